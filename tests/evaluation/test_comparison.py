"""Tests of ``cfe_lightning.evaluation.comparison`` on values whose differences and groups are known."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cfe_lightning.evaluation import tables as evaluation_table
from cfe_lightning.evaluation.comparison import group_means, paired_differences, worst_pair
from cfe_lightning.evaluation.evaluate import Evaluation
from cfe_lightning.evaluation.summary import ResultRow
from cfe_lightning.metrics.catalogue import METRICS
from cfe_lightning.metrics.statistics import skipped, summarise

NAN = float("nan")
PREDICTED = torch.tensor([0, 0, 1, 1, 2, 2])
TARGET = torch.tensor([1, 1, 0, 0, 1, 0])


def row(name: str, **per_image: Tensor) -> ResultRow:
    measured = {metric.key: skipped("not measured") for metric in METRICS} | summarise(per_image)
    return ResultRow(name=name, measurements=measured, per_image=per_image, predicted=PREDICTED, target=TARGET)


def evaluation() -> Evaluation:
    flips = torch.tensor([True, True, True, False, True, False])
    return Evaluation(
        rows=[
            row("ours", l1=torch.tensor([0.1, 0.2, 0.3, 0.4, NAN, 0.6]), flip_rate=flips),
            row("theirs", l1=torch.tensor([0.2, 0.4, 0.3, NAN, 0.1, 0.9]), flip_rate=~flips),
            ResultRow(name="broken", measurements={metric.key: skipped("broken") for metric in METRICS}),
        ],
        image_names=[f"{index}.png" for index in range(6)],
        labels=torch.tensor([0, 0, 1, 1, 2, 0]),
        class_names=("cat", "dog", "owl"),
    )


def test_differences_are_paired_and_need_both_to_be_defined() -> None:
    found = {(one.first, one.second, one.key): one.measured for one in paired_differences(evaluation())}
    assert set(found) == {("ours", "theirs", "l1"), ("ours", "theirs", "flip_rate")}
    l1 = found["ours", "theirs", "l1"]
    # The mean of -0.1, -0.2, 0 and -0.3, on the images that both have.
    assert l1.value == pytest.approx(-0.15)
    assert l1.n_used == 4
    assert l1.low is not None
    assert l1.high is not None
    assert l1.low < -0.15 < l1.high <= 0
    # Four images flip with ours only, two with theirs only.
    assert found["ours", "theirs", "flip_rate"].value == pytest.approx(2 / 6)


def test_the_same_explainer_twice_differs_by_nothing() -> None:
    given = evaluation()
    given.rows[1] = row("again", **given.rows[0].per_image)
    for one in paired_differences(given):
        assert (one.measured.value, one.measured.low, one.measured.high) == (0, 0, 0)


def test_every_pair_of_classes_and_every_true_class_has_its_mean() -> None:
    found = {(one.explainer, one.source, one.target, one.key): one.measured for one in group_means(evaluation())}
    assert found["ours", "cat", "dog", "flip_rate"].value == 1.0
    assert found["ours", "dog", "cat", "flip_rate"].value == 0.5
    assert found["ours", "owl", "cat", "flip_rate"].value == 0.0
    assert found["ours", "owl", "dog", "l1"].status == "undefined"
    # True classes: the images 0, 1 and 5 are cats.
    assert found["ours", "cat", None, "l1"].value == pytest.approx(0.3)
    assert found["ours", "cat", None, "l1"].n_used == 3
    assert not any(explainer == "broken" for explainer, *_ in found)


def test_the_worst_pair_follows_the_metrics_direction() -> None:
    groups = group_means(evaluation())
    # More flips are better, more change is worse.
    flips, change = (worst_pair(groups, "ours", key) for key in ("flip_rate", "l1"))
    assert flips is not None
    assert (flips.source, flips.target) == ("owl", "cat")
    assert change is not None
    assert (change.source, change.target) == ("owl", "cat")
    assert worst_pair(groups, "broken", "l1") is None


def test_tables_show_differences_to_the_first_and_the_worst_pair(tmp_path: Path) -> None:
    # Markdown.
    evaluation_table.save(evaluation(), tmp_path, {})
    text = (tmp_path / "table.md").read_text()
    assert "## Paired differences" in text
    assert "| ours minus |" in text
    assert "-0.150 [-0.2" in text
    assert "## Worst pair of classes" in text
    assert "0.000 owl > cat" in text

    # CSV.
    with (tmp_path / "differences.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["metric"], line["n"]) for line in lines] == [("flip_rate", "6"), ("l1", "4")]
    with (tmp_path / "groups.csv").open(newline="") as file:
        groups = list(csv.DictReader(file))
    undefined = [line for line in groups if (line["class"], line["target"], line["metric"]) == ("owl", "dog", "l1")]
    assert undefined[0]["value"] == undefined[0]["n"] == ""


def test_one_explainer_and_one_pair_have_nothing_to_compare() -> None:
    given = evaluation()
    given.rows = given.rows[:1]
    given.rows[0].predicted, given.rows[0].target = torch.zeros(6).long(), torch.ones(6).long()
    assert evaluation_table.tables(given, paired_differences(given), group_means(given)) == []
