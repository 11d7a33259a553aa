"""Boundaries of half precision: computations that stay in float32 while the rest runs in bfloat16.

Under ``bf16-mixed``, convolutions and matrix products run in bfloat16. Losses, statistics of norms, penalties on
gradients and sums over many layers or steps go through the functions here. Without mixed precision these functions
change no bit.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def to_float32(x: Tensor) -> Tensor:
    """Converts half-precision tensors to float32 and returns all others unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(like: Tensor) -> torch.autocast:
    """Returns a context without autocast on a tensor's device; inputs of layers must be ``to_float32`` inside."""
    return torch.autocast(like.device.type, enabled=False)


@contextmanager
def double_backward(like: Tensor) -> Iterator[None]:
    """Enters single precision without compilation, for passes with second derivatives (R1, path length).

    Squared gradients leave the range of bfloat16, and compiled graphs have no second derivative.
    """
    with full_precision(like), torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def cast_once(blocks: Iterable[nn.Module], like: Tensor) -> Iterator[None]:
    """Rounds the weights of convolutions and linear layers once, for many passes under autocast.

    Autocast rounds them again in every pass, which costs one kernel per weight; the numbers are the same. Without
    autocast, or with gradients enabled, nothing changes. No layer of the blocks may compute in ``full_precision``.
    """
    device = like.device.type
    weights: list[tuple[nn.Parameter, Tensor]] = []
    if torch.is_autocast_enabled(device) and not torch.is_grad_enabled():
        layers = (layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Conv2d | nn.Linear))
        weights = [(weight, weight.data) for layer in layers for weight in layer.parameters(recurse=False)]
    try:
        for weight, exact in weights:
            weight.data = exact.to(torch.get_autocast_dtype(device))
        yield
    finally:
        for weight, exact in weights:
            weight.data = exact
