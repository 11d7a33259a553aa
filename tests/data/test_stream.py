import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toy

from cfe_lightning import images
from cfe_lightning.data import stream as image_stream
from cfe_lightning.data.stream import Batch, ImageStream, read_batch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, image in enumerate(toy.toy_images(5)):
        images.save_image(image, tmp_path / f"{index}.png")
    (tmp_path / "empty.png").write_bytes(b"")
    return tmp_path


BATCHES = [["0.png", "empty.png", "1.png"], ["2.png"], ["3.png", "4.png"]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_as_given_whatever_reads_them(folder: Path, num_workers: int):
    stream = ImageStream(folder=folder, batches=BATCHES, image_size=8, channels=1, num_workers=num_workers)
    read = sorted(stream.predict_dataloader(), key=lambda batch: batch["name"])
    assert [batch["name"] for batch in read] == [["0.png", "1.png"], ["2.png"], ["3.png", "4.png"]]
    assert [failure["name"] for failure in read[0]["failed"]] == ["empty.png"]
    assert [list(batch["image"].shape) for batch in read] == [[2, 1, 8, 8], [1, 1, 8, 8], [2, 1, 8, 8]]
    assert "target" not in read[0]


def test_the_next_batch_is_read_while_the_current_one_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch):
    read = {names[0]: threading.Event() for names in BATCHES}

    def recorded(names: list[str], **options: Any) -> Batch:
        read[names[0]].set()
        return read_batch(names, **options)

    monkeypatch.setattr(image_stream, "read_batch", recorded)
    stream = ImageStream(folder=folder, batches=BATCHES, image_size=8, channels=1)
    batches = iter(stream.predict_dataloader())
    assert next(batches)["name"] == ["0.png", "1.png"]
    assert read["2.png"].wait(timeout=60)
    # One ahead, not all: memory stays what it is.
    assert not read["3.png"].is_set()
    assert [batch["name"] for batch in batches] == [["2.png"], ["3.png", "4.png"]]


def test_files_that_cannot_be_read_stop_no_other(folder: Path):
    batch = read_batch(["gone.png", "1.png", "empty.png"], folder=folder, image_size=16, channels=3, target=1)
    assert batch["name"] == ["1.png"]
    assert torch.equal(batch["image"][0], images.saved(toy.toy_images(2)[1]))
    assert batch["target"].tolist() == [1]
    status = (folder / "1.png").stat()
    assert batch["source"] == [[status.st_size, status.st_mtime_ns]]
    gone, empty = batch["failed"]
    assert (gone["name"], gone["source"]) == ("gone.png", [0, 0])
    assert (empty["name"], empty["error"]) == ("empty.png", "The file is empty.")


def test_a_batch_without_a_readable_file_is_one_blank_image_without_a_name(folder: Path):
    batch = read_batch(["gone.png", "empty.png"], folder=folder, image_size=16, channels=3, target=1)
    assert list(batch["image"].shape) == [1, 3, 16, 16]
    assert (batch["name"], len(batch["failed"]), batch["target"].tolist()) == ([], 2, [1])


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_processes_share_the_first_ones_batches(folder: Path, world_size: int):
    read: list[list[str]] = []
    for rank in range(world_size):
        given = BATCHES if rank == 0 else []
        stream = ImageStream(folder=folder, batches=given, image_size=8, channels=3)
        strategy = SimpleNamespace(broadcast=lambda _: BATCHES)
        stream.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, strategy=strategy)
        stream.setup("predict")
        read += [batch["name"] for batch in stream.predict_dataloader()]
    assert sorted(read) == [["0.png", "1.png"], ["2.png"], ["3.png", "4.png"]]
