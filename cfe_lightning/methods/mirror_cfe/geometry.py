"""The mathematics of Mirror-CFE in feature space: mirrors, swaps and steps.

Source: Chowdhury et al., ICCV 2025, arXiv 2509.16822; the closed-form swap and its bounds are ours.

The classifier ends in a linear head: logits = weight @ features + bias. The boundary between two classes is a
hyperplane; reflecting an image's features in it exchanges the two classes. With more than two classes the plain
reflection also moves the others. The default therefore moves along the pseudo-inverse of the head, which exchanges the
two confidences and leaves every other one as it was.

Everything here is exact to rounding and meant for float64. Nothing raises inside a batch: every sample gets a status.

Shapes: B samples, D features, K classes. These arguments return in most functions: ``features`` [B, D], ``weight``
[K, D] and ``bias`` [K] of the head, ``logits`` [B, K] of the features, classes ``source`` and ``target`` [B].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cfe_lightning.decisions import margin

Swap = Literal["softmax", "logits", "lbfgs", "reflect"]
#: Names of ``Reflection.status``. "exact": the softmax is swapped. "negative_features": it is swapped, but not within
#: the bounds. "pair_only": this head cannot swap; the target wins all the same or comes as close as the head allows.
#: "degenerate": source and target have the same row, so no mirror exists. "on_boundary": the image is on the mirror.
STATUS = ("exact", "negative_features", "pair_only", "degenerate", "on_boundary")
_EXACT, _NEGATIVE, _PAIR_ONLY, _DEGENERATE, _ON_BOUNDARY = range(5)

#: Upper limits of L-BFGS steps, of the pairs that it keeps, and of Newton steps.
_LBFGS_STEPS, _LBFGS_PAIRS, _NEWTON_STEPS = 50, 10, 60
#: Move, change of the gradient and curvature of one L-BFGS step, [B, D], [B, D], [B].
_Pair = tuple[Tensor, Tensor, Tensor]
#: Function from points [B, D] to its values [B], gradients [B, D] and largest errors of a logit [B].
_Objective = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
#: Largest error of a softmax that counts as swapped.
_TOLERANCE = 1e-5
#: Distance in logits by which a third class that would win is put below the target.
_LEAD = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Reflection:
    """Reflected features and how far they can be trusted.

    Attributes:
        features: Reflected features, [B, D].
        status: Index into ``STATUS``, [B] int64.
        residual: Largest difference between their softmax and the swapped one, [B].
        distance: Length of the step, [B].
        negative: Share of features outside the bounds, [B].
    """

    features: Tensor
    status: Tensor
    residual: Tensor
    distance: Tensor
    negative: Tensor


def swapped(values: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Exchanges the entries of source and target, [B] each, in logits or probabilities [B, K]."""
    pair = torch.stack([source, target], dim=1)
    return values.scatter(1, pair, values.gather(1, pair.flip(1)))


def position(
    features: Tensor, weight: Tensor, bias: Tensor, source: Tensor, target: Tensor, step: float | Tensor = 1.0
) -> Tensor:
    """Moves features towards their plain reflection (equation 1): step 0 stays, 0.5 projects on the mirror, 1 reflects.

    The shift is divided by the *squared* length of the mirror's normal: with the unit normal and the unscaled margin,
    the margin would not be negated. ``step`` is one number or [B]. Nothing moves where both classes have the same row.
    """
    return mirrored(features, weight[source] - weight[target], bias[source] - bias[target], step)


def mirrored(features: Tensor, normal: Tensor, offset: Tensor, step: float | Tensor = 1.0) -> Tensor:
    """Reflects features [B, D] in the hyperplanes ``normal . z + offset = 0``, [B, D] and [B]; see ``position``."""
    square = normal.square().sum(dim=1)
    height = (normal * features).sum(dim=1) + offset
    shift = torch.where(square > 0, 2 * step * height / square.clamp_min(torch.finfo(square.dtype).tiny), 0)
    return features - shift[:, None] * normal


def swap_matrix(weight: Tensor, form: Literal["softmax", "logits"] = "softmax") -> Tensor:
    """Returns the head's pseudo-inverse, transposed, [K, D] -> [K, D]: directions that move one logit each.

    "logits" matches the swapped logits themselves. "softmax" inverts the rows minus their mean: the logits then match
    up to a common constant, which no softmax sees, and the step is the shortest there is.
    """
    if form == "softmax":
        weight = weight - weight.mean(dim=0)
    return torch.linalg.pinv(weight.double(), rtol=1e-10).T.contiguous()


