"""``last.ckpt``, from which a killed or stopped run continues bit for bit."""

import signal
import threading
from pathlib import Path, PurePath
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from cfe_lightning.compute.processes import all_reduce_max
from cfe_lightning.compute.signals import StopRequested, StopSignals, name_of
from cfe_lightning.training import lightning_inside as inside
from cfe_lightning.training.lightning_inside import finished_batches, forget_children, kill_children, set_step_limit

#: The reason to stop beside the signals, more urgent than any of them.
_READING_FAILED = 1000


class OtherProcessFailedError(ValueError):
    """Another process of the same run failed and says why; ``last.ckpt`` is up to date."""


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt``, and ends the run on a signal after the batch in flight, with nothing lost.

    Lightning's ``ModelCheckpoint(save_last=True)`` writes only when the best has improved, and counts optimiser steps.
    This callback saves between two batches and never inside one: after the next batch was read and before anything is
    done with it, before every validation, and after every epoch. A resumed run repeats no batch, leaves out no
    validation, and finds the row of its last batch in ``metrics.csv``.

    Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 raise ``StopRequested`` in all processes after the same batch, whichever
    process received them; before the first batch they do so at once. If the next batch cannot be read, ``last.ckpt`` is
    written first as well.

    Args:
        every_n_batches: Training batches between two writes within an epoch; None writes for validations and epochs.
        dirpath: Folder of ``last.ckpt``; None takes the trainer's ``default_root_dir``.
    """

    def __init__(self, every_n_batches: int | None = None, dirpath: str | None = None) -> None:
        if every_n_batches is not None and every_n_batches < 1:
            raise ValueError(f"every_n_batches must be positive or null, got {every_n_batches}.")
        self.every_n_batches, self.dirpath = every_n_batches, dirpath
        self._signals = StopSignals("stopping after this batch and saving last.ckpt (Ctrl-C again: without it)")
        self._child_handler: Any = None
        self._between = self._agreed = False
        self._planned: BaseException | None = None
        self._saved: int | None = None
        self._last_step: int | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listens to signals until the run ends, in Lightning's place."""
        if stage == "fit":
            inside.silence_signals(trainer)
            self._agreed, self._planned, self._last_step = False, None, None
            self._signals.__enter__()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remembers whether the run is resumed from ``last.ckpt`` itself."""
        resumed = trainer.ckpt_path is not None and Path(trainer.ckpt_path).resolve() == self.path(trainer).resolve()
        self._saved = finished_batches(trainer) if resumed else None
        inside.leave_finished_epoch(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Saves on schedule and stops on request; the batch at hand is not finished."""
        self._signals.patient = True
        self._notice_dead_loaders_late()
        scheduled = self.every_n_batches is not None and finished_batches(trainer) % self.every_n_batches == 0
        self._stop_or_save(trainer, due=scheduled)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves before every validation, which may be long or fail; a run resumed here begins with it."""
        if not trainer.sanity_checking:
            if self._last_step is not None:
                set_step_limit(trainer, self._last_step)
            self._stop_or_save(trainer, due=True)

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Stops on request; everything was saved before this validation."""
        if not trainer.sanity_checking:
            self._stop_or_save(trainer, due=False)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves again, so that the validation is not repeated; the end of an epoch saves right afterwards anyway."""
        if not trainer.sanity_checking and not inside.is_last_batch(trainer):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves after every epoch."""
        self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets signals end the program at once: no batch is in flight any more."""
        self._signals.patient = False

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Returns the signals to their former handlers."""
        self._leave()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Saves finished batches if only reading the next one failed; leaves no process that waits for this one."""
        try:
            if exception is self._planned:
                forget_children(trainer)  # they end by themselves, after the same batch
            elif self._signals.patient and not self._agreed and inside.failed_in_fetching(exception):
                self._stop_unread(trainer, exception)
            else:
                kill_children(trainer)
        finally:
            self._leave()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Makes every checkpoint, also those of ``ModelCheckpoint``, count finished batches and validations only."""
        inside.count_finished_only(checkpoint, between=self._between, validating=bool(trainer.validating))

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Finds the files of a moved run again, and keeps the validation after the last step of ``max_steps``."""
        # In a moved folder ModelCheckpoint would forget its files and write a worse best.ckpt over the best.
        for callback in trainer.checkpoint_callbacks:
            state = checkpoint["callbacks"].get(callback.state_key)
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None and state is not None:
                _find_again(state, Path(callback.dirpath))

        # Lightning would leave out the validation that is still to come.
        limit = inside.step_limit(trainer)
        if 0 < limit <= checkpoint["global_step"] and inside.is_to_validate(checkpoint):
            self._last_step = limit
            set_step_limit(trainer, checkpoint["global_step"] + 1)

    def path(self, trainer: pl.Trainer) -> Path:
        """Returns the path of ``last.ckpt``."""
        return Path(self.dirpath or trainer.default_root_dir) / "last.ckpt"

    def _notice_dead_loaders_late(self) -> None:
        """Lets a dead loader process be noticed where the program waits for it.

        PyTorch's handler raises at any point of the program, also in the middle of an optimiser step. It comes with
        the first loader processes, which exist once a batch has been read.
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
        if reason not in (0, _READING_FAILED) and inside.accumulates(trainer):
            self._agreed = False
            return
        if due or reason:
            self._save_between(trainer)
        if reason:
            self._planned = _stopped(trainer, reason)
            raise self._planned

    def _stop_unread(self, trainer: pl.Trainer, exception: BaseException) -> None:
        """Saves and ends the run if this process cannot read its next batch."""
        try:
            # The other processes have their batch and are about to ask; schedulers may end loader processes, too.
            reason = self._agree(trainer, self._signals.received or _READING_FAILED)
            self._save_between(trainer)
        except BaseException:  # also a second Ctrl-C
            kill_children(trainer)
            raise
        forget_children(trainer)
        if reason != _READING_FAILED:
            raise _stopped(trainer, reason) from exception

    def _agree(self, trainer: pl.Trainer, reason: int) -> int:
        """Returns the most urgent reason to stop among all processes, 0 for none."""
        # Once per batch, in the place of Lightning's own exchange.
        reason = all_reduce_max(reason, trainer.strategy.root_device)
        self._agreed = reason != 0
        return reason

    def _save_between(self, trainer: pl.Trainer) -> None:
        """Saves the state after the last finished batch, unless ``last.ckpt`` holds it."""
        if not inside.accumulates(trainer) and finished_batches(trainer) not in (0, self._saved):
            self._between = True
            try:
                self._save(trainer)
            finally:
                self._between = False

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.path(trainer))
        self._saved = finished_batches(trainer)


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


def _stopped(trainer: pl.Trainer, reason: int) -> BaseException:
    """Returns the exception that ends the run once all processes have agreed."""
    batches = f"Training stopped after {finished_batches(trainer)} batches"
    if reason == _READING_FAILED:
        return OtherProcessFailedError(f"{batches}, because another process failed.")
    return StopRequested(reason, f"{batches} by {name_of(reason)}.", agreed=True)
