"""Reading of image files into tensors [C, H, W] in [-1, 1], and finding them in folders."""

import logging
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cfe_lightning.images.pixels import interpolate

#: Endings of pictures. Files with other endings or none are judged by their first bytes.
EXTENSIONS = frozenset([
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jpx", ".pbm", ".pgm",
    ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
])  # fmt: skip
#: Largest number of pixels; larger images are refused before decoding as decompression bombs.
MAX_PIXELS = 100_000_000
#: Formats that are opened. Pillow knows more, but hands some (EPS) to other programs, which no file may choose.
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
#: First bytes of those formats; ``?`` stands for any byte.
_BEGINNINGS = (
    b"????ftypavif", b"????ftypavis", b"GIF8", b"\xff\xd8\xff", b"\xff\x4f\xff\x51",
    b"\x00\x00\x00\x0cjP  \r\n\x87\n", b"\x89PNG\r\n\x1a\n", b"II*\x00", b"MM\x00*",
    b"II+\x00", b"MM\x00+", b"RIFF????WEBP",
)  # fmt: skip
#: Pixels per strip when resizing, so that the floats of one strip fit a core's cache.
_STRIP_PIXELS = 1 << 18
_log = logging.getLogger(__name__)
_SIXTEEN_BIT_MODES = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})


class UnreadableImageError(ValueError):
    """A file cannot be read as an image; the message is one sentence for the user."""


def unreadable(kind: str, error: Exception) -> UnreadableImageError:
    """Returns the error of an unreadable file of some kind, without the path, which a system error would repeat."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return UnreadableImageError(f"Not a readable {kind}: {' '.join(reason.split()) or type(error).__name__}")


def is_picture(path: str | Path) -> bool:
    """Tells whether a file has the ending of a picture, or else begins like one."""
    return os.path.splitext(path)[1].lower() in EXTENSIONS or _begins_like_picture(beginning(path))


def beginning(path: str | Path, length: int = 132) -> bytes:
    """Returns the first bytes of a file; none of what cannot be read or is no regular file."""
    try:
        # A pipe would wait for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            return b""
        with open(path, "rb") as file:
            return file.read(length)
    except (OSError, ValueError):
        return b""


def _begins_like_picture(content: bytes) -> bool:
    """Tells whether bytes are the beginning of a picture; after two letters alone (BM, P6) more has to fit."""
    if content.startswith(b"BM"):
        # The offset of the pixels stands at byte 10.
        return 26 <= int.from_bytes(content[10:14], "little") < 1 << 16
    if content[:1] == b"P" and content[1:2] in b"123456":
        return content[2:3] in (b" ", b"\t", b"\n", b"\r")
    return any(
        len(content) >= len(wanted) and all(b in (ord("?"), a) for a, b in zip(content, wanted, strict=False))
        for wanted in _BEGINNINGS
    )


def find_images(folder: Path, wanted: Callable[[str], bool] = is_picture) -> Iterator[str]:
    """Walks a folder and yields every picture, readable or not, listing one directory at a time.

    A file is a picture by its ending, or by its first bytes where it has another ending or none. A warning at the end
    says how many files were left out: hidden ones (one leading dot) and those that are no pictures. Links to files are
    followed; broken ones are listed by their endings and fail when they are read. A linked folder is entered once if it
    lies outside ``folder``. Links to folders inside or around it are not entered: the files are found anyway, and loops
    end.

    The names are relative to ``folder``, with forward slashes, sorted by their parts. Bytes that are no UTF-8 become
    surrogates, as in ``os.fsdecode``. ``wanted`` decides by a file's path in place of ``is_picture``.

    Raises:
        FileNotFoundError: If the folder does not exist.
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
    left_out, first_left_out = 0, ""
    # A stack instead of recursion: folders may nest deeper than Python's calls.
    pending = [("", iter(_entries(str(folder))))]
    while pending:
        prefix, entries = pending[-1]
        entry = next(entries, None)
        if entry is None:
            pending.pop()
        elif _is_hidden(entry.name) or not _is_folder(entry):
            if not _is_hidden(entry.name) and _may_be_file(entry) and wanted(entry.path):
                yield prefix + entry.name
            else:
                left_out, first_left_out = left_out + 1, first_left_out or prefix + entry.name
        elif not entry.is_symlink() or _leads_elsewhere(entry.path, root, entered_links):
            pending.append((f"{prefix}{entry.name}/", iter(_entries(entry.path))))
    if left_out:
        _log.warning(
            "%d entries of %s are left out, because they are hidden or no images, such as %r.",
            left_out,
            folder,
            first_left_out,
        )


