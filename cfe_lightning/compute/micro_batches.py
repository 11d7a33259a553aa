"""A batch computed in parts, one after the other: the gradient of the whole in about the memory of one part.

Lightning's ``accumulate_grad_batches`` is for one optimiser that it steps itself. A method with a critic steps several
by hand, in an order that must stay: the generator answers to the critic that this batch has already taught.

What looks at several images of a batch at once (a batch norm, the critic's comparison of images, a mean over selected
pixels) sees one part instead of the batch; each method says which of its terms do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
from torch import Tensor, nn

from cfe_lightning.compute.precision import full_precision
from cfe_lightning.compute.processes import average_gradients

#: Types of devices where one kernel takes an optimiser's step (``fused``), several times as fast as an operation each.
FUSED = ("cpu", "cuda")

Slice = TypeVar("Slice", bound=Sized)
Result = TypeVar("Result")


def check_micro_batches(count: int) -> int:
    """The number of parts that a batch is computed in.

    Raises:
        ValueError: If it is below 1.
    """
    if count < 1:
        raise ValueError(f"micro_batches is the number of parts of a batch, at least 1, got {count}.")
    return count


def parts_of(batch_size: int, count: int) -> list[slice]:
    """The rows of at most ``count`` parts of a batch, whose sizes differ by one at most."""
    count = min(count, batch_size)
    edges = [batch_size * index // count for index in range(count + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(edges)]


def render_twice(
    render: Callable[[Slice], Result], parts: Sequence[Slice]
) -> tuple[Callable[[Slice], Result], Callable[[Slice], Result]]:
    """A pass that two steps need: first without a gradient of its own, then with it.

    Where the batch is one part, one pass serves both. Where it is several, holding all of their graphs would take the
    memory that parts are to save, so each is made again; random numbers must not be drawn inside.
    """
    if len(parts) == 1:
        made: list[Result] = []

        def once(part: Slice) -> Result:
            if not made:
                made.append(render(part))
            return made[0]

        return once, once
    return torch.no_grad()(render), render


def accumulate_and_step(
    module: pl.LightningModule,
    parts: Sequence[Slice],
    loss: Callable[[Slice], dict[str, Tensor]],
    name: str,
    *optimizers: Any,
) -> dict[str, Tensor]:
    """One step of some optimisers with the gradient of all parts together; processes exchange it once.

    Args:
        module: With manual optimisation.
        parts: Of the batch; the length of each is its share in all means.
        loss: A part to its terms, each a mean over images, [].
        name: The term whose gradient is followed.
        optimizers: Which take the step.

    Returns:
        The terms' means over the batch, without gradient.
    """
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    strategy, total = module.trainer.strategy, sum(map(len, parts))
    # DDP would send the weights of all networks after every backward pass, whichever of them take a step.
    by_hand = isinstance(strategy, DDPStrategy)
    means: dict[str, Tensor] = {}
    for index, part in enumerate(parts):
        apart = isinstance(strategy, ParallelStrategy) and (by_hand or index < len(parts) - 1)
        with strategy.block_backward_sync() if apart else nullcontext():  # type: ignore[attr-defined]
            share = len(part) / total
            terms = loss(part)
            # Under autocast the gradient of what was computed in single precision would be rounded.
            with full_precision(terms[name]):
                module.manual_backward(terms[name] * share)
            means = {key: means.get(key, 0) + share * value.detach() for key, value in terms.items()}
    if by_hand:
        groups = itertools.chain.from_iterable(optimizer.param_groups for optimizer in optimizers)
        average_gradients(weight for group in groups for weight in group["params"])
    for optimizer in optimizers:
        optimizer.step()
    return means


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No weight of the module gets a gradient inside; a gradient still passes through it."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
