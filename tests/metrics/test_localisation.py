"""Tests of ``cfe_lightning.metrics.localisation`` on four pixels, and agreement with a known difference."""

import pytest
import torch

from cfe_lightning.metrics import localisation

CHANGE = torch.tensor([0.4, 0.3, 0.2, 0.1]).view(1, 1, 1, 4)
MASK = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 1, 4)


def test_mask_mass_chance_lift_and_leak() -> None:
    assert float(localisation.mask_mass(CHANGE, MASK)) == pytest.approx(0.7)
    assert float(localisation.chance(MASK)) == pytest.approx(0.5)
    assert float(localisation.lift(CHANGE, MASK)) == pytest.approx(1.4)
    assert float(localisation.leak(CHANGE, MASK)) == pytest.approx(0.15)


def test_empty_maps_and_masks_are_undefined() -> None:
    assert localisation.mask_mass(CHANGE * 0, MASK).isnan().all()
    assert localisation.lift(CHANGE, MASK * 0).isnan().all()
    assert localisation.leak(CHANGE, MASK * 0 + 1).isnan().all()


def test_correlation_and_cosine_of_the_truth_are_one_at_any_scale() -> None:
    truth = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(localisation.correlation(truth * 3, truth), torch.ones(4))
    torch.testing.assert_close(localisation.signed_cosine(truth * 3, truth), torch.ones(4))
    # Only the cosine sees the sign.
    torch.testing.assert_close(localisation.correlation(-truth, truth), torch.ones(4))
    torch.testing.assert_close(localisation.signed_cosine(-truth, truth), -torch.ones(4))


def test_correlation_is_pearson_over_pixels() -> None:
    distinct, truth = torch.randn(1, 3, 5, 5), torch.randn(1, 3, 5, 5)
    maps = torch.stack([distinct.abs().mean(1).flatten(), truth.abs().mean(1).flatten()])
    assert float(localisation.correlation(distinct, truth)) == pytest.approx(
        float(torch.corrcoef(maps)[0, 1]), abs=1e-6
    )


def test_cosine_ignores_a_constant_per_channel() -> None:
    truth = torch.randn(2, 3, 8, 8)
    shifted = truth + torch.tensor([0.5, -2.0, 1.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(localisation.signed_cosine(shifted, truth), torch.ones(2))


def test_constant_maps_have_no_correlation() -> None:
    truth = torch.randn(1, 3, 8, 8)
    for constant in (0.0, 0.3):
        flat = torch.full((1, 3, 8, 8), constant)
        assert localisation.correlation(flat, truth).isnan().all()
        assert localisation.signed_cosine(flat, truth).isnan().all()


def test_amplitude_is_in_unit_range() -> None:
    assert float(localisation.amplitude(torch.full((1, 3, 2, 2), -0.5))) == pytest.approx(0.25)
