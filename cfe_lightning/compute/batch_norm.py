"""Passes through batch norms that leave no trace in their running statistics."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def uncounted(network: nn.Module) -> Iterator[None]:
    """Keeps the running statistics of all batch norms unchanged; in training mode they still normalise by the batch."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # Without running statistics a pass would keep other tensors for its gradient, and a norm that is synchronised
        # over processes needs a counter: so momentum is 0, and a copy of the counter counts in vain.
        norm.momentum = 0.0
        norm.num_batches_tracked = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
