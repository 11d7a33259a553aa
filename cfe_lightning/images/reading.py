"""The only door between image files and tensors.

Every image tensor of the package is float32, [C, H, W] or [B, C, H, W], in [-1, 1], with one channel or RGB.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cfe_lightning.images.pixels import _interpolate

#: File name endings that are looked at when a folder is read.
EXTENSIONS = frozenset([".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"])
#: More pixels than this are refused before decoding: a decompression bomb, not a photograph.
MAX_PIXELS = 100_000_000
#: Pillow opens more, but hands some of it (EPS) to other programs: a stranger's file must not choose those.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
#: Floating point of one strip stays in a core's cache.
_STRIP_PIXELS = 1 << 18
_log = logging.getLogger(__name__)
_SIXTEEN_BIT_MODES = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})


class UnreadableImageError(ValueError):
    """A file that cannot become an image tensor; the message is one sentence for the user."""


def is_picture(name: str) -> bool:
    """Whether a file name has an image ending."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def find_images(folder: Path, wanted: Callable[[str], bool] = is_picture) -> Iterator[str]:
    """Walks a folder and yields every file with an image ending, readable or not, holding one directory at a time.

    Hidden files and folders (one leading dot) are left out. Files are judged by name alone: a file without an image
    ending is not listed, a PNG called ``.jpg`` is. Links to files are followed, broken ones listed (they fail when they
    are read). A linked folder is entered when it leads out of ``folder``, and only once; a link to a place inside is
    not, because its files are met there, nor is a link to a folder around it, so no loop is endless.

    Args:
        folder: Where to look, with everything below.
        wanted: Judges file names instead, without their folders.

    Returns:
        Names relative to ``folder`` with forward slashes, ordered by their parts. Bytes that are no UTF-8 arrive as
        the surrogates that ``os.fsdecode`` makes of them.

    Raises:
        FileNotFoundError: If there is no such folder.
        NotADirectoryError: If it is a file.
    """
    if not folder.exists():
        raise FileNotFoundError(f"There is no folder {folder}.")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder: give the folder that holds the images.")
    return _walk(folder, wanted)


def _walk(folder: Path, wanted: Callable[[str], bool]) -> Iterator[str]:
    root = os.path.realpath(folder)
    entered_links = set[str]()
    # A stack instead of recursion: a folder may nest deeper than Python's calls.
    pending = [("", iter(_entries(str(folder))))]
    while pending:
        prefix, entries = pending[-1]
        entry = next(entries, None)
        if entry is None:
            pending.pop()
        elif not _is_folder(entry):
            if wanted(entry.name) and _may_be_file(entry):
                yield prefix + entry.name
        elif not entry.is_symlink() or _leads_elsewhere(entry.path, root, entered_links):
            pending.append((f"{prefix}{entry.name}/", iter(_entries(entry.path))))


