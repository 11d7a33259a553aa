"""Watches a run: throughput, metrics of each batch, and losses that are not finite.

Iterations are training batches: Lightning's ``global_step`` counts optimiser steps, two per batch for a GAN.
"""

import time
from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from cfe_lightning.training.lightning_inside import forget_batch_metrics, iteration


class Throughput(pl.Callback):
    """Logs ``images_per_second`` of training over all processes, without validation.

    Args:
        every_n_batches: Training batches per measurement; averaging over a window hides asynchronous GPU execution.
    """

    def __init__(self, every_n_batches: int = 50) -> None:
        self.every_n_batches = every_n_batches
        self._images = 0
        self._start: float | None = None
        self._paused = 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Starts a window after the slow first batch, and logs at the end of every window."""
        now = time.perf_counter()
        if self._start is not None:
            self._images += len(batch["image"]) * trainer.world_size
            if iteration(trainer) % self.every_n_batches:
                return
            elapsed = now - self._start - self._paused
            pl_module.log("images_per_second", self._images / max(elapsed, 1e-9), batch_size=1)
        self._images, self._start, self._paused = 0, now, 0.0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock."""
        self._paused -= time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock again."""
        self._paused += time.perf_counter()


class FreshMetrics(pl.Callback):
    """Logs only values measured in the current training batch.

    Lightning repeats the last value of a quantity that is not measured in every batch, such as a lazy penalty or the
    throughput, until the epoch ends. A resumed run does not know that value, so its log would differ.
    """

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Forgets the values of the batch before; means over an epoch continue."""
        forget_batch_metrics(trainer)


class NonFiniteLossError(RuntimeError):
    """A loss became infinite or not a number; the message names iteration and term."""


class NonFiniteGuard(pl.Callback):
    """Stops a run with a non-finite loss before its weights replace a good checkpoint.

    The first bad iteration of every ``train/<term>`` is noted on the device and read only every ``every_n_batches`` and
    before a checkpoint is written, so that batches do not wait for the device. The broken state is saved as
    ``nonfinite.ckpt`` for inspection; ``last.ckpt`` stays as it was.

    Args:
        every_n_batches: Training batches between two checks.
    """

    def __init__(self, every_n_batches: int = 50) -> None:
        self.every_n_batches = every_n_batches
        self._first_bad: dict[tuple[str, ...], Tensor] = {}
        self._saving = False

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Notes non-finite terms of this batch, and checks on schedule."""
        step = iteration(trainer)
        terms = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
        if terms:
            values = torch.stack([value.float() for value in terms.values()])
            now = torch.where(values.isfinite(), torch.inf, float(step))
            names = tuple(terms)
            self._first_bad[names] = torch.minimum(self._first_bad.get(names, now), now)
        if step % self.every_n_batches == 0:
            self._check(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Checks before anything is written."""
        if not self._saving:
            self._check(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks the last batches."""
        self._check(trainer)

    def _check(self, trainer: pl.Trainer) -> None:
        first = (zip(steps.tolist(), names, strict=True) for names, steps in self._first_bad.items())
        bad = [(step, name) for step, name in chain.from_iterable(first) if step < float("inf")]
        if not trainer.strategy.reduce_boolean_decision(bool(bad), all=False):
            return
        path = Path(trainer.default_root_dir) / "nonfinite.ckpt"
        self._saving = True
        trainer.save_checkpoint(path)
        # Among terms that break in the same iteration, the first one logged: the others follow from it.
        step, name = min(bad, key=lambda item: item[0], default=(float("nan"), "a loss of another process"))
        raise NonFiniteLossError(
            f"{name} is not finite at iteration {step:.0f}: training stopped and its state was saved as {path}; the "
            "checkpoints before are untouched. Lower the learning rate or use 32-bit precision, then --resume."
        )
