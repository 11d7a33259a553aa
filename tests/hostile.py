"""A folder of files that break programs: what people's photo folders contain, and worse."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

LOOPS = "loop.png"


def write_hostile_folder(folder: Path, num_files: int) -> tuple[set[str], set[str]]:
    """Writes at least ``num_files`` files that are listed as images.

    Returns:
        Names that can be explained and names that cannot; together all that must have a row.
    """
    good: set[str] = set()
    bad: set[str] = set()
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("no image")
    os.symlink("..", folder / "back")
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    for round_ in range(1000):
        prefix = f"{round_}/" if round_ else ""
        for name, content in readable(round_).items():
            good.add(_write(folder, prefix + name, content))
        for name, content in broken().items():
            bad.add(_write(folder, prefix + name, content))
        for name in strange_names():
            good.add(_write(folder, prefix + name, encoded(_picture(round_), "PNG")))
        for name, target in ((LOOPS, LOOPS), ("gone.png", "nowhere.png")):
            os.symlink(target, folder / prefix / name)
            bad.add(prefix + name)
        if len(good) + len(bad) >= num_files:
            return good, bad
    raise AssertionError("unreachable")


def _write(folder: Path, name: str, content: bytes) -> str:
    path = os.path.join(os.fsencode(folder), os.fsencode(name))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "xb") as file:
        file.write(content)
    return name


def _picture(seed: int, width: int = 20, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(picture: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=form, **options)
    return buffer.getvalue()


def readable(seed: int) -> dict[str, bytes]:
    picture = _picture(seed)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    grey16 = Image.fromarray(np.random.default_rng(seed).integers(0, 65536, (16, 16)).astype(np.uint16))
    palette = picture.convert("P")
    palette.info["transparency"] = 3
    frames = [_picture(seed + i) for i in range(3)]
    nan = np.full((16, 16), np.nan, np.float32)
    nan[0] = 1.0
    return {
        "plain.png": encoded(picture, "PNG"),
        "UPPER.JPG": encoded(picture, "JPEG"),
        "wrong_ending.jpg": encoded(picture, "PNG"),
        "cmyk.jpg": encoded(picture.convert("CMYK"), "JPEG"),
        "grey16.png": encoded(grey16, "PNG"),
        "float.tif": encoded(Image.fromarray(nan), "TIFF"),
        "palette.png": encoded(palette, "PNG", transparency=3),
        "grey_alpha.png": encoded(picture.convert("LA"), "PNG"),
        "rgba.png": encoded(picture.convert("RGBA"), "PNG"),
        "bits.png": encoded(picture.convert("1"), "PNG"),
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated.webp": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "pages.tiff": encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        "pixel.png": encoded(_picture(seed, 1, 1), "PNG"),
        "wide.png": encoded(_picture(seed, 20000, 1), "PNG"),
        "tall.png": encoded(_picture(seed, 1, 20000), "PNG"),
        "rotated.jpg": encoded(picture, "JPEG", exif=rotated),
        "trailing_garbage.jpg": encoded(picture, "JPEG") + b"\0" * 1000,
        "folder.png/inside.png" if not seed else "inside.png": encoded(picture, "PNG"),
    }


def broken() -> dict[str, bytes]:
    jpeg, png = encoded(_picture(0), "JPEG"), encoded(_picture(0), "PNG")
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return {
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated.png": png[: len(png) // 2],
        "empty.png": b"",
        "text.png": b"this is no image",
        "html.jpg": b"<html><script>alert(1)</script></html>",
        "signature_only.png": png[:8],
        "bomb.png": png[:8] + chunk + png[33:],
        "zeros.bmp": b"\0" * 5000,
        "noise.gif": np.random.default_rng(0).bytes(5000),
    }


def strange_names() -> list[str]:
    return [
        "quote\"'.png",
        "line\nbreak\r.png",
        "<script>alert(1)<!-- .png",
        "&amp;<img src=x onerror=alert(1)>.png",
        "..\\..\\up.png",
        "..%2f..%2fup.png",
        "... /dots.png",
        "bell\x07\x1b[31m.png",
        "same.png",
        "SAME.PNG",
        "Same.png",
        "CON.png",
        "-rf.png",
        "=1+1.png",
        "~tilde #1?.png",
        "comma, semicolon; .png",
        "n" * 240 + ".png",
        "deep/" * 30 + "deep.png",
        "\N{PILE OF POO}\N{RIGHT-TO-LEFT OVERRIDE}e\N{COMBINING ACUTE ACCENT}.png",
        os.fsdecode(b"bytes\xff\xfe.png"),
        "\u2028separator.png",
    ]
