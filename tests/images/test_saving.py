"""Pictures and animations appear whole or not at all, and pixels are read back as they were saved."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from cfe_lightning import images


@pytest.mark.parametrize("channels", [1, 3])
def test_saved_is_what_a_reader_sees(tmp_path: Path, channels: int) -> None:
    image = torch.rand(channels, 9, 5, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    path = tmp_path / "new" / "a.png"
    images.save_image(image, path)
    torch.testing.assert_close(images.read_image(path, channels), images.saved(image), atol=1e-6, rtol=0)
    torch.testing.assert_close(images.saved(images.saved(image)), images.saved(image))


def test_only_the_file_itself_stays_and_long_names_work(tmp_path: Path) -> None:
    name = "n" * 251 + ".png"
    images.save_image(torch.zeros(1, 4, 4), tmp_path / name)
    assert os.listdir(tmp_path) == [name]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images.save_image(torch.zeros(1, 4, 4), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def interrupted(self: Image.Image, file: Path, **options: object) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(OSError, match=r"No space left.*a\.png"):
        images.save_image(torch.ones(1, 4, 4), tmp_path / "a.png")
    with pytest.raises(OSError, match=r"No space left.*a\.gif"):
        images.save_animation(torch.ones(2, 1, 4, 4), tmp_path / "a.gif")
    assert (tmp_path / "a.png").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.png"]
