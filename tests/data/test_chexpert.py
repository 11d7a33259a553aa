"""CheXpert from tables and tiny radiographs of its layout that the test writes itself."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image

from cfe_lightning.data.base import Split
from cfe_lightning.data.chexpert import PATHOLOGIES, CheXpert
from cfe_lightning.images import read_image, resize

HEADER = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", "No Finding", *PATHOLOGIES]
FOLDER = "CheXpert-v1.0-small"
Row = tuple[str, str, dict[str, str]]
#: Path below ``train``, view, and the labels that are not blank; the policies differ on b2, c1 and c2 only.
ROWS: list[Row] = [
    ("patient00001/study1/a1.jpg", "Frontal", {"No Finding": "1.0"}),
    ("patient00001/study1/a1_lateral.jpg", "Lateral", {"No Finding": "1.0"}),
    ("patient00001/study2/a2.jpg", "Frontal", {"Cardiomegaly": "1.0", "Edema": "1.0"}),
    ("patient00002/study1/b1.jpg", "Frontal", {"Cardiomegaly": "0.0"}),
    ("patient00002/study2/b2.jpg", "Frontal", {"Cardiomegaly": "-1.0"}),
    ("patient00003/study1/c1.jpg", "Frontal", {"No Finding": "1.0", "Cardiomegaly": "-1.0"}),
    ("patient00003/study2/c2.jpg", "Frontal", {"No Finding": "1.0", "Cardiomegaly": "1.0"}),
    ("patient00004/study1/d1.jpg", "Frontal", {}),
    ("patient00004/study1/d1_frontal.jpg", "Lateral", {"Cardiomegaly": "1.0"}),
    ("patient00005/study1/e1.jpg", "Frontal", {"No Finding": "0.0", "Cardiomegaly": "1.0"}),
    ("patient00005/study2/e2.jpg", "Frontal", {"No Finding": "-1.0", "Edema": "-1.0"}),
]


def write_table(file: Path, rows: list[Row], part: str = "train", above: str = f"{FOLDER}/") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, HEADER, restval="")
        writer.writeheader()
        for name, view, labels in rows:
            place = {"Path": f"{above}{part}/{name}", "Sex": "Female", "Age": "68", "Frontal/Lateral": view}
            writer.writerow({**place, "AP/PA": "AP" if view == "Frontal" else "", **labels})


def write_images(folder: Path, rows: list[Row], size: tuple[int, int] = (24, 20)) -> None:
    for number, (name, _, _) in enumerate(rows):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", size, 20 * (number % 12)).save(folder / name)


def many(count: int, first: int = 1) -> list[Row]:
    """Patients with one healthy and one enlarged heart each, and a side view that is not wanted."""
    rows: list[Row] = []
    for number in range(first, first + count):
        patient = f"patient{number:05d}"
        rows.append((f"{patient}/study1/view1_frontal.jpg", "Frontal", {"No Finding": "1.0"}))
        rows.append((f"{patient}/study1/view2_lateral.jpg", "Lateral", {"No Finding": "1.0"}))
        rows.append((f"{patient}/study2/view1_frontal.jpg", "Frontal", {"Cardiomegaly": "1.0"}))
        rows.append((f"{patient}/study3/view1_frontal.jpg", "Frontal", {"Edema": "1.0"}))
    return rows


def write(root: Path, rows: list[Row] = ROWS) -> Path:
    """The archive as it unpacks."""
    write_table(root / FOLDER / "train.csv", rows)
    write_images(root / FOLDER / "train", rows)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path)


def data(root: Path, **options: Any) -> CheXpert:
    return CheXpert(root=str(root), **({"pathology": "Cardiomegaly", "uncertain": "zeros", "image_size": 8} | options))


def whole(root: Path, **options: Any) -> CheXpert:
    """All patients in the training split."""
    return data(root, val_fraction=0.0, test_fraction=0.0, **options)


def labels(source: CheXpert, split: Split = "train") -> dict[str, int]:
    return {Path(file.name).stem: file.label for file in source.dataset(split).files}


def patients(source: CheXpert, split: Split) -> set[str]:
    return {file.group for file in source.dataset(split).files}


class TestPolicies:
    @pytest.mark.parametrize(
        ("uncertain", "wanted", "contradictions"),
        [
            ("zeros", {"a1": 0, "a2": 1, "c1": 0, "e1": 1}, 1),
            ("ones", {"a1": 0, "a2": 1, "b2": 1, "e1": 1}, 2),
            ("ignore", {"a1": 0, "a2": 1, "e1": 1}, 1),
        ],
    )
    def test_against_the_healthy(
        self, root: Path, caplog: pytest.LogCaptureFixture, uncertain: str, wanted: dict[str, int], contradictions: int
    ) -> None:
        source = whole(root, uncertain=uncertain)
        assert labels(source) == wanted
        assert source.class_names == ("healthy", "Cardiomegaly")
        said = [record.getMessage() for record in caplog.records]
        file = root / FOLDER / "train.csv"
        assert said == [f"{contradictions} rows of {file} have both No Finding and Cardiomegaly and are left out."]

    @pytest.mark.parametrize(
        ("uncertain", "wanted"),
        [
            ("zeros", {"a1": 0, "a2": 1, "b1": 0, "b2": 0, "c1": 0, "c2": 1, "d1": 0, "e1": 1, "e2": 0}),
            ("ones", {"a1": 0, "a2": 1, "b1": 0, "b2": 1, "c1": 1, "c2": 1, "d1": 0, "e1": 1, "e2": 0}),
            ("ignore", {"a1": 0, "a2": 1, "b1": 0, "c2": 1, "d1": 0, "e1": 1, "e2": 0}),
        ],
    )
    def test_against_the_rest(
        self, root: Path, caplog: pytest.LogCaptureFixture, uncertain: str, wanted: dict[str, int]
    ) -> None:
        source = whole(root, uncertain=uncertain, against="rest")
        assert labels(source) == wanted
        assert source.class_names == ("no Cardiomegaly", "Cardiomegaly")
        assert not caplog.records

    def test_views_are_taken_from_the_column(self, root: Path) -> None:
        assert labels(whole(root, views="lateral")) == {"a1_lateral": 0, "d1_frontal": 1}
        both = labels(whole(root, views="all"))
        assert both == {"a1": 0, "a2": 1, "c1": 0, "e1": 1, "a1_lateral": 0, "d1_frontal": 1}

    def test_another_pathology(self, root: Path) -> None:
        assert labels(whole(root, pathology="Edema")) == {"a1": 0, "a2": 1, "c1": 0, "c2": 0}
        assert labels(whole(root, pathology="Edema", uncertain="ones"))["e2"] == 1

    def test_whole_numbers_mean_the_same(self, root: Path) -> None:
        file = root / FOLDER / "train.csv"
        before = labels(whole(root, uncertain="ones"))
        file.write_text("\ufeff" + re.sub(r"\b([01])\.0\b", r"\1", file.read_text()), encoding="utf-8")
        assert ".0," not in file.read_text()
        assert labels(whole(root, uncertain="ones")) == before


class TestSplits:
    def test_a_patient_is_in_one_split_whatever_the_task(self, tmp_path: Path) -> None:
        write(tmp_path, many(60))
        splits: tuple[Split, ...] = get_args(Split)
        heart = data(tmp_path, val_fraction=0.2, test_fraction=0.2)
        rest = data(tmp_path, val_fraction=0.2, test_fraction=0.2, pathology="Edema", against="rest", views="all")
        members = {split: patients(heart, split) for split in splits}
        assert members == {split: patients(rest, split) for split in splits}
        assert sum(map(len, members.values())) == len(set.union(*members.values())) == 60
        assert len(members["train"]) > 25
        assert min(len(members["val"]), len(members["test"])) > 5
        other = data(tmp_path, val_fraction=0.2, test_fraction=0.2, split_seed=1)
        assert patients(other, "val") != members["val"]

    def test_more_patients_move_no_other(self, tmp_path: Path) -> None:
        few, lots = write(tmp_path / "few", many(40)), write(tmp_path / "many", many(60))
        assert patients(data(few, val_fraction=0.3), "val") <= patients(data(lots, val_fraction=0.3), "val")

    def test_the_classes_take_turns(self, tmp_path: Path) -> None:
        # All the healthy ones first.
        write(tmp_path, sorted(many(40), key=lambda row: "No Finding" not in row[2]))
        source = data(tmp_path, val_fraction=0.3)
        for split in get_args(Split):
            members = source.dataset(split)
            assert members.labels.tolist() == [0, 1] * (len(members) // 2)

    def test_a_table_of_its_own_for_testing(self, tmp_path: Path) -> None:
        write(tmp_path, many(40))
        write_table(tmp_path / FOLDER / "valid.csv", many(3, first=64541), part="valid")
        write_images(tmp_path / FOLDER / "valid", many(3, first=64541))
        source = data(tmp_path, test_table="valid.csv", val_fraction=0.3)
        assert patients(source, "test") == {"patient64541", "patient64542", "patient64543"}
        assert source.dataset("test").files[0].name == "valid/patient64541/study1/view1_frontal.jpg"
        assert len(patients(source, "train") | patients(source, "val")) == 40

    def test_a_patient_in_both_tables_is_refused(self, tmp_path: Path) -> None:
        write(tmp_path, many(4))
        write_table(tmp_path / FOLDER / "valid.csv", many(2, first=4), part="valid")
        write_images(tmp_path / FOLDER / "valid", many(2, first=4))
        with pytest.raises(ValueError, match=r"Group 'patient00004' is in both the (train|val) and the test split"):
            data(tmp_path, test_table="valid.csv")

    def test_a_split_needs_both_classes(self, root: Path, tmp_path: Path) -> None:
        source = whole(root)
        with pytest.raises(
            ValueError, match=r"The val split of CheXpert has no image of healthy or Cardiomegaly: add "
        ):
            source.dataset("val")
        write_table(tmp_path / FOLDER / "valid.csv", many(1, first=64541)[:1], part="valid")
        write_images(tmp_path / FOLDER / "valid", many(1, first=64541)[:1])
        source = data(root, val_fraction=0.0, test_table="valid.csv")
        with pytest.raises(ValueError, match=r"The val split .*: add patients, or change the fractions\."):
            source.dataset("val")
        with pytest.raises(ValueError, match=r"The test split .* no image of Cardiomegaly: take another test_table\."):
            source.dataset("test")


class TestImages:
    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_the_batch_contract(self, tmp_path: Path, num_workers: int) -> None:
        write(tmp_path, many(12))
        source = whole(tmp_path, batch_size=6, num_workers=num_workers, balanced=True)
        names: list[str] = []
        for batch in source.train_dataloader():
            assert batch["image"].shape == (6, 1, 8, 8)
            assert batch["image"].dtype == torch.float32
            assert -1 <= batch["image"].min() <= batch["image"].max() <= 1
            assert set(batch["label"].tolist()) <= {0, 1}
            names += batch["name"]
        assert len(names) == 24
        stored = [source.dataset("train")[index]["name"] for index in range(24)]
        assert len(set(stored)) == 24
        assert set(names) <= set(stored)
        assert stored[0] == "train/patient00001/study1/view1_frontal.jpg"

    def test_black_and_white_are_the_ends_of_the_range(self, tmp_path: Path) -> None:
        folder = write(tmp_path, ROWS[:3]) / FOLDER / "train" / "patient00001"
        # From 32 to 8 pixels the resizing filter's weights sum to a little more than 1.
        Image.new("L", (40, 32), 0).save(folder / "study1" / "a1.jpg")
        Image.new("L", (40, 32), 255).save(folder / "study2" / "a2.jpg")
        black, white = (whole(tmp_path).dataset("train")[index]["image"] for index in (0, 1))
        torch.testing.assert_close(black, torch.full((1, 8, 8), -1.0))
        torch.testing.assert_close(white, torch.ones(1, 8, 8))
        assert -1 <= black.min() <= white.max() <= 1
        assert whole(tmp_path, channels=3).dataset("train")[1]["image"].shape == (3, 8, 8)

    @pytest.mark.parametrize(("width", "height"), [(32, 20), (20, 28)])
    def test_the_largest_square_in_the_middle_is_read(self, tmp_path: Path, width: int, height: int) -> None:
        values = np.random.default_rng(0).integers(0, 255, (height, width), dtype=np.uint8)
        file = write(tmp_path, ROWS[:3]) / FOLDER / "train" / ROWS[0][0]
        Image.fromarray(values).save(file)
        decoded = read_image(file, 1)
        top, left = (height - 20) // 2, (width - 20) // 2
        square = resize(decoded[:, top : top + 20, left : left + 20], 8)
        torch.testing.assert_close(whole(tmp_path).dataset("train")[0]["image"], square)
        squeezed = whole(tmp_path, crop=False).dataset("train")[0]["image"]
        torch.testing.assert_close(squeezed, resize(decoded, 8))

    def test_what_was_read_once_comes_from_memory(self, root: Path) -> None:
        kept, read_again = whole(root).dataset("train"), whole(root, cache=False).dataset("train")
        first = kept[0]["image"]
        assert torch.equal(read_again[0]["image"], first)
        (root / FOLDER / "train" / ROWS[0][0]).unlink()
        assert torch.equal(kept[0]["image"], first)
        with pytest.raises(ValueError, match=r"a1\.jpg cannot be used"):
            read_again[0]

    def test_an_unreadable_image(self, root: Path, caplog: pytest.LogCaptureFixture) -> None:
        (root / FOLDER / "train" / ROWS[0][0]).write_bytes(b"")
        with pytest.raises(
            ValueError, match=r"a1.jpg cannot be used \(The file is empty\): repair or remove it, or set"
        ):
            whole(root).dataset("train")[0]
        assert "a1" not in labels(whole(root, skip_unreadable=True))
        assert "1 of 4 images cannot be read and are left out" in caplog.text

    def test_a_missing_image(self, root: Path, caplog: pytest.LogCaptureFixture) -> None:
        (root / FOLDER / "train" / ROWS[0][0]).unlink()
        assert labels(whole(root)) == {"a2": 1, "c1": 0, "e1": 1}
        assert f"1 of the 4 images of {root / FOLDER / 'train.csv'} are missing and left out" in caplog.text


class TestPlaces:
    def test_the_same_names_from_every_root(self, root: Path, tmp_path: Path) -> None:
        above, itself = whole(root), whole(root / FOLDER)
        assert itself.dataset("train").files == above.dataset("train").files
        renamed = (root / FOLDER).rename(tmp_path / "radiographs")
        names = [file.name for file in above.dataset("train").files]
        assert [file.name for file in whole(renamed).dataset("train").files] == names
        assert [file.path for file in whole(renamed).dataset("train").files] == [renamed / name for name in names]

    def test_the_full_resolution_with_the_table_of_the_small_one(self, root: Path) -> None:
        (root / FOLDER).rename(root / "CheXpert-v1.0")
        assert labels(whole(root)) == {"a1": 0, "a2": 1, "c1": 0, "e1": 1}

    @pytest.mark.parametrize("above", ["", "data/CheXpert-v1.0-small/"])
    def test_a_table_with_other_folders_in_front(self, root: Path, above: str) -> None:
        write_table(root / FOLDER / "own" / "table.csv", ROWS, above=above)
        assert labels(whole(root / FOLDER, table="own/table.csv")) == {"a1": 0, "a2": 1, "c1": 0, "e1": 1}

    def test_no_image_anywhere(self, tmp_path: Path) -> None:
        write_table(tmp_path / FOLDER / "train.csv", ROWS)
        first = f"{tmp_path}/{FOLDER}/train/{ROWS[0][0]} and {tmp_path}/train/{ROWS[0][0]}"
        wanted = f"train.csv names is there, the first was looked for as {first}: set root to the folder that holds"
        with pytest.raises(ValueError, match=r"None of the 4 images that .*" + re.escape(wanted)):
            data(tmp_path)

    @pytest.mark.parametrize("option", ["table", "test_table"])
    def test_no_table(self, root: Path, option: str) -> None:
        wanted = f"There is no table gone.csv in {root} or {root}/{FOLDER} or {root}/CheXpert-v1.0: set root to the"
        with pytest.raises(FileNotFoundError, match=re.escape(wanted)):
            data(root, **{option: "gone.csv"})


class TestErrors:
    def test_an_unknown_pathology(self, root: Path) -> None:
        with pytest.raises(ValueError, match=r"CheXpert has no pathology 'cardiomegalie': did you mean Cardiomegaly\?"):
            data(root, pathology="cardiomegalie")
        with pytest.raises(ValueError, match=r"no pathology 'effusion': did you mean .*Pleural Effusion.*\?"):
            data(root, pathology="effusion")
        with pytest.raises(ValueError, match=r"no pathology 'zzz': it has Enlarged .*, Fracture, Support Devices\.$"):
            data(root, pathology="zzz")
        with pytest.raises(ValueError, match="CheXpert has no pathology 'No Finding'"):
            data(root, pathology="No Finding")

    @pytest.mark.parametrize(
        ("option", "known"),
        [
            ("uncertain", "zeros, ones, ignore"),
            ("against", "healthy, rest"),
            ("views", "frontal, lateral, all"),
        ],
    )
    def test_an_option_that_is_none(self, root: Path, option: str, known: str) -> None:
        with pytest.raises(ValueError, match=f"^{option} must be one of {known}, got 'other'"):
            data(root, **{option: "other"})

    def test_uncertain_has_no_default(self, root: Path) -> None:
        with pytest.raises(TypeError, match="'uncertain'"):
            CheXpert(root=str(root), pathology="Edema", image_size=8)  # type: ignore[call-arg]

    def test_fractions_leave_something(self, root: Path) -> None:
        with pytest.raises(ValueError, match="val_fraction and test_fraction must be shares"):
            data(root, val_fraction=0.5, test_fraction=0.5)

    def test_wrong_columns_are_named_with_the_nearest(self, root: Path) -> None:
        file = root / FOLDER / "train.csv"
        file.write_text(file.read_text().replace("Frontal/Lateral", "frontal_lateral").replace("No Finding", "X"))
        wanted = (
            f"{file} is not CheXpert's table, it has no column 'Frontal/Lateral' (but 'frontal_lateral') and "
            "no column 'No Finding': the first line must name the columns as CheXpert does"
        )
        with pytest.raises(ValueError, match=re.escape(wanted)):
            data(root)
        file.write_text(file.read_text().replace("frontal_lateral", "Frontal/Lateral"))
        assert labels(whole(root, against="rest"))["a2"] == 1  # needs no column No Finding

    @pytest.mark.parametrize("content", ["", "a;b\n1;2\n"])
    def test_no_table_at_all(self, root: Path, content: str) -> None:
        (root / FOLDER / "train.csv").write_text(content)
        with pytest.raises(ValueError, match=r"is not CheXpert's table, it has no column 'Path'"):
            data(root)

    def test_another_encoding(self, root: Path) -> None:
        (root / FOLDER / "train.csv").write_bytes(b"Path\xff\xfe\n")
        with pytest.raises(ValueError, match=r"train.csv is no CSV file in UTF-8"):
            data(root)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (
                ("patient1/a.jpg", "Frontal", {"Cardiomegaly": "2.0"}),
                "train.csv, line 2: 'Cardiomegaly' is '2.0', which is none of 1.0, 0.0, -1.0 and empty.",
            ),
            (
                ("patient1/a.jpg", "Frontal", {"No Finding": "yes"}),
                "train.csv, line 2: 'No Finding' is 'yes', which is none of 1.0, 0.0, -1.0 and empty.",
            ),
            (
                ("patient1/a.jpg", "Oblique", {}),
                "train.csv, line 2: 'Frontal/Lateral' is 'Oblique', which is neither Frontal nor Lateral.",
            ),
            (
                ("person1/a.jpg", "Frontal", {"Cardiomegaly": "1.0"}),
                f"line 2: the path '{FOLDER}/train/person1/a.jpg' holds no patient's folder such as patient00001.",
            ),
        ],
    )
    def test_a_wrong_field(self, tmp_path: Path, row: Row, message: str) -> None:
        write_table(tmp_path / "train.csv", [row])
        with pytest.raises(ValueError, match=re.escape(message)):
            data(tmp_path)

    def test_a_line_cut_off(self, tmp_path: Path) -> None:
        (tmp_path / "train.csv").write_text(",".join(HEADER) + "\ntrain/patient00001/a.jpg,Male,40,Frontal\n")
        with pytest.raises(ValueError, match=r"'Cardiomegaly' is '\(nothing\)', which is none of"):
            data(tmp_path)

    def test_no_row_in_either_class(self, tmp_path: Path) -> None:
        write_table(tmp_path / "train.csv", [("patient1/a.jpg", "Frontal", {"Edema": "1.0"})])
        wanted = r"train.csv has no row for the task Cardiomegaly against healthy, frontal views\."
        with pytest.raises(ValueError, match=wanted):
            data(tmp_path)

    def test_an_image_named_twice(self, root: Path) -> None:
        write_table(root / FOLDER / "train.csv", [*ROWS, ROWS[0]])
        with pytest.raises(ValueError, match=rf"names 'train/{ROWS[0][0]}' 2 times: one row for each image is needed"):
            data(root)
