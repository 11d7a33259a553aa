"""Checkpoint files that survive a kill, and the random state that they hold."""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from cfe_lightning.files.tensors import load_plain, save_plain
from cfe_lightning.training.last_checkpoint import log


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the old file and renames: whatever happens leaves the old checkpoint or the new one, whole.

    Checkpoints say which older ones are to be removed, and are anybody's: only those are that lie where this run has
    written, too.
    """

    def __init__(self) -> None:
        self._folders: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Saves plain data and tensors to a local file.

        Raises:
            OSError: If the file cannot be written; it names the file.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_plain(path, checkpoint)
        _keep_name(path)
        self._folders.add(path.parent.resolve())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads plain data and tensors from a local file onto the CPU, from where Lightning moves them.

        Args:
            path: The file.
            map_location: Not used, as Lightning gives none.
            weights_only: Always so.

        Raises:
            ValueError: If the file holds anything else.
        """
        try:
            return load_plain(Path(path))
        except ValueError as error:
            raise ValueError(f"{path} cannot be read as a checkpoint: {error}; give a file of train.py.") from error

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a regular file called .ckpt from a folder that this run has written to, and leaves anything else."""
        path = Path(path)
        ours = path.suffix == ".ckpt" and path.parent.resolve() in self._folders
        if ours and path.is_file() and not path.is_symlink():
            path.unlink()
        elif os.path.lexists(path):
            log.warning("%s is no checkpoint in the folder of this run, so it was not removed.", path)


def _keep_name(path: Path) -> None:
    """A new name outlives a power failure only once its folder is written; not every file system lets one ask."""
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


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
