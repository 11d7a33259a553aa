"""The only door between image files and tensors.

Every image tensor of the package is float32, [C, H, W] or [B, C, H, W], in [-1, 1], with one channel or RGB.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import math
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torch.nn import functional as F

from cfe_lightning.files.atomic import whole_path

#: File name endings that are looked at when a folder is read.
EXTENSIONS = frozenset([".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"])
#: More pixels than this are refused before decoding: a decompression bomb, not a photograph.
MAX_PIXELS = 100_000_000

#: Pillow opens more, but hands some of it (EPS) to other programs: a stranger's file must not choose those.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
#: Floating point of one strip stays in a core's cache.
_STRIP_PIXELS = 1 << 18
#: Of what a network makes at a time on a CPU: decoders were fastest with 2 pictures of 256 x 256, 8 of 128, 32 of 64.
_PIXELS_ON_CPU = 1 << 17
#: Longer side that a video has at least.
_SMALLEST_VIDEO = 256

#: And a picture with arrows; and the arrows' colour.
_SMALLEST_DRAWING = 160
_ARROW = (196, 22, 106)

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


def resize(image: Tensor, size: int) -> Tensor:
    """Resizes [C, H, W] or [B, C, H, W] to a square, antialiased bilinear; the aspect ratio is not kept."""
    if image.shape[-2:] == (size, size):
        return image
    return _interpolate(image, size, size) if image.ndim == 4 else _interpolate(image[None], size, size)[0]


def _interpolate(image: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(image, size=(height, width), mode="bilinear", antialias=True, align_corners=False)


def cut_montage(image: Tensor, num_slices: int) -> Tensor:
    """Cuts a montage into its slices, row by row; the inverse of ``tile_montage``.

    Args:
        image: The montage, [B, C, H, W], of slices with H / sqrt(S) x W / sqrt(S) pixels.
        num_slices: S, a square number.

    Returns:
        The slices, [B, S, C, H / sqrt(S), W / sqrt(S)].

    Raises:
        ValueError: If S is no square number, or H or W cannot be divided by its root.
    """
    side = montage_side(num_slices)
    height, width = image.shape[-2:]
    if height % side or width % side:
        raise ValueError(
            f"A montage of {num_slices} slices needs a height and width that {side} divides, got {height} x {width}: "
            "change the image size or the number of slices."
        )
    cells = image.unflatten(3, (side, width // side)).unflatten(2, (side, height // side))
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def tile_montage(slices: Tensor) -> Tensor:
    """Tiles slices [B, S, C, h, w] row by row into one picture, [B, C, sqrt(S) h, sqrt(S) w].

    Raises:
        ValueError: If S is no square number.
    """
    side = montage_side(slices.shape[1])
    return slices.unflatten(1, (side, side)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def montage_side(num_slices: int) -> int:
    """The slices in a row of a montage: the root of their number.

    Raises:
        ValueError: If the number is no square.
    """
    side = math.isqrt(max(num_slices, 0))
    if side < 1 or side**2 != num_slices:
        raise ValueError(f"A montage is a square and needs 1, 4, 9, 16, ... slices, got {num_slices}.")
    return side


def to_unit(image: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], without clamping."""
    return image * 0.5 + 0.5


def visible_change(image: Tensor, edited: Tensor) -> Tensor:
    """What was added, on [0, 1] units; what leaves the range cannot be seen and does not count."""
    return to_unit(edited.float()).clamp(0, 1) - to_unit(image.float()).clamp(0, 1)