def _entries(directory: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        _log.warning("The folder %s cannot be listed and is left out: %s", directory, error.strerror)
        return []


def _is_hidden(name: str) -> bool:
    # Two dots begin ordinary names.
    return name.startswith(".") and not name.startswith("..")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _may_be_file(entry: os.DirEntry[str]) -> bool:
    """Tells whether an entry is a file or a broken link, and not a pipe, socket or device."""
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
    """Reads any common image file: with EXIF rotation, the first frame of animations, and transparency on white.

    The content decides the format, not the file's ending. 16-bit greys are scaled by the range of their type, 32-bit
    ones by their values: as 16-bit, 8-bit or unit data where they look like it, else by their own range.

    Args:
        path: Path of the file.
        channels: Number of channels, 1 for luminance, 3 for RGB.
        size: Side of the square to resize to, in strips, so that a photograph of 50 million pixels needs no copy in
            floating point, which is four times as large. None keeps the size.
        max_pixels: Largest number of pixels; larger images are refused before they are decoded.

    Returns:
        The image, [C, H, W] in [-1, 1].

    Raises:
        UnreadableImageError: If the file is missing, empty, truncated, no image or too large. The message does not
            repeat the path.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels}.")
    try:
        # Refused without decoding.
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImageError("Not a file but a folder, pipe or device.")
        if status.st_size == 0:
            raise UnreadableImageError("The file is empty.")
        Image.init()  # registers the rarer formats; later calls return at once
        # A TGA file has no mark by which its content could be told.
        formats = ("TGA",) if path.suffix.lower() == ".tga" else _FORMATS
        with Image.open(path, formats=formats) as opened:
            width, height = opened.size
            if width * height > max_pixels:
                raise UnreadableImageError(f"{width} x {height} pixels are more than the {max_pixels:,} accepted.")
            # Pixels.
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
        raise unreadable("image", error) from error


def from_pil(picture: Image.Image, channels: int, *, size: int | None = None) -> Tensor:
    """Converts a decoded Pillow image of any mode to [C, H, W] in [-1, 1], with the options of ``read_image``."""
    values = _to_array(picture, channels)
    image = _to_tensor(values) if size is None else _resize_in_strips(values, size)
    return image if image.shape[0] == channels else image.repeat(channels, 1, 1)


def _to_array(picture: Image.Image, channels: int) -> np.ndarray:
    """Returns the pixels as bytes, or as floats in [0, 1] for more than 8 bits; [H, W] or [H, W, 3]."""
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
    """Converts [H, W] or [H, W, 3] to [C, H, W] in [-1, 1]."""
    # A copy, because Pillow's memory is read-only.
    tensor = torch.from_numpy(np.array(values[None] if values.ndim == 2 else values.transpose(2, 0, 1), order="C"))
    unit = tensor.float().div_(255.0) if tensor.dtype == torch.uint8 else tensor
    return unit.mul_(2.0).sub_(1.0)


def _resize_in_strips(values: np.ndarray, size: int) -> Tensor:
    """Computes ``resize(_to_tensor(values), size)`` with only one strip in floating point, as the filter is separable.

    The longer side shrinks first: otherwise an image of 1 x 50 million pixels would grow to ``size`` x 50 million.
    """
    # Longer side, strip by strip.
    tall = values.shape[0] > values.shape[1]
    shorter, longer = sorted(values.shape[:2])
    thickness = max(_STRIP_PIXELS // longer, 1)
    strips = []
    for start in range(0, shorter, thickness):
        part = slice(start, start + thickness)
        # A tall picture is transposed strip by strip, in the cache; as a whole it would be read with long strides.
        strip = _to_tensor(values[:, part].copy().swapaxes(0, 1) if tall else values[part])
        strips.append(interpolate(strip[None], strip.shape[1], size))
    # Shorter side; rounded weights of the filter may leave the range by one unit in the last place.
    image = interpolate(torch.cat(strips, dim=2), size, size)[0].clamp_(-1.0, 1.0)
    return image.transpose(1, 2).contiguous() if tall else image


def _scale_by_range(values: np.ndarray) -> np.ndarray:
    """Scales 32-bit values to [0, 1], as 16-bit, 8-bit or unit data by their largest value, else by their own range."""
    finite = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(finite.min()), float(finite.max())
    if low >= 0 and high <= 1:
        return finite
    if low >= 0 and high <= 65535:
        return finite / (65535.0 if high > 255 else 255.0)
    return (finite - low) / max(high - low, 1e-12)
