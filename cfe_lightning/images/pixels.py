"""Arithmetic of image tensors: sizes, units, 8-bit levels, montages.

Images are float32, [C, H, W] or [B, C, H, W], in [-1, 1].
"""

from __future__ import annotations

import math

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


def resize(image: Tensor, size: int) -> Tensor:
    """Resizes [C, H, W] or [B, C, H, W] to a square, antialiased bilinear; the aspect ratio is not kept."""
    if image.shape[-2:] == (size, size):
        return image
    return _interpolate(image, size, size) if image.ndim == 4 else _interpolate(image[None], size, size)[0]


def _interpolate(image: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(image, size=(height, width), mode="bilinear", antialias=True, align_corners=False)


def cut_montage(image: Tensor, num_slices: int) -> Tensor:
    """Cuts a montage into its slices, row by row; the inverse of ``tile_montage``.

    Args:
        image: The montage, [B, C, H, W], of slices with H / sqrt(S) x W / sqrt(S) pixels.
        num_slices: S, a square number.

    Returns:
        The slices, [B, S, C, H / sqrt(S), W / sqrt(S)].

    Raises:
        ValueError: If S is no square number, or H or W cannot be divided by its root.
    """
    side = montage_side(num_slices)
    height, width = image.shape[-2:]
    if height % side or width % side:
        raise ValueError(
            f"A montage of {num_slices} slices needs a height and width that {side} divides, got {height} x {width}: "
            "change the image size or the number of slices."
        )
    cells = image.unflatten(3, (side, width // side)).unflatten(2, (side, height // side))
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def tile_montage(slices: Tensor) -> Tensor:
    """Tiles slices [B, S, C, h, w] row by row into one picture, [B, C, sqrt(S) h, sqrt(S) w].

    Raises:
        ValueError: If S is no square number.
    """
    side = montage_side(slices.shape[1])
    return slices.unflatten(1, (side, side)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def montage_side(num_slices: int) -> int:
    """The slices in a row of a montage: the root of their number.

    Raises:
        ValueError: If the number is no square.
    """
    side = math.isqrt(max(num_slices, 0))
    if side < 1 or side**2 != num_slices:
        raise ValueError(f"A montage is a square and needs 1, 4, 9, 16, ... slices, got {num_slices}.")
    return side


def to_unit(image: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], without clamping."""
    return image * 0.5 + 0.5


def visible_change(image: Tensor, edited: Tensor) -> Tensor:
    """What was added, on [0, 1] units; what leaves the range cannot be seen and does not count."""
    return to_unit(edited.float()).clamp(0, 1) - to_unit(image.float()).clamp(0, 1)


def to_uint8(image: Tensor) -> Tensor:
    """[-1, 1] to bytes, clamped and rounded to the nearest level (truncation can undo a flip)."""
    return _levels(image).to(torch.uint8)


def saved(image: Tensor) -> Tensor:
    """The image as a reader of the saved 8-bit PNG sees it, still in [-1, 1]."""
    return _levels(image).div_(255).mul_(2).sub_(1)


def _levels(image: Tensor) -> Tensor:
    """[-1, 1] to the levels 0 to 255 of an 8-bit file, as floats."""
    return to_unit(image.detach()).clamp_(0, 1).mul_(255).round_()


def to_pil(image: Tensor) -> Image.Image:
    """[C, H, W] in [-1, 1] to a Pillow image, grey or RGB."""
    array = to_uint8(image.detach()).cpu().numpy()
    return Image.fromarray(array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0))
