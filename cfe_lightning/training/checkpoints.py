"""Checkpoint files that survive a kill, and the random state that they hold."""

import contextlib
import logging
import os
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from cfe_lightning.files.tensors import load_plain, save_plain

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints that are whole at any moment: the old one, or the new one.

    It removes older checkpoints only from folders that this run has written to, because a foreign checkpoint may name
    any file as an older one.
    """

    def __init__(self) -> None:
        self._folders: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Saves plain data and tensors to a local file.

        Raises:
            OSError: If the file cannot be written; the message names it.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_plain(path, checkpoint)
        _keep_name(path)
        self._folders.add(path.parent.resolve())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads plain data and tensors from a local file onto the CPU; Lightning moves them from there.

        Args:
            path: Checkpoint file.
            map_location: Ignored; Lightning passes none.
            weights_only: Ignored; files are always read as plain data.

        Raises:
            ValueError: If the file holds anything else.
        """
        try:
            return load_plain(Path(path))
        except ValueError as error:
            raise ValueError(f"{path} cannot be read as a checkpoint: {error}; give a file of train.py.") from error

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a regular .ckpt file in a folder that this run has written to; leaves anything else."""
        path = Path(path)
        ours = path.suffix == ".ckpt" and path.parent.resolve() in self._folders
        if ours and path.is_file() and not path.is_symlink():
            path.unlink()
        elif os.path.lexists(path):
            log.warning("%s is no checkpoint in the folder of this run, so it was not removed.", path)


def _keep_name(path: Path) -> None:
    """Flushes a folder, so that a new name survives a power failure; not every file system allows it."""
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class RandomState(pl.Callback):
    """Saves the random states of all processes and restores them right before the first resumed batch.

    Every process but the first starts from a seed of its own; otherwise all would draw the same noise.
    """

    def __init__(self) -> None:
        self._loaded: list[dict[str, Any]] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restores the state of this process."""
        loaded, self._loaded = self._loaded, None
        rank, size = trainer.global_rank, trainer.world_size
        if loaded is not None and len(loaded) == size:
            _set_random_state(loaded[rank])
        elif rank > 0:
            torch.manual_seed(torch.initial_seed() + rank)
        if loaded is not None and len(loaded) != size:
            message = (
                "The checkpoint was written by %d process(es), this run has %d: it goes on with other random numbers."
            )
            log.warning(message, len(loaded), size)

    def state_dict(self) -> dict[str, Any]:
        """Gathers the states of all processes as plain data; all processes call it."""
        mine = _random_state()
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return {"processes": [mine]}
        states: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(states, mine)
        return {"processes": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the states until training starts, because building loaders and models draws numbers."""
        self._loaded = state_dict["processes"]


def _random_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        # Lists, not NumPy arrays: a checkpoint must load with weights_only.
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "python": [version, list(words), gauss],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
