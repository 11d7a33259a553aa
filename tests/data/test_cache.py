"""The cache of resized images: the same values cold, half-filled, warm, damaged and on a full disk."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cfe_lightning import images
from cfe_lightning.data import cache as image_cache
from cfe_lightning.data.base import ImageData
from cfe_lightning.data.cache import ImageCache
from cfe_lightning.data.celeba import CelebA
from cfe_lightning.data.chexpert import PATHOLOGIES, CheXpert
from cfe_lightning.data.folder import ImageFolder
from cfe_lightning.data.patient_slices import PatientSlices
from cfe_lightning.images import medical as medical_files

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def room_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_cache, "_RESERVE", 0)


def noise(path: Path, shape: tuple[int, ...] = (23, 17, 3)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(6):
        noise(tmp_path / "pictures" / "ab"[number % 2] / f"{number}.png")
    return tmp_path


def folder(root: Path, **options: Any) -> ImageFolder:
    whole = {"image_size": 8, "val_fraction": 0.0, "test_fraction": 0.0, "cache": False, "batch_size": 2}
    return ImageFolder(root=str(root / "pictures"), **(whole | {"cache_folder": str(root / "cache")} | options))


def entries(root: Path) -> list[Path]:
    return sorted(path for path in (root / "cache").rglob("*") if path.is_file())


def epoch(data: ImageData) -> tuple[torch.Tensor, list[str]]:
    batches = list(data.train_dataloader())
    return torch.cat([batch["image"] for batch in batches]), [name for batch in batches for name in batch["name"]]


def assert_same(one: tuple[torch.Tensor, list[str]], other: tuple[torch.Tensor, list[str]]) -> None:
    assert one[1] == other[1]
    assert torch.equal(one[0], other[0])


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Makes opening a picture fail; ``undo`` allows it again."""

    def refused(path: Path, *_: Any, **__: Any) -> None:
        raise AssertionError(f"{path} was decoded")

    monkeypatch.setattr(images, "read_image", refused)
    return monkeypatch


def test_an_epoch_is_the_same_without_a_cache_and_with_a_cold_half_filled_and_warm_one(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = epoch(folder(root, cache_folder=None))
    assert not (root / "cache").exists()
    assert_same(expected, epoch(folder(root)))
    assert len(entries(root)) == 6
    for path in entries(root)[::2]:
        path.unlink()
    assert_same(expected, epoch(folder(root)))
    assert len(entries(root)) == 6
    monkeypatch.setattr(images, "read_image", None)
    assert_same(expected, epoch(folder(root)))


def test_a_kept_image_can_be_changed_without_changing_the_cache(root: Path) -> None:
    dataset = folder(root).dataset("train")
    expected = dataset[0]["image"].clone()
    dataset[0]["image"].zero_()
    assert torch.equal(dataset[0]["image"], expected)


def test_loader_processes_fill_and_read_it_together(root: Path, no_decoding: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="was decoded"):
        epoch(folder(root, num_workers=2))
    no_decoding.undo()
    no_decoding.setattr(image_cache, "_RESERVE", 0)
    expected = epoch(folder(root, num_workers=2))
    assert len(entries(root)) == 6
    assert all(path.suffix == ".image" for path in entries(root))
    no_decoding.setattr(images, "read_image", None)
    assert_same(expected, epoch(folder(root, num_workers=2)))


def test_what_decides_on_the_pixels_decides_on_the_entry(root: Path) -> None:
    for options in ({}, {"image_size": 9}, {"channels": 1}):
        plain = folder(root, cache_folder=None, **options).dataset("train")
        for data in (folder(root, **options), folder(root, **options)):
            for index in range(6):
                assert torch.equal(data.dataset("train")[index]["image"], plain[index]["image"])
    assert len(entries(root)) == 18
    cache = ImageCache(root / "cache")
    picture = root / "pictures" / "a" / "0.png"
    for number, settings in enumerate(("crop None", "crop 5")):
        value = torch.full((1, 2, 2), float(number))
        assert cache.load(picture, settings, (1, 2, 2), value.clone)[0, 0, 0] == number
    assert len(entries(root)) == 20


@pytest.mark.parametrize(("name", "reader"), [("a.dcm", "pydicom"), ("a.nii.gz", "nibabel"), ("a.png", None)])
def test_the_version_of_what_reads_a_medical_file_decides_on_its_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reader: str | None
) -> None:
    (tmp_path / name).write_bytes(b"content")
    read: list[str] = []

    def value() -> torch.Tensor:
        read.append(name)
        return torch.zeros(1, 2, 2)

    def load() -> None:
        medical_files._versions.cache_clear()
        ImageCache(tmp_path / "cache").load(tmp_path / name, "", (1, 2, 2), value)

    # Read once, and again only for a newer version of its own reader.
    load(), load()
    assert len(read) == 1
    version = importlib.metadata.version
    for changed in ("pydicom", "nibabel"):
        with monkeypatch.context() as patch:
            newer = lambda package, changed=changed: "99" if package == changed else version(package)  # noqa: E731
            patch.setattr(importlib.metadata, "version", newer)
            load()
    medical_files._versions.cache_clear()
    assert len(read) == (1 if reader is None else 2)


