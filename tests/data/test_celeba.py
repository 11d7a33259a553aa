"""CelebA from files of its layout that the test writes itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cfe_lightning.data import celeba
from cfe_lightning.data.base import Split
from cfe_lightning.data.celeba import CelebA
from cfe_lightning.images import resize

ATTRIBUTES = ["Bald", "Eyeglasses", "Male", "Smiling", "Wearing_Hat"]
#: Official split, attributes and identity of eight images.
ROWS = [
    (0, (-1, 1, -1, 1, -1), 7),
    (0, (-1, -1, 1, -1, -1), 7),
    (0, (1, -1, 1, 1, -1), 3),
    (0, (-1, 1, -1, -1, 1), 4),
    (1, (-1, -1, -1, 1, -1), 5),
    (1, (-1, -1, 1, -1, -1), 6),
    (2, (-1, -1, -1, -1, -1), 8),
    (2, (-1, 1, 1, 1, -1), 9),
]


def write_tables(root: Path, form: str = "txt", rows: list[Any] = ROWS) -> None:
    folder = root / "celeba"
    folder.mkdir(parents=True, exist_ok=True)
    ids = [f"{number:06d}.jpg" for number in range(1, len(rows) + 1)]

    # Rows.
    attributes = [(name, *map(str, row[1])) for name, row in zip(ids, rows, strict=True)]
    partition = [(name, str(row[0])) for name, row in zip(ids, rows, strict=True)]
    identities = [(name, str(row[2])) for name, row in zip(ids, rows, strict=True)]

    # Files.
    if form == "txt":
        head = f"{len(rows)}\n{' '.join(ATTRIBUTES)}\n"
        (folder / "list_attr_celeba.txt").write_text(head + "".join("  ".join(row) + "\n" for row in attributes))
        (folder / "list_eval_partition.txt").write_text("".join(" ".join(row) + "\n" for row in partition))
        (folder / "identity_CelebA.txt").write_text("".join(" ".join(row) + "\n" for row in identities))
    else:
        head = f"image_id,{','.join(ATTRIBUTES)}\n"
        (folder / "list_attr_celeba.csv").write_text(head + "".join(",".join(row) + "\n" for row in attributes))
        text = "image_id,partition\n" + "".join(",".join(row) + "\n" for row in partition)
        (folder / "list_eval_partition.csv").write_text(text)


def write_images(folder: Path, ending: str = "jpg") -> None:
    folder.mkdir(parents=True)
    for number in range(1, len(ROWS) + 1):
        picture = np.zeros((218, 178, 3), dtype=np.uint8)
        picture[20:198] = 20 * number  # what a square crop of 178 keeps
        Image.fromarray(picture).save(folder / f"{number:06d}.{ending}")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_tables(tmp_path)
    write_images(tmp_path / "celeba" / "img_align_celeba")
    return tmp_path


def data(root: Path, **options: Any) -> CelebA:
    return CelebA(root=str(root), image_size=16, **({"attribute": "Smiling"} | options))


@pytest.mark.parametrize("form", ["txt", "csv"])
def test_official_split_and_labels(tmp_path: Path, form: str) -> None:
    write_tables(tmp_path, form)
    write_images(tmp_path / "celeba" / "img_align_celeba")
    smiling = data(tmp_path)
    assert smiling.class_names == ("not Smiling", "Smiling")
    wanted: dict[Split, list[int]] = {"train": [1, 0, 1, 0], "val": [1, 0], "test": [0, 1]}
    for split, labels in wanted.items():
        assert smiling.dataset(split).labels.tolist() == labels
    assert [smiling.dataset("test")[i]["name"] for i in range(2)] == ["000007.jpg", "000008.jpg"]
    assert data(tmp_path, attribute="Eyeglasses").dataset("train").labels.tolist() == [1, 0, 0, 1]


def test_the_crop_is_the_middle_square(root: Path) -> None:
    cropped, whole = data(root).dataset("train")[3]["image"], data(root, crop=None).dataset("train")[3]["image"]
    assert cropped.shape == whole.shape == (3, 16, 16)
    assert cropped.min() == pytest.approx(80 / 255 * 2 - 1, abs=0.03)
    assert whole[:, 0].max() < -0.9
    assert data(root, channels=1).dataset("train")[0]["image"].shape == (1, 16, 16)


def test_a_crop_is_resized_like_everything_else(root: Path) -> None:
    picture = np.asarray(Image.open(root / "celeba" / "img_align_celeba" / "000002.jpg").convert("RGB"))[20:198]
    tensor = torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 255 * 2 - 1
    torch.testing.assert_close(data(root).dataset("train")[1]["image"], resize(tensor, 16), atol=1e-5, rtol=0)


def test_the_users_own_folder_in_another_format(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tables(tmp_path)
    write_images(tmp_path / "own", "png")
    (tmp_path / "own" / "000003.png").unlink()
    own = data(tmp_path, images=str(tmp_path / "own"))
    assert [file.name for file in own.dataset("train").files] == ["000001.png", "000002.png", "000004.png"]
    assert "has 7 of the 8 images of CelebA; the others are left out" in caplog.text


def test_identities_are_checked_if_asked(root: Path) -> None:
    files = data(root, check_identities=True).dataset("train").files
    assert [file.group for file in files] == ["7", "7", "3", "4"]
    rows = [*ROWS[:-1], (2, ROWS[-1][1], 7)]
    write_tables(root, rows=rows)
    assert len(data(root).dataset("test")) == 2
    with pytest.raises(ValueError, match=r"Group '7' is in both the train and the test split"):
        data(root, check_identities=True)


def test_an_unknown_attribute_names_its_neighbours(root: Path) -> None:
    with pytest.raises(ValueError, match=r"CelebA has no attribute 'smile': did you mean Smiling.*\?"):
        data(root, attribute="smile")
    with pytest.raises(ValueError, match=r"no attribute 'zzz': it has Bald, Eyeglasses, Male, Smiling, Wearing_Hat\."):
        data(root, attribute="zzz")


@pytest.mark.parametrize("table", ["list_attr_celeba", "list_eval_partition"])
def test_a_missing_table_is_named(root: Path, table: str) -> None:
    (root / "celeba" / f"{table}.txt").unlink()
    with pytest.raises(FileNotFoundError, match=rf"CelebA's table {table}.txt \(or .csv\) is not in .*celeba: put it"):
        data(root)


def test_missing_images(tmp_path: Path) -> None:
    write_tables(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*img_align_celeba with CelebA's aligned images"):
        data(tmp_path)
    (tmp_path / "celeba" / "img_align_celeba").mkdir()
    with pytest.raises(ValueError, match=r"holds none of the images that .*list_eval_partition.txt names"):
        data(tmp_path)


def test_a_split_without_images(root: Path) -> None:
    for number in (5, 6):
        (root / "celeba" / "img_align_celeba" / f"{number:06d}.jpg").unlink()
    with pytest.raises(ValueError, match=r"None of the images of CelebA's val split is in the folder of images"):
        data(root).dataset("val")


def test_a_broken_table(root: Path) -> None:
    table = root / "celeba" / "list_attr_celeba.txt"
    table.write_text(table.read_text().replace("000004.jpg  -1", "000004.jpg"))
    with pytest.raises(ValueError, match=r"is not CelebA's table: the row of '000004.jpg' does not hold a 1 or -1"):
        data(root)
    table.write_text("")
    with pytest.raises(ValueError, match=re.escape("CelebA has no attribute 'Smiling'")):
        data(root)


def test_a_crop_of_nothing(root: Path) -> None:
    with pytest.raises(ValueError, match=r"crop is a number of pixels, or null for the whole picture, got 0"):
        data(root, crop=0)


def test_unreadable_images_can_be_left_out(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "celeba" / "img_align_celeba" / "000002.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"000002.jpg cannot be used \(The file is empty\): repair or remove it"):
        data(root).dataset("train")[1]
    assert len(data(root, skip_unreadable=True).dataset("train")) == 3
    assert "1 of 4 images cannot be read and are left out" in caplog.text


class TestDownload:
    def test_it_happens_only_if_asked_and_needed(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []
        monkeypatch.setattr(celeba.torchvision.datasets, "CelebA", lambda *a, **k: asked.append((a, k)))
        data(root, download=True)
        assert asked == []
        (root / "celeba" / "list_attr_celeba.txt").unlink()
        with pytest.raises(FileNotFoundError):
            data(root)
        assert asked == []
        with pytest.raises(FileNotFoundError):
            data(root, download=True)
        assert asked == [((str(root),), {"download": True})]

    def test_a_failure_says_what_to_do(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def failing(*arguments: object, **options: object) -> None:
            raise RuntimeError("The daily quota\nis exceeded")

        monkeypatch.setattr(celeba.torchvision.datasets, "CelebA", failing)
        with pytest.raises(
            ValueError, match=r"could not be downloaded \(The daily quota is exceeded\): fetch img_align"
        ):
            data(tmp_path, download=True)
