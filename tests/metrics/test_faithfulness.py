"""The check numbers of evaluation, section 7, and DXAI, sections 5.1, 5.2 and 8 (test 12)."""

import pytest
import torch
from torch import Tensor, nn

from cfe_lightning.metrics import faithfulness
from cfe_lightning.metrics.faithfulness import REMOVED, STRENGTHS


def picture(*values: float) -> Tensor:
    """One image of one pixel row, from values on [0, 1]."""
    return torch.tensor(values).view(1, 1, 1, -1) * 2 - 1


def mean_head(image: Tensor) -> Tensor:
    """p(class 1) is the mean of the image on [0, 1]."""
    p = (image * 0.5 + 0.5).flatten(1).mean(dim=1).clamp(1e-9, 1 - 1e-9)
    return torch.stack([1 - p, p], dim=1).log()


ZERO, ONE = torch.tensor([0]), torch.tensor([1])


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
    assert float(faithfulness.normalised_area(torch.tensor(accuracy), positions)) == pytest.approx(expected)
    # The largest strength is divided out.
    assert float(faithfulness.normalised_area(torch.tensor(accuracy), positions / 2)) == pytest.approx(expected)


def test_raw_area_is_not_divided_by_the_clean_accuracy() -> None:
    positions = torch.tensor([0, 0.25, 0.5, 0.75, 1])
    assert float(faithfulness.area(torch.tensor([0.8, 0.6, 0.4, 0.2, 0.2]), positions)) == pytest.approx(0.425)


def test_area_is_undefined_without_a_clean_hit() -> None:
    curves = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    areas = faithfulness.normalised_area(curves, torch.tensor([0.0, 1.0]))
    assert areas[0].isnan()
    assert float(areas[1]) == 1.0


def test_sweep_goes_from_the_image_to_image_minus_distinct_without_clamping() -> None:
    seen: list[Tensor] = []

    def classify(images: Tensor) -> Tensor:
        seen.append(images)
        return images.flatten(1)[:, :2]

    image, distinct = torch.full((2, 1, 1, 2), 0.5), torch.full((2, 1, 1, 2), 2.0)
    logits = faithfulness.sweep_logits(classify, image, distinct)
    assert logits.shape == (2, 11, 2)
    torch.testing.assert_close(logits[0, :, 0], 0.5 - 2 * torch.linspace(0, 1, 11))
    assert STRENGTHS == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    # All strengths went through the classifier at once.
    assert [len(images) for images in seen] == [22]
    # -0.5, ... from strength 0.8 on the value is below -1.
    assert faithfulness.outside_range(image, distinct).tolist() == pytest.approx([3 / 11] * 2)


@pytest.mark.parametrize("max_batch", [1, 5, 9, 1000])
def test_curves_do_not_depend_on_the_batch_size(max_batch: int) -> None:
    torch.manual_seed(0)
    # Instance norm has no statistics across images.
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )
    image, distinct = torch.rand(6, 3, 8, 8) * 2 - 1, torch.randn(6, 3, 8, 8)
    with torch.no_grad():
        together = faithfulness.sweep_logits(network, image, distinct, max_batch=1000)
        alone = torch.cat(
            [
                faithfulness.sweep_logits(network, image[i : i + 1], distinct[i : i + 1], max_batch=max_batch)
                for i in range(6)
            ]
        )
        chunked = faithfulness.sweep_logits(network, image, distinct, max_batch=max_batch)
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
    torch.testing.assert_close(chunked, together, atol=1e-5, rtol=0)


# --- pixel removal ---


def test_removal_area_of_constant_accuracy_is_the_last_fraction() -> None:
    fractions = torch.tensor(REMOVED)
    assert float(faithfulness.removal_area(torch.full((5,), 0.7), fractions)) == pytest.approx(0.2)
    assert faithfulness.removal_area(torch.zeros(5), fractions).isnan()


def test_removal_takes_exactly_the_share_even_where_importance_ties() -> None:
    image = torch.ones(1, 3, 4, 5)

    def count_grey(images: Tensor) -> Tensor:
        return (images == 0).all(dim=1).flatten(1).sum(dim=1, keepdim=True).float()

    for importance in (torch.zeros(1, 1, 4, 5), torch.rand(1, 1, 4, 5)):
        removed = faithfulness.removal_logits(count_grey, image, importance)
        assert removed.flatten().tolist() == [0, 1, 2, 3, 4]


def test_removal_takes_the_most_important_first_and_ties_by_index() -> None:
    image = torch.ones(1, 1, 1, 10)
    importance = torch.tensor([0.0, 3, 1, 3, 2, 0, 0, 0, 0, 0]).view(1, 1, 1, 10)
    kept = faithfulness.removal_logits(lambda x: x.flatten(1), image, importance, fractions=(0.1, 0.3, 0.4))
    assert [(row == 0).nonzero().flatten().tolist() for row in kept[0]] == [[1], [1, 3, 4], [1, 2, 3, 4]]


# --- COUT, deletion, insertion ---


def test_cout_of_a_linear_head() -> None:
    image, other = picture(0, 0, 0, 0), picture(1, 0.8, 0.6, 0.6)
    score, source, target = faithfulness.cout(mean_head, image, other, ZERO, ONE, steps=4)
    torch.testing.assert_close(target[0], torch.tensor([0, 0.25, 0.45, 0.60, 0.75]), atol=1e-6, rtol=0)
    torch.testing.assert_close(source[0], 1 - target[0], atol=1e-6, rtol=0)
    assert float(score) == pytest.approx(-0.1625, abs=1e-6)


