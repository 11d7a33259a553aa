"""Tests of ``cfe_lightning.metrics.faithfulness`` on a linear head and curves computed by hand."""

import pytest
import torch
from torch import Tensor

from cfe_lightning.metrics import faithfulness


def picture(*values: float) -> Tensor:
    """Returns one image of one pixel row, from values on [0, 1]."""
    return torch.tensor(values).view(1, 1, 1, -1) * 2 - 1


def mean_head(image: Tensor) -> Tensor:
    """Returns logits whose probability of class 1 is the mean of the image on [0, 1]."""
    p = (image * 0.5 + 0.5).flatten(1).mean(dim=1).clamp(1e-9, 1 - 1e-9)
    return torch.stack([1 - p, p], dim=1).log()


ZERO, ONE = torch.tensor([0]), torch.tensor([1])


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


def test_cout_with_a_short_last_block() -> None:
    assert faithfulness.cut_points(10, 3) == [0, 3, 6, 9, 10]
    curve = torch.tensor([0, 0.2, 0.6, 0.9, 1.0])
    image, other = picture(*[0.0] * 10), picture(*[1.0] * 10)

    def stairs(images: Tensor) -> Tensor:
        changed = (images > 0).flatten(1).sum(dim=1)
        p = curve[torch.searchsorted(torch.tensor([0, 3, 6, 9, 10]), changed)].clamp(1e-9, 1 - 1e-7)
        return torch.stack([1 - p, p], dim=1).log()

    score, *_ = faithfulness.cout(stairs, image, other, ZERO, ONE, steps=3)
    assert float(score) == pytest.approx(-0.06, abs=1e-5)


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
