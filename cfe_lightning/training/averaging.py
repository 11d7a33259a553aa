"""The exponential moving average of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class EMA(WeightAveraging):
    """Exponential moving average of the weights; checkpoints and validation hold the average, buffers are copied.

    The first average is the model after one batch. From then on the decay grows as (1 + n) / (10 + n), so a short run
    is not dominated by its random start. Frozen weights stay bit-identical: ``lerp`` between equal numbers is exact,
    which Lightning's own average is not.

    Args:
        decay: Largest share of the old average kept per training batch, in [0, 1).
    """

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__(use_buffers=False, multi_avg_fn=self._blend)
        if not 0 <= decay < 1:
            raise ValueError(f"The decay of EMA must be in [0, 1), got {decay}.")
        self.decay = decay

    def _blend(self, averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor) -> None:
        assert self._average_model is not None, "EMA averages only during fit"
        # Not ``num_averaged``, a copy on the accelerator: reading it would wait for the device.
        count = int(self._average_model.n_averaged)
        torch._foreach_lerp_(averaged, current, 1 - min(self.decay, (1 + count) / (10 + count)))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Keeps the counter on the CPU, because it is read after every batch."""
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            self._average_model.n_averaged = self._average_model.n_averaged.cpu()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copies buffers that a validation has filled to the trained model."""
        super().on_validation_epoch_end(trainer, pl_module)
        # Not in the check before training: a method may have fitted buffers that the average does not have yet.
        if self._average_model is not None and not trainer.sanity_checking:
            for current, averaged in zip(pl_module.buffers(), self._average_model.module.buffers(), strict=True):
                current.data.copy_(averaged.data)

    @contextmanager
    def averaged(self, pl_module: pl.LightningModule) -> Iterator[None]:
        """Gives the module its averaged weights inside the context, and exactly its own afterwards."""
        self._swap_models(pl_module)
        try:
            yield
        finally:
            self._swap_models(pl_module)
