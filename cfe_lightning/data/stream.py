"""A folder of images without labels, read in batches as they are needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from cfe_lightning import images
from cfe_lightning.data.patient_slices import read_montage
from cfe_lightning.images import medical as medical_files

Batch = dict[str, Any]


class ImageStream(pl.LightningDataModule):
    """Feeds ``Trainer.predict`` with given files; a batch never depends on the number of processes or loader workers.

    A batch is a dictionary with ``image`` [B, C, H, W] in [-1, 1], ``name`` (B names), ``source`` (size and
    modification time of each file), ``target`` [B] where one is asked for, and ``failed``: name, source and error of
    every file of the batch that could not be read. Where none could, ``image`` holds one blank image and ``name`` none.

    Args:
        folder: Where the files are.
        batches: Names relative to ``folder``, batch by batch. Only the first process needs them.
        image_size: Side of the square images, in pixels.
        channels: 1 for grey, 3 for RGB.
        target: The class to ask for; None leaves it to the explainer.
        num_slices: With more than one, every name is a patient of ``find_patients`` and becomes a montage.
        window: Of DICOM and NIfTI files, see ``medical_files.apply_window``.
        num_workers: Loader processes; with 0 a thread reads the next batch while the current one is explained.
    """

    def __init__(
        self,
        *,
        folder: Path,
        batches: list[list[str]],
        image_size: int,
        channels: int,
        target: int | None = None,
        num_slices: int = 1,
        window: tuple[float, float] | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.folder = folder
        self.batches = batches
        self.image_size = image_size
        self.channels = channels
        self.target = target
        self.num_slices = num_slices
        self.window = window
        self.num_workers = num_workers

    def setup(self, stage: str) -> None:
        """Takes over the first process's list: the folder may change while the others start."""
        del stage
        if self.trainer is not None:
            self.batches = self.trainer.strategy.broadcast(self.batches)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The batches of this process."""
        rank, world_size = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        read = partial(
            read_batch,
            folder=self.folder,
            image_size=self.image_size,
            channels=self.channels,
            target=self.target,
            num_slices=self.num_slices,
            window=self.window,
        )
        return DataLoader(
            dataset=_Reader(self.batches[rank::world_size], read),
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )


class _Reader(IterableDataset[Batch]):
    """Reads batches one after the other, divided among the loader's workers."""

    def __init__(self, batches: list[list[str]], read: Callable[[list[str]], Batch]) -> None:
        self.batches = batches
        self.read = read

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        if worker is None:
            return _one_ahead(self.read, self.batches)
        return map(self.read, self.batches[worker.id :: worker.num_workers])


def _one_ahead(read: Callable[[list[str]], Batch], batches: list[list[str]]) -> Iterator[Batch]:
    """``map`` in the given order, one batch ahead of whoever iterates; decoding lets other threads run."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming: Future[Batch] | None = None
        for names in batches:
            current, coming = coming, thread.submit(read, names)
            if current is not None:
                yield current.result()
        if coming is not None:
            yield coming.result()


def read_batch(
    names: list[str],
    *,
    folder: Path,
    image_size: int,
    channels: int,
    target: int | None = None,
    num_slices: int = 1,
    window: tuple[float, float] | None = None,
) -> Batch:
    """Reads one batch of ``ImageStream``; files that cannot be read are named in ``failed`` and stop no other."""
    batch: Batch = {"image": [], "name": [], "source": [], "failed": []}
    for name in names:
        source = source_of(folder / name)
        try:
            if num_slices == 1:
                image = medical_files.read_slice(folder / name, channels, size=image_size, window=window)
            else:
                image = read_montage(
                    folder / name, num_slices=num_slices, image_size=image_size, channels=channels, window=window
                )
        # The second: a medical format whose package is not installed.
        except (images.UnreadableImageError, ModuleNotFoundError) as error:
            batch["failed"].append({"name": name, "source": source, "error": str(error)})
        else:
            batch["image"].append(image)
            batch["name"].append(name)
            batch["source"].append(source)
    batch["image"] = torch.stack(batch["image"] or [torch.zeros(channels, image_size, image_size)])
    if target is not None:
        batch["target"] = torch.full((len(batch["image"]),), target)
    return batch


def source_of(path: Path) -> list[int]:
    """Size and modification time of a file: what tells that its content has been exchanged; zeros where it is gone.

    Of a patient's folder, the sum and the latest of what it holds.
    """
    try:
        if path.is_dir():
            held = [entry.stat() for entry in os.scandir(path) if entry.is_file()]
            return [sum(status.st_size for status in held), max((status.st_mtime_ns for status in held), default=0)]
        status = os.stat(path)
    except OSError:
        return [0, 0]
    return [status.st_size, status.st_mtime_ns]
