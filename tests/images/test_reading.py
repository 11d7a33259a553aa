"""Files of every mode are read with the right values, and every broken file is refused in one sentence."""

from __future__ import annotations

import inspect
import io
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cfe_lightning.images import UnreadableImageError, find_images, read_image, reading, resize

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (7, 10, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (7, 10), dtype=np.uint8)


def rgb() -> Image.Image:
    return Image.fromarray(PIXELS)


def expected(unit: np.ndarray) -> torch.Tensor:
    """Returns the tensor that should be read from pixels [H, W] or [H, W, 3] in [0, 1]."""
    unit = unit[None] if unit.ndim == 2 else unit.transpose(2, 0, 1)
    return torch.from_numpy(unit.astype(np.float32)) * 2 - 1


def assert_read(path: Path, unit: np.ndarray, channels: int = 3, tolerance: float = 1e-6) -> None:
    image = read_image(path, channels)
    wanted = expected(unit)
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    torch.testing.assert_close(image, wanted.expand(channels, -1, -1), atol=tolerance, rtol=0)


class TestModes:
    @pytest.mark.parametrize("form", ["png", "bmp", "ppm", "tif", "webp"])
    def test_rgb_is_exact_in_lossless_formats(self, tmp_path: Path, form: str) -> None:
        path = tmp_path / f"a.{form}"
        rgb().save(path, lossless=True) if form == "webp" else rgb().save(path)
        assert_read(path, PIXELS / 255)

    def test_grey_is_repeated_for_rgb(self, tmp_path: Path) -> None:
        Image.fromarray(GREY).save(tmp_path / "a.png")
        assert_read(tmp_path / "a.png", GREY / 255, channels=3)
        assert_read(tmp_path / "a.png", GREY / 255, channels=1)

    def test_rgb_becomes_luminance_for_grey(self, tmp_path: Path) -> None:
        rgb().save(tmp_path / "a.png")
        luminance = (PIXELS / 255) @ np.array([0.299, 0.587, 0.114])
        assert_read(tmp_path / "a.png", luminance, channels=1, tolerance=2 / 255)

    def test_transparent_pixels_become_white(self, tmp_path: Path) -> None:
        alpha = np.zeros((7, 10), dtype=np.uint8)
        alpha[:, 5:] = 255
        unit = np.where(alpha[..., None] == 255, PIXELS / 255, 1.0)
        Image.fromarray(np.dstack([PIXELS, alpha])).save(tmp_path / "rgba.png")
        assert_read(tmp_path / "rgba.png", unit)
        Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(alpha))).save(tmp_path / "la.png")
        assert_read(tmp_path / "la.png", np.where(alpha == 255, GREY / 255, 1.0), channels=1)

    def test_half_transparency_mixes_with_white(self, tmp_path: Path) -> None:
        alpha = np.full((7, 10), 128, dtype=np.uint8)
        Image.fromarray(np.dstack([PIXELS, alpha])).save(tmp_path / "a.png")
        assert_read(tmp_path / "a.png", PIXELS / 255 * 128 / 255 + 1 - 128 / 255, tolerance=2.1 / 255)

    def test_palettes(self, tmp_path: Path) -> None:
        palette = Image.fromarray((GREY % 4).astype(np.uint8), mode="P")
        colours = np.array([[250, 0, 0], [0, 200, 0], [0, 0, 150], [9, 9, 9]], dtype=np.uint8)
        palette.putpalette(colours.tobytes())
        unit = colours[GREY % 4] / 255
        palette.save(tmp_path / "plain.png")
        assert_read(tmp_path / "plain.png", unit)
        palette.save(tmp_path / "index.gif", transparency=2)
        assert_read(tmp_path / "index.gif", np.where((GREY % 4 == 2)[..., None], 1.0, unit))
        palette.save(tmp_path / "bytes.png", transparency=bytes([255, 0, 255, 255]))
        assert_read(tmp_path / "bytes.png", np.where((GREY % 4 == 1)[..., None], 1.0, unit))

    def test_a_colour_marked_transparent_becomes_white(self, tmp_path: Path) -> None:
        grey = GREY.copy()
        grey[2, 3] = 7
        Image.fromarray(grey).save(tmp_path / "a.png", transparency=7)
        assert_read(tmp_path / "a.png", np.where(grey == 7, 1.0, grey / 255), channels=1)

    def test_one_bit(self, tmp_path: Path) -> None:
        Image.fromarray(GREY > 127).save(tmp_path / "a.png")
        assert_read(tmp_path / "a.png", (GREY > 127).astype(float))

    def test_cmyk_jpeg_looks_like_the_rgb_one(self, tmp_path: Path) -> None:
        smooth = Image.fromarray(np.linspace(0, 255, 16 * 16 * 3).reshape(16, 16, 3).astype(np.uint8))
        smooth.convert("CMYK").save(tmp_path / "a.jpg", quality=100)
        assert_read(tmp_path / "a.jpg", np.asarray(smooth) / 255, tolerance=0.1)

    @pytest.mark.parametrize("channels", [1, 3])
    def test_sixteen_bits_keep_their_precision(self, tmp_path: Path, channels: int) -> None:
        deep = RNG.integers(0, 65536, (7, 10)).astype(np.uint16)
        Image.fromarray(deep).save(tmp_path / "a.png")
        Image.fromarray(deep).save(tmp_path / "a.tif")
        Image.frombytes("I;16B", (10, 7), deep.astype(">u2").tobytes()).save(tmp_path / "big.tif")
        for name in ("a.png", "a.tif", "big.tif"):
            assert_read(tmp_path / name, deep / 65535, channels=channels)

    def test_float_in_the_unit_range_is_taken_as_it_is(self, tmp_path: Path) -> None:
        unit = RNG.random((7, 10)).astype(np.float32)
        Image.fromarray(unit).save(tmp_path / "a.tif")
        assert_read(tmp_path / "a.tif", unit)

    @pytest.mark.parametrize(("high", "divisor"), [(200, 255.0), (4000, 65535.0)])
    def test_32_bits_that_hold_fewer(self, tmp_path: Path, high: int, divisor: float) -> None:
        values = np.linspace(0, high, 70).reshape(7, 10).astype(np.int32)
        Image.fromarray(values).save(tmp_path / "a.tif")
        assert_read(tmp_path / "a.tif", values / divisor)

    def test_anything_else_is_scaled_by_its_own_range_and_nan_is_zero(self, tmp_path: Path) -> None:
        values = np.linspace(-100, 300, 70).reshape(7, 10).astype(np.float32)
        broken = values.copy()
        broken[0, 5], broken[0, 6] = np.nan, np.inf
        values[0, 5:7] = 0
        Image.fromarray(broken).save(tmp_path / "a.tif")
        assert_read(tmp_path / "a.tif", (values + 100) / 400)

    def test_a_constant_image_does_not_divide_by_zero(self, tmp_path: Path) -> None:
        Image.fromarray(np.full((7, 10), -3, dtype=np.float32)).save(tmp_path / "a.tif")
        assert_read(tmp_path / "a.tif", np.zeros((7, 10)))

    @pytest.mark.parametrize("form", ["gif", "webp", "png", "tif"])
    def test_the_first_frame_of_an_animation(self, tmp_path: Path, form: str) -> None:
        frames = [Image.fromarray(np.full((7, 10, 3), level, dtype=np.uint8)) for level in (255, 0, 100)]
        options = {"lossless": True} if form == "webp" else {}
        frames[0].save(tmp_path / f"a.{form}", save_all=True, append_images=frames[1:], **options)
        assert_read(tmp_path / f"a.{form}", np.ones((7, 10)))

    @pytest.mark.parametrize(
        ("orientation", "turned"),
        [(1, PIXELS), (2, PIXELS[:, ::-1]), (3, PIXELS[::-1, ::-1]), (6, np.rot90(PIXELS, -1)), (8, np.rot90(PIXELS))],
    )
    def test_exif_rotation(self, tmp_path: Path, orientation: int, turned: np.ndarray) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        rgb().save(tmp_path / "a.png", exif=exif)
        assert_read(tmp_path / "a.png", turned / 255)

    def test_exif_rotation_of_sixteen_bits(self, tmp_path: Path) -> None:
        deep = RNG.integers(0, 65536, (7, 10)).astype(np.uint16)
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(deep).save(tmp_path / "a.png", exif=exif)
        assert_read(tmp_path / "a.png", np.rot90(deep, -1) / 65535, channels=1)

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
    def test_broken_exif_does_not_matter(self, tmp_path: Path) -> None:
        rgb().save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
        assert_read(tmp_path / "a.png", PIXELS / 255)

    def test_the_content_decides_not_the_ending(self, tmp_path: Path) -> None:
        rgb().save(tmp_path / "a.jpg", format="PNG")
        assert_read(tmp_path / "a.jpg", PIXELS / 255)


