"""Image folders in every layout: what is read, how it is split, and what is refused."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cfe_lightning.data import files as image_files
from cfe_lightning.data.base import Split
from cfe_lightning.data.files import take_turns
from cfe_lightning.data.folder import ImageFolder
from cfe_lightning.images import UnreadableImageError, read_image

SPLITS: tuple[Split, ...] = ("train", "val", "test")


def write(root: Path, *names: str, level: int | None = None) -> None:
    """One small picture for each name; the level tells them apart."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((5, 4, 3), level if level is not None else number % 256, dtype=np.uint8)).save(path)


def numbered(folder: str, count: int) -> list[str]:
    return [f"{folder}/{number:03d}.png" for number in range(count)]


def folder(root: Path, **options: Any) -> ImageFolder:
    return ImageFolder(root=str(root), image_size=8, **options)


def names(data: ImageFolder, split: Split) -> list[str]:
    return [sample["name"] for sample in (data.dataset(split)[i] for i in range(len(data.dataset(split))))]


class TestSplitFolders:
    def test_all_three(self, tmp_path: Path) -> None:
        for split, count in (("train", 4), ("val", 2), ("test", 3)):
            write(tmp_path, *numbered(f"{split}/cat", count), *numbered(f"{split}/dog", count))
        data = folder(tmp_path)
        assert data.class_names == ("cat", "dog")
        assert [len(data.dataset(split)) for split in SPLITS] == [8, 4, 6]
        assert names(data, "val") == ["val/cat/000.png", "val/dog/000.png", "val/cat/001.png", "val/dog/001.png"]
        assert data.dataset("val").labels.tolist() == [0, 1, 0, 1]

    def test_a_missing_val_comes_out_of_train_and_never_out_of_test(self, tmp_path: Path) -> None:
        write(
            tmp_path,
            *numbered("train/a", 60),
            *numbered("train/b", 60),
            *numbered("test/a", 30),
            *numbered("test/b", 30),
        )
        data = folder(tmp_path, val_fraction=0.25)
        assert len(data.dataset("test")) == 60
        assert 15 <= len(data.dataset("val")) <= 45
        assert len(data.dataset("train")) + len(data.dataset("val")) == 120
        assert all(name.startswith("train/") for name in names(data, "val"))
        assert not set(names(data, "train")) & set(names(data, "val"))

    def test_a_missing_test_too(self, tmp_path: Path) -> None:
        write(
            tmp_path, *numbered("train/a", 60), *numbered("train/b", 60), *numbered("val/a", 9), *numbered("val/b", 9)
        )
        data = folder(tmp_path, test_fraction=0.3)
        assert len(data.dataset("val")) == 18
        assert 20 <= len(data.dataset("test")) <= 55
        assert all(name.startswith("train/") for name in names(data, "test"))

    def test_only_test_can_be_evaluated_but_not_trained_on(self, tmp_path: Path) -> None:
        write(tmp_path, *numbered("test/a", 3), *numbered("test/b", 3))
        data = folder(tmp_path)
        assert len(data.dataset("test")) == 6
        with pytest.raises(ValueError, match=r"The train split of .* is empty: there is nothing to train on\."):
            data.dataset("train")
        with pytest.raises(ValueError, match=r"The val split of .* is empty: add images, or raise val_fraction\."):
            data.dataset("val")

    def test_other_common_names_and_other_folders(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write(tmp_path, *numbered("Training/a", 9), *numbered("Training/b", 9), *numbered("Testing/a", 2))
        write(tmp_path, *numbered("Testing/b", 2), *numbered("single_prediction", 2))
        data = folder(tmp_path)
        assert len(data.dataset("test")) == 4
        assert "these folders are left out: single_prediction." in caplog.text

    def test_a_class_may_be_called_test(self, tmp_path: Path) -> None:
        write(tmp_path, *numbered("control", 30), *numbered("test", 30))
        data = folder(tmp_path)
        assert data.class_names == ("control", "test")
        assert sum(len(data.dataset(split)) for split in SPLITS) == 60

    def test_a_class_missing_in_one_split_is_told(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write(tmp_path, *numbered("train/a", 9), *numbered("train/b", 9), *numbered("test/a", 2))
        folder(tmp_path)
        assert re.search(r"test has no images of these classes: b\.", caplog.text)

    def test_an_unlabelled_split_folder_is_refused(self, tmp_path: Path) -> None:
        write(tmp_path, *numbered("train/a", 9), *numbered("train/b", 9), "test/1.png")
        with pytest.raises(ValueError, match=r"test has no class folders with images: put .* or move away what is not"):
            folder(tmp_path)


class TestClassFolders:
    def test_we_split_by_a_hash_of_the_file(self, tmp_path: Path) -> None:
        write(tmp_path, *numbered("a", 150), *numbered("b", 150))
        data = folder(tmp_path, val_fraction=0.2, test_fraction=0.3)
        sizes = [len(data.dataset(split)) for split in SPLITS]
        assert sum(sizes) == 300
        assert sizes == pytest.approx([150, 60, 90], abs=25)
        before = {split: set(names(data, split)) for split in SPLITS}
        write(tmp_path, "a/999.png")
        after = folder(tmp_path, val_fraction=0.2, test_fraction=0.3)
        assert all(before[split] <= set(names(after, split)) for split in SPLITS)
        other = folder(tmp_path, val_fraction=0.2, test_fraction=0.3, split_seed=1)
        assert set(names(other, "test")) != set(names(after, "test"))

    def test_nested_folders_are_read_and_hidden_ones_are_not(self, tmp_path: Path) -> None:
        write(tmp_path, "a/1.png", "a/deep/er/2.png", "a/.hidden.png", "a/.cache/3.png", "b/4.png", ".git/5.png")
        data = folder(tmp_path, val_fraction=0, test_fraction=0)
        assert names(data, "train") == ["a/1.png", "b/4.png", "a/deep/er/2.png"]

    def test_loose_images_are_told(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write(tmp_path, *numbered("a", 5), *numbered("b", 5), "x.png", "y.png")
        folder(tmp_path)
        assert "2 images lie in" in caplog.text

    def test_no_class_folders(self, tmp_path: Path) -> None:
        write(tmp_path, "1.png", "2.png")
        with pytest.raises(
            ValueError, match=r"has no class folders with images: .* give a CSV of labels with labels=<file>, or move"
        ):
            folder(tmp_path)

    def test_one_class_is_none(self, tmp_path: Path) -> None:
        write(tmp_path, *numbered("a", 5))
        with pytest.raises(ValueError, match=r"At least two different classes are needed, got \['a'\]"):
            folder(tmp_path)

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(
            FileNotFoundError, match=r"There is no folder .*: set root to the folder that holds the images"
        ):
            folder(tmp_path / "nowhere")

    @pytest.mark.parametrize("fractions", [(-0.1, 0.1), (0.5, 0.5)])
    def test_fractions_must_leave_something(self, tmp_path: Path, fractions: tuple[float, float]) -> None:
        with pytest.raises(ValueError, match=r"must be shares that leave something for training"):
            folder(tmp_path, val_fraction=fractions[0], test_fraction=fractions[1])


class TestClasses:
    def test_they_can_be_limited_and_ordered(self, tmp_path: Path) -> None:
        for digit in "0138":
            write(tmp_path, *numbered(f"train/{digit}", 20), *numbered(f"test/{digit}", 5))
        data = folder(tmp_path, class_names=["8", "3"])
        assert data.class_names == ("8", "3")
        assert len(data.dataset("test")) == 10
        sample = data.dataset("test")[0]
        assert (sample["label"], sample["name"]) == (0, "test/8/000.png")

    def test_limiting_moves_no_file_to_another_split(self, tmp_path: Path) -> None:
        for name in "abc":
            write(tmp_path, *numbered(name, 40))
        every, some = folder(tmp_path), folder(tmp_path, class_names=["a", "b"])
        for split in SPLITS:
            assert set(names(some, split)) == {name for name in names(every, split) if name[0] != "c"}

    def test_an_unknown_class(self, tmp_path: Path) -> None:
        write(tmp_path, *numbered("cat", 2), *numbered("dog", 2))
        with pytest.raises(ValueError, match=r"class_names asks for 'cats', but .* has the classes cat, dog\."):
            folder(tmp_path, class_names=["cats", "dog"])

    def test_a_class_named_twice(self, tmp_path: Path) -> None:
        write(tmp_path, *numbered("cat", 2), *numbered("dog", 2))
        with pytest.raises(ValueError, match=r"At least two different classes"):
            folder(tmp_path, class_names=["cat", "cat"])

    def test_they_take_turns(self) -> None:
        assert take_turns([0, 0, 0, 2, 2, 1]) == [0, 5, 3, 1, 4, 2]
        assert take_turns([]) == []


class TestGroups:
    @staticmethod
    def patients(count: int, folder_names: Iterable[str]) -> list[str]:
        return [
            f"{name}/p{patient:03d}_{view}.png"
            for name in folder_names
            for patient in range(count)
            for view in range(2)
        ]

    def test_a_patient_is_in_one_split_only(self, tmp_path: Path) -> None:
        write(tmp_path, *self.patients(40, ["sick", "well"]))
        data = folder(tmp_path, group_pattern=r"/p(\d+)_", val_fraction=0.2, test_fraction=0.2)
        seen = [{re.sub(r".*/(p\d+)_.*", r"\1", name) for name in names(data, split)} for split in SPLITS]
        assert len(set.union(*seen)) == sum(len(part) for part in seen) == 40
        assert all(seen)
        assert data.dataset("train").files[0].group.isdigit()

    def test_a_patient_in_two_given_splits_stops(self, tmp_path: Path) -> None:
        write(tmp_path, *self.patients(5, ["train/sick", "train/well"]), "test/sick/p003_9.png", "test/well/p900_0.png")
        with pytest.raises(ValueError, match=r"Group '003' is in both the (train|val) and the test split"):
            folder(tmp_path, group_pattern=r"/p(\d+)_")

    def test_a_pattern_that_does_not_match(self, tmp_path: Path) -> None:
        write(tmp_path, *self.patients(3, ["a", "b"]), "b/other.png")
        with pytest.raises(ValueError, match=r"finds no group in 'b/other.png': its first bracket must match"):
            folder(tmp_path, group_pattern=r"/p(\d+)_")

    @pytest.mark.parametrize(("pattern", "message"), [("p", "finds no group"), ("(", "is no regular expression")])
    def test_a_pattern_without_or_with_half_a_bracket(self, tmp_path: Path, pattern: str, message: str) -> None:
        write(tmp_path, *self.patients(3, ["a", "b"]))
        with pytest.raises(ValueError, match=message):
            folder(tmp_path, group_pattern=pattern)


class TestCsv:
    @staticmethod
    def table(root: Path, text: str, encoding: str = "utf-8") -> str:
        (root / "labels.csv").write_bytes(text.encode(encoding))
        return "labels.csv"

    def test_name_and_label(self, tmp_path: Path) -> None:
        write(tmp_path, *(f"{i}.png" for i in range(40)), "unlabelled.png")
        rows = "\n".join(f"{i}.png,{'cat' if i % 2 else 'dog'}" for i in range(40))
        data = folder(tmp_path, labels=self.table(tmp_path, f"name,label\n{rows}\n"))
        assert data.class_names == ("cat", "dog")
        assert sum(len(data.dataset(split)) for split in SPLITS) == 40
        sample = data.dataset("train")[0]
        assert (int(sample["name"].split(".")[0]) % 2 == 1) == (sample["label"] == 0)

    def test_the_file_may_lie_elsewhere(self, tmp_path: Path) -> None:
        write(tmp_path / "in", "a.png", "b.png")
        self.table(tmp_path, "name,label\na.png,x\nb.png,y\n")
        data = folder(tmp_path / "in", labels=str(tmp_path / "labels.csv"), val_fraction=0, test_fraction=0)
        assert names(data, "train") == ["a.png", "b.png"]

    def test_other_columns_names_without_ending_and_a_spreadsheets_mark(self, tmp_path: Path) -> None:
        write(tmp_path, "deep/a.png", "b.jpg")
        text = "image_id,age,dx\ndeep/a,3,mel\n./b,4,nv\n"
        data = folder(
            tmp_path,
            labels=self.table(tmp_path, text, "utf-8-sig"),
            name_column="image_id",
            label_column="dx",
            val_fraction=0,
            test_fraction=0,
        )
        assert sorted(names(data, "train")) == ["b.jpg", "deep/a.png"]
        assert data.class_names == ("mel", "nv")

    def test_groups_and_splits(self, tmp_path: Path) -> None:
        write(tmp_path, *(f"{i}.png" for i in range(60)))
        rows = [f"{i}.png,{i % 2},patient{i // 4},{'test' if i >= 40 else 'Training'}" for i in range(60)]
        text = "\n".join(["name,label,group,split", *rows])
        data = folder(tmp_path, labels=self.table(tmp_path, text), val_fraction=0.3)
        assert len(data.dataset("test")) == 20
        groups = {split: {file.group for file in data.dataset(split).files} for split in SPLITS}
        assert groups["test"] == {f"patient{k}" for k in range(10, 15)}
        assert groups["val"]
        assert not groups["train"] & groups["val"]

    def test_a_group_in_two_splits_of_the_table(self, tmp_path: Path) -> None:
        write(tmp_path, "a.png", "b.png")
        text = "name,label,group,split\na.png,x,p,train\nb.png,y,p,test\n"
        with pytest.raises(ValueError, match=r"Group 'p' is in both the (train|val) and the test split"):
            folder(tmp_path, labels=self.table(tmp_path, text))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "file;label\na.png;x\n",
                "no column 'name' and no column 'label' but ['file;label']: set name_column and label_column",
            ),
            ("name,label\n", "has no rows"),
            ("name,label\na.png,x\nd.png,y\n", "line 3: there is no image 'd.png' below"),
            ("name,label\na.png,x\n../b.png,y\n", "line 3: there is no image '../b.png' below"),
            ("name,label\na.png,x\nb.png,\n", "line 3: 'b.png' has no label in the column 'label'"),
            ("name,label\na.png,x\nb.png\n", "line 3: 'b.png' has no label in the column 'label'"),
            ("name,label\na.png,x\na,y\n", "names 'a.png' 2 times: one row for each image is needed"),
            ("name,label,split\na.png,x,train\nb.png,y,dev\n", "line 3: 'dev' in the column 'split' is none of train,"),
            ("name,label,split\na.png,x,train\nb.png,y,\n", "line 3: 'b.png' has an empty field in the column 'split'"),
            ("name,label,group\na.png,x,\nb.png,y,1\n", "line 2: 'a.png' has an empty field in the column 'group'"),
            ("name,label\na.png,x\nc,y\n", "line 3: 'c' fits c.gif and c.tif: write it with its ending"),
        ],
    )
    def test_what_does_not_fit(self, tmp_path: Path, text: str, message: str) -> None:
        write(tmp_path, "a.png", "b.png", "c.gif", "c.tif")
        with pytest.raises(ValueError, match=re.escape(message)):
            folder(tmp_path, labels=self.table(tmp_path, text))

    def test_no_text_at_all(self, tmp_path: Path) -> None:
        write(tmp_path, "a.png", "b.png")
        (tmp_path / "labels.csv").write_bytes(b"\xff\xfe\x00name")
        with pytest.raises(ValueError, match=r"labels.csv is no CSV file in UTF-8"):
            folder(tmp_path, labels="labels.csv")

    def test_no_table(self, tmp_path: Path) -> None:
        with pytest.raises(
            FileNotFoundError, match=r"There is no CSV of labels nowhere.csv, neither as given nor below"
        ):
            folder(tmp_path, labels="nowhere.csv")

    def test_groups_from_two_places(self, tmp_path: Path) -> None:
        write(tmp_path, "a.png", "b.png")
        labels = self.table(tmp_path, "name,label,group\na.png,x,1\nb.png,y,2\n")
        with pytest.raises(ValueError, match=r"groups can come from one of them only"):
            folder(tmp_path, labels=labels, group_pattern="(.)")


