"""Patients as montages: which slices are shown and when, how patients are split, and what is refused."""

from __future__ import annotations

import itertools
import logging
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from cfe_lightning import images
from cfe_lightning.data import files as image_files
from cfe_lightning.data.base import Sample, Split
from cfe_lightning.data.folder import ImageFolder
from cfe_lightning.data.patient_slices import PatientSlices, draw_slices, middle_slices
from cfe_lightning.images import UnreadableImageError, cut_montage, read_image, to_uint8

SPLITS: tuple[Split, ...] = ("train", "val", "test")


def write_slice(path: Path, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), level, dtype=np.uint8)).save(path)


def write_table(root: Path, text: str, encoding: str = "utf-8") -> None:
    (root / "slices.csv").write_bytes(text.encode(encoding))


def write_patients(root: Path, counts: Sequence[int], split: str | None = None) -> None:
    """Patient i has counts[i] slices, the classes alternate; the grey level of a slice is its place in the stack."""
    rows = ["patient,path,label" + (",split" if split else "")]
    for patient, count in enumerate(counts):
        for place in range(count):
            name = f"p{patient:03d}/{place}.png"
            write_slice(root / name, place)
            rows.append(f"p{patient:03d},{name},{'sick' if patient % 2 else 'well'}" + (f",{split}" if split else ""))
    write_table(root, "\n".join(rows))


def patients(root: Path, **options: Any) -> PatientSlices:
    return PatientSlices(root=str(root), labels="slices.csv", slice_size=options.pop("slice_size", 4), **options)


def all_in_training(root: Path, **options: Any) -> PatientSlices:
    return patients(root, val_fraction=0.0, test_fraction=0.0, **options)


def shown(image: Tensor, num_slices: int = 4) -> list[int]:
    """The grey levels of a montage's slices: their places in the stack."""
    return to_uint8(cut_montage(image[None], num_slices)[0, :, 0, 0, 0]).tolist()


