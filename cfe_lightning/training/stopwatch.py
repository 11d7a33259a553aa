"""The clock of ``train.py --dry-run``: times a few iterations of a run and then ends it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import Dataset, Subset

from cfe_lightning.data.base import ImageData, Sample, Split
from cfe_lightning.training.checkpoints import AtomicCheckpointIO
from cfe_lightning.training.lightning_inside import kill_children

#: Iterations before timing starts, and the fewest that are timed.
_WARM_UP, _TIMED = 3, 10
#: Seconds after which timing ends, even if a lazy penalty has not come yet.
_PATIENCE = 120.0
#: Batches of the short validation, and of a preparation that would read the whole training split.
VAL_BATCHES, _PREPARED_BATCHES = 3, 4


@dataclass
class Measured:
    """Measurements of a run, times in seconds."""

    batch: int = 0  # images per iteration over all processes
    iterations: int = 0  # per epoch
    cycle: int = 1  # iterations in which every lazy penalty comes once
    images: dict[str, int] = field(default_factory=dict)  # number by split
    seconds: list[float] = field(default_factory=list)  # time of every timed iteration
    waits: list[float] = field(default_factory=list)  # time that every timed iteration waited for its batch
    steps: float = 1.0  # optimiser steps per iteration
    preparation: float = 0.0  # time before the first iteration, extrapolated to all images
    val_batches: int = 0  # batches of a whole validation
    val_seconds: float = 0.0  # time of a whole validation
    memory: str | None = None  # peak in words; None where the system does not tell
    memory_share: float = 0.0  # share of a GPU's memory used at the peak
    trouble: str | None = None  # reason why the end of the validation could not be measured

    @property
    def iteration_seconds(self) -> float:
        """Averages over whole cycles, because iterations with a penalty take longer."""
        whole = len(self.seconds) // self.cycle * self.cycle or len(self.seconds)
        return statistics.mean(self.seconds[:whole])

    @property
    def waiting(self) -> float:
        """Returns the share of the time spent waiting for batches."""
        return sum(self.waits) / sum(self.seconds)


class MeasuredError(Exception):
    """Ends a measured run before it writes anything at its end."""


class _Scales(AtomicCheckpointIO):
    """Weighs checkpoints instead of writing them."""

    size = 0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        self.size = 0
        torch.save(checkpoint, self)  # type: ignore[arg-type]

    def write(self, data: Any) -> int:
        self.size += memoryview(data).nbytes
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Does nothing; ``torch.save`` calls it."""


