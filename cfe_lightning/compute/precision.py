"""Where half precision ends: what stays in single precision when everything around it runs in bfloat16.

A training or an explanation under ``bf16-mixed`` computes convolutions and matrix products in bfloat16. What the
specifications of the methods name (losses, statistics of norms, penalties on gradients, what is added up over many
layers or steps) goes through the functions here; without mixed precision they change nothing, not even a bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def to_float32(x: Tensor) -> Tensor:
    """Half-precision tensors as float32; all others as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(like: Tensor) -> torch.autocast:
    """A context without autocast on a tensor's device; inputs of layers have to be ``to_float32`` inside."""
    return torch.autocast(like.device.type, enabled=False)


@contextmanager
def double_backward(like: Tensor) -> Iterator[None]:
    """The context of a pass whose gradient is differentiated again (R1, path length): single precision, not compiled.

    Squared gradients are too small and too large for bfloat16, and compiled graphs have no second derivative.
    """
    with full_precision(like), torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def cast_once(blocks: Iterable[nn.Module], like: Tensor) -> Iterator[None]:
    """Rounds the weights of convolutions and linear layers once for many passes under autocast.

    Autocast rounds them anew in every pass, which is one more kernel for each; the numbers are the same. Without
    autocast, or where gradients are wanted, nothing happens.

    Args:
        blocks: Of a network, without layers that compute in ``full_precision``.
        like: On their device.
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
