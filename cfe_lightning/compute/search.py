"""The smallest step at which something expensive to judge comes true, searched in batches.

Source: DiffExplainer's specification, section 5.4. Nothing is assumed about what lies between the points that are
looked at: of several crossings the first that the grid sees counts.

Shapes: B images, T steps per image, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def smallest_step(
    reached: Callable[[Tensor, Tensor], Tensor], limit: Tensor, *, points: int = 8, rounds: int = 2
) -> tuple[Tensor, Tensor]:
    """Looks along [0, limit] on a grid and then again inside the first interval whose end meets the goal.

    Args:
        reached: Steps [R, T] of the images ``rows`` [R] to whether the goal is met there, [R, T] bool.
        limit: Largest step of each image, [B], positive.
        points: Steps looked at per round, the zero of the first round apart.
        rounds: Rounds after the first; each divides the uncertainty by ``points + 1``.

    Returns:
        The smallest step seen to meet the goal [B], the limit where none does; and whether one does, [B] bool.
    """
    rows = torch.arange(len(limit), device=limit.device)
    share = torch.linspace(0, 1, points + 1, device=limit.device, dtype=limit.dtype)
    grid = limit[:, None] * share
    low, high, found = first_interval(grid, reached(grid, rows))
    # At zero already: nothing is left to be searched.
    refine(reached, low, high, rows[found & (high > 0)], points=points, rounds=rounds)
    return high, found


def first_interval(grid: Tensor, met: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first point of ascending grids [B, T] that meets the goal [B, T] bool, and the one before it.

    Returns:
        Lower and upper end of the interval, [B] twice, the last point where none meets the goal; and whether one does,
        [B] bool.
    """
    found = met.any(dim=1)
    first = torch.where(found, met.to(torch.int8).argmax(dim=1), grid.shape[1] - 1)[:, None]
    return grid.gather(1, (first - 1).clamp_min(0)).squeeze(1), grid.gather(1, first).squeeze(1), found


def refine(
    reached: Callable[[Tensor, Tensor], Tensor], low: Tensor, high: Tensor, rows: Tensor, *, points: int, rounds: int
) -> None:
    """Narrows intervals whose upper end meets the goal, in place, to the first crossing that is seen inside.

    Args:
        reached: As for ``smallest_step``.
        low: Lower ends, [B].
        high: Upper ends, [B].
        rows: The images to be searched, [R].
        points: Steps looked at per round; one is bisection.
        rounds: Each divides the interval by ``points + 1``.
    """
    inside = torch.arange(1, points + 1, device=low.device, dtype=low.dtype) / (points + 1)
    for _ in range(rounds):
        if len(rows) == 0:
            break
        below, above = low[rows], high[rows]
        grid = below[:, None] + (above - below)[:, None] * inside
        met = reached(grid, rows)
        first = torch.where(met.any(dim=1), met.to(torch.int8).argmax(dim=1), points)
        ends = torch.cat([below[:, None], grid, above[:, None]], dim=1)
        low[rows] = ends.gather(1, first[:, None]).squeeze(1)
        high[rows] = ends.gather(1, first[:, None] + 1).squeeze(1)
