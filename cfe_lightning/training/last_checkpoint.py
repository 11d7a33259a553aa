"""Checkpoints that survive a kill and continue bit for bit: atomic files, ``last.ckpt``, random states, signals."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path, PurePath
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.loop import _Loop

from cfe_lightning.compute.processes import all_reduce_max
from cfe_lightning.compute.signals import (
    StopRequested,
    StopSignals,
    forget_children,
    kill_children,
    name_of,
    silence_trainer,
)

log = logging.getLogger(__name__)
#: A reason to stop beside the signals, more urgent than any of them.
_READING_FAILED = 1000
#: Where Lightning waits for batches.
_FETCHING = (_DataFetcher.__iter__.__code__, _DataFetcher.__next__.__code__)


class OtherProcessFailedError(ValueError):
    """Another process of the same run could not go on and says why; ``last.ckpt`` is up to date."""


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt`` and ends the run when a signal asks for it, after the batch in flight and with nothing lost.

    Lightning's ``ModelCheckpoint(save_last=True)`` writes only when the best has improved, and counts optimiser steps.
    Here a checkpoint is always taken between two batches and never inside one: when the next batch has been read and
    nothing was done with it, before every validation, and after every epoch. What is resumed repeats no batch, leaves
    out no validation, and finds the row of its last batch in ``metrics.csv``.

    Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 raise ``StopRequested`` in all processes after the same batch, whichever of
    them was told; before the first batch they do so at once. Where the next batch cannot be read, ``last.ckpt`` is
    written first, too.

    Args:
        every_n_batches: Training batches between two writes within an epoch; None writes for validations and epochs.
        dirpath: The folder of ``last.ckpt``; None takes the trainer's ``default_root_dir``.
    """

    def __init__(self, every_n_batches: int | None = None, dirpath: str | None = None) -> None:
        if every_n_batches is not None and every_n_batches < 1:
            raise ValueError(f"every_n_batches must be positive or null, got {every_n_batches}.")
        self.every_n_batches = every_n_batches
        self.dirpath = dirpath
        self._signals = StopSignals("stopping after this batch and saving last.ckpt (Ctrl-C again: without it)")
        self._child_handler: Any = None
        self._saved: int | None = None
        self._between = False
        self._agreed = False
        self._planned: BaseException | None = None
        self._last_step: int | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listens to signals until the run ends, in Lightning's place."""
        if stage == "fit":
            silence_trainer(trainer)
            self._agreed, self._planned, self._last_step = False, None, None
            self._signals.__enter__()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remembers whether ``last.ckpt`` is what is resumed."""
        resumed = trainer.ckpt_path is not None and Path(trainer.ckpt_path).resolve() == self.path(trainer).resolve()
        self._saved = _finished(trainer) if resumed else None
        if trainer.fit_loop.restarted_on_epoch_end:
            _leave_epoch(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Saves when it is time and ends a run that was asked to stop; this batch is none of the finished ones."""
        self._signals.patient = True
        self._let_children_die()
        scheduled = self.every_n_batches is not None and _finished(trainer) % self.every_n_batches == 0
        self._stop_or_save(trainer, due=scheduled)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves before every validation, which may be long or fail; what is resumed here begins with it."""
        if not trainer.sanity_checking:
            if self._last_step is not None:
                trainer.fit_loop.epoch_loop.max_steps = self._last_step
            self._stop_or_save(trainer, due=True)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Ends a run that was asked to stop; all was saved before this validation."""
        if not trainer.sanity_checking:
            self._stop_or_save(trainer, due=False)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves again, so that the validation is not repeated; at the end of an epoch that follows at once."""
        if not trainer.sanity_checking and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves after every epoch."""
        self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing is in flight any more."""
        self._signals.patient = False

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the signals to whoever had them before."""
        self._leave()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Saves what is finished where only reading the next batch has failed; no process waits for this one."""
        try:
            if exception is self._planned:
                forget_children(trainer)  # they end by themselves, after the same batch
            elif self._signals.patient and not self._agreed and _in_fetching(exception):
                self._stop_unread(trainer, exception)
            else:
                kill_children(trainer)
        finally:
            self._leave()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Counts as finished what is finished: not the batch that was only read, not the validation to come.

        Called for every checkpoint, those of ``ModelCheckpoint`` included.
        """
        loops = checkpoint["loops"]["fit_loop"]
        batches = loops["epoch_loop.batch_progress"]
        validated = loops["epoch_loop.val_loop.batch_progress"]
        loaders = loops["state_dict"].get("combined_loader", [])
        # What is resumed in the middle of a validation has begun a batch more than it has finished, for ever; what is
        # resumed between two epochs does not know how long the last validation was.
        ended = validated["total"]["completed"]
        validated["total"] = dict.fromkeys(validated["total"], ended)
        validated["current"] = dict.fromkeys(validated["current"], 0)
        validated["is_last_batch"] = False
        if self._between:
            for counts in (batches["total"], batches["current"]):
                counts.update(dict.fromkeys(("ready", "started", "processed"), counts["completed"]))
            if not trainer.validating:
                batches["is_last_batch"] = False
                for loader in loaders:
                    loader["delivered"] = batches["current"]["completed"]
            else:
                # As if the run had died in the first validation batch: Lightning then validates before it goes on.
                validated["total"] |= dict.fromkeys(("ready", "started"), ended + 1)
                validated["current"] |= dict.fromkeys(("ready", "started"), 1)
        if batches["is_last_batch"]:
            # Where limit_train_batches has ended the epoch, loaders have some left that the next one does not skip.
            for loader in loaders:
                loader["delivered"] = 0

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Prepares what is resumed.

        ModelCheckpoint is told where its files are once the folder of the run was moved: it would forget them, and
        write a worse best.ckpt over the best. A run whose last step is done still has its validation to come, which
        Lightning would leave out.
        """
        for callback in trainer.checkpoint_callbacks:
            state = checkpoint["callbacks"].get(callback.state_key)
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None and state is not None:
                _find_again(state, Path(callback.dirpath))
        limit = trainer.fit_loop.max_steps
        if 0 < limit <= checkpoint["global_step"] and _is_to_validate(checkpoint):
            self._last_step = limit
            trainer.fit_loop.epoch_loop.max_steps = checkpoint["global_step"] + 1

    def _let_children_die(self) -> None:
        """Has a loader process that dies be noticed where it is waited for.

        PyTorch's handler raises wherever the program happens to be, also in the middle of an optimiser step. It comes
        with the first loader processes, which are there once a batch has been read.
        """
        listens = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
        if self._child_handler is None and listens:
            self._child_handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _leave(self) -> None:
        self._signals.__exit__()
        if self._child_handler is not None:
            signal.signal(signal.SIGCHLD, self._child_handler)
            self._child_handler = None

    def _stop_or_save(self, trainer: pl.Trainer, *, due: bool) -> None:
        reason = self._agree(trainer, self._signals.received)
        if reason not in (0, _READING_FAILED) and not self._complete(trainer):
            self._agreed = False
            return
        if due or reason:
            self._save_between(trainer)
        if reason:
            self._planned = _stopped(trainer, reason)
            raise self._planned

    def _stop_unread(self, trainer: pl.Trainer, exception: BaseException) -> None:
        """Saves and ends the run where this process could not read its next batch."""
        try:
            # The others have their batch and are about to ask. A scheduler may tell loader processes to end, too.
            reason = self._agree(trainer, self._signals.received or _READING_FAILED)
            self._save_between(trainer)
        except BaseException:  # also a second Ctrl-C
            kill_children(trainer)
            raise
        forget_children(trainer)
        if reason != _READING_FAILED:
            raise _stopped(trainer, reason) from exception

    def _agree(self, trainer: pl.Trainer, reason: int) -> int:
        """The most urgent reason to stop of all processes, 0 for none."""
        # Once a batch, in the place of Lightning's own exchange.
        reason = all_reduce_max(reason, trainer.strategy.root_device)
        self._agreed = reason != 0
        return reason

    def _complete(self, trainer: pl.Trainer) -> bool:
        """Whether no gradients are being accumulated: they would be lost, because no checkpoint holds them."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        last = trainer.validating and progress.is_last_batch  # Lightning steps after the last batch in any case
        return last or progress.current.processed % trainer.accumulate_grad_batches == 0  # type: ignore[attr-defined]

    def _save_between(self, trainer: pl.Trainer) -> None:
        """Saves the state after the last finished batch, unless that is what ``last.ckpt`` holds."""
        if self._complete(trainer) and _finished(trainer) not in (0, self._saved):
            self._between = True
            try:
                self._save(trainer)
            finally:
                self._between = False

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.path(trainer))
        self._saved = _finished(trainer)

    def path(self, trainer: pl.Trainer) -> Path:
        """Where ``last.ckpt`` is."""
        return Path(self.dirpath or trainer.default_root_dir) / "last.ckpt"