class TestSizes:
    @pytest.mark.parametrize("shape", [(1, 1), (1, 20000), (20000, 1), (3, 200), (64, 64)])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_any_shape_becomes_the_square(self, tmp_path: Path, shape: tuple[int, int], channels: int) -> None:
        values = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / "a.png")
        whole = read_image(tmp_path / "a.png", channels)
        assert whole.shape == (channels, *shape)
        small = read_image(tmp_path / "a.png", channels, size=64)
        assert small.shape == (channels, 64, 64)
        assert small.is_contiguous()
        torch.testing.assert_close(small, resize(whole, 64), atol=1e-5, rtol=0)
        assert small.mean() == pytest.approx(whole.mean().item(), abs=1e-3)

    @pytest.mark.parametrize("shape", [(90, 50), (50, 90)])
    def test_many_strips_equal_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
    ) -> None:
        Image.fromarray(RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(tmp_path / "a.png")
        one = read_image(tmp_path / "a.png", 3, size=16)
        monkeypatch.setattr(reading, "_STRIP_PIXELS", 400)
        torch.testing.assert_close(read_image(tmp_path / "a.png", 3, size=16), one, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("shape", [(100_000, 1), (1, 100_000), (2000, 1500)])
    def test_no_intermediate_is_large(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
    ) -> None:
        Image.fromarray(np.zeros((*shape, 3), dtype=np.uint8)).save(tmp_path / "a.png")
        sizes = []
        interpolate = reading.interpolate

        def recorded(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
            sizes.append(max(image.numel(), 3 * height * width))
            return interpolate(image, height, width)

        monkeypatch.setattr(reading, "interpolate", recorded)
        read_image(tmp_path / "a.png", 3, size=64)
        assert max(sizes) <= 3 * reading._STRIP_PIXELS

    def test_the_range_is_never_left(self, tmp_path: Path) -> None:
        Image.fromarray(np.full((333, 217, 3), 255, dtype=np.uint8)).save(tmp_path / "a.png")
        for size in (7, 64, 100):
            image = read_image(tmp_path / "a.png", 3, size=size)
            assert image.max() <= 1
            assert image.min() == pytest.approx(1, abs=1e-5)

    def test_other_channel_counts_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"channels must be 1 \(grey\) or 3 \(RGB\), got 4"):
            read_image(tmp_path / "a.png", 4)


class TestBrokenFiles:
    @staticmethod
    def message(path: Path, **options: int) -> str:
        with pytest.raises(UnreadableImageError) as caught:
            read_image(path, 3, **options)
        message = str(caught.value)
        assert "\n" not in message
        assert str(path.parent) not in message, "the message would differ from machine to machine"
        return message

    @pytest.mark.filterwarnings("ignore::UserWarning:PIL")
    @pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "TIFF"])
    @pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
    def test_truncated(self, tmp_path: Path, form: str, share: float) -> None:
        buffer = io.BytesIO()
        Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, format=form)
        path = tmp_path / "a.png"
        path.write_bytes(buffer.getvalue()[: int(len(buffer.getvalue()) * share)])
        assert "ot a readable image" in self.message(path) or "no image in a format read here" in self.message(path)

    def test_empty(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").touch()
        assert self.message(tmp_path / "a.png") == "The file is empty."

    def test_no_image(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_text("<script>alert(1)</script>")
        assert self.message(tmp_path / "a.png").startswith(
            "The content is no image in a format read here: AVIF, BMP, DIB, GIF,"
        )

    def test_postscript_never_reaches_an_interpreter(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import subprocess

        def started(*arguments: object, **options: object) -> None:
            raise AssertionError("a program was started")

        monkeypatch.setattr(subprocess, "Popen", started)
        monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
        (tmp_path / "a.jpg").write_bytes(
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%Page: 1 1\nshowpage\n%%EOF\n"
        )
        assert "no image in a format read here" in self.message(tmp_path / "a.jpg")

    def test_missing_folder_pipe_and_loop(self, tmp_path: Path) -> None:
        assert "No such file" in self.message(tmp_path / "a.png")
        (tmp_path / "folder.png").mkdir()
        os.mkfifo(tmp_path / "pipe.png")
        for name in ("folder.png", "pipe.png"):
            assert self.message(tmp_path / name) == "Not a file but a folder, pipe or device."
        (tmp_path / "loop.png").symlink_to("loop.png")
        assert "symbolic links" in self.message(tmp_path / "loop.png")

    def test_no_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # Not by chmod, which does not stop root.
        def refused(path: Path, **options: object) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        rgb().save(tmp_path / "a.png")
        monkeypatch.setattr(reading.Image, "open", refused)
        assert self.message(tmp_path / "a.png") == "Not a readable image: Permission denied"

    def test_too_many_pixels(self, tmp_path: Path) -> None:
        rgb().save(tmp_path / "a.png")
        assert self.message(tmp_path / "a.png", max_pixels=69) == "10 x 7 pixels are more than the 69 accepted."
        assert read_image(tmp_path / "a.png", 3, max_pixels=70).shape == (3, 7, 10)

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize("side", [10_001, 60_000])
    def test_a_bomb_is_refused_before_it_is_decoded(self, tmp_path: Path, side: int) -> None:
        rgb().save(tmp_path / "small.png")
        content = (tmp_path / "small.png").read_bytes()
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
        (tmp_path / "a.png").write_bytes(content[:8] + chunk + content[33:])
        assert "pixels are more than the" in self.message(tmp_path / "a.png") or "too large to decode safely" in (
            self.message(tmp_path / "a.png")
        )

    @pytest.mark.filterwarnings("ignore::UserWarning:PIL")
    def test_random_damage_is_either_read_or_refused(self, tmp_path: Path) -> None:
        # One file of each format.
        rng = np.random.default_rng(1)
        originals = []
        for form in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"):
            buffer = io.BytesIO()
            rgb().save(buffer, format=form)
            originals.append(buffer.getvalue())
        # Five random bytes changed in each of many copies.
        path = tmp_path / "a.png"
        refused = 0
        for round_ in range(20 * len(originals)):
            content = bytearray(originals[round_ % len(originals)])
            for position in rng.integers(0, len(content), 5):
                content[position] = rng.integers(0, 256)
            path.write_bytes(bytes(content))
            try:
                image = read_image(path, 3, size=8, max_pixels=1_000_000)
                assert image.shape == (3, 8, 8)
                assert image.abs().max() <= 1
            except UnreadableImageError:
                refused += 1
        assert 0 < refused < 20 * len(originals)


class TestFindImages:
    @staticmethod
    def touch(folder: Path, *names: str) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()

    def test_names_are_relative_and_ordered_by_their_parts(self, tmp_path: Path) -> None:
        self.touch(tmp_path, "b.png", "a/z.JPG", "a/b/1.tiff", "a.png", "a/b.webp", "Z.gif", "a/notes.txt", "noending")
        assert list(find_images(tmp_path)) == ["Z.gif", "a/b/1.tiff", "a/b.webp", "a/z.JPG", "a.png", "b.png"]

    def test_hidden_files_and_folders_are_left_out(self, tmp_path: Path) -> None:
        self.touch(tmp_path, ".a.png", ".thumbnails/b.png", "c.png", ".png")
        assert list(find_images(tmp_path)) == ["c.png"]

    def test_readable_or_not_but_no_pipe(self, tmp_path: Path) -> None:
        self.touch(tmp_path, "empty.png")
        (tmp_path / "broken.png").symlink_to("nowhere.png")
        (tmp_path / "loop.png").symlink_to("loop.png")
        (tmp_path / "link.png").symlink_to("empty.png")
        os.mkfifo(tmp_path / "pipe.png")
        (tmp_path / "folder.png").mkdir()
        assert list(find_images(tmp_path)) == ["broken.png", "empty.png", "link.png", "loop.png"]

    def test_linked_folders_are_entered_once_and_never_in_a_circle(self, tmp_path: Path) -> None:
        root, other = tmp_path / "root", tmp_path / "other"
        self.touch(root, "a/1.png")
        self.touch(other, "2.png", "deep/3.png")
        (root / "self").symlink_to(root)
        (root / "up").symlink_to(tmp_path)
        (root / "alias").symlink_to(root / "a")
        (root / "x").symlink_to(other)
        (root / "y").symlink_to(other / "deep")
        (other / "back").symlink_to(root)
        (other / "deep" / "again").symlink_to(other)
        assert list(find_images(root)) == ["a/1.png", "x/2.png", "x/deep/3.png"]

    def test_the_folder_itself_may_be_a_link(self, tmp_path: Path) -> None:
        self.touch(tmp_path, "real/1.png")
        (tmp_path / "link").symlink_to("real")
        assert list(find_images(tmp_path / "link")) == ["1.png"]

    def test_strange_names_survive(self, tmp_path: Path) -> None:
        names = sorted(["line\nbreak.png", "quote'\".png", "<b>.png", "..%2f.png", os.fsdecode(b"\xff.png"), "é.png"])
        self.touch(tmp_path, *names)
        found = list(find_images(tmp_path))
        assert found == names
        assert all((tmp_path / name).exists() for name in found)

    def test_depth_costs_no_python_calls(self, tmp_path: Path) -> None:
        self.touch(tmp_path, "d/" * 200 + "1.png")
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(len(inspect.stack()) + 100)
        try:
            found = list(find_images(tmp_path))
        finally:
            sys.setrecursionlimit(limit)
        assert found == ["d/" * 200 + "1.png"]

    def test_only_one_folder_is_listed_at_a_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.touch(tmp_path, *(f"{folder}/1.png" for folder in range(5)))
        opened = []
        entries = reading._entries
        monkeypatch.setattr(reading, "_entries", lambda directory: opened.append(directory) or entries(directory))
        walk = find_images(tmp_path)
        assert next(walk) == "0/1.png"
        assert len(opened) == 2

    def test_a_folder_that_cannot_be_listed_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.touch(tmp_path, "a/1.png", "b/2.png")
        scandir = os.scandir

        def refusing(path: str) -> object:
            if path.endswith("/a"):
                raise PermissionError(13, "Permission denied", path)
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refusing)
        assert list(find_images(tmp_path)) == ["b/2.png"]
        assert f"The folder {tmp_path}/a cannot be listed and is left out: Permission denied" in caplog.text

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere"):
            find_images(tmp_path / "nowhere")
        self.touch(tmp_path, "a.png")
        with pytest.raises(NotADirectoryError, match="is not a folder: give the folder that holds the images"):
            find_images(tmp_path / "a.png")
