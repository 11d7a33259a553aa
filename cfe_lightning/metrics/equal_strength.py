"""Every method at the same confidence: the smallest edit on its way that the classifier is as sure of as asked.

A method that stops just beyond the boundary looks closer than one that goes on. Here both stop at the same place.
Images [B, C, H, W] in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.compute.search import first_interval, refine
from cfe_lightning.decisions import sure_enough
from cfe_lightning.metrics.faithfulness import path_logits

#: Positions that are looked at first, at least.
_GRID = 9


@dataclass(frozen=True, kw_only=True, slots=True)
class EqualStrength:
    """The smallest edits that were found.

    Attributes:
        edit: [B, C, H, W], as an 8-bit file holds it; the end of the way where it was not found.
        reached: Whether it is as sure as asked, [B] bool.
        position: Where on the way it is, 0 to 1, [B].
    """

    edit: Tensor
    reached: Tensor
    position: Tensor


@torch.no_grad()
def smallest_edit(
    judge: Callable[[Tensor], Tensor],
    path: Tensor,
    target: Tensor,
    confidence: float,
    *,
    bisections: int = 7,
    max_batch: int = 256,
) -> EqualStrength:
    """Searches along a way for the first picture whose probability of the target is high enough.

    Args:
        judge: Images to logits [B, K].
        path: Frames, [B, T, C, H, W]; between them pictures are blended.
        target: Classes asked for, [B].
        confidence: The probability.
        bisections: Halvings between the first point of a grid that is sure enough and the one before it.
        max_batch: Largest batch of the judge.
    """
    last = path.shape[1] - 1

    def pictures(position: Tensor, rows: Tensor) -> Tensor:
        """Pictures at positions [R, S] of the images ``rows``, [R, S, C, H, W]."""
        place = (position * last).clamp(0, last)
        before = place.floor().long().clamp_max(max(last - 1, 0))
        share = (place - before).view(*place.shape, 1, 1, 1).to(path.dtype)
        after = (before + 1).clamp_max(last)
        every = rows[:, None]
        return images.saved(torch.lerp(path[every, before], path[every, after], share))

    def reached(position: Tensor, rows: Tensor) -> Tensor:
        shown = pictures(position, rows)
        logits = path_logits(judge, lambda index: shown[:, index], shown.shape[1], max_batch)
        return sure_enough(logits.float(), target[rows], confidence)

    rows = torch.arange(len(path), device=path.device)
    grid = torch.linspace(0, 1, max(_GRID, last + 1), device=path.device, dtype=torch.float64).expand(len(path), -1)
    low, high, found = first_interval(grid, reached(grid, rows))
    refine(reached, low, high, rows[found & (high > 0)], points=1, rounds=bisections)
    return EqualStrength(edit=pictures(high[:, None], rows)[:, 0], reached=found, position=high)
