"""Tests of ``warp_energy`` in ``benchmarks/steerable_lens.py`` on changes that are, or are not, warps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

# Scripts, not a package.
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from steerable_lens import warp_energy


def smooth(count: int = 3, channels: int = 1) -> Tensor:
    noise = torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return (0.4 * F.interpolate(noise, size=32, mode="bicubic")).clamp(-0.9, 0.9)


def test_a_warp_of_the_grid_explains_all_of_itself() -> None:
    image = smooth().double()
    field = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved = F.interpolate(field, size=32, mode="bilinear", align_corners=True)
    slope = [torch.gradient(image, dim=dim)[0] for dim in (2, 3)]
    change = -(slope[0] * moved[:, :1] + slope[1] * moved[:, 1:])
    assert warp_energy(image, image + 0.01 * change).tolist() == pytest.approx([1.0] * 3, abs=1e-5)


def test_brightening_is_a_gain_and_no_warp() -> None:
    image = smooth(channels=3)
    darker = (image + 1) * 0.9 - 1
    assert warp_energy(image, darker, gain=True).tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    assert (warp_energy(image, darker) < 0.9).all()


def test_noise_is_explained_by_chance() -> None:
    image = smooth(24)
    noise = 0.05 * torch.randn(image.shape, generator=torch.Generator().manual_seed(2))
    # 128 unknowns, 1024 values.
    assert warp_energy(image, image + noise).mean().item() == pytest.approx(0.125, abs=0.02)


def test_no_change_is_undefined_and_a_flat_image_has_no_warp() -> None:
    image = smooth()
    assert warp_energy(image, image).isnan().all()
    flat = torch.full((1, 1, 32, 32), 0.2)
    assert warp_energy(flat, flat + 0.1 * image[:1]).tolist() == pytest.approx([0.0], abs=1e-6)


def test_images_are_judged_one_by_one() -> None:
    image = torch.cat([smooth(), 0.5 * smooth(2)])
    changed = image.roll(1, 2)
    together = warp_energy(image, changed)
    alone = torch.cat([warp_energy(image[i : i + 1], changed[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone)
