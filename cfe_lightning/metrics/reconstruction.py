"""How faithfully a method renders the image before it changes anything, per image.

Source: evaluation, section 9.1. Images [B, C, H, W] in [-1, 1]; a rendering may overshoot the range and is judged as it
is, so that the numbers equal those of the training loop.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from cfe_lightning import images

#: Identical images have an infinite ratio; it is reported as this many dB.
PSNR_CAP = 100.0
#: The 11 x 11 window of SSIM needs at least this many pixels a side.
SSIM_MIN_SIZE = 6


def psnr(image: Tensor, reconstruction: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, at most ``PSNR_CAP``, [B].

    A peak of 1 on [0, 1] and of 2 on [-1, 1] are the same number. Never pooled over the batch, which is another number.
    """
    ratio = peak_signal_noise_ratio(
        images.to_unit(reconstruction), images.to_unit(image), data_range=1.0, reduction="none", dim=(1, 2, 3)
    )
    return torch.as_tensor(ratio).clamp_max(PSNR_CAP)


def ssim(image: Tensor, reconstruction: Tensor) -> Tensor:
    """Structural similarity of each image, Gaussian window 11 x 11, sigma 1.5, [B] in [-1, 1].

    Raises:
        ValueError: If a side is shorter than ``SSIM_MIN_SIZE``.
    """
    if min(image.shape[-2:]) < SSIM_MIN_SIZE:
        raise ValueError(f"SSIM needs images of at least {SSIM_MIN_SIZE} pixels a side, got {list(image.shape[-2:])}.")
    value = structural_similarity_index_measure(
        images.to_unit(reconstruction), images.to_unit(image), data_range=1.0, reduction="none"
    )
    return torch.as_tensor(value[0] if isinstance(value, tuple) else value).reshape(len(image))