def pictures_at_once(pixels: int, device: torch.device) -> int:
    """How many pictures a network is given at a time: bounds the memory, and on a CPU what has to fit its cache.

    Args:
        pixels: Of one picture.
        device: Where they are.
    """
    return min(128, max(1, _PIXELS_ON_CPU // pixels)) if device.type == "cpu" else 128


def to_uint8(image: Tensor) -> Tensor:
    """[-1, 1] to bytes, clamped and rounded to the nearest level (truncation can undo a flip)."""
    return _levels(image).to(torch.uint8)


def saved(image: Tensor) -> Tensor:
    """The image as a reader of the saved 8-bit PNG sees it, still in [-1, 1]."""
    return _levels(image).div_(255).mul_(2).sub_(1)


def _levels(image: Tensor) -> Tensor:
    """[-1, 1] to the levels 0 to 255 of an 8-bit file, as floats."""
    return to_unit(image.detach()).clamp_(0, 1).mul_(255).round_()


def to_pil(image: Tensor) -> Image.Image:
    """[C, H, W] in [-1, 1] to a Pillow image, grey or RGB."""
    array = to_uint8(image.detach()).cpu().numpy()
    return Image.fromarray(array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0))


def save_image(image: Tensor, path: Path) -> str:
    """Writes [C, H, W] in [-1, 1] as an 8-bit PNG; the file appears whole or not at all.

    Returns:
        Its ``pixel_digest``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = to_pil(image)
    with whole_path(path, owner=str(os.getpid())) as temporary:
        picture.save(temporary, format="PNG", compress_level=1)
    return pixel_digest(picture)


def read_saved(path: Path, root: Path) -> tuple[Tensor, str]:
    """Reads a PNG that ``save_image`` left somewhere below a folder.

    Args:
        path: The file.
        root: The folder, resolved; what lies elsewhere is not opened.

    Returns:
        The image, [C, H, W] in [-1, 1], and its ``pixel_digest``.

    Raises:
        UnreadableImageError: If it cannot be read; the message is what to say after the file's name.
    """
    try:
        if not path.resolve().is_relative_to(root):
            raise UnreadableImageError("lies outside the folder")
        with Image.open(path, formats=["PNG"]) as picture:
            picture.load()
            return from_pil(picture, 1 if picture.mode == "L" else 3), pixel_digest(picture)
    except UnreadableImageError:
        raise
    except FileNotFoundError as error:
        raise UnreadableImageError("is missing") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableImageError("cannot be read as the PNG that was saved") from error


def pixel_digest(picture: Image.Image) -> str:
    """What tells the pixels of a picture from all others, however the file is compressed; 32 hexadecimal digits."""
    digest = hashlib.sha256(f"{picture.mode} {picture.width} {picture.height}".encode())
    digest.update(picture.tobytes())
    return digest.hexdigest()[:32]


def save_animation(steps: Tensor, path: Path, *, milliseconds: int = 100) -> None:
    """Writes steps [T, C, H, W] in [-1, 1] as an animation there and back: ``.gif`` and ``.webp`` endless, or ``.mp4``.

    A video enlarges small pictures by a whole factor, because players blur them otherwise.
    """
    frames = [to_pil(step) for step in (*steps, *steps.flip(0)[1:-1])]
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_path(path, owner=str(os.getpid())) as temporary:
        if path.suffix == ".mp4":
            _save_video(frames, temporary, milliseconds)
            return
        options = {"lossless": True} if path.suffix == ".webp" else {}
        form = path.suffix[1:].upper()
        frames[0].save(
            temporary, format=form, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, **options
        )


def can_save_video() -> bool:
    """Whether PyAV is there, which ``save_animation`` needs for ``.mp4``."""
    return importlib.util.find_spec("av") is not None


def _save_video(frames: Sequence[Image.Image], path: Path, milliseconds: int) -> None:
    import av

    width, height = frames[0].size
    factor = max(1, _SMALLEST_VIDEO // max(width, height))
    # H.264 stores colour at half resolution: sides have to be even.
    size = (width * factor // 2 * 2, height * factor // 2 * 2)
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w", format="mp4") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(1000, milliseconds))
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            enlarged = frame.convert("RGB").resize((width * factor, height * factor), Image.Resampling.NEAREST)
            picture = av.VideoFrame.from_image(enlarged.crop((0, 0, *size)))
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def signed_difference(change: Tensor, scale: float | None = None) -> Tensor:
    """Colours a change [B, C, H, W] blue (darker) over white (none) to red (brighter), [B, 3, H, W] in [-1, 1].

    Args:
        change: Image minus image. The channel that changes most is shown: a mean would hide a change of hue.
        scale: The change drawn in full colour; None takes the largest magnitude of each image.
    """
    signed = change.gather(1, change.abs().argmax(dim=1, keepdim=True))
    limit = signed.abs().amax(dim=(2, 3), keepdim=True).clamp_min(1e-6) if scale is None else scale
    signed = (signed / limit).clamp(-1, 1)
    white_to_red = signed.clamp_min(0)
    white_to_blue = (-signed).clamp_min(0)
    red, green, blue = 1 - white_to_blue, 1 - signed.abs(), 1 - white_to_red
    return torch.cat([red, green, blue], dim=1) * 2 - 1


def amplify(difference: Tensor, largest_gain: float = 64.0) -> tuple[Tensor, Tensor]:
    """Scales differences [B, C, H, W], 0 is mid grey, so that the strongest value of each image is black or white.

    Args:
        difference: Images minus images.
        largest_gain: Weaker differences are amplified no further: it would be rounding errors that one sees.

    Returns:
        The differences times their gains, and the gains, [B]; at least 1, so what is too strong is shown as it is.
    """
    peak = difference.abs().amax(dim=(1, 2, 3))
    gain = (1 / peak.clamp_min(1 / largest_gain)).clamp_min(1.0)
    return difference * gain[:, None, None, None], gain


def heat_map(attribution: Tensor) -> Tensor:
    """Colours a non-negative map [B, 1, H, W], scaled per image, black-red-yellow-white, [B, 3, H, W] in [-1, 1]."""
    peak = attribution.amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
    level = (attribution / peak).clamp(0, 1) * 3
    return torch.cat([level.clamp(0, 1), (level - 1).clamp(0, 1), (level - 2).clamp(0, 1)], dim=1) * 2 - 1


def arrows(motion: Tensor, cells: int = 12) -> Tensor:
    """Displacements [B, 2, H, W] averaged over at most ``cells`` x ``cells`` places, [B, 2, h, w]."""
    return F.adaptive_avg_pool2d(motion, (min(cells, motion.shape[2]), min(cells, motion.shape[3])))


def draw_motion(image: Tensor, motion: Tensor) -> Tensor:
    """Arrows of displacements [B, 2, H, W], (row, column) in pixels, on paled images [B, C, H, W] in [-1, 1].

    The longest arrow of every image spans one and a half cells; a small image is enlarged by a whole factor.

    Returns:
        [B, 3, h, w] in [-1, 1].
    """
    factor = max(1, -(-_SMALLEST_DRAWING // max(image.shape[-2:])))
    coarse = arrows(motion).cpu()
    lengths = coarse.norm(dim=1)
    longest = lengths.amax(dim=(1, 2)).clamp_min(1e-12)
    drawn = []
    for picture, field, length, limit in zip(image, coarse, lengths, longest, strict=True):
        canvas = to_pil(picture).convert("L").point(lambda level: 96 + level * 5 // 8).convert("RGB")
        canvas = canvas.resize((canvas.width * factor, canvas.height * factor), Image.Resampling.NEAREST)
        cell = (canvas.height / field.shape[1], canvas.width / field.shape[2])
        pen = ImageDraw.Draw(canvas)
        scale = 1.5 * min(cell) / float(limit)
        # Below a twentieth of the longest an arrow would be a dot.
        for row, column in torch.nonzero(length > 0.05 * limit).tolist():
            down, right = (float(value) * scale for value in field[:, row, column])
            middle = ((column + 0.5) * cell[1], (row + 0.5) * cell[0])
            _arrow(pen, (middle[0] - right / 2, middle[1] - down / 2), (middle[0] + right / 2, middle[1] + down / 2))
        drawn.append(from_pil(canvas, 3))
    return torch.stack(drawn)


def _arrow(pen: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float]) -> None:
    across, down = end[0] - start[0], end[1] - start[1]
    length = math.hypot(across, down)
    head = min(4.0, 0.6 * length)
    across, down = across / length * head, down / length * head
    sides = [(end[0] - across + sign * 0.6 * down, end[1] - down - sign * 0.6 * across) for sign in (1, -1)]
    pen.line([start, end], fill=_ARROW, width=1)
    pen.polygon([end, *sides], fill=_ARROW)


def grid(columns: Sequence[Tensor], padding: int = 2) -> Tensor:
    """Lays batches [B, C, H, W] side by side: one row per image, one column per batch, [3, height, width]."""
    coloured = [column.detach().float().cpu() for column in columns]
    coloured = [c.expand(-1, 3, -1, -1) if c.shape[1] == 1 else c for c in coloured]
    padded = [F.pad(c, (padding, padding, padding, padding), value=1.0) for c in coloured]
    rows = torch.cat(padded, dim=3)
    return torch.cat(list(rows), dim=1)
