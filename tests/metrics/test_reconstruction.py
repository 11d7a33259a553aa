"""Tests of ``cfe_lightning.metrics.reconstruction`` on images whose error is known."""

import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

from cfe_lightning.metrics.reconstruction import PSNR_CAP, psnr, ssim


def test_psnr_is_per_image_not_pooled() -> None:
    image = torch.zeros(2, 1, 8, 8)
    errors = torch.tensor([0.1, 0.01]).view(2, 1, 1, 1) * 2
    ratios = psnr(image, image + errors)
    torch.testing.assert_close(ratios, torch.tensor([20.0, 40.0]), atol=1e-3, rtol=0)
    assert float(ratios.mean()) == pytest.approx(30, abs=1e-3)
    # What the library says of the batch as one picture is another number.
    pooled = peak_signal_noise_ratio(image / 2 + 0.5 + errors / 2, image / 2 + 0.5, data_range=1.0)
    assert float(pooled) == pytest.approx(22.967, abs=1e-3)


def test_identical_images_are_capped() -> None:
    image = torch.rand(3, 1, 8, 8) * 2 - 1
    assert psnr(image, image).tolist() == [PSNR_CAP] * 3


def test_overshooting_rendering_is_judged_as_it_is() -> None:
    image = torch.ones(1, 1, 8, 8)
    assert float(psnr(image, image + 0.2)) == pytest.approx(20.0, abs=1e-3)


def test_ssim_of_constants_and_of_itself() -> None:
    image, other = torch.full((2, 1, 16, 16), 0.2) * 2 - 1, torch.full((2, 1, 16, 16), 0.4) * 2 - 1
    torch.testing.assert_close(ssim(image, other), torch.full((2,), 0.800093), atol=1e-4, rtol=0)
    noise = torch.rand(3, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(ssim(noise, noise), torch.ones(3))
    assert ssim(noise[:1], noise[:1]).shape == (1,)


def test_ssim_works_from_six_pixels() -> None:
    assert ssim(torch.zeros(1, 1, 6, 6), torch.zeros(1, 1, 6, 6)).shape == (1,)
    with pytest.raises(ValueError, match="at least 6 pixels a side"):
        ssim(torch.zeros(1, 1, 5, 5), torch.zeros(1, 1, 5, 5))
