"""Search for the smallest step that meets a goal, where each test is expensive and runs in batches.

Nothing is assumed between the tested points: of several crossings, the first one that the grid sees counts.

Shapes: B images, R searched images, T steps per image.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def smallest_step(
    reached: Callable[[Tensor, Tensor], Tensor], limit: Tensor, *, points: int = 8, rounds: int = 2
) -> tuple[Tensor, Tensor]:
    """Searches [0, limit] on a grid, then refines the first interval with an upper end that meets the goal.

    Args:
        reached: Tests the goal at steps [R, T] of the images with the numbers ``rows`` [R], returning [R, T] bool.
        limit: Largest step of each image, [B], positive.
        points: Number of steps tested per round; the first round adds the step 0.
        rounds: Number of rounds after the first; each divides the uncertainty by ``points + 1``.

    Returns:
        The smallest tested step that meets the goal, [B], or the limit where none does; whether one does, [B] bool.
    """
    rows = torch.arange(len(limit), device=limit.device)
    share = torch.linspace(0, 1, points + 1, device=limit.device, dtype=limit.dtype)
    grid = limit[:, None] * share
    low, high, found = first_interval(grid, reached(grid, rows))
    # Further rounds, except where the step 0 already meets the goal.
    refine(reached, low, high, rows[found & (high > 0)], points=points, rounds=rounds)
    return high, found


def first_interval(grid: Tensor, met: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the first point of ascending grids [B, T] where ``met``, [B, T] bool, holds, and the point before it.

    Returns the two points, or the last two where it never holds, and whether it ever holds, [B] each.
    """
    found = met.any(dim=1)
    first = torch.where(found, met.to(torch.int8).argmax(dim=1), grid.shape[1] - 1)[:, None]
    return grid.gather(1, (first - 1).clamp_min(0)).squeeze(1), grid.gather(1, first).squeeze(1), found


def refine(
    reached: Callable[[Tensor, Tensor], Tensor], low: Tensor, high: Tensor, rows: Tensor, *, points: int, rounds: int
) -> None:
    """Narrows intervals from ``low`` to ``high``, [B] each, to the first crossing inside, in place, for ``rows`` [R].

    The upper ends meet the goal. The other arguments are those of ``smallest_step``; one point is bisection.
    """
    inside = torch.arange(1, points + 1, device=low.device, dtype=low.dtype) / (points + 1)
    for _ in range(rounds):
        if len(rows) == 0:
            break
        below, above = low[rows, None], high[rows, None]
        grid = below + (above - below) * inside
        # The goal is not met at the lower end, and met at the upper one.
        met = F.pad(F.pad(reached(grid, rows), (1, 0), value=False), (0, 1), value=True)
        low[rows], high[rows], _ = first_interval(torch.cat([below, grid, above], dim=1), met)