def _entries(directory: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return sorted((entry for entry in entries if not _is_hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        _log.warning("The folder %s cannot be listed and is left out: %s", directory, error.strerror)
        return []


def _is_hidden(name: str) -> bool:
    return name.startswith(".") and not name.startswith("..")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _may_be_file(entry: os.DirEntry[str]) -> bool:
    """False for pipes, sockets and devices; a link that leads nowhere counts as a file that cannot be read."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        return True


def _leads_elsewhere(link: str, root: str, entered_links: set[str]) -> bool:
    target = os.path.realpath(link)
    if _is_within(target, root) or _is_within(root, target) or any(_is_within(target, seen) for seen in entered_links):
        return False
    entered_links.add(target)
    return True


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def read_image(path: Path, channels: int, *, size: int | None = None, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Reads any common image file: EXIF rotation applied, first frame of animations, transparency put on white.

    The content decides the format, not the file name's ending.

    Args:
        path: The file. 16-bit greys are scaled by their type's range, 32-bit ones by ``_scale_by_range``.
        channels: 1 for luminance, 3 for RGB.
        size: Resizes to [C, size, size] like ``resize``, in strips: a photograph of 50 million pixels then needs its
            own bytes, not four times as much for floating-point copies. None keeps the size.
        max_pixels: Larger images are refused before they are decoded.

    Returns:
        The image, [C, H, W] in [-1, 1].

    Raises:
        UnreadableImageError: If the file is missing, empty, truncated, no image or too large. The message does not
            repeat the path.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels}.")
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImageError("Not a file but a folder, pipe or device.")
        if status.st_size == 0:
            raise UnreadableImageError("The file is empty.")
        Image.init()  # Pillow knows the rarer formats only after this; later calls return at once
        with Image.open(path, formats=_FORMATS) as opened:
            width, height = opened.size
            if width * height > max_pixels:
                raise UnreadableImageError(f"{width} x {height} pixels are more than the {max_pixels:,} accepted.")
            opened.load()
            ImageOps.exif_transpose(opened, in_place=True)
            return from_pil(opened, channels, size=size)
    except UnreadableImageError:
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"The image is too large to decode safely: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise UnreadableImageError(f"The content is no image in a format read here: {', '.join(_FORMATS)}.") from error
    # Decoders raise nearly anything on broken files (struct.error, SyntaxError, zlib.error, IndexError, ...).
    except Exception as error:
        # The system's own message would repeat the path.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnreadableImageError(
            f"Not a readable image: {' '.join(reason.split()) or type(error).__name__}"
        ) from error


def from_pil(picture: Image.Image, channels: int, *, size: int | None = None) -> Tensor:
    """A decoded Pillow image of any mode as [C, H, W] in [-1, 1]; the arguments are those of ``read_image``."""
    values = _to_array(picture, channels)
    image = _to_tensor(values) if size is None else _resize_in_strips(values, size)
    return image if image.shape[0] == channels else image.repeat(channels, 1, 1)


def _to_array(picture: Image.Image, channels: int) -> np.ndarray:
    """Bytes, or floats in [0, 1] where the file has more than 8 bits; [H, W] or [H, W, 3]."""
    if picture.mode in _SIXTEEN_BIT_MODES:
        return np.asarray(picture, dtype=np.float32) / 65535.0
    if picture.mode in ("I", "F"):
        return _scale_by_range(np.asarray(picture, dtype=np.float32))
    if "A" in picture.getbands() or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    mode = "L" if channels == 1 else "RGB"
    return np.asarray(picture if picture.mode == mode else picture.convert(mode))


def _to_tensor(values: np.ndarray) -> Tensor:
    """[H, W] or [H, W, 3] to [C, H, W] in [-1, 1]."""
    # A copy, because Pillow's memory is read-only.
    tensor = torch.from_numpy(np.array(values[None] if values.ndim == 2 else values.transpose(2, 0, 1), order="C"))
    unit = tensor.float().div_(255.0) if tensor.dtype == torch.uint8 else tensor
    return unit.mul_(2.0).sub_(1.0)


def _resize_in_strips(values: np.ndarray, size: int) -> Tensor:
    """``resize(_to_tensor(values), size)``, floating point held for one strip at a time: the filter is separable.

    The longer side is shrunk first. The other way round an image of 1 x 50 million pixels would become
    ``size`` x 50 million on the way.
    """
    tall = values.shape[0] > values.shape[1]
    shorter, longer = sorted(values.shape[:2])
    thickness = max(_STRIP_PIXELS // longer, 1)
    strips = []
    for start in range(0, shorter, thickness):
        part = slice(start, start + thickness)
        # A tall picture is turned strip by strip, in the cache: as a whole it would be read against its memory's grain.
        strip = _to_tensor(values[:, part].copy().swapaxes(0, 1) if tall else values[part])
        strips.append(_interpolate(strip[None], strip.shape[1], size))
    # Rounding of the filter's weights may leave the range by one unit in the last place.
    image = _interpolate(torch.cat(strips, dim=2), size, size)[0].clamp_(-1.0, 1.0)
    return image.transpose(1, 2).contiguous() if tall else image


def _scale_by_range(values: np.ndarray) -> np.ndarray:
    """Scales 32-bit values to [0, 1]: by 65535 when they look like 16-bit data, else by their own range."""
    finite = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(finite.min()), float(finite.max())
    if low >= 0 and 255 < high <= 65535:
        return finite / 65535.0
    if low >= 0 and 1 < high <= 255:
        return finite / 255.0
    if low >= 0 and high <= 1:
        return finite
    return (finite - low) / max(high - low, 1e-12)
