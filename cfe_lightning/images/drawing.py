"""Drawings of changes, attributions and motions.

Shapes: B images, C channels, H, W pixels; pictures are in [-1, 1].
"""

import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from cfe_lightning.images.pixels import to_pil
from cfe_lightning.images.reading import from_pil

#: Shortest longer side of a picture with arrows, in pixels, and the colour of the arrows.
_SMALLEST_DRAWING = 160
_ARROW = (196, 22, 106)


def signed_difference(change: Tensor, scale: float | None = None) -> Tensor:
    """Colours a change [B, C, H, W] blue (darker) over white (none) to red (brighter), [B, 3, H, W] in [-1, 1].

    Each pixel shows its most changed channel, as a mean would hide changes of hue. Changes from ``scale`` on have full
    colour; None takes the largest magnitude of each image.
    """
    signed = change.gather(1, change.abs().argmax(dim=1, keepdim=True))
    limit = signed.abs().amax(dim=(2, 3), keepdim=True).clamp_min(1e-6) if scale is None else scale
    signed = (signed / limit).clamp(-1, 1)
    red, green, blue = 1 - (-signed).clamp_min(0), 1 - signed.abs(), 1 - signed.clamp_min(0)
    return torch.cat([red, green, blue], dim=1) * 2 - 1


def amplify(difference: Tensor, largest_gain: float = 64.0) -> tuple[Tensor, Tensor]:
    """Scales differences [B, C, H, W] around mid grey so that the strongest value of each image is black or white.

    Returns the scaled differences and their gains, [B], at least 1; gains above ``largest_gain`` would amplify rounding
    errors.
    """
    peak = difference.abs().amax(dim=(1, 2, 3))
    gain = (1 / peak.clamp_min(1 / largest_gain)).clamp_min(1.0)
    return difference * gain[:, None, None, None], gain


def heat_map(attribution: Tensor) -> Tensor:
    """Colours a non-negative map [B, 1, H, W], scaled per image, black-red-yellow-white, [B, 3, H, W] in [-1, 1]."""
    peak = attribution.amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
    level = (attribution / peak).clamp(0, 1) * 3
    return torch.cat([level.clamp(0, 1), (level - 1).clamp(0, 1), (level - 2).clamp(0, 1)], dim=1) * 2 - 1


def arrows(motion: Tensor, cells: int = 12) -> Tensor:
    """Averages displacements [B, 2, H, W] over a grid of at most ``cells`` x ``cells`` cells, [B, 2, h, w]."""
    return F.adaptive_avg_pool2d(motion, (min(cells, motion.shape[2]), min(cells, motion.shape[3])))


def draw_motion(image: Tensor, motion: Tensor) -> Tensor:
    """Draws arrows of displacements [B, 2, H, W], (row, column) in pixels, on paled images [B, C, H, W] in [-1, 1].

    The longest arrow of every image spans one and a half cells. Small images are enlarged by a whole factor, so the
    drawings are [B, 3, h, w].
    """
    factor = max(1, -(-_SMALLEST_DRAWING // max(image.shape[-2:])))
    coarse = arrows(motion).cpu()
    lengths = coarse.norm(dim=1)
    longest = lengths.amax(dim=(1, 2)).clamp_min(1e-12)
    drawn = []
    for picture, field, length, limit in zip(image, coarse, lengths, longest, strict=True):
        # Paled image.
        canvas = to_pil(picture).convert("L").point(lambda level: 96 + level * 5 // 8).convert("RGB")
        canvas = canvas.resize((canvas.width * factor, canvas.height * factor), Image.Resampling.NEAREST)
        # Arrows; below a twentieth of the longest one they would be dots.
        cell = (canvas.height / field.shape[1], canvas.width / field.shape[2])
        pen = ImageDraw.Draw(canvas)
        scale = 1.5 * min(cell) / float(limit)
        for row, column in torch.nonzero(length > 0.05 * limit).tolist():
            down, right = (float(value) * scale for value in field[:, row, column])
            middle = ((column + 0.5) * cell[1], (row + 0.5) * cell[0])
            _arrow(pen, (middle[0] - right / 2, middle[1] - down / 2), (middle[0] + right / 2, middle[1] + down / 2))
        drawn.append(from_pil(canvas, 3))
    return torch.stack(drawn)


def _arrow(pen: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float]) -> None:
    across, down = end[0] - start[0], end[1] - start[1]
    length = math.hypot(across, down)
    head = min(4.0, 0.6 * length)
    across, down = across / length * head, down / length * head
    sides = [(end[0] - across + sign * 0.6 * down, end[1] - down - sign * 0.6 * across) for sign in (1, -1)]
    pen.line([start, end], fill=_ARROW, width=1)
    pen.polygon([end, *sides], fill=_ARROW)


def grid(columns: Sequence[Tensor], padding: int = 2) -> Tensor:
    """Lays batches [B, C, H, W] side by side: one row per image, one column per batch, [3, height, width]."""
    coloured = [column.detach().float().cpu().expand(-1, 3, -1, -1) for column in columns]
    rows = torch.cat([F.pad(column, [padding] * 4, value=1.0) for column in coloured], dim=3)
    return torch.cat(list(rows), dim=1)
