"""The mathematics of Mirror-CFE in feature space: mirrors, swaps and paths.

Source: Chowdhury et al., ICCV 2025, arXiv 2509.16822; the closed-form swap and its bounds are ours.

The classifier ends in a linear head: logits = weight @ features + bias. The boundary between two classes is a
hyperplane; reflecting an image's features in it exchanges the two classes. With more than two classes the plain
reflection also moves the others, so the default moves along the pseudo-inverse of the head instead, which exchanges the
two confidences and leaves every other one as it was.

Everything here is exact to rounding and meant for float64. Nothing raises inside a batch: every sample gets a status.

Shapes: B samples, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Swap = Literal["softmax", "logits", "lbfgs", "reflect"]
#: How a reflection came about, by the number in ``Reflection.status``. "exact": softmax swapped. "negative_features":
#: swapped, but non-negative features were asked for and none exist. "pair_only": this head cannot swap, the target wins
#: all the same (or comes as close as the head allows). "degenerate": source and target have the same row, no mirror
#: exists. "on_boundary": the image is on the mirror already.
STATUS = ("exact", "negative_features", "pair_only", "degenerate", "on_boundary")
_EXACT, _NEGATIVE, _PAIR_ONLY, _DEGENERATE, _ON_BOUNDARY = range(5)

#: Largest error of a swapped softmax that counts as swapped.
_TOLERANCE = 1e-5
#: How far below the target a third class is put where it would win.
_LEAD = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Reflection:
    """Reflected features and how far they can be trusted.

    Attributes:
        features: The reflected features, [B, D].
        status: Index into ``STATUS``, [B] int64.
        residual: Largest difference between their softmax and the swapped one, [B].
        distance: Length of the step, [B].
        negative: Share of features below the lower bound, [B].
    """

    features: Tensor
    status: Tensor
    residual: Tensor
    distance: Tensor
    negative: Tensor


def margin(logits: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Logit of the source minus logit of the target, [B, K], [B], [B] -> [B]."""
    return _of(logits, source) - _of(logits, target)