def closed_form_swap(features: Tensor, logits: Tensor, matrix: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Exchanges source and target and nothing else, by one vector per sample from ``swap_matrix``, [B, D]."""
    return torch.addcmul(features, margin(logits, source, target)[:, None], matrix[target] - matrix[source])


def first_flip(start: Tensor, end: Tensor, target: Tensor) -> Tensor:
    """Finds the step, [B], from which the target has the largest logit on the line between two logits, [B, K] each.

    It is 0.5 or more for a swap, 0 if the target's logit is the largest from the start, 2 if not even at the end.
    """
    before, after = (logits - _entry(logits, target)[:, None] for logits in (start, end))
    tiny = torch.finfo(start.dtype).tiny
    overtaken = torch.where(before > 0, before / (before - after).clamp_min(tiny), 0.0)
    step = overtaken.amax(dim=1)
    return torch.where((after > 0).any(dim=1), 2.0, step.clamp(max=1.0))


def bisect_step(reached: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, *, iterations: int = 40) -> Tensor:
    """Finds the steps, in any shape, from which ``reached`` holds: not yet at ``low``, but at ``high``.

    Every iteration halves the intervals; the result is their upper ends.
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
) -> Tensor:
    """Moves features [B, D] by L-BFGS on half the squared error until the head's logits have source and target swapped.

    Every sample has a curvature and a line search of its own (weak Wolfe conditions by bisection), so its result does
    not depend on the rest of the batch. For a linear head of full row rank the limit is that of the swap "logits".

    Args:
        head: Differentiable map from features [B, D] to logits [B, K].
        start: First point, [B, D]; None starts at the features.
        proximity: Weight of half the squared distance from ``features``.
    """
    with torch.no_grad():
        wanted = swapped(head(features), source, target)

    def objective(point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            point = point.detach().requires_grad_(True)
            error = head(point) - wanted
            value = 0.5 * error.square().sum(dim=1) + 0.5 * proximity * (point - features).square().sum(dim=1)
            (gradient,) = torch.autograd.grad(value.sum(), point)
        return value.detach(), gradient, error.detach().abs().amax(dim=1)

    point = (features if start is None else start).detach().clone()
    value, gradient, error = objective(point)
    pairs: list[_Pair] = []
    for _ in range(_LBFGS_STEPS):
        # Finished?
        done = gradient.abs().amax(dim=1) < 1e-8
        if proximity == 0:
            done = done | (error < 1e-6)
        if bool(done.all()):
            break
        # Step.
        direction = _two_loops(gradient, pairs)
        slope = (direction * gradient).sum(dim=1)
        # Rounding can turn an almost finished direction uphill; steepest descent never points there.
        direction = torch.where((slope < 0)[:, None], direction, -gradient)
        length = _wolfe_lengths(objective, point, direction, value, gradient, done)
        following = point + length[:, None] * direction
        value, following_gradient, error = objective(following)
        # Curvature.
        move, change = following - point, following_gradient - gradient
        curvature = (move * change).sum(dim=1)
        useful = curvature > 1e-12 * move.square().sum(dim=1)
        pairs.append((move * useful[:, None], change * useful[:, None], torch.where(useful, curvature, 1.0)))
        del pairs[:-_LBFGS_PAIRS]
        point, gradient = following, following_gradient
    return point


def _two_loops(gradient: Tensor, pairs: list[_Pair]) -> Tensor:
    """Computes the L-BFGS direction of every sample (Nocedal and Wright, algorithm 7.4), [B, D]."""
    direction = -gradient
    factors = []
    for move, change, curvature in reversed(pairs):
        factor = (move * direction).sum(dim=1) / curvature
        direction = direction - factor[:, None] * change
        factors.append(factor)
    if pairs:
        _, change, curvature = pairs[-1]
        square = change.square().sum(dim=1)
        scale = torch.where(square > 0, curvature / square.clamp_min(torch.finfo(square.dtype).tiny), 1.0)
        direction = direction * scale[:, None]
    for (move, change, curvature), factor in zip(pairs, reversed(factors), strict=True):
        back = (change * direction).sum(dim=1) / curvature
        direction = direction + (factor - back)[:, None] * move
    return direction


def _wolfe_lengths(
    objective: _Objective, point: Tensor, direction: Tensor, value: Tensor, gradient: Tensor, done: Tensor
) -> Tensor:
    """Finds step lengths that meet the weak Wolfe conditions, by doubling and bisection (Lewis, Overton 2013), [B]."""
    slope = (direction * gradient).sum(dim=1)
    low = torch.zeros_like(value)
    high = torch.full_like(value, torch.inf)
    length = torch.where(done, 0.0, 1.0).to(value.dtype)
    for _ in range(30):
        # Conditions: enough decrease, and a slope that has flattened.
        reached, reached_gradient, _ = objective(point + length[:, None] * direction)
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
) -> tuple[Tensor, Tensor]:
    """Finds the nearest features within bounds whose softmax is swapped, by damped Newton on the dual problem.

    Features after a ReLU are never negative, but swapped ones can be. Minimises the squared step under K - 1 linear
    equations and the bounds; the solution is ``clamp(features + rows^T u)`` for the multipliers u. Returns features
    [B, D] and a flag for every sample that converged [B]; without convergence there is (almost always) no solution.

    Args:
        lower: Lower bound: 0 after a ReLU, -0.2785 after a SiLU.
        upper: Upper bound: 6 after a ReLU6.
    """
    # Equations for the features: rows @ z' = rows @ z + change of the logits; the bias cancels.
    num_classes = len(weight)
    others = torch.arange(num_classes - 1, device=source.device)[None].expand(len(source), -1)
    others = others + (others >= source[:, None])  # all classes but the source, [B, K - 1]
    rows = weight[others] - weight[source][:, None]
    goal = swapped(logits, source, target)
    present = logits.gather(1, others) - _entry(logits, source)[:, None]
    wanted = goal.gather(1, others) - _entry(goal, source)[:, None]
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
    for _ in range(_NEWTON_STEPS):
        converged = gradient.abs().amax(dim=1) < 1e-9
        if bool(converged.all()):
            break
        # Newton direction.
        active = ((free > lower) & (free < upper)).to(features.dtype)
        hessian = (rows * active[:, None]) @ rows.transpose(1, 2) + ridge
        direction = -torch.linalg.solve(hessian, gradient)
        slope = (direction * gradient).sum(dim=1)
        # Halve the step until the dual decreases enough.
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
    """Moves features until their softmax has source and target exchanged, with a status for every sample.

    A head with more classes than features, or with repeated rows, may not allow that. Then only the pair's margin is
    negated, and classes that would beat the target are pushed below it, as far as the head allows.

    Args:
        swap: "softmax" or "logits" as in ``swap_matrix``; "lbfgs", the paper's refinement of the plain reflection;
            "reflect", the plain reflection, which swaps exactly only two classes (``residual`` tells how far off).
        matrix: ``swap_matrix`` of the head for this swap; None computes it.
        bounds: Lower and upper bound of every feature, or None.

    Raises:
        ValueError: If a target equals its source.
    """
    _check_target(source, target)
    logits = features @ weight.T + bias
    goal = swapped(logits.softmax(dim=1), source, target)

    def residual(candidate: Tensor) -> Tensor:
        return ((candidate @ weight.T + bias).softmax(dim=1) - goal).abs().amax(dim=1)

    # Unbounded swap.
    if swap in ("softmax", "logits"):
        matrix = swap_matrix(weight, swap) if matrix is None else matrix
        moved = closed_form_swap(features, logits, matrix, source, target)
    else:
        moved = position(features, weight, bias, source, target)
    if swap == "lbfgs":
        moved = lbfgs_swap(features, lambda z: z @ weight.T + bias, source, target, start=moved)
    failed = residual(moved) >= _TOLERANCE
    status = torch.where(failed, _PAIR_ONLY, _EXACT)
    if swap != "reflect" and bool(failed.any()):
        repaired = _pair_only(features[failed], logits[failed], weight, bias, source[failed], target[failed])
        moved = moved.masked_scatter(failed[:, None], repaired)
    # Swap within bounds.
    if bounds is not None:
        lower, upper = bounds
        bounded, converged = bounded_swap(features, logits, weight, source, target, lower=lower, upper=upper)
        kept = converged & (residual(bounded) < _TOLERANCE)
        moved = torch.where(kept[:, None], bounded, moved)
        status = torch.where(kept, _EXACT, torch.where(status == _EXACT, _NEGATIVE, status))
    # Samples that cannot or need not move.
    degenerate = (weight[source] == weight[target]).all(dim=1)
    on_boundary = (margin(logits, source, target) == 0) & ~degenerate
    moved = torch.where((degenerate | on_boundary)[:, None], features, moved)
    status = torch.where(degenerate, _DEGENERATE, torch.where(on_boundary, _ON_BOUNDARY, status))
    return _reflection(moved, features, status, residual(moved), bounds)


