"""Watches a run: throughput, metrics of each batch, and losses that are not finite.

Iterations are training batches: Lightning's ``global_step`` counts optimiser steps, two per batch for a GAN.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor


def iteration(trainer: pl.Trainer) -> int:
    """Training batches finished so far, over all epochs; call it after a batch or before the first."""
    return trainer.fit_loop.total_batch_idx + 1


class Throughput(pl.Callback):
    """Logs ``images_per_second`` of training, over all processes and without validation.

    Args:
        every_n_batches: Training batches per measurement; a window hides that accelerators run behind.
    """

    def __init__(self, every_n_batches: int = 50) -> None:
        self.every_n_batches = every_n_batches
        self._images = 0
        self._start: float | None = None
        self._paused = 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Starts a window after the first batch, which is slower than all others, and logs at its end."""
        now = time.perf_counter()
        if self._start is None:
            self._images, self._start, self._paused = 0, now, 0.0
            return
        self._images += len(batch["image"]) * trainer.world_size
        if iteration(trainer) % self.every_n_batches == 0:
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
    """Logs of every training batch only what was measured in it.

    Lightning repeats the last value of what is not measured in every batch until the epoch ends: a penalty that is due
    now and then, the throughput. A resumed run cannot know it, so its log would differ.
    """

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Forgets the batch before; means over an epoch go on."""
        assert trainer._results is not None, "there are results while batches are trained on"
        for metric in trainer._results.values():
            if not metric.meta.on_epoch:
                metric.reset()


class NonFiniteLossError(RuntimeError):
    """A loss became infinite or not a number; the message names iteration and term."""


class NonFiniteGuard(pl.Callback):
    """Stops a run whose loss is no number, and never lets such weights replace a good checkpoint.

    The first bad iteration of every ``train/<term>`` is noted on the device and read only every ``every_n_batches`` and
    before a checkpoint is written, so the device is not waited for after every batch. The broken state is saved as
    ``nonfinite.ckpt`` for inspection; ``last.ckpt`` stays from before.

    Args:
        every_n_batches: Training batches between two looks.
    """

    def __init__(self, every_n_batches: int = 50) -> None:
        self.every_n_batches = every_n_batches
        self._first_bad: dict[tuple[str, ...], Tensor] = {}
        self._saving = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes this batch's terms, looks at what was noted when it is time."""
        step = iteration(trainer)
        terms = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
        if terms:
            values = torch.stack([value.float() for value in terms.values()])
            now = torch.where(values.isfinite(), torch.inf, float(step))
            names = tuple(terms)
            self._first_bad[names] = torch.minimum(self._first_bad.get(names, now), now)
        if step % self.every_n_batches == 0:
            self._look(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Looks before anything is written."""
        if not self._saving:
            self._look(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks at the last batches."""
        self._look(trainer)

    def _look(self, trainer: pl.Trainer) -> None:
        first = [
            (step, name)
            for names, steps in self._first_bad.items()
            for step, name in zip(steps.tolist(), names, strict=True)
        ]
        bad = [(step, name) for step, name in first if step < float("inf")]
        if not trainer.strategy.reduce_boolean_decision(bool(bad), all=False):
            return
        path = Path(trainer.default_root_dir) / "nonfinite.ckpt"
        self._saving = True
        trainer.save_checkpoint(path)
        # Of terms that break in the same iteration the one that is logged first: the others follow from it.
        step, name = min(bad, key=lambda item: item[0], default=(float("nan"), "a loss of another process"))
        raise NonFiniteLossError(
            f"{name} is not finite at iteration {step:.0f}: training stopped and its state was saved as {path}; the "
            "checkpoints before are untouched. Lower the learning rate or use 32-bit precision, then --resume."
        )
