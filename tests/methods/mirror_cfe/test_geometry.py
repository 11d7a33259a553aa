"""Analytic tests of ``cfe_lightning.methods.mirror_cfe.geometry``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cfe_lightning.decisions import margin
from cfe_lightning.methods.mirror_cfe.geometry import (
    STATUS,
    Swap,
    bounded_swap,
    closed_form_swap,
    first_flip,
    lbfgs_swap,
    position,
    reflect,
    reflect_nonlinear,
    swap_matrix,
    swapped,
)

EXACT, NEGATIVE, PAIR_ONLY, DEGENERATE, ON_BOUNDARY = range(len(STATUS))


def problem(num_classes: int, num_features: int = 64, batch: int = 20, seed: int = 0) -> tuple[Tensor, ...]:
    """Draws features, weight, bias, predicted class and another class, all in float64."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.rand(batch, num_features, generator=generator, dtype=torch.float64)
    weight = torch.randn(num_classes, num_features, generator=generator, dtype=torch.float64)
    bias = torch.randn(num_classes, generator=generator, dtype=torch.float64)
    source = (features @ weight.T + bias).argmax(dim=1)
    other = torch.randint(1, num_classes, (batch,), generator=generator)
    return features, weight, bias, source, (source + other) % num_classes


def softmax_error(moved: Tensor, features: Tensor, weight: Tensor, bias: Tensor, source: Tensor, target: Tensor):
    wanted = swapped((features @ weight.T + bias).softmax(dim=1), source, target)
    return ((moved @ weight.T + bias).softmax(dim=1) - wanted).abs().max().item()


@pytest.mark.parametrize("num_classes", [2, 10])
def test_plain_reflection_negates_the_margin_and_is_its_own_inverse(num_classes: int) -> None:
    features, weight, bias, source, target = problem(num_classes)
    mirrored = position(features, weight, bias, source, target)
    before = margin(features @ weight.T + bias, source, target)
    after = margin(mirrored @ weight.T + bias, source, target)
    torch.testing.assert_close(after, -before, atol=1e-10, rtol=0)
    torch.testing.assert_close(position(mirrored, weight, bias, source, target), features, atol=1e-12, rtol=0)
    # The sign of the normal does not matter, and half the way is the projection on the mirror.
    torch.testing.assert_close(position(features, weight, bias, target, source), mirrored, atol=1e-12, rtol=0)
    middle = position(features, weight, bias, source, target, 0.5)
    assert margin(middle @ weight.T + bias, source, target).abs().max() < 1e-10
    normal = weight[source] - weight[target]
    torch.testing.assert_close((mirrored - features).norm(dim=1), 2 * before / normal.norm(dim=1))


def test_the_unit_normal_of_the_notes_would_not_negate_the_margin() -> None:
    features, weight, bias, source, target = problem(10)
    normal = weight[source] - weight[target]
    before = margin(features @ weight.T + bias, source, target)
    wrong = features - 2 * before[:, None] * normal / normal.norm(dim=1, keepdim=True)
    after = margin(wrong @ weight.T + bias, source, target)
    assert ((after + before).abs() > 0.1).all()


def test_two_logits_move_by_a_common_offset_that_is_known() -> None:
    features, weight, bias, source, target = problem(2)
    logits, mirrored = features @ weight.T + bias, position(features, weight, bias, source, target)
    squares = weight.square().sum(dim=1)
    distance = (weight[0] - weight[1]).square().sum()
    offset = -margin(logits, source, target) * (squares[source] - squares[target]) / distance
    expected = swapped(logits, source, target) + offset[:, None]
    torch.testing.assert_close(mirrored @ weight.T + bias, expected, atol=1e-10, rtol=0)
    assert softmax_error(mirrored, features, weight, bias, source, target) < 1e-12


def test_a_sigmoid_s_probability_becomes_its_complement() -> None:
    features, weight, bias, *_ = problem(2)
    weight, bias = torch.stack([0 * weight[0], weight[1]]), torch.stack([0 * bias[0], bias[1]])
    probability = (features @ weight[1] + bias[1]).sigmoid()
    source = (probability > 0.5).long()
    mirrored = reflect(features, weight, bias, source, 1 - source).features
    torch.testing.assert_close((mirrored @ weight[1] + bias[1]).sigmoid(), 1 - probability, atol=1e-12, rtol=0)


@pytest.mark.parametrize("num_classes", [2, 10, 100])
@pytest.mark.parametrize("form", ["softmax", "logits"])
def test_the_closed_form_swaps_the_softmax_exactly(num_classes: int, form: Swap) -> None:
    features, weight, bias, source, target = problem(num_classes, num_features=256)
    reflection = reflect(features, weight, bias, source, target, swap=form)
    assert softmax_error(reflection.features, features, weight, bias, source, target) < 1e-10
    assert (reflection.status == EXACT).all()
    assert reflection.residual.max() < 1e-10


