"""Content decides on what is an image: odd endings, no ending, exports without names, and what is left out is said."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from medical import write_dicom
from PIL import Image

from cfe_lightning.data.stream import read_batch
from cfe_lightning.images import find_images, is_picture, read_image
from cfe_lightning.images.medical import is_dicom, is_slice

#: Names of readable pictures and the formats of their contents.
ODD = {
    "a.jfif": "JPEG", "b.jpe": "JPEG", "c.avif": "AVIF", "d.jp2": "JPEG2000", "e.tga": "TGA", "f.apng": "PNG",
    "g": "PNG", "h.dat": "TIFF", "i.JPG": "JPEG", "j.jpg": "PNG", "k.gif": "GIF", "l.bmp": "BMP", "m.dib": "DIB",
    "n.tif": "TIFF", "o.TIFF": "TIFF", "p.webp": "WEBP", "q.pgm": "PPM", "r.ppm": "PPM", "s.bak": "JPEG", "t.1": "WEBP",
    "u.png.download": "PNG", "v": "GIF", "w.bin": "BMP", "x.raw": "AVIF",
}  # fmt: skip


def test_every_readable_picture_is_found_whatever_its_ending(tmp_path):
    picture = Image.new("RGB", (12, 9), (200, 30, 90))
    for name, form in ODD.items():
        content = io.BytesIO()
        picture.save(content, format=form)
        (tmp_path / name).write_bytes(content.getvalue())
    names = list(find_images(tmp_path))
    assert names == sorted(ODD)
    assert len(names) == 24
    batch = read_batch(names, folder=tmp_path, image_size=8, channels=3)
    assert (batch["name"], batch["failed"]) == (names, [])
    expected = torch.tensor([200, 30, 90]) / 127.5 - 1
    assert float((batch["image"].mean(dim=(2, 3)) - expected).abs().max()) < 0.1


@pytest.mark.parametrize("content", [b"BMW and other cars, a list of them", b"P2P networks", b"", b"\xff\xd8", b"GIF"])
def test_texts_that_begin_like_pictures_are_none(content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    assert not is_picture(tmp_path / "file")


def test_what_is_left_out_is_counted(tmp_path, caplog):
    for name in ("a.png", "b/.hidden.png", "b/._a.png", "Thumbs.db", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"none")
    with caplog.at_level(logging.WARNING):
        assert list(find_images(tmp_path)) == ["a.png"]
    assert "4 entries of" in caplog.text
    assert "hidden or no images, such as 'Thumbs.db'" in caplog.text


@pytest.mark.parametrize("name", ["IM000001", "1.2.840.113619.2.5", "scan.dicom", "scan.IMA", "image.000"])
def test_an_export_of_an_archive_is_read_by_its_content(name, tmp_path):
    write_dicom(tmp_path / "file.dcm", np.arange(64, dtype=np.uint16).reshape(8, 8))
    (tmp_path / "file.dcm").rename(tmp_path / name)
    assert is_dicom(tmp_path / name)
    assert is_slice(tmp_path / name)
    batch = read_batch(list(find_images(tmp_path, is_slice)), folder=tmp_path, image_size=8, channels=1)
    assert (batch["name"], batch["failed"]) == ([name], [])


def test_a_pipe_is_no_picture(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert not is_slice(tmp_path / "pipe")


def test_a_tga_file_is_read_by_its_name(tmp_path):
    Image.new("L", (5, 4), 128).save(tmp_path / "grey.tga")
    assert read_image(tmp_path / "grey.tga", 1).shape == (1, 4, 5)
