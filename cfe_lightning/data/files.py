"""Labelled image files as a data set, and the base of the sources that read them."""

from __future__ import annotations

import csv
import logging
import os
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import center_crop

from cfe_lightning import images
from cfe_lightning.data.base import ImageData, Sample
from cfe_lightning.data.cache import ImageCache

Crop = int | Literal["largest"] | None

_log = logging.getLogger(__name__)

#: A split is kept in memory if its images in all loader processes together need at most this number of bytes.
CACHE_BYTES = 1 << 30


class LabelledFile(NamedTuple):
    """One image file: its path, its unique name, its class, and its group, such as the patient it shows."""

    path: Path
    name: str
    label: int
    group: str


class LabelledImages(Dataset[Sample]):
    """Images with labels and names, kept in memory after the first loading if the whole split fits.

    Args:
        names: Unique and stable names, [N].
        labels: Class of each image, [N] int64; ``ImageData`` needs them for class-balanced drawing.
        image_size: Side of the square images in pixels.
        channels: 1 for grey, 3 for RGB.
        num_copies: Number of processes that each keep the images in a memory of their own; 0 keeps none.
        image_cache: Folder of resized images that is read and filled; None reads the files only.
    """

    def __init__(
        self,
        names: Sequence[str],
        labels: Tensor,
        *,
        image_size: int,
        channels: int,
        num_copies: int = 0,
        image_cache: ImageCache | None = None,
    ) -> None:
        self.names = names
        self.labels = labels
        self.image_size = image_size
        self.channels = channels
        self.image_cache = image_cache
        bytes_needed = 4 * channels * image_size**2 * len(names) * num_copies
        # float32, so that memory returns exactly the loaded values.
        self._memory: dict[int, Tensor] | None = {} if 0 < bytes_needed <= CACHE_BYTES else None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        """Returns image [C, H, W], label and name."""
        image = self._memory.get(index) if self._memory is not None else None
        if image is None:
            image = self.load(index)
            if self._memory is not None:
                self._memory[index] = image
        return {"image": image, "label": int(self.labels[index]), "name": self.names[index]}

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the memory out: a loader process with its own copy fills its own."""
        return self.__dict__ | {"_memory": None if self._memory is None else {}}

    @abstractmethod
    def load(self, index: int) -> Tensor:
        """Reads or decodes one image, [C, image_size, image_size] in [-1, 1]."""

    def _cached(self, path: Path, settings: str, read: Callable[[], Tensor]) -> Tensor:
        """Reads a file, or takes its image from the cache; the arguments are those of ``ImageCache.load``."""
        if self.image_cache is None:
            return read()
        return self.image_cache.load(path, settings, (self.channels, self.image_size, self.image_size), read)


class ImageFiles(LabelledImages):
    """Labelled files, read at one size.

    Args:
        files: Files in the order of the data set.
        crop: Side in pixels of the square, or "largest" possible square, cut out before resizing; None cuts nothing.
        options: Options of ``LabelledImages``.
    """

    def __init__(self, files: Sequence[LabelledFile], *, crop: Crop = None, **options: Any) -> None:
        labels = torch.tensor([file.label for file in files], dtype=torch.int64)
        super().__init__([file.name for file in files], labels, **options)
        self.files = files
        self.crop = crop

    def load(self, index: int) -> Tensor:
        """Reads one file, or takes its image from the cache.

        Raises:
            UnreadableImageError: If the file cannot be read; the message names it.
        """
        path = self.files[index].path
        return self._cached(path, f"crop {self.crop}", lambda: self._read(path))

    def _read(self, path: Path) -> Tensor:
        try:
            if self.crop is None:
                return images.read_image(path, self.channels, size=self.image_size)
            # Crop, then resize.
            picture = images.read_image(path, self.channels)
            side = min(picture.shape[-2:]) if self.crop == "largest" else self.crop
            # Rounded weights of the resizing filter may exceed the range by one unit in the last place.
            return images.resize(center_crop(picture, [side]), self.image_size).clamp(-1.0, 1.0)
        except images.UnreadableImageError as error:
            raise images.UnreadableImageError(
                f"The image {path} cannot be used ({str(error).rstrip('.')}): repair or remove it, or set "
                "skip_unreadable=true."
            ) from error


class FileData(ImageData):
    """A data source that reads image files and keeps the resized images in memory or in a folder.

    Args:
        skip_unreadable: Reads every file at the start and leaves unreadable ones out, with their number in the log.
            False stops at the first unreadable file with its name.
        cache: Keeps images in memory after their first reading, if all images of a split take less than 1 GiB.
        cache_folder: Folder in which resized images are kept for later epochs, runs and processes, with exactly the
            values that reading gives. An image takes 4 bytes per value: 786 kB in RGB at 256 x 256 pixels. Worth it for
            large pictures, compressed volumes and slow disks. None keeps no images on disk.
        loading: Options of ``ImageData``.

    Raises:
        ValueError: If ``cache_folder`` is a file.
    """

    def __init__(
        self, *, skip_unreadable: bool = False, cache: bool = True, cache_folder: str | None = None, **loading: Any
    ) -> None:
        super().__init__(**loading)
        self.skip_unreadable = skip_unreadable
        self.num_copies = max(self.num_workers, 1) if cache else 0
        self.image_cache = None if cache_folder is None else ImageCache(Path(cache_folder))

    def image_files(self, files: list[LabelledFile], *, crop: Crop = None, alternate: bool = True) -> ImageFiles:
        """Returns files as a data set; the classes take turns if ``alternate``, else the files keep their order."""
        if self.skip_unreadable:
            files = drop_unreadable(files, self.channels)
        if alternate:
            files = [files[index] for index in take_turns([file.label for file in files])]
        return ImageFiles(
            files,
            image_size=self.image_size,
            channels=self.channels,
            crop=crop,
            num_copies=self.num_copies,
            image_cache=self.image_cache,
        )


def drop_unreadable(files: Sequence[LabelledFile], channels: int) -> list[LabelledFile]:
    """Reads every file once, leaves out unreadable images, and logs their number and the first of them."""

    def problem(file: LabelledFile) -> str | None:
        try:
            images.read_image(file.path, channels, size=1)
        except images.UnreadableImageError as error:
            return str(error)
        return None

    # Trial reading; decoding lets other threads run.
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        problems = zip(files, executor.map(problem, files), strict=True)
        broken = {file: text for file, text in problems if text is not None}

    # One warning for all.
    if broken:
        first, text = next(iter(broken.items()))
        counts = len(broken), len(files)
        _log.warning("%d of %d images cannot be read and are left out, first %s: %s", *counts, first.path, text)
    return [file for file in files if file not in broken]


def take_turns(labels: Sequence[int]) -> list[int]:
    """Returns an order of indices in which the classes alternate, so that the first batch shows every class.

    Within a class the given order is kept, so the result depends on that order alone.
    """
    turns: defaultdict[int, Iterator[int]] = defaultdict(count)
    return [i for _, _, i in sorted((next(turns[label]), label, i) for i, label in enumerate(labels))]


@contextmanager
def open_csv(file: Path, filling: str | None = None) -> Iterator[csv.DictReader[str]]:
    """Opens a table in UTF-8, or raises a ValueError; ``filling`` is the value of fields that a short row lacks."""
    try:
        # utf-8-sig: spreadsheets put a mark before the first column's name.
        with file.open(newline="", encoding="utf-8-sig") as stream:
            yield csv.DictReader(stream, restval=filling)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no CSV file in UTF-8: {error}.") from error


def check_unique(file: Path, names: Sequence[str]) -> None:
    """Raises a ValueError if a table names an image in several rows; ``names`` holds at least one."""
    name, number = Counter(names).most_common(1)[0]
    if number > 1:
        raise ValueError(f"{file} names {name!r} {number} times: one row for each image is needed.")


def check_columns(file: Path, reader: csv.DictReader[str], needed: Sequence[str], remedy: str) -> None:
    """Raises a ValueError that names the missing columns of a table and says what to do, unless all are there."""
    header = list(reader.fieldnames or [])
    if missing := [column for column in needed if column not in header]:
        names = " and no column ".join(map(repr, missing))
        raise ValueError(f"{file} has no column {names} but {header}: {remedy} (the separator must be a comma).")
