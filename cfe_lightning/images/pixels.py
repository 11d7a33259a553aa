"""Arithmetic of image tensors: sizes, value ranges, 8-bit levels, montages.

Images are float32, [C, H, W] or [B, C, H, W], in [-1, 1].
"""

import math

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


def resize(image: Tensor, size: int) -> Tensor:
    """Resizes [C, H, W] or [B, C, H, W] to a square, antialiased bilinear; the aspect ratio is not kept."""
    if image.shape[-2:] == (size, size):
        return image
    return interpolate(image, size, size) if image.ndim == 4 else interpolate(image[None], size, size)[0]


def interpolate(image: Tensor, height: int, width: int) -> Tensor:
    """Resizes [B, C, H, W] to [B, C, ``height``, ``width``], antialiased bilinear."""
    return F.interpolate(image, size=(height, width), mode="bilinear", antialias=True, align_corners=False)


def cut_montage(image: Tensor, num_slices: int) -> Tensor:
    """Cuts montages [B, C, H, W] row by row into S slices, [B, S, C, H / sqrt(S), W / sqrt(S)].

    Raises:
        ValueError: If S is no square number, or its root does not divide H and W.
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
    """Tiles slices [B, S, C, h, w] row by row into one picture, [B, C, sqrt(S) h, sqrt(S) w]; undoes ``cut_montage``.

    Raises:
        ValueError: If S is no square number.
    """
    side = montage_side(slices.shape[1])
    return slices.unflatten(1, (side, side)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def montage_side(num_slices: int) -> int:
    """Returns the number of slices in a row of a montage: the square root of their total.

    Raises:
        ValueError: If the total is no square number.
    """
    side = math.isqrt(max(num_slices, 0))
    if side < 1 or side**2 != num_slices:
        raise ValueError(f"A montage is a square and needs 1, 4, 9, 16, ... slices, got {num_slices}.")
    return side


def to_unit(image: Tensor) -> Tensor:
    """Converts [-1, 1] to [0, 1], without clamping."""
    return image * 0.5 + 0.5


def visible_change(image: Tensor, edited: Tensor) -> Tensor:
    """Returns the change that a viewer sees, on the scale of [0, 1] images: both are clamped to their range first."""
    return to_unit(edited.float()).clamp(0, 1) - to_unit(image.float()).clamp(0, 1)


def to_uint8(image: Tensor) -> Tensor:
    """Converts [-1, 1] to bytes, clamped and rounded to the nearest level; truncation could undo a flip."""
    return _levels(image).to(torch.uint8)


def saved(image: Tensor) -> Tensor:
    """Returns an image as it is read back from an 8-bit PNG, in [-1, 1]."""
    return _levels(image).div_(255).mul_(2).sub_(1)


def _levels(image: Tensor) -> Tensor:
    return to_unit(image.detach()).clamp_(0, 1).mul_(255).round_()


def to_pil(image: Tensor) -> Image.Image:
    """Converts [C, H, W] in [-1, 1] to a Pillow image, grey or RGB."""
    array = to_uint8(image.detach()).cpu().numpy()
    return Image.fromarray(array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0))
