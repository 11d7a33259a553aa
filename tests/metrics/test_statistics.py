"""Intervals, populations and the result that is never NaN."""

import math

import pytest
import torch

from cfe_lightning.metrics.statistics import (
    Measurement,
    bootstrap_means,
    interval,
    skipped,
    statistic,
    summarise,
    undefined,
    wilson,
)


@pytest.mark.parametrize(("successes", "low", "high"), [(9, 0.5958, 0.9821), (10, 0.7225, 1.0)])
def test_wilson_interval(successes: int, low: float, high: float) -> None:
    assert wilson(successes, 10) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "total"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_impossible_counts(successes: int, total: int) -> None:
    with pytest.raises(ValueError, match="0 <= successes <= total"):
        wilson(successes, total)


def test_boolean_values_are_rates_with_a_wilson_interval() -> None:
    hits = torch.tensor([True] * 9 + [False])
    measured = summarise({"flip_rate": hits})["flip_rate"]
    assert (measured.status, measured.value, measured.n_used) == ("ok", 0.9, 10)
    assert (measured.low, measured.high) == wilson(9, 10)


def test_mean_is_over_images_and_its_interval_covers_the_truth_about_95_times_of_100() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(100):
        values = torch.rand(40, generator=generator)
        measured = summarise({"l1": values}, resamples=300, seed=seed)["l1"]
        assert measured.value == pytest.approx(float(values.mean()))
        assert measured.low is not None
        assert measured.high is not None
        covered += measured.low <= 0.5 <= measured.high
    assert 86 <= covered <= 99


def test_undefined_images_are_left_out_and_counted() -> None:
    values = torch.tensor([1.0, math.nan, 3.0, math.nan])
    measured = summarise({"area90": values}, {"area90": "changed"})["area90"]
    assert (measured.value, measured.n_used, measured.n_total, measured.population) == (2.0, 2, 4, "changed")
    assert measured.low is not None
    assert 1.0 <= measured.low <= measured.high <= 3.0  # type: ignore[operator]


def test_nothing_defined_is_undefined_with_a_reason_and_one_image_has_no_interval() -> None:
    measured = summarise({"none": torch.tensor([math.nan] * 3), "one": torch.tensor([math.nan, 0.5, math.nan])})
    assert measured["none"].status == "undefined"
    assert measured["none"].value is None
    assert measured["none"].reason == "not defined on any image"
    assert (measured["one"].value, measured["one"].low, measured["one"].n_used) == (0.5, None, 1)


def test_infinite_value_is_undefined_not_a_number_in_a_table() -> None:
    measured = summarise({"psnr": torch.tensor([1.0, math.inf])})["psnr"]
    assert measured.status == "undefined"
    assert "infinite" in measured.reason


def test_measurement_refuses_nan_and_silence() -> None:
    with pytest.raises(ValueError, match="finite value"):
        Measurement(status="ok", value=math.nan)
    with pytest.raises(ValueError, match="needs a reason"):
        Measurement(status="skipped")
    with pytest.raises(ValueError, match="needs a reason and no value"):
        Measurement(status="undefined", value=0.0, reason="because")
    assert skipped("no file").reason == "no file"
    assert undefined("empty", 3).n_total == 3


def test_bootstrap_is_seeded_and_pairs_columns() -> None:
    values = torch.randn(50, 1, generator=torch.Generator().manual_seed(1)).repeat(1, 2)
    values[:, 1] += 2
    first, again = bootstrap_means(values, 200, seed=3), bootstrap_means(values, 200, seed=3)
    assert torch.equal(first, again)
    assert not torch.equal(first, bootstrap_means(values, 200, seed=4))
    # The same images are drawn for both columns, so their difference does not vary at all.
    torch.testing.assert_close(first[:, 1] - first[:, 0], torch.full((200,), 2.0, dtype=torch.float64))


def test_bootstrap_in_chunks_has_the_right_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cfe_lightning.metrics.statistics._CHUNK", 700)
    values = torch.randn(100, 1, generator=torch.Generator().manual_seed(0))
    samples = bootstrap_means(values, 1000, seed=0)
    assert samples.shape == (1000, 1)
    assert float(samples.std()) == pytest.approx(float(values.std()) / 10, rel=0.15)


def test_statistic_of_a_curve_has_an_interval_over_images() -> None:
    hits = torch.tensor([[1.0, 0.0]] * 30 + [[1.0, 1.0]] * 10)
    measured = statistic(hits, lambda curve: curve[..., 1] / curve[..., 0], "no clean hit")
    assert measured.value == pytest.approx(0.25)
    assert measured.low is not None
    assert measured.high is not None
    assert 0.1 < measured.low < 0.25 < measured.high < 0.42
    nowhere = statistic(hits * 0, lambda curve: curve[..., 1] / curve[..., 0], "no clean hit")
    assert (nowhere.status, nowhere.reason) == ("undefined", "no clean hit")


def test_interval_of_nothing_is_none() -> None:
    assert interval(torch.tensor([math.nan])) == (None, None)


def test_of_no_image_nothing_is_defined() -> None:
    found = summarise({"l1": torch.zeros(0), "flip_rate": torch.zeros(0, dtype=torch.bool)})
    assert [(one.status, one.value) for one in found.values()] == [("undefined", None)] * 2