@pytest.mark.parametrize(
    ("replaced", "target", "expected"),
    [
        ([0, 0.25, 0.5, 0.75, 1], [0, 0.25, 0.45, 0.60, 0.75], (0.41875, 0.58125)),
        ([0, 0.3, 0.6, 0.9, 1], [0, 0.2, 0.6, 0.9, 1], (0.47, 0.53)),
    ],
)
def test_areas_of_the_curves_of_cout(replaced: list[float], target: list[float], expected: tuple[float, float]) -> None:
    curve, positions = torch.tensor(target), torch.tensor(replaced)
    areas = faithfulness.area(torch.stack([curve, 1 - curve]), positions)
    assert areas.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("side", "width"), [(128, 1.018), (28, 1.014)])
def test_the_published_blocks_are_wider_than_the_image(side: int, width: float) -> None:
    cuts = faithfulness.cut_points(side**2, 50)
    assert cuts[-1] == side**2
    assert (len(cuts) - 1) * cuts[1] / side**2 == pytest.approx(width, abs=5e-4)


@pytest.mark.parametrize(("first_block", "expected"), [(1, 0.98), (50, -0.98)])
def test_cout_of_a_jump(first_block: int, expected: float) -> None:
    image, other = picture(*[0.0] * 50), picture(*[1.0] * 50)

    def jump(images: Tensor) -> Tensor:
        changed = (images > 0).flatten(1).sum(dim=1)
        p = (changed >= first_block).float().clamp(1e-9, 1 - 1e-7)
        return torch.stack([1 - p, p], dim=1).log()

    score, *_ = faithfulness.cout(jump, image, other, ZERO, ONE)
    assert float(score) == pytest.approx(expected, abs=1e-5)


def test_cout_with_a_short_last_block_and_as_published() -> None:
    assert faithfulness.cut_points(10, 3) == [0, 3, 6, 9, 10]
    curve = torch.tensor([0, 0.2, 0.6, 0.9, 1.0])
    image, other = picture(*[0.0] * 10), picture(*[1.0] * 10)

    def stairs(images: Tensor) -> Tensor:
        changed = (images > 0).flatten(1).sum(dim=1)
        p = curve[torch.searchsorted(torch.tensor([0, 3, 6, 9, 10]), changed)].clamp(1e-9, 1 - 1e-7)
        return torch.stack([1 - p, p], dim=1).log()

    score, *_ = faithfulness.cout(stairs, image, other, ZERO, ONE, steps=3)
    assert float(score) == pytest.approx(-0.06, abs=1e-5)
    # Every block 0.3 wide: areas .66 and .54.
    published, *_ = faithfulness.cout(stairs, image, other, ZERO, ONE, steps=3, protocol="published")
    assert float(published) == pytest.approx(0.66 - 0.54, abs=1e-5)


def test_cout_orders_pixels_by_the_change_of_all_channels_together() -> None:
    image = torch.full((1, 3, 1, 2), -1.0)
    other = image.clone()
    other[0, :, 0, 0] += 0.4
    other[0, 0, 0, 1] += 2.0
    # The second pixel changes most, though in one channel only: it alone is what the head looks at.
    score, _, target = faithfulness.cout(lambda x: mean_head(x[:, :1, :, 1:]), image, other, ZERO, ONE, steps=2)
    assert target[0].tolist() == pytest.approx([0, 1, 1], abs=1e-6)
    assert float(score) == pytest.approx(0.5, abs=1e-5)


def test_cout_is_undefined_where_nothing_changed() -> None:
    image = picture(0.1, 0.2, 0.3, 0.4)
    score, *_ = faithfulness.cout(mean_head, image, image, ZERO, ONE)
    assert score.isnan().all()


def test_deletion_and_insertion_of_a_linear_head() -> None:
    image, black = picture(1, 0.5, 0.25, 0.25), picture(0, 0, 0, 0)
    importance = torch.tensor([4.0, 3, 2, 1]).view(1, 1, 1, 4)
    deleted, curve = faithfulness.deletion(mean_head, image, importance, ONE, black, steps=4)
    assert float(deleted) == pytest.approx(0.171875, abs=1e-6)
    torch.testing.assert_close(curve[0], torch.tensor([0.5, 0.25, 0.125, 0.0625, 0]), atol=1e-6, rtol=0)
    inserted, curve = faithfulness.insertion(mean_head, image, importance, ONE, black, steps=4)
    assert float(inserted) == pytest.approx(0.328125, abs=1e-6)
    torch.testing.assert_close(curve[0], torch.tensor([0, 0.25, 0.375, 0.4375, 0.5]), atol=1e-6, rtol=0)


def test_deletion_towards_the_counterfactual_is_the_source_curve_of_cout() -> None:
    image, other = picture(0.9, 0.3, 0.8, 0.1), picture(0.2, 0.4, 0.1, 0.1)
    change = (image - other).abs()
    _, source, _ = faithfulness.cout(mean_head, image, other, ONE, ZERO, steps=4)
    _, curve = faithfulness.deletion(mean_head, image, change, ONE, other, steps=4)
    torch.testing.assert_close(curve, source)


@pytest.mark.parametrize("size", [2, 7, 32])
def test_blur_keeps_size_range_and_constants(size: int) -> None:
    image = torch.rand(2, 3, size, size) * 2 - 1
    blurred = faithfulness.blurred(image)
    assert blurred.shape == image.shape
    assert float(blurred.abs().max()) <= 1
    torch.testing.assert_close(faithfulness.blurred(torch.full_like(image, 0.3)), torch.full_like(image, 0.3))
    if size == 32:
        assert float(blurred.std()) < 0.5 * float(image.std())