def test_an_exchanged_file_is_read_again(root: Path) -> None:
    picture = root / "pictures" / "a" / "0.png"
    before = folder(root).dataset("train")[0]["image"]
    status = picture.stat()
    pixels = RNG.integers(0, 256, (23, 17, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    # Even with the size of the old one.
    picture.write_bytes(picture.read_bytes()[: status.st_size].ljust(status.st_size, b"\0"))
    os.utime(picture, ns=(0, status.st_mtime_ns + 1))
    after = folder(root, cache_folder=None).dataset("train")[0]["image"]
    assert not torch.equal(before, after)
    assert torch.equal(folder(root).dataset("train")[0]["image"], after)


def test_a_file_that_is_exchanged_while_it_is_read_is_not_kept(root: Path) -> None:
    picture = root / "pictures" / "a" / "0.png"

    def read() -> torch.Tensor:
        os.utime(picture, ns=(0, 7))
        return torch.zeros(1, 2, 2)

    ImageCache(root / "cache").load(picture, "", (1, 2, 2), read)
    assert not entries(root)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def damages(content: bytes, other: bytes, trace: Path) -> dict[str, bytes]:
    flipped = bytearray(content)
    flipped[-5] ^= 1
    return {
        "empty": b"",
        "shortened": content[:-1],
        "lengthened": content + b"\0",
        "one bit": bytes(flipped),
        "another image's": other,
        "zeros": bytes(len(content)),
        "a pickle": pickle.dumps(Payload(trace)).ljust(len(content), b"."),
    }


def test_a_damaged_file_is_replaced_and_nothing_else_is_touched(root: Path) -> None:
    expected = epoch(folder(root))
    notes = root / "cache" / "notes.txt"
    notes.write_text("mine")
    first, second = [path for path in entries(root) if path != notes][:2]
    content = first.read_bytes()
    for name, damage in damages(content, second.read_bytes(), root / "trace").items():
        first.write_bytes(damage)
        assert_same(expected, epoch(folder(root)))
        assert first.read_bytes() == content, name
    assert notes.read_text() == "mine"
    assert len(entries(root)) == 7
    assert not (root / "trace").exists()


def test_a_full_disk_switches_it_off_with_one_warning(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = epoch(folder(root, cache_folder=None))
    monkeypatch.setattr(image_cache, "_RESERVE", 1 << 60)
    with caplog.at_level(logging.WARNING):
        assert_same(expected, epoch(folder(root)))
    assert [record.getMessage() for record in caplog.records] == [
        f"No more images are kept in cache_folder {root / 'cache'} (less than 1073741824 GiB would be left on the "
        "disk): the run continues with those it holds."
    ]
    assert not entries(root)
    # The loader's processes share the switch: nobody tries again.
    data = folder(root, num_workers=2)
    assert_same(expected, epoch(data))
    assert data.image_cache is not None
    assert data.image_cache._only_read


def test_an_interrupted_writing_leaves_nothing_behind(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(self: Path, target: Path) -> None:
        assert self.stat().st_size > 0
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refused)
    expected = epoch(folder(root, cache_folder=None))
    assert_same(expected, epoch(folder(root)))
    assert not entries(root)
    assert caplog.text.count("(No space left on device)") == 1


def test_a_folder_that_cannot_be_made_is_said_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    noise(root / "file.png")
    data = folder(root, cache_folder=str(root / "file.png" / "cache"))
    assert_same(epoch(folder(root, cache_folder=None)), epoch(data))
    assert caplog.text.count("No more images are kept") == 1


def test_a_file_is_no_folder(root: Path) -> None:
    with pytest.raises(ValueError, match=r"cache_folder .*0\.png is a file: give a folder, which is made if there is"):
        folder(root, cache_folder=str(root / "pictures" / "a" / "0.png"))


def test_an_unreadable_picture_is_named_as_without_a_cache(root: Path) -> None:
    broken, gone = root / "pictures" / "a" / "0.png", root / "pictures" / "a" / "2.png"
    dataset = folder(root).dataset("train")
    broken.write_bytes(b"no picture")
    gone.unlink()
    for path in (broken, gone):
        with pytest.raises(images.UnreadableImageError, match=rf"The image .*{path.name} cannot be used .*: repair or"):
            dataset.load([file.path for file in dataset.files].index(path))
    assert not entries(root)


def celeba(root: Path, **options: Any) -> ImageData:
    names = [f"{number:06d}.jpg" for number in range(4)]
    for name in names:
        noise(root / "celeba" / "img_align_celeba" / name, (218, 178, 3))
    table = "".join(f"{name} {1 if number % 2 else -1}\n" for number, name in enumerate(names))
    (root / "celeba" / "list_attr_celeba.txt").write_text(f"4\nSmiling\n{table}")
    (root / "celeba" / "list_eval_partition.txt").write_text("".join(f"{name} 0\n" for name in names))
    return CelebA(root=str(root), attribute="Smiling", image_size=16, **options)


def chexpert(root: Path, **options: Any) -> ImageData:
    lines = [",".join(("Path", "Frontal/Lateral", "No Finding", *PATHOLOGIES))]
    for patient in range(4):
        name = f"train/patient{patient:05d}/study1/view1_frontal.jpg"
        noise(root / name, (20, 24))
        findings = ("," * 12) if patient % 2 else ",".join(["1.0"] * 13)
        lines.append(f"CheXpert-v1.0-small/{name},Frontal,{'1.0' if patient % 2 else ''},{findings}")
    (root / "train.csv").write_text("\n".join(lines))
    shares = {"val_fraction": 0.0, "test_fraction": 0.0}
    return CheXpert(root=str(root), pathology="Edema", uncertain="zeros", image_size=16, **shares, **options)


def slices(root: Path, **options: Any) -> ImageData:
    for number in range(4):
        noise(root / f"{number}.png", (9, 9))
    (root / "slices.csv").write_text("patient,path,label\n" + "".join(f"{n},{n}.png,{'ab'[n % 2]}\n" for n in range(4)))
    shares = {"val_fraction": 0.0, "test_fraction": 0.0}
    return PatientSlices(root=str(root), labels="slices.csv", slice_size=8, num_slices=1, **shares, **options)


@pytest.mark.parametrize("source", [celeba, chexpert, slices])
def test_every_source_that_reads_files_has_one(source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tmp_path / "cache")
    expected = source(tmp_path, cache=False, cache_folder=folder).dataset("train")
    pictures = torch.stack([expected[index]["image"] for index in range(4)])
    assert len(entries(tmp_path)) == 4
    monkeypatch.setattr(images, "read_image", None)
    for path in tmp_path.rglob("*.*g"):
        status = path.stat()
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert torch.equal(torch.stack([expected[index]["image"] for index in range(4)]), pictures)
