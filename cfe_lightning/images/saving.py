"""Writing of pictures and animations, and reading of saved pictures with a digest of their pixels."""

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from cfe_lightning.files.atomic import atomic_path
from cfe_lightning.images.pixels import to_pil
from cfe_lightning.images.reading import UnreadableImageError, from_pil

#: Shortest longer side of a video, in pixels.
_SMALLEST_VIDEO = 256


def save_image(image: Tensor, path: Path) -> str:
    """Writes [C, H, W] in [-1, 1] as an 8-bit PNG, atomically, and returns its ``pixel_digest``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = to_pil(image)
    with atomic_path(path, owner=str(os.getpid())) as temporary:
        picture.save(temporary, format="PNG", compress_level=1)
    return pixel_digest(picture)


def read_saved(path: Path, root: Path) -> tuple[Tensor, str]:
    """Reads a PNG of ``save_image`` below the resolved folder ``root``: [C, H, W] in [-1, 1], and its ``pixel_digest``.

    Raises:
        UnreadableImageError: If the picture cannot be read; the message continues a sentence that begins with its name.
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
    """Returns a digest of the mode, size and pixels of a picture, whatever its compression; 32 hexadecimal digits."""
    digest = hashlib.sha256(f"{picture.mode} {picture.width} {picture.height}".encode())
    digest.update(picture.tobytes())
    return digest.hexdigest()[:32]


def save_animation(steps: Tensor, path: Path, *, milliseconds: int = 100) -> None:
    """Writes steps [T, C, H, W] in [-1, 1], there and back, as an endless ``.gif`` or ``.webp``, or as an ``.mp4``.

    A video enlarges small pictures by a whole factor, because players would blur them.
    """
    frames = [to_pil(step) for step in (*steps, *steps.flip(0)[1:-1])]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path, owner=str(os.getpid())) as temporary:
        if path.suffix == ".mp4":
            _save_video(frames, temporary, milliseconds)
            return
        options = {"lossless": True} if path.suffix == ".webp" else {}
        form = path.suffix[1:].upper()
        frames[0].save(
            temporary, format=form, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, **options
        )


def can_save_video() -> bool:
    """Tells whether PyAV is installed, which ``save_animation`` needs for ``.mp4``."""
    return importlib.util.find_spec("av") is not None


def _save_video(frames: Sequence[Image.Image], path: Path, milliseconds: int) -> None:
    import av

    # Sides must be even, because H.264 stores colour at half resolution.
    width, height = frames[0].size
    factor = max(1, _SMALLEST_VIDEO // max(width, height))
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
