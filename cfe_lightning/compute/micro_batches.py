"""Gradient accumulation over parts of a batch: the gradient of the whole in about the memory of one part.

Lightning's ``accumulate_grad_batches`` serves one optimiser that Lightning itself steps. A method with a critic steps
several optimisers by hand, in a fixed order: the generator learns from the critic that has just seen this batch.

Terms over several images of a batch (a batch norm, the critic's comparison of images, a mean over selected pixels) see
one part instead of the batch; each method documents its own.
"""

import functools
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

#: Device types on which an optimiser's step is one kernel (``fused``), several times as fast as separate operations.
FUSED = ("cpu", "cuda")

Slice = TypeVar("Slice", bound=Sized)
Result = TypeVar("Result")


def check_micro_batches(count: int) -> int:
    """Returns the number of parts of a batch.

    Raises:
        ValueError: If the number is below 1.
    """
    if count < 1:
        raise ValueError(f"micro_batches is the number of parts of a batch, at least 1, got {count}.")
    return count


def parts_of(batch_size: int, count: int) -> list[slice]:
    """Returns the rows of at most ``count`` parts of a batch; their sizes differ by at most one."""
    count = min(count, batch_size)
    edges = [batch_size * index // count for index in range(count + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(edges)]


def render_twice(
    render: Callable[[Slice], Result], parts: Sequence[Slice]
) -> tuple[Callable[[Slice], Result], Callable[[Slice], Result]]:
    """Returns a pass for two steps: the first version computes no gradient, the second one does.

    For a batch of one part, a single pass serves both steps. For several parts, keeping all graphs would take the
    memory that the parts save, so each part is rendered again; ``render`` must not draw random numbers.
    """
    if len(parts) == 1:
        rendered = functools.cache(lambda: render(parts[0]))
        return lambda _: rendered(), lambda _: rendered()
    return torch.no_grad()(render), render


def accumulate_and_step(
    module: pl.LightningModule,
    parts: Sequence[Slice],
    loss: Callable[[Slice], dict[str, Tensor]],
    name: str,
    *optimizers: Any,
) -> dict[str, Tensor]:
    """Takes one step of the optimisers with the gradient of all parts; processes exchange the gradient once.

    Args:
        module: A module with manual optimisation.
        parts: Parts of the batch; each counts by its length.
        loss: Computes the terms of a part by name, each a mean over its images, [].
        name: Name of the term to be minimised.
        optimizers: Optimisers that take the step.

    Returns:
        The terms averaged over the batch, without gradient, [] each.
    """
    # Gradients of all parts.
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    strategy, total = module.trainer.strategy, sum(map(len, parts))
    # DDP would exchange the gradients of all networks after every backward pass, whichever of them take a step.
    by_hand = isinstance(strategy, DDPStrategy)
    means: dict[str, Tensor] = {}
    for index, part in enumerate(parts):
        unsynchronised = isinstance(strategy, ParallelStrategy) and (by_hand or index < len(parts) - 1)
        with strategy.block_backward_sync() if unsynchronised else nullcontext():  # type: ignore[attr-defined]
            share = len(part) / total
            terms = loss(part)
            # Under autocast, gradients of single-precision operations would be rounded.
            with full_precision(terms[name]):
                module.manual_backward(terms[name] * share)
            means = {key: means.get(key, 0) + share * value.detach() for key, value in terms.items()}
    # One exchange, then the step.
    if by_hand:
        groups = itertools.chain.from_iterable(optimizer.param_groups for optimizer in optimizers)
        average_gradients(weight for group in groups for weight in group["params"])
    for optimizer in optimizers:
        optimizer.step()
    return means


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Excludes the weights of a module from gradients, which still flow through it to its input."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
