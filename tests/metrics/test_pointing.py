"""Tests of ``cfe_lightning.metrics.pointing``: changes that count, and maps of known ranks."""

import pytest
import torch

from cfe_lightning.explanation import Explanation
from cfe_lightning.metrics.path import rank_correlation
from cfe_lightning.metrics.pointing import pointed_at, rank_agreement


def explained(**fields: object) -> Explanation:
    image = torch.zeros(1, 3, 2, 2)
    given: dict[str, object] = {
        "image": image,
        "logits": torch.zeros(1, 2),
        "target": torch.zeros(1, dtype=torch.int64),
        "attribution": torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]]),
    }
    if "counterfactual" in fields:
        given["counterfactual_logits"] = torch.zeros(1, 2)
    return Explanation(**(given | fields))  # type: ignore[arg-type]


def dot(row: int, column: int, value: float) -> torch.Tensor:
    image = torch.zeros(1, 3, 2, 2)
    image[..., row, column] = value
    return image


def test_an_attribution_stands_for_itself() -> None:
    assert torch.equal(pointed_at(explained()), torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]]))


def test_a_change_counts_from_the_image_and_only_as_far_as_it_can_be_seen() -> None:
    found = pointed_at(explained(counterfactual=dot(0, 1, 3.0)))
    # 1 on [-1, 1] is 0.5 on [0, 1].
    assert torch.equal(found, dot(0, 1, 0.5)[:, :1])


def test_a_change_counts_from_the_own_rendering() -> None:
    rendering = dot(1, 0, 0.8)
    found = pointed_at(explained(counterfactual=rendering + dot(0, 1, 0.4), parts={"reconstruction": rendering}))
    torch.testing.assert_close(found, dot(0, 1, 0.2)[:, :1])


def test_a_decomposition_counts_from_the_image() -> None:
    parts = {"reconstruction": dot(1, 0, 0.8), "agnostic": torch.zeros(1, 3, 2, 2)}
    found = pointed_at(explained(counterfactual=dot(0, 1, 0.4), parts=parts))
    torch.testing.assert_close(found, dot(0, 1, 0.2)[:, :1])


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
