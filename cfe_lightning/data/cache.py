"""Resized images kept in a folder that the user names, for later epochs, runs and processes."""

import errno
import hashlib
import logging
import math
import os
import shutil
import stat
import struct
import sys
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path

import PIL
import torch
from torch import Tensor

from cfe_lightning.files.atomic import atomic_path
from cfe_lightning.images.medical import reader_versions

_log = logging.getLogger(__name__)

#: Version of the file format; to be raised also when ``images`` makes another tensor of the same file.
_VERSION = 1
#: Magic word, key of the entry, checksum of the values.
_HEAD = struct.Struct("<8s32sI")
_MAGIC = b"cfeimage"
#: Free bytes that a cache leaves on its disk, where checkpoints may be written too.
_RESERVE = 5 << 30


class ImageCache:
    """Returns images bit for bit as they were read: a run is the same with a cold, half-filled or warm cache.

    Values are kept as float32, because rounding them to the 256 levels of a byte would change the training data. An
    image takes 4 bytes per value: 786 kB in RGB at 256 x 256 pixels, 159 GB for all of CelebA.

    The key of an image holds everything that decides on its pixels: path, size and modification time of the file, its
    preparation, and the versions of this format, PyTorch, Pillow and, for DICOM and NIfTI, of the packages that read
    them. A file holds raw numbers and a checksum and is written whole or not at all, so any number of processes can
    share a folder. A damaged file is replaced; nothing else is touched. Unused entries stay, but the folder may be
    emptied at any time. After a failed write or with less than 5 GiB left on the disk, it is only read, with a warning.

    Args:
        folder: Folder of the cache; it is made with the first image.

    Raises:
        ValueError: If ``folder`` is a file.
    """

    def __init__(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"cache_folder {folder} is a file: give a folder, which is made if there is none.")
        self.folder = folder
        # Shared with the loader processes, which would otherwise all try to write, and all warn.
        self._only_read = torch.zeros(1, dtype=torch.bool).share_memory_()

    def load(self, path: Path, settings: str, shape: tuple[int, ...], read: Callable[[], Tensor]) -> Tensor:
        """Returns an image from the cache, or reads and keeps it.

        Args:
            path: File that the image is made from.
            settings: Everything besides ``shape`` that decides on the image made from the file.
            shape: Shape of the image, [C, H, W].
            read: Makes the image, float32; its exceptions are passed on.
        """
        source = _source(path)
        if source is None:
            return read()  # it raises the right error
        identity = f"{_VERSION} {sys.byteorder} {torch.__version__} {PIL.__version__} {source} {settings} {shape} "
        identity += reader_versions(path)
        key = hashlib.sha256(identity.encode() + os.fsencode(os.path.abspath(path))).digest()

        # Reading; 256 folders, because some file systems are slow with many files in one.
        place = self.folder / key.hex()[:2] / f"{key.hex()}.image"
        image = _read(place, key, shape)
        if image is None:
            image = read()
            # A file that was replaced meanwhile may have given either content.
            if not self._only_read and _source(path) == source:
                self._write(place, key, image)
        return image

    def _write(self, place: Path, key: bytes, image: Tensor) -> None:
        values = image.contiguous().numpy().tobytes()
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(place.parent).free < _RESERVE + len(values):
                raise OSError(errno.ENOSPC, f"less than {_RESERVE / 2**30:.0f} GiB would be left on the disk")
            # A name of its own for each writer: several may write the same image.
            with atomic_path(place, owner=uuid.uuid4().hex) as temporary, temporary.open("xb") as file:
                file.write(_HEAD.pack(_MAGIC, key, zlib.crc32(values)))
                file.write(values)
        except OSError as error:
            if not self._only_read:
                self._only_read.fill_(True)
                _log.warning(
                    "No more images are kept in cache_folder %s (%s): the run continues with those it holds.",
                    self.folder,
                    error.strerror or error,
                )


def _source(path: Path) -> tuple[int, int] | None:
    """Returns size and modification time of a file, or None if it does not exist."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _read(place: Path, key: bytes, shape: tuple[int, ...]) -> Tensor | None:
    """Returns the image of a whole, undamaged cache file, or None if there is none."""
    values = bytearray(4 * math.prod(shape))
    try:
        # Only regular files of the right length: a pipe would wait for ever.
        status = os.stat(place)
        if not stat.S_ISREG(status.st_mode) or status.st_size != _HEAD.size + len(values):
            return None
        with place.open("rb") as file:
            magic, made_for, checksum = _HEAD.unpack(file.read(_HEAD.size))
            length = file.readinto(values)
    except (OSError, struct.error):
        return None
    if (magic, made_for, length, checksum) != (_MAGIC, key, len(values), zlib.crc32(values)):
        return None
    return torch.frombuffer(values, dtype=torch.float32).view(shape)
