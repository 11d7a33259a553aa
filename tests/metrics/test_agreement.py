"""Tests of ``cfe_lightning.metrics.agreement`` on maps whose ranks are known."""

import pytest
import torch

from cfe_lightning.metrics.agreement import rank_agreement
from cfe_lightning.metrics.path import rank_correlation


def test_same_order_opposite_order_and_nowhere() -> None:
    one = torch.arange(9.0).view(1, 1, 3, 3)
    found = rank_agreement(torch.stack([one, one**3, -one, torch.ones_like(one)]))[0]
    expected = torch.tensor([[1.0, 1, -1], [1, 1, -1], [-1, -1, 1]])
    torch.testing.assert_close(found[:3, :3], expected)
    assert found[3].isnan().all()
    assert found[:, 3].isnan().all()


def test_every_pair_and_image_equals_the_plain_rank_correlation() -> None:
    torch.manual_seed(0)
    maps = torch.rand(3, 4, 1, 5, 5).mul(6).round()
    found = rank_agreement(maps)
    for i in range(3):
        for j in range(3):
            torch.testing.assert_close(found[:, i, j], rank_correlation(maps[i].flatten(1), maps[j].flatten(1)))


def test_ties_take_their_mean_rank() -> None:
    # Ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3.
    found = rank_correlation(torch.tensor([[1.0, 2, 2, 3]]), torch.tensor([[1.0, 2, 3, 4]]))
    assert float(found) == pytest.approx(0.9486833)
