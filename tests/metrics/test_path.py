"""Tests of ``cfe_lightning.metrics.path`` on paths whose numbers are computed by hand, and at the edges."""

from __future__ import annotations

import pytest
import torch

from cfe_lightning.metrics import path

Q = torch.tensor([[0.1, 0.3, 0.2, 0.6, 0.9]])
K = torch.tensor([[0.0, 0.25, 0.5, 0.75, 1.0]])


def test_the_documents_numbers() -> None:
    assert path.monotone(Q).item() == pytest.approx(0.75)
    assert path.rank_correlation(K, Q).item() == pytest.approx(0.9)
    assert path.regress(Q).item() == pytest.approx(0.1)
    q = torch.tensor([[0.05, 0.2, 0.4, 0.8, 0.95]])
    assert path.crossing(K, q).item() == pytest.approx(0.5625)


def test_a_crossing_at_the_start_and_none_at_all() -> None:
    q = torch.tensor([[0.7, 0.9, 0.2], [0.1, 0.2, 0.3], [0.1, 0.5, 0.4]])
    k = torch.tensor([[0.0, 0.5, 1.0]]).expand(3, -1)
    found = path.crossing(k, q)
    assert found[0] == 0
    assert found[1].isnan()
    assert found[2] == 0.5


def test_ranks_share_ties_and_a_constant_has_no_order() -> None:
    k = torch.arange(4.0)[None]
    assert path.rank_correlation(k, torch.full((1, 4), 0.3)).item() == 0
    assert path.rank_correlation(k, -k).item() == pytest.approx(-1)
    # Ranks 0.5 0.5 2 3 against 0 1 2 3: Pearson of the two.
    tied = path.rank_correlation(k, torch.tensor([[0.1, 0.1, 0.4, 0.8]])).item()
    assert tied == pytest.approx(0.948683, abs=1e-5)


def test_rounding_is_no_fall() -> None:
    assert path.monotone(torch.tensor([[0.5, 0.5 - 1e-7, 0.6]])).item() == 1


def test_positions_run_from_zero_to_one() -> None:
    strengths = torch.tensor([[0.001, 0.5, 1.501], [2.0, 2.0, 2.0]])
    found = path.positions(strengths)
    assert found[0].tolist() == pytest.approx([0.0, 0.499 / 1.5, 1.0])
    assert found[1].tolist() == [0, 0, 0]


def test_what_was_meant_and_how_even_the_steps_are() -> None:
    assert path.schedule_error(Q, Q + 0.05).item() == pytest.approx(0.05)
    steps = torch.zeros(2, 4, 1, 2, 2)
    steps[0, 1:] += 1.0
    steps[0, 2:] += 1.0
    steps[0, 3:] += 4.0
    found = path.roughness(steps)
    assert found[0].item() == pytest.approx(2.0)
    assert found[1].isnan()


def test_a_path_is_resampled_between_its_frames() -> None:
    k = torch.tensor([[0.0, 0.1, 1.0], [0.0, 0.5, 1.0]])
    q = torch.tensor([[0.0, 0.5, 0.5], [0.2, 0.4, 1.0]])
    found = path.resampled(k, q, points=5)
    assert found[0].tolist() == pytest.approx([0.0, 0.5, 0.5, 0.5, 0.5])
    assert found[1].tolist() == pytest.approx([0.2, 0.3, 0.4, 0.7, 1.0])
    assert path.resampled(torch.zeros(1, 1), torch.full((1, 1), 0.3)).eq(0.3).all()