def test_form_a_swaps_the_logits_and_form_b_is_shorter() -> None:
    features, weight, bias, source, target = problem(10)
    logits = features @ weight.T + bias
    by_logits = reflect(features, weight, bias, source, target, swap="logits")
    by_softmax = reflect(features, weight, bias, source, target, swap="softmax")
    expected = swapped(logits, source, target)
    torch.testing.assert_close(by_logits.features @ weight.T + bias, expected, atol=1e-10, rtol=0)
    assert (by_softmax.distance < by_logits.distance).all()


def test_for_two_classes_form_b_is_the_plain_reflection() -> None:
    features, weight, bias, source, target = problem(2)
    mirrored = position(features, weight, bias, source, target)
    torch.testing.assert_close(reflect(features, weight, bias, source, target).features, mirrored)


def test_lbfgs_ends_in_form_a_whatever_the_batch() -> None:
    features, weight, bias, source, target = problem(10, batch=50)
    form_a = reflect(features, weight, bias, source, target, swap="logits").features
    together = reflect(features, weight, bias, source, target, swap="lbfgs").features
    torch.testing.assert_close(together, form_a, atol=1e-4, rtol=0)
    alone = reflect(features[3:4], weight, bias, source[3:4], target[3:4], swap="lbfgs").features
    torch.testing.assert_close(alone[0], together[3], atol=1e-6, rtol=0)


def test_lbfgs_follows_a_head_that_is_not_linear() -> None:
    features, weight, bias, source, target = problem(4)

    def head(z: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(z, z.shape[1:]) @ weight.T + bias

    source = head(features).argmax(dim=1)
    target = (source + 1) % 4
    moved = lbfgs_swap(features, head, source, target)
    torch.testing.assert_close(head(moved), swapped(head(features), source, target), atol=1e-5, rtol=0)
    # From the swap of the tangent the step is no longer.
    reflection, tangent, height = reflect_nonlinear(features, head, source, target)
    assert (reflection.status == EXACT).all()
    assert (reflection.distance <= (moved - features).norm(dim=1) + 1e-3).all()
    close = features + 1e-4 * torch.randn_like(features)
    expected = (tangent @ close[:, :, None]).squeeze(2) + height
    torch.testing.assert_close(head(close), expected, atol=1e-5, rtol=0)
    near = lbfgs_swap(features, head, source, target, proximity=10.0)
    assert ((near - features).norm(dim=1) < (moved - features).norm(dim=1)).all()


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_source_and_target_are_equal_half_way(num_classes: int) -> None:
    features, weight, bias, source, target = problem(num_classes)
    moved = reflect(features, weight, bias, source, target).features
    middle = 0.5 * (features + moved) @ weight.T + bias
    assert margin(middle, source, target).abs().max() < 1e-10


@pytest.mark.parametrize("num_classes", [2, 10])
def test_the_intended_flip_is_where_the_path_crosses(num_classes: int) -> None:
    features, weight, bias, source, target = problem(num_classes, batch=40)
    logits = features @ weight.T + bias
    moved = reflect(features, weight, bias, source, target).features
    grid = torch.linspace(0, 1, 1001, dtype=torch.float64)
    path = features[:, None] + grid[None, :, None] * (moved - features)[:, None]
    arrived = ((path @ weight.T + bias).argmax(dim=2) == target[:, None]).double()
    measured = grid[arrived.argmax(dim=1)]
    flip = first_flip(logits, moved @ weight.T + bias, target)
    torch.testing.assert_close(flip, measured, atol=1.001e-3, rtol=0)
    assert num_classes == 2 or (flip > 0.501).any()


def test_the_intended_flip_without_one_and_from_the_start() -> None:
    start = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0], [4.0, 0.0, 3.0]], dtype=torch.float64)
    end = torch.tensor([[3.0, 2.0, 0.0], [0.0, 3.0, 1.0], [0.0, 4.0, 3.0]], dtype=torch.float64)
    # Never; from the start; above the source from 1/2 on but above the third class only from 3/4 on.
    assert first_flip(start, end, torch.tensor([1, 1, 1])).tolist() == [2, 0, 0.75]


