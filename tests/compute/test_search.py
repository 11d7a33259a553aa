"""The smallest step is found for goals with a known first crossing."""

from __future__ import annotations

import torch
from torch import Tensor

from cfe_lightning.compute.search import smallest_step


def beyond(threshold: Tensor) -> object:
    return lambda step, rows: step >= threshold[rows, None]


def test_the_crossing_is_found_within_the_grids_resolution() -> None:
    threshold = torch.tensor([0.3, 1.7, 2.99], dtype=torch.float64)
    limit = torch.full((3,), 3.0, dtype=torch.float64)
    step, found = smallest_step(beyond(threshold), limit, points=8, rounds=2)  # type: ignore[arg-type]
    assert found.tolist() == [True] * 3
    assert (step >= threshold).all()
    assert (step - threshold < 3 / 8 / 81 + 1e-9).all()


def test_at_the_goal_already_nothing_moves() -> None:
    limit = torch.tensor([2.0, 2.0])
    step, found = smallest_step(beyond(torch.tensor([0.0, 1.0])), limit)  # type: ignore[arg-type]
    assert step[0] == 0
    assert found.tolist() == [True, True]


def test_a_goal_that_is_never_met_ends_at_the_limit_and_is_not_looked_at_again() -> None:
    seen: list[Tensor] = []

    def reached(step: Tensor, rows: Tensor) -> Tensor:
        seen.append(rows)
        return step >= torch.tensor([9.0, 1.0])[rows, None]

    step, found = smallest_step(reached, torch.tensor([4.0, 4.0]), points=4, rounds=2)
    assert found.tolist() == [False, True]
    assert step[0] == 4
    assert [rows.tolist() for rows in seen] == [[0, 1], [1], [1]]


def test_of_several_crossings_the_first_counts() -> None:
    def reached(step: Tensor, _rows: Tensor) -> Tensor:
        return ((step >= 0.9) & (step <= 1.6)) | (step >= 3.0)

    step, found = smallest_step(reached, torch.tensor([4.0]), points=8, rounds=3)
    assert bool(found)
    assert 0.9 <= step.item() < 0.901


def test_without_further_rounds_the_grid_decides() -> None:
    step, _ = smallest_step(beyond(torch.tensor([1.1])), torch.tensor([4.0]), points=4, rounds=0)  # type: ignore[arg-type]
    assert step.item() == 2.0
