"""What batch norms remember of the images that they have seen, and passes that they should not remember."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def uncounted(network: nn.Module) -> Iterator[None]:
    """Inside, batch norms in training mode normalise as ever, but their running statistics stay as they are."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # Without running statistics at all a pass would keep other tensors for its gradient; without a counter, a norm
        # that is synchronised over processes refuses to work. What counts here is thrown away.
        norm.momentum = 0.0
        norm.num_batches_tracked = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