def linearised(head: Callable[[Tensor], Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the tangent, weight [B, K, D] and bias [B, K], of a differentiable head at every sample.

    The head maps features [B, D] to logits [B, K], every sample by itself.
    """
    weight = torch.func.vmap(torch.func.jacrev(lambda z: head(z[None])[0]))(features)
    return weight, head(features) - (weight @ features[:, :, None]).squeeze(2)


def reflect_nonlinear(
    features: Tensor, head: Callable[[Tensor], Tensor], source: Tensor, target: Tensor
) -> tuple[Reflection, Tensor, Tensor]:
    """Does the work of ``reflect`` for a head that is not linear: L-BFGS from the swap of its tangent.

    L-BFGS runs first with a small weight on a short step, then without. The straight path between the two points no
    longer meets the boundary half way. Returns the tangent's weight [B, K, D] and bias [B, K] at the features, too.
    """
    _check_target(source, target)
    # Swap of the tangent.
    weight, bias = linearised(head, features)
    logits = head(features)
    inverse = torch.linalg.pinv(weight - weight.mean(dim=1, keepdim=True), rtol=1e-10)  # [B, D, K]
    ends = inverse.gather(2, torch.stack([target, source], dim=1)[:, None].expand(-1, inverse.shape[1], -1))
    start = features + margin(logits, source, target)[:, None] * (ends[:, :, 0] - ends[:, :, 1])
    # Swap of the head.
    near = lbfgs_swap(features, head, source, target, start=start, proximity=1e-4)
    moved = lbfgs_swap(features, head, source, target, start=near)
    goal = swapped(logits.softmax(dim=1), source, target)
    residual = (head(moved).softmax(dim=1) - goal).abs().amax(dim=1)
    status = torch.where(residual < _TOLERANCE, _EXACT, _PAIR_ONLY)
    return _reflection(moved, features, status, residual, None), weight, bias


def _pair_only(
    features: Tensor, logits: Tensor, weight: Tensor, bias: Tensor, source: Tensor, target: Tensor
) -> Tensor:
    """Takes the shortest step that negates the pair's margin and puts classes that beat the target below it, [B, D]."""
    num_classes = len(weight)
    rows = weight[None] - weight[target][:, None]  # [B, K, D]: logit of each class minus that of the target
    heights = logits - _entry(logits, target)[:, None]
    is_source = torch.nn.functional.one_hot(source, num_classes).bool()
    is_target = torch.nn.functional.one_hot(target, num_classes).bool()
    # Mirrored, the source stands below the target by as much as it stood above.
    wanted = torch.where(is_source, -heights, -_LEAD)
    # Active set: one more equation for every class that beats the target.
    chosen = is_source
    moved = features
    for _ in range(num_classes):
        equations = rows * chosen[:, :, None]
        change = torch.where(chosen, wanted - heights, 0.0)
        moved = features + (torch.linalg.pinv(equations, rtol=1e-10) @ change[:, :, None]).squeeze(2)
        reached = moved @ weight.T + bias
        beaten = (reached > _entry(reached, target)[:, None]) & ~is_target & ~chosen
        if not bool(beaten.any()):
            break
        chosen = chosen | beaten
    return moved


def _reflection(
    moved: Tensor, features: Tensor, status: Tensor, residual: Tensor, bounds: tuple[float, float] | None
) -> Reflection:
    """Measures the step from ``features`` to ``moved``, [B, D] each; without bounds, below zero is outside."""
    least, most = bounds or (0.0, torch.inf)
    negative = ((moved < least - 1e-12) | (moved > most + 1e-12)).to(features.dtype).mean(dim=1)
    distance = (moved - features).norm(dim=1)
    return Reflection(features=moved, status=status, residual=residual, distance=distance, negative=negative)


def _check_target(source: Tensor, target: Tensor) -> None:
    if bool((source == target).any()):
        raise ValueError("The target of a reflection must differ from its source: ask for another class.")


def _entry(values: Tensor, index: Tensor) -> Tensor:
    """Selects one entry of every row, [B, K] and [B] -> [B]."""
    return values.gather(1, index[:, None]).squeeze(1)
