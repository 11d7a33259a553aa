"""Tests of ``cfe_lightning.metrics.counterfactual``; images given on [0, 1] are moved to the package's [-1, 1]."""

import pytest
import torch
from torch import Tensor

from cfe_lightning.decisions import decides_for
from cfe_lightning.metrics import counterfactual as change


def picture(*rows: list[float]) -> Tensor:
    """One-channel images of one pixel row, from values on [0, 1]."""
    return torch.tensor(rows)[:, None, None, :] * 2 - 1


def test_tie_is_not_a_flip_and_zero_is_class_zero() -> None:
    z = torch.tensor([2.0, -1.0, 0.0])
    logits = torch.stack([torch.zeros(3), z], dim=1)
    assert decides_for(logits, torch.tensor([1, 1, 1])).tolist() == [True, False, False]


def test_untargeted_flip_counts_any_other_class() -> None:
    before = torch.tensor([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0]])
    after = torch.tensor([[0.0, 1.0, 3.0], [3.0, 1.0, 2.0]])
    assert change.flipped_any(before, after).tolist() == [True, False]


def test_delta_p_is_signed_and_mad_is_not() -> None:
    def logits(p: list[float]) -> Tensor:
        target = torch.tensor(p)
        return torch.stack([1 - target, target], dim=1).log()

    gain = change.delta_p(logits([0.1, 0.3]), logits([0.9, 0.2]), torch.tensor([1, 1]))
    assert float(gain.mean()) == pytest.approx(0.35)
    assert float(gain.abs().mean()) == pytest.approx(0.45)


def test_bkl() -> None:
    logits = torch.tensor([[0.0, 2.0], [0.0, -1.0]])
    assert float(change.bkl(logits, torch.tensor([1, 1])).mean()) == pytest.approx(0.425131, abs=1e-6)


def test_distances_are_in_unit_range() -> None:
    image, other = picture([0, 0, 0, 0]), picture([0.5, 0, 0, 0])
    assert float(change.l1(image, other)) == pytest.approx(0.125)
    assert float(change.l2(image, other)) == pytest.approx(0.25)
    assert float(change.linf(image, other)) == pytest.approx(0.5)


def test_grey_and_replicated_grey_are_the_same_distance() -> None:
    image, other = torch.rand(2, 1, 4, 4) * 2 - 1, torch.rand(2, 1, 4, 4) * 2 - 1
    colour, other_colour = image.expand(-1, 3, -1, -1), other.expand(-1, 3, -1, -1)
    for metric in (change.l1, change.l2, change.linf, change.changed_area):
        torch.testing.assert_close(metric(image, other), metric(colour, other_colour))
    torch.testing.assert_close(change.change_map(image, other), change.change_map(colour, other_colour))


def test_changed_area_looks_at_the_largest_channel_and_the_threshold() -> None:
    image = torch.full((1, 3, 1, 4), -1.0)
    other = image.clone()
    other[0, 1, 0, 0] += 2 * 9 / 255
    other[0, :, 0, 1] += 2 * 7 / 255
    assert float(change.changed_area(image, other)) == 0.25
    assert float(change.changed_area(image, other, threshold=6 / 255)) == 0.5


@pytest.mark.parametrize(
    ("values", "area90", "gini"),
    [([0.4, 0.3, 0.2, 0.1], 0.75, 0.25), ([0, 0, 0, 1.0], 0.25, 0.75), ([1.0, 1.0, 1.0, 1.0], 1.0, 0.0)],
)
def test_sparsity(values: list[float], area90: float, gini: float) -> None:
    change_map = torch.tensor(values).view(1, 1, 2, 2)
    assert float(change.area90(change_map)) == pytest.approx(area90)
    assert float(change.gini(change_map)) == pytest.approx(gini, abs=1e-6)
    # Neither depends on the unit of the map.
    assert float(change.area90(change_map * 1e-4)) == pytest.approx(area90)


def test_sparsity_is_undefined_where_nothing_changed() -> None:
    nothing = torch.zeros(2, 1, 2, 2)
    assert change.area90(nothing).isnan().all()
    assert change.gini(nothing).isnan().all()


@pytest.mark.parametrize("value", [1.01, -1.01, float("nan")])
def test_values_outside_the_range_are_refused(value: float) -> None:
    image, other = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), value)
    with pytest.raises(ValueError, match=r"The counterfactual must lie in \[-1, 1\], got values from"):
        change.l1(image, other)


def test_rounding_outside_the_range_is_accepted() -> None:
    image = torch.ones(1, 1, 2, 2)
    assert float(change.l1(image, image + 1e-5)) == pytest.approx(5e-6, rel=0.1)
