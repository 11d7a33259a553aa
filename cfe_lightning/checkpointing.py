"""Checkpoints that survive a kill and continue bit for bit: atomic files, ``last.ckpt``, random states, Ctrl-C."""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from cfe_lightning.callbacks import iteration

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the old file and renames: a kill at any moment leaves the old checkpoint or the new one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Saves plain data and tensors to a local file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.part")
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


class RandomState(pl.Callback):
    """Saves the random states of every process and restores them just before the first resumed batch.

    Processes other than the first start from another seed, or all would draw the same noise.
    """

    def __init__(self) -> None:
        self._loaded: list[dict[str, Any]] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sets this process's state."""
        if self._loaded is not None and len(self._loaded) == trainer.world_size:
            _set_random_state(self._loaded[trainer.global_rank])
        elif trainer.global_rank > 0:
            torch.manual_seed(torch.initial_seed() + trainer.global_rank)
        if self._loaded is not None and len(self._loaded) != trainer.world_size:
            log.warning(
                "The checkpoint was written by %d process(es), this run has %d: it goes on with other random numbers.",
                len(self._loaded),
                trainer.world_size,
            )
        self._loaded = None

    def state_dict(self) -> dict[str, Any]:
        """The states of all processes as plain data; called by all of them."""
        mine = _random_state()
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return {"processes": [mine]}
        states: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(states, mine)
        return {"processes": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the states until training starts: building loaders and models draws numbers too."""
        self._loaded = state_dict["processes"]


def _random_state() -> dict[str, Any]:
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        # Lists, not NumPy arrays: a checkpoint must load with weights_only.
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "python": [version, list(words), gauss],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


class TrainingStoppedError(RuntimeError):
    """The user asked for the end by Ctrl-C; ``last.ckpt`` is up to date."""


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt`` after every epoch, every ``every_n_batches`` and when the user or a cluster stops the run.

    Lightning's ``ModelCheckpoint(save_last=True)`` writes only when the best has improved, and counts optimiser steps.
    A checkpoint is always taken between two batches, never inside one, so resuming repeats nothing.

    Args:
        every_n_batches: Training batches between two writes within an epoch; None writes after epochs only.
        dirpath: The folder of ``last.ckpt``; None takes the trainer's ``default_root_dir``.
    """

    def __init__(self, every_n_batches: int | None = None, dirpath: str | None = None) -> None:
        if every_n_batches is not None and every_n_batches < 1:
            raise ValueError(f"every_n_batches must be positive or null, got {every_n_batches}.")
        self.every_n_batches = every_n_batches
        self.dirpath = dirpath
        self._stop = False
        self._stop_agreed = False
        self._due = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listens to Ctrl-C until training ends, when Lightning puts all signal handlers back as they were."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._on_interrupt)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ends a stopped run only here: a validation or epoch end after the last batch has been completed and saved."""
        if self._stop_agreed:
            raise TrainingStoppedError(f"Training stopped after {iteration(trainer) - 1} batches.")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves when it is time, or when any process was asked to stop."""
        step = iteration(trainer)
        self._stop_agreed = self._agree_to_stop(trainer, step)
        # Lightning ends a run that was sent SIGTERM after this batch; several processes do not learn of it together.
        terminated = trainer.world_size == 1 and trainer.received_sigterm
        scheduled = self.every_n_batches is not None and step % self.every_n_batches == 0
        self._due = self._stop_agreed or terminated or scheduled
        if self._due:
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves again when a validation followed the batch, or resuming would leave it out."""
        if self._due and not trainer.sanity_checking:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves after every epoch."""
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(Path(self.dirpath or trainer.default_root_dir) / "last.ckpt")

    def _agree_to_stop(self, trainer: pl.Trainer, step: int) -> bool:
        if trainer.world_size == 1:
            return self._stop
        # Asking the others after every batch would cost more than waiting a few batches does.
        return step % 10 == 0 and trainer.strategy.reduce_boolean_decision(self._stop, all=False)

    def _on_interrupt(self, signal_number: int, frame: FrameType | None) -> None:
        self._stop = True
        log.warning("Stopping after this batch and saving last.ckpt; press Ctrl-C again to stop at once without it.")
        signal.signal(signal.SIGINT, signal.default_int_handler)