class TestReading:
    def test_images_go_through_the_one_door(self, tmp_path: Path) -> None:
        write(tmp_path, *numbered("a", 2), *numbered("b", 2))
        for channels in (1, 3):
            data = folder(tmp_path, channels=channels, val_fraction=0, test_fraction=0)
            sample = data.dataset("train")[1]
            assert torch.equal(sample["image"], read_image(tmp_path / sample["name"], channels, size=8))

    def test_an_unreadable_file_is_named(self, tmp_path: Path) -> None:
        write(tmp_path, *numbered("a", 2), "b/1.png")
        (tmp_path / "b" / "0.png").write_text("no image")
        data = folder(tmp_path, val_fraction=0, test_fraction=0)
        with pytest.raises(UnreadableImageError) as caught:
            names(data, "train")
        message = str(caught.value)
        assert message.startswith(f"The image {tmp_path}/b/0.png cannot be used (The content is no image in a format")
        assert message.endswith("): repair or remove it, or set skip_unreadable=true.")

    def test_unreadable_files_can_be_left_out(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write(tmp_path, *numbered("a", 4), *numbered("b", 4))
        for name in ("a/x.png", "b/y.png"):
            (tmp_path / name).write_bytes(b"")
        with caplog.at_level(logging.WARNING):
            data = folder(tmp_path, val_fraction=0, test_fraction=0, skip_unreadable=True)
        assert len(data.dataset("train")) == 8
        assert "2 of 10 images cannot be read and are left out, first" in caplog.text
        assert "a/x.png: The file is empty." in caplog.text


class TestMemory:
    @staticmethod
    def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
        read: list[str] = []
        original = image_files.images.read_image

        def counting(path: Path, channels: int, **options: Any) -> torch.Tensor:
            read.append(path.name)
            return original(path, channels, **options)

        monkeypatch.setattr(image_files.images, "read_image", counting)
        return read

    def test_a_file_is_read_once_and_gives_the_same_values_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(tmp_path, *numbered("a", 3), *numbered("b", 3))
        read = self.counted(monkeypatch)
        data = folder(tmp_path, val_fraction=0, test_fraction=0, batch_size=2)
        first = [batch["image"] for batch in (*data.train_dataloader(), *data.train_dataloader())]
        assert len(read) == 6
        uncached = folder(tmp_path, val_fraction=0, test_fraction=0, cache=False)
        for index in range(6):
            assert torch.equal(uncached.dataset("train")[index]["image"], data.dataset("train")[index]["image"])
        assert len(read) == 12
        assert len(first) == 6

    def test_batches_do_not_share_the_memory(self, tmp_path: Path) -> None:
        write(tmp_path, *numbered("a", 3), *numbered("b", 3), level=9)
        data = folder(tmp_path, val_fraction=0, test_fraction=0, batch_size=2)
        for batch in data.train_dataloader():
            batch["image"].fill_(5)
        assert data.dataset("train")[0]["image"].max() < 1

    @pytest.mark.parametrize(
        ("limit", "workers", "kept"), [(6 * 3 * 64 * 4, 0, True), (6 * 3 * 64 * 4, 2, False), (5, 0, False)]
    )
    def test_only_what_fits_is_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, workers: int, kept: bool
    ) -> None:
        write(tmp_path, *numbered("a", 3), *numbered("b", 3))
        monkeypatch.setattr(image_files, "CACHE_BYTES", limit)
        read = self.counted(monkeypatch)
        data = folder(tmp_path, val_fraction=0, test_fraction=0, num_workers=workers)
        names(data, "train")
        names(data, "train")
        assert len(read) == (6 if kept else 12)

    def test_loader_processes_deliver_the_same(self, tmp_path: Path) -> None:
        write(tmp_path, *numbered("train/a", 3), *numbered("train/b", 3), *numbered("val/a", 3), *numbered("val/b", 3))
        plain, parallel = (folder(tmp_path, num_workers=workers, batch_size=4) for workers in (0, 1))
        names(parallel, "val")  # something is in memory when the processes start
        for one, other in zip(plain.val_dataloader(), parallel.val_dataloader(), strict=True):
            assert one["name"] == other["name"]
            assert torch.equal(one["image"], other["image"])

    def test_a_copy_for_another_process_is_sent_without_the_memory(self, tmp_path: Path) -> None:
        import pickle

        write(tmp_path, *numbered("a", 3), *numbered("b", 3))
        data = folder(tmp_path, val_fraction=0, test_fraction=0)
        before = len(pickle.dumps(data.dataset("train")))
        names(data, "train")
        assert len(pickle.dumps(data.dataset("train"))) == before
        assert pickle.loads(pickle.dumps(data.dataset("train")))[0]["name"] == "a/000.png"