def _find_again(state: dict[str, Any], folder: Path) -> None:
    """Renames the files in the state of a ModelCheckpoint to those of a folder, if that has them all."""
    old = state["dirpath"]

    def moved(path: str) -> str:
        inside = path and PurePath(path).is_relative_to(old)
        return str(folder / PurePath(path).relative_to(old)) if inside else path

    kept = {moved(path): score for path, score in state["best_k_models"].items()}
    if old != str(folder) and kept and all(Path(path).is_file() for path in kept):
        names = {name: moved(state[name]) for name in ("best_model_path", "kth_best_model_path", "last_model_path")}
        state.update(names, dirpath=str(folder), best_k_models=kept)


def _is_to_validate(checkpoint: dict[str, Any]) -> bool:
    """Whether the batch that a checkpoint was written after is followed by a validation; see ``on_save_checkpoint``."""
    total = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["total"]
    return bool(total["started"] > total["completed"])


def _leave_epoch(trainer: pl.Trainer) -> None:
    """Begins the next epoch where a finished one is resumed with ``max_steps``.

    Lightning would go through it once more without a batch, and the next would have the images of the one after it.
    """
    loop = trainer.fit_loop
    loop.epoch_progress.increment_completed()
    loop.reset_restart_stage()
    # The setter of the loop itself takes nothing but True where there are max_steps.
    _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]


def _finished(trainer: pl.Trainer) -> int:
    """Training batches finished, whenever it is asked."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]


def _stopped(trainer: pl.Trainer, reason: int) -> BaseException:
    """What ends the run where all processes have agreed to."""
    batches = f"Training stopped after {_finished(trainer)} batches"
    if reason == _READING_FAILED:
        return OtherProcessFailedError(f"{batches}, because another process failed.")
    return StopRequested(reason, f"{batches} by {name_of(reason)}.", agreed=True)


def _in_fetching(error: BaseException) -> bool:
    """Whether an exception comes from reading a batch, between two batches."""
    trace = error.__traceback__ if isinstance(error, Exception) else None
    while trace is not None and trace.tb_frame.f_code not in _FETCHING:
        trace = trace.tb_next
    return trace is not None