class Stopwatch(pl.Callback):
    """Times the preparation, some iterations and a short validation, then ends the run.

    Args:
        val_limit: The run's own ``limit_val_batches``; the trainer holds that of the short validation.

    Attributes:
        measured: The measurements, complete when the run has ended.
        scales: Weighs checkpoints in place of the trainer's writer.
        is_judging: True during the validation.
    """

    def __init__(self, val_limit: float) -> None:
        self.val_limit = val_limit
        self.measured, self.scales = Measured(), _Scales()
        self.is_judging = self._is_done = False
        self._iterations: list[tuple[_Tick, _Tick]] = []
        self._waits: list[float] = []
        self._validation: list[_Tick] = []
        self._first_step = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wraps the preparation of the module, which comes next."""
        self._resident = resident_bytes()
        pl_module.on_fit_start = partial(self._prepare, trainer, pl_module, pl_module.on_fit_start)  # type: ignore[method-assign]

    def _prepare(self, trainer: pl.Trainer, module: pl.LightningModule, prepare: Callable[[], None]) -> None:
        """Times a preparation on a few batches, for methods that read the whole training split before they start."""
        data: ImageData = trainer.datamodule  # type: ignore[attr-defined]
        whole, share = data.dataset, 1.0
        most = _PREPARED_BATCHES * data.batch_size * trainer.world_size

        def first_batches(split: Split) -> Dataset[Sample]:
            nonlocal share
            dataset: Any = whole(split)
            share = min(share, most / len(dataset))
            return Subset(dataset, range(min(most, len(dataset))))

        # Preparation.
        data.dataset = first_batches  # type: ignore[method-assign]
        started = time.perf_counter()
        try:
            prepare()
        finally:
            # Restores the methods of the classes.
            del data.dataset, module.on_fit_start
        self.measured.preparation = (time.perf_counter() - started) / share

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts images and iterations, and finds the length of a cycle."""
        self.measured.images["train"] = len(trainer.train_dataloader.dataset)  # type: ignore[union-attr]
        self.measured.iterations = int(trainer.num_training_batches)
        intervals = [value for name, value in pl_module.hparams.items() if name.endswith("_interval")]
        lazy = [value for value in intervals if isinstance(value, int) and value > 0]
        self.measured.cycle = math.lcm(trainer.accumulate_grad_batches, *lazy)
        self._first_step = trainer.global_step

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restarts the clock: the time since the last iteration belongs to none."""
        self._since = _Tick(pl_module.device)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Notes how long the batch was waited for."""
        self._waits.append(time.perf_counter() - self._since.host)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes the time, and asks for the validation when enough iterations were timed."""
        since, self._since = self._since, _Tick(pl_module.device)
        self._iterations.append((since, self._since))
        self.measured.batch = len(batch["image"]) * trainer.world_size
        self.measured.steps = (trainer.global_step - self._first_step) / len(self._iterations)
        if self._has_enough(trainer):
            self._is_done = trainer.should_stop = True
            trainer.save_checkpoint("")
            if not trainer.enable_validation:
                self._end(trainer)

    def _has_enough(self, trainer: pl.Trainer) -> bool:
        timed = len(self._iterations) - _WARM_UP
        wanted = math.ceil(_TIMED / self.measured.cycle) * self.measured.cycle
        impatient = timed >= 2 and self._since.host - self._iterations[_WARM_UP][0].host > _PATIENCE
        return trainer.strategy.reduce_boolean_decision(timed >= wanted or impatient, all=False)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts images and batches, and starts the clock."""
        loader: Any = trainer.val_dataloaders
        self.measured.images["val"] = len(loader.dataset)
        whole, limit = len(loader), self.val_limit
        self.measured.val_batches = min(limit, whole) if isinstance(limit, int) else int(limit * whole)
        self.is_judging = True
        self._validation = [_Tick(pl_module.device)]

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Takes the time of a batch."""
        self._validation.append(_Tick(pl_module.device))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends the run if enough iterations were timed."""
        self.is_judging = False
        self._validation.append(_Tick(pl_module.device))
        if self._is_done:
            self._end(trainer)
        self._since = _Tick(pl_module.device)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends a run with fewer iterations than were to be timed."""
        self._end(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves no process that waits for this one; after a complete measurement they end with it."""
        if not isinstance(exception, MeasuredError):
            kill_children(trainer)

    def _end(self, trainer: pl.Trainer) -> None:
        # Weighed again, because a validation may have added to the checkpoint.
        trainer.save_checkpoint("")
        self.read(trainer.strategy.root_device)
        raise MeasuredError

    def read(self, device: torch.device) -> None:
        """Fills ``measured`` at the end: waiting for a device after every iteration would slow it down."""
        # Training.
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        measured = self.measured
        # A run of very few iterations cannot spare any for warming up.
        first = min(_WARM_UP, len(self._iterations) - 1)
        measured.seconds = [since.until(now) for since, now in self._iterations[first:]]
        measured.waits = self._waits[first:]

        # Validation and memory.
        if len(ticks := self._validation) > 1:
            batches = [since.until(now) for since, now in pairwise(ticks[: VAL_BATCHES + 1])]
            # The median: loader processes start before the first batch, and a method may compute after the last.
            missing = measured.val_batches - len(batches)
            measured.val_seconds = ticks[0].until(ticks[-1]) + missing * statistics.median(batches)
        measured.memory, measured.memory_share = _peak_memory(device, self._resident)


class _Tick:
    """A moment on the host and, if the host runs ahead of a GPU, in the GPU's work."""

    def __init__(self, device: torch.device) -> None:
        self.host = time.perf_counter()
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self.event is not None:
            self.event.record()

    def until(self, other: _Tick) -> float:
        """Returns seconds; call it once the GPU has come that far."""
        if self.event is None or other.event is None:
            return other.host - self.host
        return self.event.elapsed_time(other.event) / 1000


def resident_bytes() -> tuple[int, int] | None:
    """Returns the main memory of this process in bytes, now and at its peak; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    now, peak = (int(values[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def _peak_memory(device: torch.device, before: tuple[int, int] | None) -> tuple[str | None, float]:
    """Returns the peak memory in words, and its share of a GPU's."""
    if device.type == "cuda":
        peak, whole = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        return f"{size_in_words(peak)} of {size_in_words(whole)} on {torch.cuda.get_device_name(device)}", peak / whole
    after = resident_bytes()
    if before is None or after is None:
        return None, 0.0
    grown = size_in_words(after[1] - before[0])
    return f"{size_in_words(after[1])} of this process, {grown} of it since training began", 0.0


def size_in_words(count: float) -> str:
    """Formats a number of bytes with three digits."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
