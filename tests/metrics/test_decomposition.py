"""Tests of ``cfe_lightning.metrics.decomposition`` on curves and images whose numbers are computed by hand."""

import pytest
import torch
from torch import Tensor, nn

from cfe_lightning.metrics import decomposition
from cfe_lightning.metrics.decomposition import REMOVED, STRENGTHS
from cfe_lightning.metrics.faithfulness import area

# --- DXAI AUC ---


@pytest.mark.parametrize(
    ("accuracy", "expected"),
    [
        ([1, 0.8, 0.5, 0.2, 0], 0.5),
        ([0.8, 0.6, 0.4, 0.2, 0.2], 0.53125),
        ([0.7] * 5, 1.0),
        ([1, 0.75, 0.5, 0.25, 0], 0.5),
    ],
)
def test_normalised_area(accuracy: list[float], expected: float) -> None:
    positions = torch.tensor([0, 0.25, 0.5, 0.75, 1])
    assert float(decomposition.normalised_area(torch.tensor(accuracy), positions)) == pytest.approx(expected)
    # The largest strength is divided out.
    assert float(decomposition.normalised_area(torch.tensor(accuracy), positions / 2)) == pytest.approx(expected)


def test_raw_area_is_not_divided_by_the_clean_accuracy() -> None:
    positions = torch.tensor([0, 0.25, 0.5, 0.75, 1])
    assert float(area(torch.tensor([0.8, 0.6, 0.4, 0.2, 0.2]), positions)) == pytest.approx(0.425)


def test_area_is_undefined_without_a_clean_hit() -> None:
    curves = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    areas = decomposition.normalised_area(curves, torch.tensor([0.0, 1.0]))
    assert areas[0].isnan()
    assert float(areas[1]) == 1.0


def test_sweep_goes_from_the_image_to_image_minus_distinct_without_clamping() -> None:
    seen: list[Tensor] = []

    def classify(images: Tensor) -> Tensor:
        seen.append(images)
        return images.flatten(1)[:, :2]

    image, distinct = torch.full((2, 1, 1, 2), 0.5), torch.full((2, 1, 1, 2), 2.0)
    logits = decomposition.sweep_logits(classify, image, distinct)
    assert logits.shape == (2, 11, 2)
    torch.testing.assert_close(logits[0, :, 0], 0.5 - 2 * torch.linspace(0, 1, 11))
    assert STRENGTHS == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    # All strengths went through the classifier at once.
    assert [len(images) for images in seen] == [22]
    # -0.5, ... from strength 0.8 on the value is below -1.
    assert decomposition.outside_range(image, distinct).tolist() == pytest.approx([3 / 11] * 2)


@pytest.mark.parametrize("max_batch", [1, 5, 9, 1000])
def test_curves_do_not_depend_on_the_batch_size(max_batch: int) -> None:
    torch.manual_seed(0)
    # Instance norm has no statistics across images.
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )
    image, distinct = torch.rand(6, 3, 8, 8) * 2 - 1, torch.randn(6, 3, 8, 8)
    with torch.no_grad():
        together = decomposition.sweep_logits(network, image, distinct, max_batch=1000)
        alone = torch.cat(
            [
                decomposition.sweep_logits(network, image[i : i + 1], distinct[i : i + 1], max_batch=max_batch)
                for i in range(6)
            ]
        )
        chunked = decomposition.sweep_logits(network, image, distinct, max_batch=max_batch)
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
    torch.testing.assert_close(chunked, together, atol=1e-5, rtol=0)


# --- pixel removal ---


def test_removal_area_of_constant_accuracy_is_the_last_fraction() -> None:
    fractions = torch.tensor(REMOVED)
    assert float(decomposition.removal_area(torch.full((5,), 0.7), fractions)) == pytest.approx(0.2)
    assert decomposition.removal_area(torch.zeros(5), fractions).isnan()


def test_removal_takes_exactly_the_share_even_where_importance_ties() -> None:
    image = torch.ones(1, 3, 4, 5)

    def count_grey(images: Tensor) -> Tensor:
        return (images == 0).all(dim=1).flatten(1).sum(dim=1, keepdim=True).float()

    for importance in (torch.zeros(1, 1, 4, 5), torch.rand(1, 1, 4, 5)):
        removed = decomposition.removal_logits(count_grey, image, importance)
        assert removed.flatten().tolist() == [0, 1, 2, 3, 4]


def test_removal_takes_the_most_important_first_and_ties_by_index() -> None:
    image = torch.ones(1, 1, 1, 10)
    importance = torch.tensor([0.0, 3, 1, 3, 2, 0, 0, 0, 0, 0]).view(1, 1, 1, 10)
    kept = decomposition.removal_logits(lambda x: x.flatten(1), image, importance, fractions=(0.1, 0.3, 0.4))
    assert [(row == 0).nonzero().flatten().tolist() for row in kept[0]] == [[1], [1, 3, 4], [1, 2, 3, 4]]
