"""The means over a folder, on hand-made changes of 16 x 16 grey pixels."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cfe_lightning.explaining import overview as global_view
from cfe_lightning.explaining.folder import OutputFolder
from cfe_lightning.explaining.names import image_folder
from cfe_lightning.explaining.overview import write_overview
from cfe_lightning.explaining.row import Row

HEADER = {"checkpoint_sha256": "aa", "classes": ["cat", "dog"]}
SIDE = 16
Changes = Callable[[int], np.ndarray]


def centre(index: int) -> np.ndarray:
    change = np.zeros((SIDE, SIDE), int)
    change[7:9, 7:9] = 40
    return change


def border(index: int) -> np.ndarray:
    change = np.zeros((SIDE, SIDE), int)
    change[:2] = -60
    return change


def add(
    output: OutputFolder,
    count: int,
    changes: Changes,
    pair: Sequence[str] = ("cat", "dog"),
    prefix: str = "",
    **more: Any,
) -> list[str]:
    """Adds flipped rows with their pictures and returns their names."""
    rows: list[Row] = []
    for index in range(count):
        # Pictures.
        name = f"{prefix}{index:04d}.png"
        folder = output.path / image_folder(name)
        folder.mkdir(parents=True, exist_ok=True)
        before = np.full((SIDE, SIDE), 100)
        for file, values in (("image.png", before), ("counterfactual.png", before + changes(index))):
            Image.fromarray(values.astype(np.uint8)).save(folder / file)

        # Row.
        line = {"name": name, "status": "ok", "predicted": pair[0], "target": pair[1], "flipped_saved": True}
        line |= {"folder": image_folder(name), "files": {key: f"{key}.png" for key in ("image", "counterfactual")}}
        rows.append(Row(line | more))
    output.append(0, rows)
    output.merge()
    return [row.name for row in rows]


@pytest.fixture
def output(tmp_path: Path) -> OutputFolder:
    folder = OutputFolder(tmp_path / "out")
    folder.prepare(HEADER)
    return folder


def content(output: OutputFolder) -> Any:
    return json.loads((output.path / "global.json").read_text())


def pixels(output: OutputFolder, file: str) -> np.ndarray:
    return np.asarray(Image.open(output.path / file)).astype(int)


def test_the_means_of_a_pair_are_those_of_its_pictures(output: OutputFolder):
    # Two ups and a down at the same place: 1 / 3 is left of the change, all of its strength.
    add(output, 3, lambda index: centre(index) * (-1 if index == 2 else 1))
    write_overview(output)
    assert (content(output)["schema"], content(output)["frame_ratio"]) == (1, 2.0)
    (pair,) = content(output)["pairs"]
    assert (pair["predicted"], pair["target"], pair["num_flipped"], pair["num_used"]) == ("cat", "dog", 3, 3)
    assert pair["pictures"]["change"]["scale"] == pytest.approx(40 / 255 / 3, rel=1e-5)
    assert pair["pictures"]["strength"]["scale"] == pytest.approx(40 / 255, rel=1e-5)
    assert pair["mean_strength"] == pytest.approx(40 / 255 * 4 / 256, rel=1e-5)
    assert (pair["where"], pair["where_share"], pair["frame_share"], pair["alarm"]) == ("centre", 1.0, 0.0, False)
    assert pair["frame_area"] == 0.4375
    change, strength = (pixels(output, pair["pictures"][kind]["file"]) for kind in ("change", "strength"))
    assert change[8, 8].tolist() == [255, 0, 0]
    assert change[0, 0].tolist() == [255, 255, 255]
    assert (strength[8, 8].tolist(), strength[0, 0].tolist()) == ([255, 255, 255], [0, 0, 0])


def test_a_change_at_the_border_raises_the_alarm_and_one_in_the_centre_does_not(output: OutputFolder):
    add(output, 5, border)
    add(output, 6, centre, ("dog", "cat"), "c")
    write_overview(output)
    inner, outer = content(output)["pairs"]
    assert (outer["frame_share"], outer["num_framed"], outer["alarm"]) == (1.0, 5, True)
    assert (inner["frame_share"], inner["num_framed"], inner["alarm"]) == (0.0, 0, False)
    # Four images show no pattern.
    other = OutputFolder(output.path.parent / "few")
    other.prepare(HEADER)
    add(other, 4, border)
    write_overview(other)
    assert content(other)["pairs"][0]["alarm"] is False


@pytest.mark.parametrize(("strength", "alarm"), [(19, False), (20, False), (21, True)])
def test_the_alarm_goes_off_above_twice_the_strength_inside(output: OutputFolder, strength: int, alarm: bool):
    change = np.full((SIDE, SIDE), strength)
    change[2:14, 2:14] = 10
    add(output, 5, lambda index: change)
    write_overview(output)
    assert content(output)["pairs"][0]["alarm"] is alarm


def test_one_loud_image_raises_no_alarm(output: OutputFolder):
    add(output, 8, lambda index: border(index) if index == 0 else centre(index) // 40)
    write_overview(output)
    (pair,) = content(output)["pairs"]
    assert pair["frame_share"] > 0.9
    assert (pair["num_framed"], pair["alarm"]) == (1, False)


def test_every_slice_of_a_montage_has_its_own_border(output: OutputFolder):
    # The middle of the montage is where four slices meet.
    add(output, 5, centre)
    write_overview(output, num_slices=4)
    assert content(output)["pairs"][0]["alarm"] is True


def test_the_typical_images_are_those_most_like_the_mean(output: OutputFolder):
    def changes(index: int) -> np.ndarray:
        return border(index) if index in (0, 3) else centre(index) * (1 + index % 2)

    names = add(output, 8, changes)
    write_overview(output)
    typical = content(output)["pairs"][0]["typical"]
    # Equally similar ones in their order; how strong a change is does not count.
    assert [example["name"] for example in typical] == [names[1], names[2], names[4]]
    similarities = [example["similarity"] for example in typical]
    assert similarities == [pytest.approx(720 / (720**2 + 32 * 120**2) ** 0.5, rel=1e-5)] * 3


def test_of_many_images_as_many_as_allowed_enter_evenly(output: OutputFolder):
    def single(index: int) -> np.ndarray:
        change = np.zeros((SIDE, SIDE), int)
        change[index // SIDE, index % SIDE] = 100
        return change

    add(output, 40, single)
    write_overview(output, max_images=10)
    (pair,) = content(output)["pairs"]
    assert (pair["num_flipped"], pair["num_used"]) == (40, 10)
    used = pixels(output, "global/0-strength.png").sum(axis=2).flatten().nonzero()[0]
    assert np.diff(used).tolist() == [4] * 9


def test_only_flips_on_saved_pixels_count(output: OutputFolder):
    add(output, 2, centre)
    add(output, 2, centre, prefix="kept", flipped_saved=False)
    add(output, 2, centre, ("dog", "dog"), "same", flipped_saved=None)
    add(output, 1, centre, prefix="map", flipped_saved=None, files={"image": "image.png"})
    output.append(0, [Row({"name": "z.png", "status": "failed", "error": "broken"})])
    output.merge()
    write_overview(output)
    assert [(pair["predicted"], pair["num_flipped"]) for pair in content(output)["pairs"]] == [("cat", 2)]


def test_the_most_frequent_pairs_have_pictures_and_the_others_numbers(
    output: OutputFolder, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(global_view, "MAX_PICTURED", 2)
    for index, count in enumerate((5, 1, 3)):
        add(output, count, border, ("cat", f"<script>{index}"), f"p{index}-")
    write_overview(output)
    pairs = content(output)["pairs"]
    assert [(pair["target"], pair["num_flipped"]) for pair in pairs] == [
        *(("<script>0", 5), ("<script>2", 3), ("<script>1", 1)),
    ]
    assert pairs[2]["pictures"] == {}
    assert pairs[2]["typical"] == []
    assert pairs[2]["frame_share"] == 1.0
    names = sorted(path.name for path in (output.path / "global").iterdir())
    assert names == ["0-change.png", "0-strength.png", "1-change.png", "1-strength.png"]


def test_pictures_that_cannot_be_read_are_left_out_and_counted(output: OutputFolder):
    names = add(output, 6, centre)
    place = [output.path / image_folder(name) for name in names]
    (place[0] / "image.png").unlink()
    (place[1] / "counterfactual.png").write_bytes(b"broken")
    for file in ("image.png", "counterfactual.png"):
        Image.new("L", (8, 8)).save(place[3] / file)
    Image.new("RGB", (SIDE, SIDE)).save(place[4] / "image.png")
    write_overview(output)
    (pair,) = content(output)["pairs"]
    assert (pair["num_flipped"], pair["num_used"], pair["num_left_out"]) == (6, 2, 4)
    assert {example["name"] for example in pair["typical"]} == {names[2], names[5]}
    # And where none is left, numbers are none.
    for folder in place:
        (folder / "image.png").unlink(missing_ok=True)
    write_overview(output)
    (pair,) = content(output)["pairs"]
    assert (pair["num_used"], pair["mean_strength"], pair["frame_share"], pair["pictures"]) == (0, None, None, {})


def test_nothing_outside_the_folder_is_read_or_written(output: OutputFolder):
    outside = output.path.parent / "outside"
    outside.mkdir()
    for file in ("image.png", "counterfactual.png"):
        Image.new("L", (SIDE, SIDE)).save(outside / file)
    add(output, 1, centre, folder="../outside")
    (output.path / "global").symlink_to(outside)
    write_overview(output)
    assert content(output)["pairs"][0]["num_left_out"] == 1
    add(output, 1, centre)
    write_overview(output)
    assert sorted(path.name for path in outside.iterdir()) == ["counterfactual.png", "image.png"]
    assert not (output.path / "global").is_symlink()


def test_an_earlier_view_gives_way_and_other_files_stay(output: OutputFolder):
    add(output, 2, centre)
    add(output, 1, centre, ("dog", "cat"), "d")
    write_overview(output)
    first = (output.path / "global.json").read_bytes()
    write_overview(output)
    assert (output.path / "global.json").read_bytes() == first

    # One pair less.
    (output.path / "global" / "mine.png").write_text("mine")
    (output.path / "global" / ".x.7.part").write_text("torn")
    add(output, 1, centre, ("dog", "cat"), "d", flipped_saved=False)
    write_overview(output)
    assert sorted(path.name for path in (output.path / "global").iterdir()) == [
        *("0-change.png", "0-strength.png", "mine.png"),
    ]

    # No pair.
    add(output, 2, centre, flipped_saved=False)
    write_overview(output)
    assert not (output.path / "global.json").exists()
    assert [path.name for path in (output.path / "global").iterdir()] == ["mine.png"]
    (output.path / "global" / "mine.png").unlink()
    write_overview(output)
    assert not (output.path / "global").exists()


def test_numbers_never_stand_beside_the_pictures_of_others(output: OutputFolder, monkeypatch: pytest.MonkeyPatch):
    add(output, 1, centre)
    write_overview(output)

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(global_view.images, "save_image", fail)
    with pytest.raises(OSError, match="no space left"):
        write_overview(output)
    assert not (output.path / "global.json").exists()


def test_overwriting_a_run_removes_its_view_and_nothing_else(output: OutputFolder):
    add(output, 1, centre)
    write_overview(output)
    output.prepare(HEADER)
    assert (output.path / "global.json").is_file(), "a run that goes on replaces it at its end"
    (output.path / "global" / "mine.png").write_text("mine")
    output.prepare(HEADER, overwrite=True)
    assert not (output.path / "global.json").exists()
    assert [path.name for path in (output.path / "global").iterdir()] == ["mine.png"]


@pytest.mark.parametrize("name", ["global.json", "global"])
def test_a_folder_with_a_view_from_elsewhere_is_refused(tmp_path: Path, name: str):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"holds {name} that no run of explain.py left there"):
        OutputFolder(tmp_path).prepare(HEADER)


def test_the_place_of_a_change_is_that_in_every_slice_of_a_montage(output: OutputFolder):
    def inner(index: int) -> np.ndarray:
        change = np.zeros((SIDE, SIDE), int)
        change[3:5, 3:5] = change[3:5, 11:13] = change[11:13, 3:5] = change[11:13, 11:13] = 40
        return change

    add(output, 1, inner)
    write_overview(output, num_slices=4)
    assert (content(output)["pairs"][0]["where"], content(output)["pairs"][0]["where_share"]) == ("centre", 1.0)


def test_all_pairs_share_one_frame():
    means = [global_view._Mean(1, pictured=False) for _ in range(3)]
    for mean in means:
        mean.add(torch.ones(1, SIDE, SIDE))
    assert means[0].frame is means[1].frame is means[2].frame
