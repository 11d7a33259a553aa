"""Labelled image files as a data set: what every source that reads files ends in."""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import center_crop

from cfe_lightning import images
from cfe_lightning.data.base import Sample
from cfe_lightning.data.cache import ImageCache

_log = logging.getLogger(__name__)

#: A split is kept in memory when all its images, in all loader processes together, need at most these bytes.
CACHE_BYTES = 1 << 30


class LabelledFile(NamedTuple):
    """One image file: where it is, its unique name, its class, and whom it shows."""

    path: Path
    name: str
    label: int
    group: str


class LabelledImages(Dataset[Sample]):
    """Images with labels and names; what was loaded once comes from memory where the whole split fits.

    Args:
        names: Unique and stable, [N].
        labels: The class of each image, [N] int64.
        image_size: Side of the square images.
        channels: 1 for grey, 3 for RGB.
        num_copies: How many processes will each keep a memory of their own; 0 keeps none.
        image_cache: Where images of earlier runs come from and new ones go to; None reads files only.

    Attributes:
        labels: As given; ``ImageData`` needs it for class-balanced drawing.
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
        # float32, so that memory gives back the very values that loading gave.
        self._memory: dict[int, Tensor] | None = {} if 0 < bytes_needed <= CACHE_BYTES else None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        """Image [C, H, W], label and name."""
        image = self._memory.get(index) if self._memory is not None else None
        if image is None:
            image = self.load(index)
            if self._memory is not None:
                self._memory[index] = image
        return {"image": image, "label": int(self.labels[index]), "name": self.names[index]}

    def __getstate__(self) -> dict[str, Any]:
        """Without the memory: a loader process that gets its own copy fills its own."""
        return self.__dict__ | {"_memory": None if self._memory is None else {}}

    @abstractmethod
    def load(self, index: int) -> Tensor:
        """Reads or decodes one image, [C, image_size, image_size] in [-1, 1]."""

    def _cached(self, path: Path, settings: str, read: Callable[[], Tensor]) -> Tensor:
        """What ``read`` makes of a file, or what it made of it before; see ``ImageCache.load``."""
        if self.image_cache is None:
            return read()
        return self.image_cache.load(path, settings, (self.channels, self.image_size, self.image_size), read)


class ImageFiles(LabelledImages):
    """Labelled files, read at one size.

    Args:
        files: In the order of the data set.
        image_size: Side of the square images.
        channels: 1 for grey, 3 for RGB.
        crop: Side of the square that is cut from the middle before resizing, or "largest" for the largest that there
            is; None resizes the whole picture.
        num_copies: See ``LabelledImages``.
        image_cache: See ``LabelledImages``.

    Attributes:
        files: As given.
    """

    def __init__(
        self,
        files: Sequence[LabelledFile],
        *,
        image_size: int,
        channels: int,
        crop: int | Literal["largest"] | None = None,
        num_copies: int = 0,
        image_cache: ImageCache | None = None,
    ) -> None:
        super().__init__(
            [file.name for file in files],
            torch.tensor([file.label for file in files], dtype=torch.int64),
            image_size=image_size,
            channels=channels,
            num_copies=num_copies,
            image_cache=image_cache,
        )
        self.files = files
        self.crop = crop

    def load(self, index: int) -> Tensor:
        """Reads one file, or takes it from the cache.

        Raises:
            UnreadableImageError: Naming the file.
        """
        path = self.files[index].path
        return self._cached(path, f"crop {self.crop}", lambda: self._read(path))

    def _read(self, path: Path) -> Tensor:
        try:
            if self.crop is None:
                return images.read_image(path, self.channels, size=self.image_size)
            picture = images.read_image(path, self.channels)
            side = min(picture.shape[-2:]) if self.crop == "largest" else self.crop
            # Rounding of the filter's weights may leave the range by one unit in the last place.
            return images.resize(center_crop(picture, [side]), self.image_size).clamp(-1.0, 1.0)
        except images.UnreadableImageError as error:
            raise images.UnreadableImageError(
                f"The image {path} cannot be used ({str(error).rstrip('.')}): repair or remove it, or set "
                "skip_unreadable=true."
            ) from error


def drop_unreadable(files: Sequence[LabelledFile], channels: int) -> list[LabelledFile]:
    """Reads every file once, leaves out what is no readable image, and logs how many and the first of them."""

    def problem(file: LabelledFile) -> str | None:
        try:
            images.read_image(file.path, channels, size=1)
        except images.UnreadableImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as executor:
        problems = list(executor.map(problem, files))
    broken = [(file, text) for file, text in zip(files, problems, strict=True) if text is not None]
    if broken:
        first, text = broken[0]
        _log.warning(
            "%d of %d images cannot be read and are left out, first %s: %s", len(broken), len(files), first.path, text
        )
    return [file for file, text in zip(files, problems, strict=True) if text is None]


def take_turns(labels: Sequence[int]) -> list[int]:
    """An order of indices in which the classes alternate, so that the first batch shows every class.

    Within a class the order stays, so the result depends on the given order alone.
    """
    seen: Counter[int] = Counter()
    keys = []
    for index, label in enumerate(labels):
        keys.append((seen[label], label, index))
        seen[label] += 1
    return [index for _, _, index in sorted(keys)]
