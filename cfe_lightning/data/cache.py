"""Resized images kept in a folder that the user names, for later epochs, runs and processes."""

from __future__ import annotations

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

#: Of what stands in a cache file; to be raised when ``images`` makes another tensor of the same file, too.
_VERSION = 1
#: Magic word, the key that the file was made for, checksum of the values.
_HEAD = struct.Struct("<8s32sI")
_MAGIC = b"cfeimage"
#: Free bytes that a cache leaves on its disk: checkpoints may be written there.
_RESERVE = 5 << 30


class ImageCache:
    """Gives back, bit for bit, what reading a file gave: a run is the same with a cold, half-filled or warm cache.

    Values are kept as float32, because rounding to the 256 levels of a byte would change what is trained on. That
    costs 4 bytes for each value: 786 kB for an RGB image of 256 x 256 pixels, 159 GB for all of CelebA.

    An image is found by its path, the file's size and modification time, how it is prepared, and the versions of this
    format, PyTorch, Pillow and, for DICOM and NIfTI files, of the packages that read them, which all decide on its
    pixels. Files are raw numbers with a checksum, written whole or not at all, so any number of processes can share a
    folder; a damaged file is replaced, nothing else is touched, and the folder may be emptied at any time, as entries
    that nobody asks for any more stay until then. Where a file cannot be written, or 5 GiB would not be left on the
    disk, the cache is only read from then on, and says so once.

    Args:
        folder: Made with the first image, if there is none.

    Raises:
        ValueError: If ``folder`` is a file.
    """

    def __init__(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"cache_folder {folder} is a file: give a folder, which is made if there is none.")
        self.folder = folder
        # Shared with the loader's processes, which would otherwise all try, and all complain.
        self._only_read = torch.zeros(1, dtype=torch.bool).share_memory_()

    def load(self, path: Path, settings: str, shape: tuple[int, ...], read: Callable[[], Tensor]) -> Tensor:
        """An image out of the cache, or read and kept.

        Args:
            path: The file that the image is made from.
            settings: All that decides what is made from it, besides ``shape``.
            shape: Of the image.
            read: Makes the image, float32; what it raises is passed on.
        """
        source = _source(path)
        if source is None:
            return read()  # which knows the words for it
        identity = f"{_VERSION} {sys.byteorder} {torch.__version__} {PIL.__version__} {source} {settings} {shape} "
        identity += reader_versions(path)
        key = hashlib.sha256(identity.encode() + os.fsencode(os.path.abspath(path))).digest()
        # Folders of 256 parts: some file systems are slow with many files in one.
        place = self.folder / key.hex()[:2] / f"{key.hex()}.image"
        image = _read(place, key, shape)
        if image is None:
            image = read()
            # A file that was exchanged meanwhile may have given either content.
            if not self._only_read and _source(path) == source:
                self._write(place, key, image)
        return image

    def _write(self, place: Path, key: bytes, image: Tensor) -> None:
        values = image.contiguous().numpy().tobytes()
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(place.parent).free < _RESERVE + len(values):
                raise OSError(errno.ENOSPC, f"less than {_RESERVE / 2**30:.0f} GiB would be left on the disk")
            with atomic_path(place, owner=uuid.uuid4().hex) as temporary, temporary.open("xb") as file:
                file.write(_HEAD.pack(_MAGIC, key, zlib.crc32(values)))
                file.write(values)
        except OSError as error:
            if not self._only_read:
                self._only_read.fill_(True)
                _log.warning(
                    "No more images are kept in cache_folder %s (%s): the run goes on with what it holds.",
                    self.folder,
                    error.strerror or error,
                )


def _source(path: Path) -> tuple[int, int] | None:
    """Size and modification time of a file; None where it is gone."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _read(place: Path, key: bytes, shape: tuple[int, ...]) -> Tensor | None:
    """The image of a whole, undamaged cache file; None where there is none."""
    values = bytearray(4 * math.prod(shape))
    try:
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
