"""Tests of ``cfe_lightning.metrics.realism`` on sets of features whose distances are computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cfe_lightning.metrics import realism

SQUARE = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])


@pytest.mark.parametrize(
    ("edited", "expected"),
    [(SQUARE + torch.tensor([3.0, 4.0]), 25.0), (SQUARE * torch.tensor([2.0, 1.0]), 2.333333), (SQUARE, 0.0)],
)
def test_frechet_distances_of_the_document(edited: Tensor, expected: float) -> None:
    assert realism.fid(SQUARE, edited) == pytest.approx(expected, abs=1e-5)


def test_a_frechet_distance_in_one_dimension() -> None:
    assert realism.fid(torch.tensor([[-1.0], [1.0]]), torch.tensor([[-2.0], [2.0]])) == pytest.approx(2.0)


def test_halves_of_originals_against_edits_of_the_others() -> None:
    real = torch.arange(4.0)[:, None]
    first = torch.tensor([[True, True, False, False]])
    assert realism.split_fid(real, real + 1, halves=first).tolist() == pytest.approx([5.0])
    assert realism.fid(real, real + 1) == pytest.approx(1.0)


def test_splits_are_drawn_from_the_seed() -> None:
    real = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    once, again, other = (realism.split_fid(real, real + 0.1, seed=seed) for seed in (0, 0, 1))
    assert len(once) == 10
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    # Sharing pixels with the originals flatters: a split never does.
    assert once.mean() > realism.fid(real, real + 0.1)


def test_the_kernel_distance_of_the_document() -> None:
    real, edited = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert realism.kid(real, edited)[0] == pytest.approx(-2.375)


def test_the_kernel_distance_leaves_the_random_state_alone() -> None:
    real = torch.randn(1200, 2, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = realism.kid(real, real + 0.5)
    assert torch.equal(state, torch.get_rng_state())
    assert first == realism.kid(real, real + 0.5)
    assert first[0] > 0.05
    assert first[1] > 0


def test_no_honest_method_is_below_the_floor() -> None:
    real = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    assert 0 < realism.fid_floor(real) < 0.2


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_are_an_error(count: int) -> None:
    few = torch.zeros(count, 2)
    for distance in (realism.fid, realism.kid):
        with pytest.raises(ValueError, match="needs two images on each side"):
            distance(few, SQUARE)
    with pytest.raises(ValueError, match="at least four images"):
        realism.split_fid(SQUARE[:3], SQUARE[:3])
