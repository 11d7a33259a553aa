"""Atlases are stored completely, refuse wrong fields, and replace only their own files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from atlases import STRENGTHS, atlas, direction, pair, pictures
from PIL import Image

from cfe_lightning import images
from cfe_lightning.explaining.atlas import SMALLEST_CELL, write_atlas
from cfe_lightning.explaining.folder import OutputFolder

HEADER = {"checkpoint_sha256": "aa", "classes": ["cat", "dog"]}


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_everything_is_in_the_json_and_the_pictures_it_names(tmp_path: Path):
    write_atlas(atlas(), tmp_path)
    names = ["atlas/0-0.png", "atlas/0-1.png", "atlas/1-0.png", "atlas/1-1.png"]
    assert files(tmp_path) == ["atlas.json", *names]
    written = json.loads((tmp_path / "atlas.json").read_text())
    about = {"schema": 1, "title": "found by hand", "note": "Mind the step."}
    assert {key: written[key] for key in about} == about
    # Pairs.
    first, second = written["pairs"]
    assert [first["source"], first["target"], second["source"], second["target"]] == ["cat", "dog", "dog", "cat"]
    assert (first["num_images"], first["num_kept"], first["covered"]) == (1200, 1000, 0.875)
    assert first["curve"] == [[0, 0], [2, 0.5], [4, 0.875]]
    assert [found["file"] for found in first["directions"] + second["directions"]] == names
    # One direction.
    found = first["directions"][1]
    assert found.pop("probabilities") == [[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]] * 3
    expected = {"name": "direction 1", "file": "atlas/0-1.png", "cell": [64, 64], "enlarged": 2}
    expected |= {"strengths": [-4, -3, -2, -1, 0, 1, 2, 3, 4], "step": -4, "degree": 9.3125, "mean_change": 3.25}
    expected |= {"flipped": 0.75, "newly": 0.125, "change": 0.0625, "inside": 0.8125}
    assert found == expected


def test_what_is_not_known_is_null(tmp_path: Path):
    write_atlas(atlas(pair(directions=[direction(inside=None)])), tmp_path)
    assert json.loads((tmp_path / "atlas.json").read_text())["pairs"][0]["directions"][0]["inside"] is None


@pytest.mark.parametrize(
    ("channels", "height", "width", "factor"),
    [(1, 32, 32, 2), (3, 16, 16, 3), (3, 48, 64, 1), (1, 20, 60, 3), (1, 96, 96, 1)],
)
def test_a_row_is_an_image_a_column_a_strength_and_no_pixel_is_lost(
    tmp_path: Path, channels: int, height: int, width: int, factor: int
):
    moved = pictures(2, channels, height, width)
    write_atlas(atlas(pair(directions=[direction(images=moved)])), tmp_path)
    with Image.open(tmp_path / "atlas" / "0-0.png") as picture:
        assert picture.size == (9 * width * factor, 2 * height * factor)
        assert min(height, width) * factor >= SMALLEST_CELL
        for row in range(2):
            for column in range(9):
                left, top = column * width * factor, row * height * factor
                cell = picture.crop((left, top, left + width * factor, top + height * factor))
                expected = np.asarray(images.to_pil(moved[row, column]))
                enlarged = expected.repeat(factor, axis=0).repeat(factor, axis=1)
                assert np.array_equal(np.asarray(cell), enlarged)


def test_no_class_name_becomes_a_file_name(tmp_path: Path):
    hostile = ["../../evil", "a/b", "", "con", "\0", "<b>", "\udcff", "x" * 300]
    write_atlas(atlas(*(pair(name, name[::-1], 1) for name in hostile)), tmp_path)
    assert files(tmp_path) == ["atlas.json", *(f"atlas/{index}-0.png" for index in range(len(hostile)))]
    written = json.loads((tmp_path / "atlas.json").read_text(encoding="utf-8"))
    assert [found["source"] for found in written["pairs"]] == hostile


def test_a_smaller_atlas_leaves_no_picture_of_the_larger_one_but_every_other_file(tmp_path: Path):
    write_atlas(atlas(pair(num_directions=3), pair("dog", "cat", 2)), tmp_path)
    (tmp_path / "atlas" / "notes.txt").write_text("mine")
    (tmp_path / "atlas" / "0-2-mine.png").write_text("mine")
    (tmp_path / "atlas" / ".torn.part").write_text("ours")
    write_atlas(atlas(pair(num_directions=1)), tmp_path)
    assert files(tmp_path) == ["atlas.json", "atlas/0-0.png", "atlas/0-2-mine.png", "atlas/notes.txt"]


def test_no_numbers_stay_beside_pictures_of_another_atlas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_atlas(atlas(), tmp_path)

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(images, "save_image", fail)
    with pytest.raises(OSError, match="no space left"):
        write_atlas(atlas(), tmp_path)
    assert not (tmp_path / "atlas.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(3, 9, 32, 32)}, r"images must be \[N, T, C, H, W\], got \[3, 9, 32, 32\]"),
        ({"strengths": STRENGTHS[:8]}, r"strengths must be \[9\], got \[8\]"),
        ({"probabilities": torch.zeros(2, 9)}, r"probabilities must be \[3, 9\], got \[2, 9\]"),
        ({"probabilities": torch.full((3, 9), torch.nan)}, "probabilities must be finite"),
        ({"images": torch.full((3, 9, 1, 4, 4), torch.inf)}, "images must be finite"),
        ({"strengths": STRENGTHS.flip(0)}, "must ascend with 0 in the middle"),
        ({"strengths": STRENGTHS + 1}, "must ascend with 0 in the middle"),
        ({"inside": float("nan")}, "inside must be finite, got nan"),
        ({"mean_change": float("inf")}, "mean_change must be finite, got inf"),
    ],
)
def test_a_direction_that_does_not_fit_is_refused_by_field(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        direction(**changes)


def test_a_share_is_a_share():
    with pytest.raises(ValueError, match=r"covered must hold shares from 0 to 1, got \[87.5\]"):
        pair(covered=87.5)
    with pytest.raises(ValueError, match=r"curve must hold shares from 0 to 1, got \[0.5, nan\]"):
        pair(curve=[(1.0, 0.5), (2.0, float("nan"))])


def test_overwriting_a_run_removes_its_atlas_and_nothing_else_of_the_folder(tmp_path: Path):
    output = OutputFolder(tmp_path)
    output.prepare(HEADER)
    write_atlas(atlas(), tmp_path)
    output.prepare(HEADER)
    assert (tmp_path / "atlas.json").is_file(), "a run that goes on keeps it"
    output.prepare(HEADER, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.jsonl"]
    write_atlas(atlas(), tmp_path)
    (tmp_path / "atlas" / "mine.png").write_text("mine")
    output.prepare(HEADER, overwrite=True)
    assert files(tmp_path) == ["atlas/mine.png", "manifest.jsonl"]


@pytest.mark.parametrize("name", ["atlas.json", "atlas"])
def test_a_folder_with_an_atlas_from_elsewhere_is_refused(tmp_path: Path, name: str):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"holds {name} that no run of explain.py left"):
        OutputFolder(tmp_path).prepare(HEADER)
