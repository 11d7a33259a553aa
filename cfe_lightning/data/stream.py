"""A folder of images without labels, read in batches as they are needed."""

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
from cfe_lightning.images import medical

Batch = dict[str, Any]


class ImageStream(pl.LightningDataModule):
    """Feeds ``Trainer.predict`` with files; batches do not depend on the number of processes or loader workers.

    A batch is a dictionary with ``image`` [B, C, H, W] in [-1, 1], ``name`` (B names), ``source`` (size and
    modification time of each file), ``target`` [B] if one is given, and ``failed``: name, source and error of every
    unreadable file of the batch. If all are unreadable, ``image`` holds one blank image and ``name`` is empty.

    Args:
        batches: Names relative to the folder, batch by batch. Only the first process needs them.
        num_workers: Loader processes; with 0 a thread reads the next batch while the current one is explained.
        reading: Options of ``read_batch``.
    """

    def __init__(self, *, batches: list[list[str]], num_workers: int = 0, **reading: Any) -> None:
        super().__init__()
        self.batches = batches
        self.num_workers = num_workers
        self._read = partial(read_batch, **reading)

    def setup(self, stage: str) -> None:
        """Takes the list of the first process, because the folder may change while the others start."""
        del stage
        if self.trainer is not None:
            self.batches = self.trainer.strategy.broadcast(self.batches)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Loads the batches of this process."""
        rank, world_size = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(
            dataset=_Reader(self.batches[rank::world_size], self._read),
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
    """Maps ``read`` over the batches in order, one batch ahead of the consumer; decoding lets other threads run."""
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
    """Reads one batch of ``ImageStream``; unreadable files are named in ``failed`` and do not stop the others.

    Args:
        names: Names relative to ``folder``.
        folder: Folder of the files.
        image_size: Side of the square images in pixels.
        channels: 1 for grey, 3 for RGB.
        target: Target class of all images; None leaves it to the explainer.
        num_slices: Slices per image; with more than one, a name is a patient of ``find_patients``, shown as a montage.
        window: Level and width of the shown values of DICOM and NIfTI files; None shows the whole range.
    """
    batch: Batch = {"image": [], "name": [], "source": [], "failed": []}
    for name in names:
        source = source_of(folder / name)
        try:
            if num_slices == 1:
                image = medical.read_slice(folder / name, channels, size=image_size, window=window)
            else:
                image = read_montage(
                    folder / name, num_slices=num_slices, image_size=image_size, channels=channels, window=window
                )
        # ModuleNotFoundError: a medical format without its package.
        except (images.UnreadableImageError, ModuleNotFoundError) as error:
            batch["failed"].append({"name": name, "source": source, "error": str(error)})
        else:
            batch["image"].append(image)
            batch["name"].append(name)
            batch["source"].append(source)

    # Tensors; a batch is never empty.
    batch["image"] = torch.stack(batch["image"] or [torch.zeros(channels, image_size, image_size)])
    if target is not None:
        batch["target"] = torch.full((len(batch["image"]),), target)
    return batch


def source_of(path: Path) -> list[int]:
    """Returns size and modification time of a file, which change with its content; zeros if it does not exist.

    For a patient's folder they are the sum and the latest of its files.
    """
    try:
        held = [file.stat() for file in os.scandir(path) if file.is_file()] if path.is_dir() else [path.stat()]
    except OSError:
        return [0, 0]
    return [sum(status.st_size for status in held), max((status.st_mtime_ns for status in held), default=0)]
