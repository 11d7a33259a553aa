"""Tests of the tables in which metrics are declared, and of the catalogue that gathers them."""

import inspect
from typing import get_args

import pytest

from cfe_lightning.metrics.case import NEEDS
from cfe_lightning.metrics.catalogue import GROUPS, METRICS, metrics_with
from cfe_lightning.metrics.metric import Better, Metric, Population, rows


def test_a_table_is_read() -> None:
    table = """
needs: mask
absent: nowhere
key    title    better   range    needs   published  meaning
one    the one  higher   [0, 1]   path    flipped    share of a, in b; c
other  -        neither  s        -       -          two
    lines
third  -        lower    dB       -       -
    one line below
"""
    one, other, third = rows(table)
    assert one == Metric(
        key="one",
        title="the one",
        better="higher",
        value_range="[0, 1]",
        needs=("mask", "path"),
        published="flipped",
        meaning="share of a, in b; c",
        absent="nowhere",
    )
    assert (other.title, other.needs, other.published, other.meaning) == ("", ("mask",), "all", "two lines")
    assert third.meaning == "one line below"
    with pytest.raises(ValueError, match="shorter"):
        rows("key  better  meaning\none  higher")


def test_the_catalogue_is_consistent() -> None:
    keys = [metric.key for metric in metrics_with((0.5, 0.9))]
    assert len(keys) == len(set(keys)) == len(METRICS) + 14
    for metric in METRICS:
        assert {*metric.needs} <= {*NEEDS}, metric.key
        assert metric.better in get_args(Better), metric.key
        assert metric.published in get_args(Population), metric.key


def test_every_key_is_written_out_where_it_is_computed() -> None:
    for group in GROUPS:
        source = inspect.getsource(inspect.getmodule(group.measure))  # type: ignore[arg-type]
        for metric in group.metrics:
            assert f'"{metric.key}"' in source, metric.key
