"""``train.py --dry-run``: predicts the time and memory of a run from a few timed iterations."""

import math
import os
import statistics
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn

from cfe_lightning.data.base import ImageData
from cfe_lightning.explainer import ExplainerModule
from cfe_lightning.files.text import one_line
from cfe_lightning.training.lightning_inside import drop_minimum_length, silence_signals
from cfe_lightning.training.run import ConfiguredRun
from cfe_lightning.training.samples import SampleGrid
from cfe_lightning.training.stopwatch import VAL_BATCHES, Measured, MeasuredError, Stopwatch, size_in_words
from cfe_lightning.training.watching import NonFiniteGuard

#: Callbacks that write files or print, and do no work of an iteration.
_LEFT_OUT = (Checkpoint, ModelSummary, NonFiniteGuard, ProgressBar, SampleGrid)
#: Shares of the waiting time and of a GPU's memory above which advice is given.
_SLOW_DATA, _FULL_MEMORY = 0.1, 0.9


class DryRun(ConfiguredRun):
    """Builds and measures a training run, and leaves nothing behind except the files of a ``cache_folder``.

    It takes the arguments of ``ConfiguredRun``. Foreign callbacks run as usual.
    """

    def before_instantiate_classes(self) -> None:
        """Drops the loggers of the config, which would begin a run."""
        self.config.trainer.logger = False

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Returns the trainer without callbacks that write, with a short validation after the timed iterations."""
        # Callbacks.
        trainer: Any = super().instantiate_trainer(**kwargs)
        silence_signals(trainer)  # as LastCheckpoint does in a run
        self.stopwatch = Stopwatch(trainer.limit_val_batches)
        kept = [callback for callback in trainer.callbacks if not isinstance(callback, _LEFT_OUT)]
        # The stopwatch comes last, so that the work of all others counts.
        trainer.callbacks = [*kept, self.stopwatch]

        # Loggers and limits; some callbacks need a logger.
        trainer.loggers = [DummyLogger()]
        trainer.strategy.checkpoint_io = self.stopwatch.scales
        trainer.limit_val_batches = VAL_BATCHES if trainer.limit_val_batches else 0
        trainer.check_val_every_n_epoch, trainer.val_check_interval, trainer.num_sanity_val_steps = 1, 1.0, 0
        drop_minimum_length(trainer)
        return trainer

    def measure(self) -> str:
        """Runs a few iterations and a short validation, and returns the table to be printed.

        Raises:
            ValueError: If Lightning or the method refuses the configuration.
        """
        # Nothing to train.
        if isinstance(self.model, ExplainerModule) and not self.model.needs_training:
            self.trainer.strategy.connect(self.model)
            self.trainer.save_checkpoint("")
            return (
                f"{parameter_table(self.model)}\n{type(self.model).__name__} needs no training: train.py saves it at "
                f"once, as a checkpoint of {size_in_words(self.stopwatch.scales.size)}.\n"
            )

        # Timed iterations.
        measured = self.stopwatch.measured
        try:
            self.train()
        except MeasuredError:
            pass
        except ValueError as error:
            # A model that has learned from a few batches only may fail in its validation.
            if not self.stopwatch.is_judging:
                raise
            measured.trouble = f"{one_line(error)}."
            self.stopwatch.read(self.trainer.strategy.root_device)
        return f"{parameter_table(self.model)}\n{self._table()}{self._advice()}"

    def _table(self) -> str:
        # Length of the run.
        measured, trainer = self.stopwatch.measured, self.trainer
        iterations, seconds = measured.iterations, measured.iteration_seconds
        planned = self.config.trainer
        times = validations_per_epoch(planned.val_check_interval or 1.0, planned.check_val_every_n_epoch, iterations)
        validation = times * measured.val_seconds
        epoch = iterations * seconds + validation
        epochs = planned_epochs(trainer.max_epochs, trainer.max_steps, iterations, measured.steps)
        run = "no end is set"
        if not math.isinf(epochs):
            run = f"{_duration(epochs * epoch + measured.preparation)} for {epochs:.3g} epochs"

        # Rows.
        median = f"{statistics.median(measured.seconds):.3g} (median of {len(measured.seconds)})"
        rows = [
            ("images", ", ".join(f"{count:,} {split}" for split, count in measured.images.items())),
            ("iterations per epoch", f"{iterations:,} of {measured.batch} images"),
            ("seconds per iteration", f"{median}, {seconds:.3g} (mean)"),
            ("images per second", f"{measured.batch / seconds:.3g}"),
            ("waiting for data", f"{measured.waiting:.0%} of the time"),
            ("epoch", _duration(epoch) + (f", {_duration(validation)} of it validation" if validation else "")),
            ("run", run),
            ("checkpoint", size_in_words(self.stopwatch.scales.size)),
        ]
        if measured.preparation >= 1:
            rows.insert(-2, ("before training", _duration(measured.preparation)))
        if measured.memory:
            rows.insert(-1, ("peak memory", measured.memory))
        return "".join(f"{title:<23}{text}\n" for title, text in rows)

    def _advice(self) -> str:
        measured, said = self.stopwatch.measured, list[str]()
        if len(measured.seconds) < measured.cycle:
            said.append(
                f"Only {len(measured.seconds)} of the {measured.cycle} iterations were timed after which every penalty "
                "has come once: the means may be off."
            )
        if measured.trouble:
            said.append(f"The end of a validation could not be measured: {measured.trouble}")
        num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        sentence = advice(measured, self.model, self.datamodule, num_cores)
        return "".join(f"{sentence}\n" for sentence in [*said, sentence] if sentence)


def validations_per_epoch(val_check_interval: Any, check_val_every_n_epoch: int | None, iterations: int) -> float:
    """Returns the validations per epoch; validations by the clock count as one per epoch.

    Args:
        val_check_interval: The trainer's argument.
        check_val_every_n_epoch: The trainer's argument.
        iterations: Training batches per epoch.
    """
    interval = val_check_interval
    if check_val_every_n_epoch is None:  # the interval counts batches over all epochs
        return iterations / interval
    if isinstance(interval, float):
        interval = max(int(iterations * interval), 1)
    return (iterations // interval if isinstance(interval, int) else 1) / check_val_every_n_epoch


def planned_epochs(max_epochs: int | None, max_steps: int, iterations: int, steps: float) -> float:
    """Returns the length of a training in epochs, infinite without a limit.

    Args:
        max_epochs: The trainer's argument.
        max_steps: The trainer's argument, in optimiser steps.
        iterations: Training batches per epoch.
        steps: Optimiser steps per batch.
    """
    by_epochs = math.inf if max_epochs in (None, -1) else max_epochs
    by_steps = math.inf if max_steps == -1 else max_steps / max(steps, 1e-9) / iterations
    return min(by_epochs, by_steps)


def parameter_table(module: nn.Module) -> str:
    """Counts trainable and frozen parameters of every network in a module; shared ones count once."""
    seen = set[int]()
    rows: list[tuple[str, int, int]] = []
    parts: list[tuple[str, Any]] = [*module.named_children(), *module.named_parameters(recurse=False)]
    for name, part in parts:
        counts = [0, 0]
        own: list[nn.Parameter] = list(part.parameters()) if isinstance(part, nn.Module) else [part]
        for parameter in own:
            counts[not parameter.requires_grad] += parameter.numel() * (id(parameter) not in seen)
            seen.add(id(parameter))
        if any(counts):
            rows.append((name, counts[0], counts[1]))
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    lines = "".join(f"{name:<23}{trainable:>15,}{frozen:>15,}\n" for name, trainable, frozen in rows)
    return f"{'parameters':<23}{'trainable':>15}{'frozen':>15}\n{lines}"


def advice(measured: Measured, model: pl.LightningModule, data: ImageData, num_cores: int) -> str | None:
    """Returns one sentence of advice where it is clear what to change."""
    # Memory.
    if measured.memory_share > _FULL_MEMORY:
        ways = ["a smaller --data.batch_size"]
        if parts := model.hparams.get("micro_batches"):
            ways.append(f"--model.micro_batches {2 * parts}")
        if getattr(model, "blocks", list)():
            ways.append("the callback cfe_lightning.compute.acceleration.RecomputeActivations")
        return f"The GPU's memory is {measured.memory_share:.0%} full: {' or '.join(ways)} would need less."

    # Data.
    if measured.waiting < _SLOW_DATA:
        return None
    problem = f"Waiting for data takes {measured.waiting:.0%} of the time"
    seconds = measured.iteration_seconds
    # Without loader processes all reading is waiting; with some, they have worked all the time.
    work = data.num_workers * seconds or measured.waiting * seconds
    workers = math.ceil(work / max((1 - measured.waiting) * seconds, 1e-9))
    if data.num_workers < workers <= num_cores:
        return f"{problem}: --data.num_workers {workers} would keep up."
    if getattr(data, "image_cache", 0) is None:
        size = size_in_words(4 * data.channels * data.image_size**2 * sum(measured.images.values()))
        return f"{problem}: --data.cache_folder FOLDER would keep the resized images on a disk ({size})."
    return f"{problem}: images in a smaller size or on a faster disk, or more than {num_cores} cores, would help."


def _duration(seconds: float) -> str:
    for unit, length, largest in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if seconds < length * largest:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds / 86400:.3g} days"
