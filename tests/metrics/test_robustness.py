"""Tests of ``cfe_lightning.metrics.robustness``."""

from __future__ import annotations

import torch
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.metrics.robustness import TRANSFORMATIONS, survives


def by_brightness(image: Tensor) -> Tensor:
    """Bright is class 1."""
    mean = image.mean(dim=(1, 2, 3))
    return torch.stack([-mean, mean], dim=1)


def by_one_pixel(image: Tensor) -> Tensor:
    """A pixel that stands out of its neighbours is class 1."""
    spike = image[:, :, 8, 8] - image[:, :, 8, 10]
    return torch.cat([0.5 - spike[:, :1], spike[:, :1] - 0.5], dim=1)


def test_a_large_change_survives_everything() -> None:
    dark, bright = torch.full((4, 3, 16, 16), -0.5), torch.full((4, 3, 16, 16), 0.5)
    found = survives(by_brightness, dark, bright, torch.zeros(4).long(), torch.ones(4).long())
    assert list(found) == ["quant8", "jpeg90", "blur1", "down_up"]
    for kept, flipped in found.values():
        assert kept.all()
        assert flipped.all()


def test_a_pixel_pattern_does_not_survive_shrinking() -> None:
    image = torch.zeros(2, 1, 16, 16)
    spiked = image.clone()
    spiked[:, :, 8, 8] = 0.8
    found = survives(by_one_pixel, image, spiked, torch.zeros(2).long(), torch.ones(2).long())
    assert found["quant8"][1].all()
    assert not found["down_up"][1].any()


def test_images_whose_own_decision_does_not_survive_are_left_out() -> None:
    """The document's check: three of four keep their decision, two of these keep the flip."""
    spike = torch.tensor([0.0, 0.0, 0.0, 0.6]).view(4, 1, 1, 1)
    image = torch.zeros(4, 1, 16, 16)
    image[:, :, 8:9, 8:9] = spike
    after = torch.zeros(4, 1, 16, 16)
    after[[0, 1, 3], :, 8:9, 8:9] = 0.9
    kept, flipped = survives(by_one_pixel, image, after, torch.zeros(4).long(), torch.ones(4).long())["quant8"]
    assert kept.tolist() == [True, True, True, False]
    assert int(flipped.sum()) / int(kept.sum()) == 2 / 3


def test_transformations_are_mild_and_stay_in_range() -> None:
    smooth = torch.linspace(-0.9, 0.9, 64).expand(2, 3, 64, 64)
    for name, transformed in TRANSFORMATIONS.items():
        result = transformed(smooth)
        assert result.shape == smooth.shape, name
        assert result.abs().max() <= 1, name
        assert (result - smooth).abs().mean() < 0.02, name
        assert TRANSFORMATIONS[name](smooth[:, :1]).shape == (2, 1, 64, 64), name
    assert torch.equal(TRANSFORMATIONS["quant8"](smooth), images.saved(smooth))
    # One pixel at 128 pixels height, half of one at 64.
    spike = torch.full((1, 1, 64, 64), -1.0)
    spike[..., 32, 32] = 1.0
    profile = (TRANSFORMATIONS["blur1"](spike)[0, 0] + 1) / 2
    place = torch.arange(64.0) - 32
    deviation = (profile.sum(dim=0) * place.square()).sum().sqrt()
    assert abs(float(deviation) - 0.5) < 0.1


def test_only_what_is_asked_for_is_tried() -> None:
    dark, bright = torch.full((2, 1, 16, 16), -0.5), torch.full((2, 1, 16, 16), 0.5)
    found = survives(by_brightness, dark, bright, torch.zeros(2).long(), torch.ones(2).long(), ("blur1", "quant8"))
    assert list(found) == ["blur1", "quant8"]