def swapped(values: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Logits or probabilities [B, K] with the entries of source and target exchanged."""
    exchanged = values.scatter(1, source[:, None], _of(values, target)[:, None])
    return exchanged.scatter(1, target[:, None], _of(values, source)[:, None])


def position(
    features: Tensor, weight: Tensor, bias: Tensor, source: Tensor, target: Tensor, step: float | Tensor = 1.0
) -> Tensor:
    """Plain reflection (Eq. 1): 0 is the point itself, 0.5 its projection on the mirror, 1 its mirror image.

    The shift is divided by the *squared* length of the mirror's normal. With the unit normal of the paper's notes and
    the unscaled margin, the margin would not be negated.

    Args:
        features: [B, D].
        weight: [K, D].
        bias: [K].
        source: Classes, [B].
        target: Classes, [B].
        step: How far, a number or [B].

    Returns:
        Features, [B, D]; the point itself where source and target have the same row.
    """
    return mirrored(features, weight[source] - weight[target], bias[source] - bias[target], step)


def mirrored(features: Tensor, normal: Tensor, offset: Tensor, step: float | Tensor = 1.0) -> Tensor:
    """Reflects features [B, D] in the hyperplanes ``normal . z + offset = 0``, [B, D] and [B]; see ``position``."""
    square = normal.square().sum(dim=1)
    height = (normal * features).sum(dim=1) + offset
    shift = torch.where(square > 0, 2 * step * height / square.clamp_min(torch.finfo(square.dtype).tiny), 0)
    return features - shift[:, None] * normal


def swap_matrix(weight: Tensor, form: Literal["softmax", "logits"] = "softmax") -> Tensor:
    """Directions in feature space that move one logit each: the head's pseudo-inverse, transposed, [K, D] -> [K, D].

    "softmax" (form B) inverts the rows minus their mean: the logits then match up to a common constant, which no
    softmax sees, and the step is the shortest there is. "logits" (form A) matches the logits themselves.
    """
    if form == "softmax":
        weight = weight - weight.mean(dim=0)
    return torch.linalg.pinv(weight.double(), rtol=1e-10).T.contiguous()


def closed_form_swap(features: Tensor, logits: Tensor, matrix: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Exchanges source and target and nothing else: one vector per sample, [B, D].

    Args:
        features: [B, D].
        logits: The head's output on them, [B, K].
        matrix: ``swap_matrix`` of the head, [K, D].
        source: Classes, [B].
        target: Classes, [B].
    """
    return torch.addcmul(features, margin(logits, source, target)[:, None], matrix[target] - matrix[source])


def first_flip(start: Tensor, end: Tensor, target: Tensor) -> Tensor:
    """The step from which the target is the largest intended logit on a path of logits that change linearly.

    Args:
        start: Logits where the path begins, [B, K].
        end: Logits where it ends.
        target: Classes, [B].

    Returns:
        [B]: 0.5 and more for a swap, 0 where the target is the largest from the start, 2 where not even at the end.
    """
    before, after = (logits - _of(logits, target)[:, None] for logits in (start, end))
    tiny = torch.finfo(start.dtype).tiny
    overtaken = torch.where(before > 0, before / (before - after).clamp_min(tiny), 0.0)
    step = overtaken.amax(dim=1)
    return torch.where((after > 0).any(dim=1), 2.0, step.clamp(max=1.0))


def bisect_step(reached: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, *, iterations: int = 40) -> Tensor:
    """Steps at which something begins to hold, between ``low``, where it does not, and ``high``, where it does.

    Args:
        reached: Steps to whether it holds there, any shape.
        low: Where it does not hold.
        high: Where it holds.
        iterations: Each halves the error.

    Returns:
        The upper end of what is left.
    """
    for _ in range(iterations):
        middle = (low + high) / 2
        holds = reached(middle)
        low, high = torch.where(holds, low, middle), torch.where(holds, middle, high)
    return high


def lbfgs_swap(
    features: Tensor,
    head: Callable[[Tensor], Tensor],
    source: Tensor,
    target: Tensor,
    *,
    start: Tensor | None = None,
    proximity: float = 0.0,
    num_steps: int = 50,
    history: int = 10,
) -> Tensor:
    """Moves features until the head's logits have source and target exchanged: L-BFGS on half the squared error.

    Every sample has its own curvature and its own line search (weak Wolfe conditions by bisection), so its result does
    not depend on the rest of the batch. For a linear head of full row rank the limit is form A of ``swap_matrix``.

    Args:
        features: [B, D].
        head: Differentiable map from [B, D] to logits [B, K].
        source: Classes, [B].
        target: Classes, [B].
        start: Where to begin, [B, D]; None begins at the features.
        proximity: Weight of half the squared distance from ``features``.
        num_steps: At most so many steps.
        history: Curvature pairs kept.

    Returns:
        Features, [B, D].
    """
    with torch.no_grad():
        wanted = swapped(head(features), source, target)

    def value_and_gradient(point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            point = point.detach().requires_grad_(True)
            error = head(point) - wanted
            value = 0.5 * error.square().sum(dim=1) + 0.5 * proximity * (point - features).square().sum(dim=1)
            (gradient,) = torch.autograd.grad(value.sum(), point)
        return value.detach(), gradient, error.detach().abs().amax(dim=1)

    point = (features if start is None else start).detach().clone()
    value, gradient, error = value_and_gradient(point)
    moves: list[Tensor] = []
    changes: list[Tensor] = []
    curvatures: list[Tensor] = []
    for _ in range(num_steps):
        done = gradient.abs().amax(dim=1) < 1e-8
        if proximity == 0:
            done = done | (error < 1e-6)
        if bool(done.all()):
            break
        direction = _two_loops(gradient, moves, changes, curvatures)
        slope = (direction * gradient).sum(dim=1)
        # Rounding can turn an almost finished direction uphill; steepest descent never points there.
        direction = torch.where((slope < 0)[:, None], direction, -gradient)
        length = _wolfe_lengths(value_and_gradient, point, direction, value, gradient, done)
        following = point + length[:, None] * direction
        value, following_gradient, error = value_and_gradient(following)
        move, change = following - point, following_gradient - gradient
        curvature = (move * change).sum(dim=1)
        useful = curvature > 1e-12 * move.square().sum(dim=1)
        moves.append(move * useful[:, None])
        changes.append(change * useful[:, None])
        curvatures.append(torch.where(useful, curvature, 1.0))
        del moves[:-history], changes[:-history], curvatures[:-history]
        point, gradient = following, following_gradient
    return point


def _two_loops(gradient: Tensor, moves: list[Tensor], changes: list[Tensor], curvatures: list[Tensor]) -> Tensor:
    """The L-BFGS direction of every sample (Nocedal and Wright, algorithm 7.4), [B, D]."""
    direction = -gradient
    factors = []
    for move, change, curvature in zip(reversed(moves), reversed(changes), reversed(curvatures), strict=True):
        factor = (move * direction).sum(dim=1) / curvature
        direction = direction - factor[:, None] * change
        factors.append(factor)
    if moves:
        square = changes[-1].square().sum(dim=1)
        scale = torch.where(square > 0, curvatures[-1] / square.clamp_min(torch.finfo(square.dtype).tiny), 1.0)
        direction = direction * scale[:, None]
    for move, change, curvature, factor in zip(moves, changes, curvatures, reversed(factors), strict=True):
        back = (change * direction).sum(dim=1) / curvature
        direction = direction + (factor - back)[:, None] * move
    return direction


def _wolfe_lengths(
    value_and_gradient: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    point: Tensor,
    direction: Tensor,
    value: Tensor,
    gradient: Tensor,
    done: Tensor,
) -> Tensor:
    """Step lengths that meet the weak Wolfe conditions, by doubling and bisection (Lewis, Overton 2013), [B]."""
    slope = (direction * gradient).sum(dim=1)
    low = torch.zeros_like(value)
    high = torch.full_like(value, torch.inf)
    length = torch.where(done, 0.0, 1.0).to(value.dtype)
    for _ in range(30):
        reached, reached_gradient, _ = value_and_gradient(point + length[:, None] * direction)
        too_long = reached > value + 1e-4 * length * slope
        too_short = ~too_long & ((reached_gradient * direction).sum(dim=1) < 0.9 * slope)
        open_ = (too_long | too_short) & ~done
        if not bool(open_.any()):
            break
        high = torch.where(open_ & too_long, length, high)
        low = torch.where(open_ & too_short, length, low)
        middle = torch.where(high.isinf(), 2 * length, 0.5 * (low + high))
        length = torch.where(open_, middle, length)
    return length


def bounded_swap(
    features: Tensor,
    logits: Tensor,
    weight: Tensor,
    source: Tensor,
    target: Tensor,
    *,
    lower: float = 0.0,
    upper: float = torch.inf,
    num_steps: int = 60,
) -> tuple[Tensor, Tensor]:
    """The nearest features inside bounds whose softmax is swapped: damped Newton on the dual problem.

    Features after a ReLU are never negative, but swapped ones can be. Minimises the squared step under K - 1 linear
    equations and the bounds; the solution is ``clamp(features + rows^T u)`` for the multipliers u.

    Args:
        features: [B, D].
        logits: The head's output on them, [B, K].
        weight: [K, D].
        source: Classes, [B].
        target: Classes, [B].
        lower: 0 after a ReLU, -0.2785 after a SiLU.
        upper: 6 after a ReLU6.
        num_steps: At most so many Newton steps.

    Returns:
        Features [B, D] and whether each sample converged [B]; where not, there is (almost always) no solution.
    """
    num_classes = len(weight)
    others = torch.arange(num_classes - 1, device=source.device)[None].expand(len(source), -1)
    others = others + (others >= source[:, None])  # all classes but the source, [B, K - 1]
    rows = weight[others] - weight[source][:, None]
    goal = swapped(logits, source, target)
    present = logits.gather(1, others) - _of(logits, source)[:, None]
    wanted = goal.gather(1, others) - _of(goal, source)[:, None]
    # The equations in terms of features: rows @ z' = rows @ z + (wanted - present); the bias cancels.
    constants = (rows @ features[:, :, None]).squeeze(2) + wanted - present
    ridge = 1e-8 * torch.eye(num_classes - 1, dtype=features.dtype, device=features.device)

    def dual(multipliers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        free = features + (rows.transpose(1, 2) @ multipliers[:, :, None]).squeeze(2)
        inside = free.clamp(lower, upper)
        # The integral of the clamp: half the square inside the bounds, straight lines outside.
        integral = (inside * free - 0.5 * inside.square()).sum(dim=1)
        value = integral - (constants * multipliers).sum(dim=1)
        gradient = (rows @ inside[:, :, None]).squeeze(2) - constants
        return value, gradient, free

    multipliers = torch.zeros_like(constants)
    value, gradient, free = dual(multipliers)
    for _ in range(num_steps):
        converged = gradient.abs().amax(dim=1) < 1e-9
        if bool(converged.all()):
            break
        active = ((free > lower) & (free < upper)).to(features.dtype)
        hessian = (rows * active[:, None]) @ rows.transpose(1, 2) + ridge
        direction = -torch.linalg.solve(hessian, gradient)
        slope = (direction * gradient).sum(dim=1)
        length = torch.where(converged, 0.0, 1.0).to(features.dtype)
        for _ in range(30):
            trial, _, _ = dual(multipliers + length[:, None] * direction)
            # A relative slack, because close to the minimum the decrease drowns in rounding.
            slack = 1e-14 * value.abs()
            too_long = trial > value + 1e-4 * length * slope + slack
            if not bool(too_long.any()):
                break
            length = torch.where(too_long, 0.5 * length, length)
        multipliers = multipliers + length[:, None] * direction
        value, gradient, free = dual(multipliers)
    return free.clamp(lower, upper), gradient.abs().amax(dim=1) < 1e-9


def reflect(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    source: Tensor,
    target: Tensor,
    *,
    swap: Swap = "softmax",
    matrix: Tensor | None = None,
    bounds: tuple[float, float] | None = None,
) -> Reflection:
    """Features whose softmax has source and target exchanged, with a status for every sample.

    Where the head cannot do that (more classes than features, or repeated rows) only the pair's margin is negated, and
    classes that would beat the target are pushed below it, as far as the head allows.

    Args:
        features: [B, D], float64.
        weight: [K, D], float64.
        bias: [K], float64.
        source: Classes, [B], usually the predicted ones.
        target: Classes, [B], each other than its source.
        swap: "softmax" (form B, default), "logits" (form A), "lbfgs" (the paper's refinement of the plain reflection),
            "reflect" (the plain reflection, which swaps exactly only for two classes; its residual says how far off).
        matrix: ``swap_matrix`` of the head for this form, if at hand.
        bounds: Lower and upper bound of every feature, or None.

    Raises:
        ValueError: If a target equals its source.
    """
    if bool((source == target).any()):
        raise ValueError("The target of a reflection must differ from its source: ask for another class.")
    logits = features @ weight.T + bias
    if swap == "reflect":
        moved = position(features, weight, bias, source, target)
    elif swap == "lbfgs":
        plain = position(features, weight, bias, source, target)
        moved = lbfgs_swap(features, lambda z: z @ weight.T + bias, source, target, start=plain)
    else:
        matrix = swap_matrix(weight, swap) if matrix is None else matrix
        moved = closed_form_swap(features, logits, matrix, source, target)
    goal = swapped(logits.softmax(dim=1), source, target)

    def residual(candidate: Tensor) -> Tensor:
        return ((candidate @ weight.T + bias).softmax(dim=1) - goal).abs().amax(dim=1)

    status = torch.full_like(source, _EXACT)
    error = residual(moved)
    failed = (error >= _TOLERANCE) & (swap != "reflect")
    if bool(failed.any()):
        repaired = _pair_only(features[failed], logits[failed], weight, bias, source[failed], target[failed])
        moved = moved.masked_scatter(failed[:, None], repaired)
        status = torch.where(failed, _PAIR_ONLY, status)
        error = residual(moved)
    if swap == "reflect":
        status = torch.where(error >= _TOLERANCE, _PAIR_ONLY, status)
    if bounds is not None:
        lower, upper = bounds
        bounded, converged = bounded_swap(features, logits, weight, source, target, lower=lower, upper=upper)
        kept = converged & (residual(bounded) < _TOLERANCE)
        moved = torch.where(kept[:, None], bounded, moved)
        error = residual(moved)
        status = torch.where(kept, _EXACT, torch.where(status == _EXACT, _NEGATIVE, status))
    degenerate = (weight[source] == weight[target]).all(dim=1)
    on_boundary = (margin(logits, source, target) == 0) & ~degenerate
    stuck = degenerate | on_boundary
    moved = torch.where(stuck[:, None], features, moved)
    status = torch.where(degenerate, _DEGENERATE, torch.where(on_boundary, _ON_BOUNDARY, status))
    error = residual(moved)
    least, most = bounds or (0.0, torch.inf)
    return Reflection(
        features=moved,
        status=status,
        residual=error,
        distance=(moved - features).norm(dim=1),
        negative=((moved < least - 1e-12) | (moved > most + 1e-12)).to(features.dtype).mean(dim=1),
    )


def linearised(head: Callable[[Tensor], Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
    """The tangent of a differentiable head at every sample: logits are about weight @ z + bias near it.

    Args:
        head: Map from [B, D] to logits [B, K] that treats every sample alike.
        features: [B, D].

    Returns:
        Weight [B, K, D] and bias [B, K].
    """
    weight = torch.func.vmap(torch.func.jacrev(lambda z: head(z[None])[0]))(features)
    return weight, head(features) - (weight @ features[:, :, None]).squeeze(2)


def reflect_nonlinear(
    features: Tensor, head: Callable[[Tensor], Tensor], source: Tensor, target: Tensor
) -> tuple[Reflection, Tensor, Tensor]:
    """As ``reflect`` for a head that is not linear: L-BFGS from the swap of its tangent.

    First with a little weight on a short step, then without. The straight path between the two points no longer meets
    the boundary half way.

    Returns:
        The reflection, and the tangent's weight [B, K, D] and bias [B, K] at the features.
    """
    if bool((source == target).any()):
        raise ValueError("The target of a reflection must differ from its source: ask for another class.")
    weight, bias = linearised(head, features)
    logits = head(features)
    inverse = torch.linalg.pinv(weight - weight.mean(dim=1, keepdim=True), rtol=1e-10)  # [B, D, K]
    ends = inverse.gather(2, torch.stack([target, source], dim=1)[:, None].expand(-1, inverse.shape[1], -1))
    start = features + margin(logits, source, target)[:, None] * (ends[:, :, 0] - ends[:, :, 1])
    near = lbfgs_swap(features, head, source, target, start=start, proximity=1e-4)
    moved = lbfgs_swap(features, head, source, target, start=near)
    goal = swapped(logits.softmax(dim=1), source, target)
    residual = (head(moved).softmax(dim=1) - goal).abs().amax(dim=1)
    status = torch.where(residual < _TOLERANCE, _EXACT, _PAIR_ONLY)
    reflection = Reflection(
        features=moved,
        status=status,
        residual=residual,
        distance=(moved - features).norm(dim=1),
        negative=(moved < -1e-12).to(features.dtype).mean(dim=1),
    )
    return reflection, weight, bias


def _pair_only(
    features: Tensor, logits: Tensor, weight: Tensor, bias: Tensor, source: Tensor, target: Tensor
) -> Tensor:
    """The shortest step that negates the pair's margin and puts those that then beat the target below it, [B, D]."""
    num_classes = len(weight)
    rows = weight[None] - weight[target][:, None]  # [B, K, D]: logit of each class minus that of the target
    heights = logits - _of(logits, target)[:, None]
    is_source = torch.nn.functional.one_hot(source, num_classes).bool()
    is_target = torch.nn.functional.one_hot(target, num_classes).bool()
    # Mirrored, the source stands below the target by as much as it stood above.
    wanted = torch.where(is_source, -heights, -_LEAD)
    chosen = is_source
    moved = features
    for _ in range(num_classes):
        equations = rows * chosen[:, :, None]
        change = torch.where(chosen, wanted - heights, 0.0)
        moved = features + (torch.linalg.pinv(equations, rtol=1e-10) @ change[:, :, None]).squeeze(2)
        reached = moved @ weight.T + bias
        beaten = (reached > _of(reached, target)[:, None]) & ~is_target & ~chosen
        if not bool(beaten.any()):
            break
        chosen = chosen | beaten
    return moved


def _of(values: Tensor, index: Tensor) -> Tensor:
    """One entry of every row, [B, K] and [B] -> [B]."""
    return values.gather(1, index[:, None]).squeeze(1)