@pytest.mark.parametrize(("num_features", "num_classes"), [(32, 10), (64, 10), (512, 10), (512, 100)])
def test_bounded_features_are_swapped_and_not_negative(num_features: int, num_classes: int) -> None:
    features, weight, bias, source, target = problem(num_classes, num_features)
    features = (features - 0.3).relu()
    source = (features @ weight.T + bias).argmax(dim=1)
    target = (source + 1) % num_classes
    free = reflect(features, weight, bias, source, target)
    assert (free.negative > 0).any()
    bounded = reflect(features, weight, bias, source, target, bounds=(0.0, torch.inf))
    assert (bounded.status == EXACT).all()
    assert bounded.features.min() >= -1e-12
    assert bounded.negative.max() == 0
    assert softmax_error(bounded.features, features, weight, bias, source, target) < 1e-8
    assert (bounded.distance >= free.distance - 1e-9).all()


def test_bounded_features_are_the_nearest_ones() -> None:
    """The step is orthogonal to every direction that equations and bounds leave free, so any other one is longer."""
    features, weight, bias, source, target = problem(3, 16, batch=8)
    logits = features @ weight.T + bias
    moved, converged = bounded_swap(features, logits, weight, source, target)
    assert converged.all()
    rows = weight - weight.mean(dim=0)
    for index in range(8):
        free = moved[index] > 1e-9
        kernel = torch.linalg.svd(rows[:, free])[2][2:]  # two independent equations of three classes
        assert ((moved - features)[index, free] @ kernel.T).abs().max() < 1e-7


def test_an_upper_bound_holds_too() -> None:
    features, weight, bias, source, target = problem(3, 64)
    bounded = reflect(features, weight, bias, source, target, bounds=(-0.2785, 0.9))
    exact = bounded.status == EXACT
    assert exact.any()
    assert bounded.features[exact].max() <= 0.9 + 1e-12
    assert bounded.features[exact].min() >= -0.2785 - 1e-12


def test_bounds_without_a_solution_leave_the_unbounded_swap() -> None:
    features = torch.rand(5, 2, dtype=torch.float64)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    bias = torch.tensor([9.0, 0.0, 0.0], dtype=torch.float64)  # swapping asks for a first feature around -9
    source, target = torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=torch.int64)
    reflection = reflect(features, weight, bias, source, target, bounds=(0.0, torch.inf))
    assert (reflection.status == NEGATIVE).all()
    assert reflection.negative.min() > 0
    assert softmax_error(reflection.features, features, weight, bias, source, target) < 1e-5


def test_more_classes_than_features_still_reach_the_target() -> None:
    features, weight, bias, source, target = problem(5, 3, batch=30)
    reflection = reflect(features, weight, bias, source, target)
    assert (reflection.status == PAIR_ONLY).all()
    logits = features @ weight.T + bias
    reached = reflection.features @ weight.T + bias
    before, after = margin(logits, source, target), margin(reached, source, target)
    won = reached.argmax(dim=1) == target
    assert won.double().mean() > 0.5
    torch.testing.assert_close(after[won], -before[won], atol=1e-8, rtol=0)
    plain = position(features, weight, bias, source, target) @ weight.T + bias
    assert (plain.argmax(dim=1) == target).sum() < won.sum()


def test_a_bad_sample_does_not_touch_its_neighbours() -> None:
    features, weight, bias, source, target = problem(4)
    weight = torch.cat([weight, weight[:1]])  # classes 0 and 4 are the same
    bias = torch.cat([bias, bias[:1] - 1])
    source = (features @ weight.T + bias).argmax(dim=1)
    target = torch.where(source == 1, 2, 1)
    target[0] = 4
    features[0] = weight[0]
    source[0] = 0
    reflection = reflect(features, weight, bias, source, target)
    assert reflection.status[0] == DEGENERATE
    torch.testing.assert_close(reflection.features[0], features[0])
    assert (reflection.status[1:] != DEGENERATE).all()
    reached = reflection.features @ weight.T + bias
    assert (reached.argmax(dim=1) == target)[1:].all()


def test_an_image_on_the_mirror_stays_there() -> None:
    weight = torch.eye(2, dtype=torch.float64)
    features, classes = torch.ones(1, 2, dtype=torch.float64), torch.tensor([0, 1])
    reflection = reflect(features, weight, 0 * weight[0], classes[:1], classes[1:])
    assert reflection.status.tolist() == [ON_BOUNDARY]
    assert reflection.distance.item() == 0


def test_a_target_that_is_the_source_is_refused() -> None:
    features, weight, bias, source, _ = problem(3)
    with pytest.raises(ValueError, match="must differ from its source"):
        reflect(features, weight, bias, source, source)


def test_the_plain_reflection_reports_that_it_swaps_only_two_classes() -> None:
    features, weight, bias, source, target = problem(10)
    reflection = reflect(features, weight, bias, source, target, swap="reflect")
    assert (reflection.status == PAIR_ONLY).any()
    assert reflection.residual.max() > 0.01
    moved = closed_form_swap(features, features @ weight.T + bias, swap_matrix(weight), source, target)
    assert moved.shape == features.shape