def epoch(data: PatientSlices, number: int) -> dict[str, list[int]]:
    """Returns the levels that the training loader shows of every patient in an epoch."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
    return {
        name: shown(image, data.num_slices)
        for batch in loader
        for name, image in zip(batch["name"], batch["image"], strict=True)
    }


def names(data: PatientSlices, split: Split) -> list[str]:
    return list(data.dataset(split).names)


class TestChoice:
    @pytest.mark.parametrize(
        ("num_found", "num_slices", "expected"),
        [
            (4, 4, [0, 1, 2, 3]),
            (8, 4, [1, 3, 5, 7]),
            (100, 4, [12, 37, 62, 87]),  # quantiles 1/8, 3/8, 5/8, 7/8
            (9, 1, [4]),
            (1, 4, [0, 0, 0, 0]),
            (2, 4, [0, 0, 1, 1]),
            (3, 4, [0, 1, 1, 2]),
        ],
    )
    def test_quantiles(self, num_found: int, num_slices: int, expected: list[int]) -> None:
        assert middle_slices(num_found, num_slices) == expected

    @pytest.mark.parametrize("num_slices", [1, 4, 9])
    def test_draws_are_stratified_and_reach_every_slice(self, num_slices: int) -> None:
        generator = torch.Generator().manual_seed(0)
        for num_found in range(num_slices, 30):
            draws = [draw_slices(num_found, num_slices, generator) for _ in range(200)]
            parts = [{draw[part] for draw in draws} for part in range(num_slices)]
            assert set.union(*parts) == set(range(num_found))
            assert sum(map(len, parts)) == num_found  # no slice belongs to two parts
            assert all(max(one) < min(other) for one, other in itertools.pairwise(parts))
            # What validation shows in a place, training shows there too.
            middle = middle_slices(num_found, num_slices)
            assert all(index in part for index, part in zip(middle, parts, strict=True))

    def test_every_slice_of_a_part_is_equally_frequent(self) -> None:
        generator = torch.Generator().manual_seed(0)
        draws = torch.tensor([draw_slices(16, 4, generator) for _ in range(2000)])
        for part in range(4):
            shares = draws[:, part].bincount(minlength=16)[4 * part : 4 * part + 4] / 2000
            assert shares.tolist() == pytest.approx([0.25] * 4, abs=0.04)

    def test_fewer_slices_are_repeated(self) -> None:
        generator = torch.Generator().manual_seed(0)
        for num_found in range(1, 9):
            assert draw_slices(num_found, 9, generator) == middle_slices(num_found, 9)
            assert set(middle_slices(num_found, 9)) == set(range(num_found))


class TestMontage:
    def test_slices_stand_row_by_row_in_their_order(self, tmp_path: Path) -> None:
        write_patients(tmp_path, [100, 4])
        data = all_in_training(tmp_path)
        assert data.image_size == 8
        sample = data.dataset("train")[1]
        assert (sample["name"], sample["label"], sample["image"].shape) == ("p000", 1, (1, 8, 8))
        levels = to_uint8(sample["image"])[0]
        assert [levels[y, x].item() for y, x in ((0, 0), (0, 7), (7, 0), (7, 7))] == [12, 37, 62, 87]

    @pytest.mark.parametrize(("num_slices", "image_size"), [(1, 6), (9, 18), (16, 24)])
    def test_the_image_grows_with_the_slices(self, tmp_path: Path, num_slices: int, image_size: int) -> None:
        write_patients(tmp_path, [20, 20])
        data = all_in_training(tmp_path, num_slices=num_slices, slice_size=6, channels=3)
        assert data.image_size == image_size
        image = data.dataset("train")[1]["image"]
        assert image.shape == (3, image_size, image_size)
        assert shown(image, num_slices) == middle_slices(20, num_slices)

    def test_slices_go_through_the_one_door(self, tmp_path: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "a.png")
        write_slice(tmp_path / "b.png", 3)
        write_table(tmp_path, "patient,path,label\n1,a.png,x\n2,b.png,y\n")
        data = all_in_training(tmp_path, num_slices=1, slice_size=5, channels=3)
        assert torch.equal(data.dataset("train")[0]["image"], read_image(tmp_path / "a.png", 3, size=5))

    def test_a_loader_delivers_the_batch_contract(self, tmp_path: Path) -> None:
        write_patients(tmp_path, [5] * 8)
        batch = next(iter(all_in_training(tmp_path, batch_size=4).train_dataloader()))
        assert set(batch) == {"image", "label", "name"}
        assert batch["image"].shape == (4, 1, 8, 8)
        assert batch["image"].dtype == torch.float32
        assert batch["label"].dtype == torch.int64
        assert [f"p{int(name[1:]) % 2}" for name in batch["name"]] == [f"p{1 - label}" for label in batch["label"]]


class TestOrder:
    def stack(self, root: Path, rows: Sequence[str], header: str = "patient,path,label,slice") -> list[int]:
        """Returns the shown levels of patient p, after writing its files, named by their levels."""
        for row in rows:
            name = row.split(",")[1]
            write_slice(root / name, int(re.findall(r"\d+", name)[-1]))
        write_slice(root / "other.png", 0)
        other = "q,other.png,y" + (",0" if header.endswith("slice") else "")
        write_table(root, "\n".join([header, *rows, other]))
        return shown(all_in_training(root).dataset("train")[0]["image"])

    def test_the_slice_column_decides(self, tmp_path: Path) -> None:
        rows = ["p,9.png,x,2", "p,1.png,x,10", "p,5.png,x,-3.5", "p,7.png,x,0"]
        assert self.stack(tmp_path, rows) == [5, 7, 9, 1]

    def test_else_names_are_ordered_by_their_numbers(self, tmp_path: Path) -> None:
        rows = [f"p,scan_{number}.png,x" for number in (10, 9, 100, 2)]
        assert self.stack(tmp_path, rows, "patient,path,label") == [2, 9, 10, 100]

    def test_the_same_number_twice_is_no_order(self, tmp_path: Path) -> None:
        rows = ["p,1.png,x,3", "p,2.png,x,3.0", "p,3.png,x,4"]
        with pytest.raises(
            ValueError,
            match=r"gives '1.png' and '2.png' of patient 'p' the same number 3 in the column 'slice': every slice",
        ):
            self.stack(tmp_path, rows)

    @pytest.mark.parametrize("text", ["first", "nan", "inf"])
    def test_what_is_no_number_is_no_order(self, tmp_path: Path, text: str) -> None:
        with pytest.raises(ValueError, match=rf"line 2: '{text}' in the column 'slice' is no number"):
            self.stack(tmp_path, [f"p,1.png,x,{text}"])


class TestTraining:
    def test_slices_change_with_the_epoch_and_are_the_same_for_the_same_seed_and_epoch(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_patients(tmp_path, [40] * 8)
        data = all_in_training(tmp_path, batch_size=4)
        first = epoch(data, 0)
        assert len(first) == 8
        torch.manual_seed(99)  # nothing may come from the global state
        state = torch.get_rng_state()
        assert epoch(all_in_training(tmp_path, batch_size=4), 0) == first
        assert torch.equal(state, torch.get_rng_state())
        second = epoch(data, 1)
        assert all(first[name] != second[name] for name in first)
        assert len({tuple(slices) for slices in first.values()}) > 1  # each patient has its own
        monkeypatch.setenv("PL_GLOBAL_SEED", "7")
        assert epoch(data, 0) != first

    def test_slices_come_from_their_part_of_the_stack(self, tmp_path: Path) -> None:
        write_patients(tmp_path, [40] * 4)
        data = all_in_training(tmp_path, batch_size=4)
        for number in range(5):
            for slices in epoch(data, number).values():
                assert [index // 10 for index in slices] == [0, 1, 2, 3]

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_an_interrupted_epoch_goes_on_bit_for_bit(self, tmp_path: Path, num_workers: int) -> None:
        write_patients(tmp_path, [40] * 12)
        data = all_in_training(tmp_path, batch_size=2, horizontal_flip=True, num_workers=num_workers)

        def started() -> DataLoader[Sample]:
            loader = data.train_dataloader()
            loader.sampler.set_epoch(3)  # type: ignore[attr-defined]
            return loader

        # Two batches, then a new loader.
        expected = list(started())
        interrupted = started()
        batches = iter(interrupted)
        for _ in range(2):
            next(batches)
        resumed = started()
        resumed.load_state_dict(interrupted.state_dict())  # type: ignore[attr-defined]
        rest = list(resumed)
        assert len(rest) == 4
        for one, other in zip(rest, expected[2:], strict=True):
            assert one["name"] == other["name"]
            assert torch.equal(one["image"], other["image"])

    def test_validation_and_test_are_the_same_every_time(self, tmp_path: Path) -> None:
        write_patients(tmp_path, [40] * 60)
        data = patients(tmp_path, horizontal_flip=True, quarter_turns=True)
        for loader in (data.val_dataloader, data.test_dataloader):
            levels = [shown(image) for batch in loader() for image in batch["image"]]
            assert levels
            assert all(slices == [5, 15, 25, 35] for slices in levels)

    def test_augmentation_changes_slices_in_their_places_and_all_alike(self, tmp_path: Path) -> None:
        # Left half dark, right half as bright as the slice's place.
        for patient in range(16):
            for place in range(4):
                pixels = np.zeros((4, 4), dtype=np.uint8)
                pixels[:, 2:] = 50 * (place + 1)
                Image.fromarray(pixels).save(tmp_path / f"{patient}_{place}.png")
        rows = [f"{i},{i}_{place}.png,{i % 2}" for i in range(16) for place in range(4)]
        write_table(tmp_path, "\n".join(["patient,path,label", *rows]))
        data = all_in_training(tmp_path, batch_size=16, horizontal_flip=True)
        (batch,) = data.train_dataloader()
        plain = cut_montage(data.dataset("train")[0]["image"][None], 4)[0]
        flipped = 0
        for slices in cut_montage(batch["image"], 4):
            assert torch.equal(slices, plain) or torch.equal(slices, plain.flip(-1))
            flipped += not torch.equal(slices, plain)
        assert 3 <= flipped <= 13

    def test_balanced_drawing_shows_a_patient_with_different_slices(self, tmp_path: Path) -> None:
        rows = ["patient,path,label"]
        for patient in range(20):
            for place in range(16):
                write_slice(tmp_path / f"{patient}_{place}.png", place)
                rows.append(f"{patient},{patient}_{place}.png,{'rare' if patient == 0 else 'usual'}")
        write_table(tmp_path, "\n".join(rows))
        (batch,) = all_in_training(tmp_path, batch_size=20, balanced=True).train_dataloader()
        rare = [shown(image) for image, name in zip(batch["image"], batch["name"], strict=True) if name == "0"]
        assert 4 <= len(rare) <= 16
        assert len({tuple(slices) for slices in rare}) > 1

    def test_loader_processes_can_be_spawned(self, tmp_path: Path) -> None:
        write_patients(tmp_path, [5] * 4)
        data = all_in_training(tmp_path)
        dataset = data.dataset("train")
        before = len(pickle.dumps(dataset))
        image = dataset[0]["image"]
        assert len(pickle.dumps(dataset)) == before  # without what is in memory
        assert torch.equal(pickle.loads(pickle.dumps(dataset))[0]["image"], image)


class TestFewSlices:
    def test_they_are_repeated_and_told_once(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write_patients(tmp_path, [2, 10, 1, 4, 3, 4])
        with caplog.at_level(logging.WARNING):
            data = all_in_training(tmp_path, batch_size=6)
            levels = epoch(data, 0) | epoch(data, 1)
        assert (levels["p000"], levels["p002"], levels["p004"]) == ([0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 2])
        assert caplog.text.count("fewer than") == 1
        assert "3 of 6 patients have fewer than 4 slices (the fewest: 1), so some of theirs are shown" in caplog.text

    def test_enough_are_no_news(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write_patients(tmp_path, [4, 4])
        with caplog.at_level(logging.WARNING):
            all_in_training(tmp_path)
        assert not caplog.text


class TestSplits:
    def test_no_patient_is_in_two_splits(self, tmp_path: Path) -> None:
        write_patients(tmp_path, [2] * 120)
        data = patients(tmp_path, num_slices=1, val_fraction=0.2, test_fraction=0.3)
        members = {split: set(names(data, split)) for split in SPLITS}
        assert set.union(*members.values()) == {f"p{patient:03d}" for patient in range(120)}
        assert sum(map(len, members.values())) == 120
        assert [len(members[split]) for split in SPLITS] == pytest.approx([60, 24, 36], abs=15)
        # Nor is a file: what the loaders read of one split, no other reads.
        files = [{one.path for stack in data.dataset(split).stacks for one in stack} for split in SPLITS]
        assert sum(map(len, files)) == len(set.union(*files))

    def test_more_patients_move_no_other(self, tmp_path: Path) -> None:
        write_patients(tmp_path, [1] * 60)
        before = {split: set(names(patients(tmp_path), split)) for split in SPLITS}
        write_patients(tmp_path, [1] * 90)
        after = patients(tmp_path)
        assert all(before[split] <= set(names(after, split)) for split in SPLITS)
        other = patients(tmp_path, split_seed=1)
        assert set(names(other, "test")) != set(names(after, "test"))

    def test_patients_are_split_as_the_groups_of_an_image_folder(self, tmp_path: Path) -> None:
        write_patients(tmp_path, [2] * 60)
        options: dict[str, Any] = {"val_fraction": 0.2, "test_fraction": 0.2, "split_seed": 3}
        data = patients(tmp_path, **options)
        folder = ImageFolder(
            root=str(tmp_path),
            image_size=4,
            labels="slices.csv",
            name_column="path",
            group_column="patient",
            **options,
        )
        for split in SPLITS:
            assert set(names(data, split)) == {file.group for file in folder.dataset(split).files}

    def test_given_splits_and_a_missing_one(self, tmp_path: Path) -> None:
        rows = ["patient,path,label,split"]
        for patient in range(60):
            write_slice(tmp_path / f"{patient}.png", 0)
            rows.append(f"{patient},{patient}.png,{patient % 2},{'Testing' if patient >= 40 else 'train'}")
        write_table(tmp_path, "\n".join(rows))
        data = patients(tmp_path, val_fraction=0.3)
        assert set(names(data, "test")) == {str(patient) for patient in range(40, 60)}
        assert 4 <= len(names(data, "val")) <= 20
        assert len(names(data, "train")) + len(names(data, "val")) == 40

    def test_an_empty_split_is_told(self, tmp_path: Path) -> None:
        write_patients(tmp_path, [1, 1], split="test")
        data = patients(tmp_path)
        with pytest.raises(ValueError, match=r"The train split of .* is empty: there is nothing to train on\."):
            data.dataset("train")
        with pytest.raises(ValueError, match=r"The val split of .* is empty: add patients, or raise val_fraction\."):
            data.dataset("val")

    def test_classes_take_turns_and_can_be_chosen(self, tmp_path: Path) -> None:
        rows = ["patient,path,label"]
        for patient, label in enumerate("aaabbbccc"):
            write_slice(tmp_path / f"{patient}.png", 0)
            rows.append(f"{patient},{patient}.png,{label}")
        write_table(tmp_path, "\n".join(rows))
        data = all_in_training(tmp_path, class_names=["c", "a"])
        assert data.class_names == ("c", "a")
        assert names(data, "train") == ["6", "0", "7", "1", "8", "2"]
        assert data.dataset("train").labels.tolist() == [0, 1, 0, 1, 0, 1]


class TestTable:
    def test_other_columns_a_spreadsheets_mark_and_absolute_paths(self, tmp_path: Path) -> None:
        write_slice(tmp_path / "elsewhere" / "a.png", 1)
        write_slice(tmp_path / "in" / "deep" / "b.png", 2)
        # An absolute and a relative path, and a mark before the first column.
        text = f"id,file,age,dx\n7,{tmp_path}/elsewhere/a.png,3,mel\n8,deep/b.png,4,nv\n"
        write_table(tmp_path, text, "utf-8-sig")
        data = PatientSlices(
            root=str(tmp_path / "in"),
            labels=str(tmp_path / "slices.csv"),
            slice_size=4,
            num_slices=1,
            patient_column="id",
            path_column="file",
            label_column="dx",
            val_fraction=0.0,
            test_fraction=0.0,
        )
        assert data.class_names == ("mel", "nv")
        assert [shown(data.dataset("train")[i]["image"], 1) for i in range(2)] == [[1], [2]]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "patient;path\n1;a.png\n",
                "has no column 'patient' and no column 'path' and no column 'label' but ['patient;path']: set",
            ),
            ("patient,path\n1,a.png\n", "has no column 'label' but ['patient', 'path']: set patient_column, path_col"),
            ("", "has no column 'patient'"),
            ("patient,path,label\n", "has no rows: one row for each slice is needed"),
            (
                "patient,path,label\n1,a.png,x\n1,b.png,y\n",
                "line 3: patient '1' has 'y' in the column 'label', but 'x' in an earlier row: all rows of a patient",
            ),
            (
                "patient,path,label,split\n1,a.png,x,train\n2,c.png,y,val\n1,b.png,x,test\n",
                "line 4: patient '1' has 'test' in the column 'split', but 'train' in an earlier row: all rows of a",
            ),
            ("patient,path,label,split\n1,a.png,x,dev\n", "line 2: 'dev' in the column 'split' is none of train, val,"),
            ("patient,path,label,split\n1,a.png,x,\n", "line 2: the field in the column 'split' is empty: fill it, or"),
            ("patient,path,label\n1,a.png,x\n ,b.png,y\n", "line 3: the field in the column 'patient' is empty"),
            ("patient,path,label\n1,a.png,x\n2,b.png\n", "line 3: the field in the column 'label' is empty"),
            ("patient,path,label\n1,a.png,x\n1,a.png,x\n", "line 3: 'a.png' stands in "),
            ("patient,path,label\n1,a.png,x\n2,d/../a.png,y\n", "slices.csv, line 2 too: one row for each slice is"),
            ("patient,path,label\n1,a.png,x\n2,b.png,x\n", "At least two different classes are needed, got ['x']"),
            ("patient,path,label\n1,a.png,x\n2,v.nii.gz,y\n", "line 3: 'v.nii.gz' is a volume and needs the index of"),
            ("patient,path,label\n1,v.nii.gz#one,x\n", "is a volume and needs the index of one axial slice: write v.n"),
            ("patient,path,label,slice\n1,v.nii.gz,x,1.5\n", "or give whole numbers in the column 'slice'"),
        ],
    )
    def test_what_does_not_fit(self, tmp_path: Path, text: str, message: str) -> None:
        for name in ("a.png", "b.png", "c.png", "d/e.png"):
            write_slice(tmp_path / name, 0)
        (tmp_path / "v.nii.gz").write_bytes(b"")
        write_table(tmp_path, text)
        with pytest.raises(ValueError, match=re.escape(message)):
            patients(tmp_path)

    def test_a_missing_file(self, tmp_path: Path) -> None:
        write_slice(tmp_path / "a.png", 0)
        write_table(tmp_path, "patient,path,label\n1,a.png,x\n2,gone.png,y\n")
        with pytest.raises(
            FileNotFoundError,
            match=r"line 3: there is no file .*/gone.png: correct the column 'path', or set root to the folder that",
        ):
            patients(tmp_path)

    def test_a_missing_table_and_folder(self, tmp_path: Path) -> None:
        with pytest.raises(
            FileNotFoundError, match=r"There is no CSV slices.csv, neither as given nor below .*: set l"
        ):
            patients(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"There is no folder .*: set root to the folder that paths"):
            patients(tmp_path / "nowhere")

    def test_no_text_at_all(self, tmp_path: Path) -> None:
        (tmp_path / "slices.csv").write_bytes(b"\xff\xfe\x00patient")
        with pytest.raises(ValueError, match=r"slices.csv is no CSV file in UTF-8"):
            patients(tmp_path)

    def test_an_unreadable_slice_is_named(self, tmp_path: Path) -> None:
        write_patients(tmp_path, [1, 1])
        (tmp_path / "p001" / "0.png").write_text("no image")
        with pytest.raises(UnreadableImageError) as caught:
            all_in_training(tmp_path).dataset("train")[0]
        message = str(caught.value)
        assert message.startswith(f"The slice p001/0.png ({tmp_path}/p001/0.png) cannot be used (The content is no im")
        assert message.endswith("): repair the file, or remove its row from the CSV.")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_slices": 5}, "needs 1, 4, 9, 16, ... slices, got 5."),
            ({"num_slices": 0}, "slices, got 0."),
            ({"slice_size": 0}, "image_size must be positive"),
            (
                {"window": [-600.0]},
                "window must be a level and a positive width in the files' units, as in [-600, 1500]",
            ),
            ({"window": [40.0, 0.0]}, "got [40.0, 0.0]."),
            (
                {"window": [40.0, 80.0]},
                "window is for DICOM and NIfTI files, but slices.csv names none: leave window out",
            ),
            ({"val_fraction": 0.5, "test_fraction": 0.5}, "must be shares that leave something for training"),
        ],
    )
    def test_wrong_arguments(self, tmp_path: Path, options: dict[str, Any], message: str) -> None:
        write_patients(tmp_path, [1, 1])
        with pytest.raises(ValueError, match=re.escape(message)):
            patients(tmp_path, **options)


class TestMemory:
    @staticmethod
    def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
        read: list[str] = []

        def counting(path: Path, channels: int, **options: Any) -> Tensor:
            read.append(path.name)
            return read_image(path, channels, **options)

        monkeypatch.setattr(images, "read_image", counting)
        return read

    def test_a_slice_is_read_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_patients(tmp_path, [3, 3])
        read = self.counted(monkeypatch)
        data = all_in_training(tmp_path, batch_size=2)
        for number in range(4):
            epoch(data, number)
        assert len(read) == 6
        without = all_in_training(tmp_path, cache=False).dataset("train")
        assert torch.equal(without[0]["image"], data.dataset("train")[0]["image"])
        assert len(read) == 10

    def test_validation_keeps_only_what_it_shows(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_patients(tmp_path, [30, 30], split="val")
        read = self.counted(monkeypatch)
        monkeypatch.setattr(image_files, "CACHE_BYTES", 2 * 4 * 4 * 4 * 4)  # patients, slices, height, width, bytes
        data = patients(tmp_path)
        for _ in range(3):
            list(data.val_dataloader())
        assert len(read) == 8


class TestMedicalFiles:
    def test_volumes(self, tmp_path: Path) -> None:
        nibabel = pytest.importorskip("nibabel")
        # Slice z of patient p has the value 100 p + z - 1000.
        for patient in range(2):
            values = np.broadcast_to(100.0 * patient + np.arange(30) - 1000, (5, 6, 30)).astype(np.float32)
            nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / f"{patient}.nii.gz")
        rows = [f"{patient},{patient}.nii.gz#{z},{patient}" for patient in range(2) for z in reversed(range(30))]
        write_table(tmp_path, "\n".join(["patient,path,label", *rows]))
        dataset = all_in_training(tmp_path, window=[-900.0, 200.0], channels=3).dataset("train")
        slices = cut_montage(dataset[1]["image"][None], 4)[0]
        assert slices.shape == (4, 3, 4, 4)
        for one, z in zip(slices, (3, 11, 18, 26), strict=True):
            torch.testing.assert_close(one, torch.full_like(one, z / 100))

        rows = [f"{patient},{patient}.nii.gz,{patient},{z}" for patient in range(2) for z in range(30)]
        write_table(tmp_path, "\n".join(["patient,path,label,slice", *rows]))
        by_column = all_in_training(tmp_path, window=[-900.0, 200.0], channels=3).dataset("train")
        assert torch.equal(by_column[1]["image"], dataset[1]["image"])

    def test_a_slice_beyond_the_volume_is_named(self, tmp_path: Path) -> None:
        nibabel = pytest.importorskip("nibabel")
        nibabel.save(nibabel.Nifti1Image(np.zeros((3, 3, 2), dtype=np.float32), np.eye(4)), tmp_path / "v.nii")
        write_slice(tmp_path / "a.png", 0)
        write_table(tmp_path, "patient,path,label\n1,v.nii#2,x\n2,a.png,y\n")
        with pytest.raises(
            UnreadableImageError,
            match=r"The slice v.nii#2 \(.*v.nii\) cannot be used \(Slice 2 was asked for, but the volume has 2 axial",
        ):
            all_in_training(tmp_path).dataset("train")[0]

    def test_dicom_beside_pictures(self, tmp_path: Path) -> None:
        pytest.importorskip("pydicom")
        from medical import write_dicom

        pixels = np.tile(np.arange(4, dtype=np.int16) * 100, (4, 1))
        write_dicom(tmp_path / "a.dcm", pixels, RescaleSlope=2, RescaleIntercept=-300)
        write_slice(tmp_path / "b.png", 9)
        write_table(tmp_path, "patient,path,label\n1,a.dcm,x\n2,b.png,y\n")
        dataset = all_in_training(tmp_path, num_slices=1, window=[0.0, 600.0]).dataset("train")
        torch.testing.assert_close(dataset[0]["image"][0, 0], torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0]))
        assert shown(dataset[1]["image"], 1) == [9]
