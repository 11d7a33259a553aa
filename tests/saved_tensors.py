"""How many bytes autograd keeps for the gradient, without a clock and without a GPU."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor


class SavedTensors:
    """Counts, inside, what is saved for a gradient: each storage once, parameters not at all.

    What a recomputed block makes again for a moment is not seen.

    Attributes:
        peak: Most bytes at a time.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._now = 0
        self._holders: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept.tensor)

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _keep(self, tensor: Tensor) -> _Kept:
        return _Kept(self, tensor)

    def add(self, tensor: Tensor, sign: int) -> None:
        """One more or one less wants the tensor's storage."""
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        count = self._holders.get(address, 0) + sign
        if count == (1 if sign > 0 else 0):
            self._now += sign * storage.nbytes()
            self.peak = max(self.peak, self._now)
        self._holders[address] = count


class _Kept:
    """A saved tensor while the graph holds it."""

    def __init__(self, counter: SavedTensors, tensor: Tensor) -> None:
        self.tensor = tensor
        self.counter = None if tensor.is_leaf and tensor.requires_grad else counter
        if self.counter:
            self.counter.add(tensor, 1)

    def __del__(self) -> None:
        if self.counter:
            self.counter.add(self.tensor, -1)
