"""``explain.py --verify``: confirmed rows, problems, and the classifier that counts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import toy
from PIL import Image
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.cli import explain
from cfe_lightning.explaining import verify as verification


@pytest.fixture(scope="module")
def explained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes an output folder of the toy, its checkpoint beside it."""
    root = tmp_path_factory.mktemp("verify")
    for index, image in enumerate(toy.toy_images(7, 3)):
        images.save_image(image, root / "photos" / f"{index}.png")
    (root / "photos" / "broken.png").write_bytes(b"broken")
    checkpoint = toy.toy_checkpoint(root / "toy.ckpt", num_classes=3)
    where = ["--checkpoint", str(checkpoint), "--input", str(root / "photos"), "--output", str(root / "out")]
    assert explain.main([*where, "--trusted", "toy", "--accelerator", "cpu"]) == explain.FAILED_ROWS
    toy.toy_classifier(3).save(root / "toy.pt")
    return root


@pytest.fixture
def out(explained: Path, tmp_path: Path) -> Path:
    shutil.copytree(explained / "out", tmp_path / "out")
    return tmp_path / "out"


def verify(out: Path, *more: str) -> int:
    return explain.main(["--verify", str(out), "--trusted", "toy", *more])


def problems(out: Path) -> dict[str, list[str]]:
    return json.loads((out / "verification.json").read_text())["problems"]


def edit(out: Path, name: str, **changes: Any) -> None:
    """Changes a row of the manifest."""
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    for line in lines:
        if line.get("name") == name:
            line |= changes
    (out / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_an_untouched_folder_is_confirmed(out: Path, explained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(out) == 0
    assert "7 of 7 rows confirmed" in capsys.readouterr().out
    content = json.loads((out / "verification.json").read_text())
    assert (content["checked"], content["confirmed"], content["problems"]) == (7, 7, {})
    assert content["classifier_fingerprint"] == toy.toy_classifier(3).fingerprint()
    # Where the checkpoint has gone the classifier alone will do.
    assert verify(out, "--classifier", str(explained / "toy.pt")) == 0


def test_compressing_losslessly_changes_nothing(out: Path) -> None:
    for path in (path for path in (out / "images").rglob("*.png") if path.is_file()):
        with Image.open(path) as picture:
            picture.load()
        picture.save(path, format="PNG", compress_level=9, optimize=True)
    assert verify(out) == 0


@pytest.mark.parametrize(
    "file", ["counterfactual.png", "steps.png", "image.png", "attribution.png", "part_distinct.png"]
)
def test_one_changed_block_is_found(out: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = out / "images" / "3.png" / file
    with Image.open(path) as picture:
        changed = picture.copy()
    level = changed.getpixel((5, 5))
    changed.putpixel((5, 5), tuple(value ^ 1 for value in level))  # type: ignore[union-attr]
    changed.save(path)
    assert verify(out) == explain.FAILED_ROWS
    assert problems(out) == {"3.png": [f"{file} has other pixels than those that were saved"]}
    assert "6 of 7 rows confirmed" in capsys.readouterr().out


def test_missing_and_unreadable_pictures_are_found(out: Path) -> None:
    (out / "images" / "0.png" / "difference.png").unlink()
    (out / "images" / "1.png" / "image.png").write_bytes(b"nothing")
    with Image.open(out / "images" / "2.png" / "image.png") as picture:
        picture.save(out / "images" / "2.png" / "image.png", format="JPEG", quality=95)
    assert verify(out) == explain.FAILED_ROWS
    assert problems(out) == {
        "0.png": ["difference.png is missing"],
        "1.png": ["image.png cannot be read as the PNG that was saved"],
        "2.png": ["image.png cannot be read as the PNG that was saved"],
    }


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"p_target_saved": 0.2}, "the probability of 'stripe"),
        ({"p_target_before": 0.9}, "the probability of 'stripe"),
        ({"flipped_saved": False}, "its saved counterfactual is a flip, which the row denies"),
        ({"predicted": "zebra"}, "its classes are not those of the classifier"),
        ({"folder": "../../secret"}, "image.png lies outside the folder"),
        ({"digests": {}}, "image.png has other pixels than those that were saved"),
    ],
)
def test_a_claim_that_is_not_true_is_found(out: Path, changes: dict[str, Any], sentence: str) -> None:
    edit(out, "3.png", **changes)
    assert verify(out) == explain.FAILED_ROWS
    found = problems(out)
    assert list(found) == ["3.png"]
    assert found["3.png"][0].startswith(sentence)


def test_a_curve_that_is_not_true_is_found(out: Path) -> None:
    row = next(
        line
        for line in map(json.loads, (out / "manifest.jsonl").read_text().splitlines())
        if line.get("name") == "3.png"
    )
    curve = row["curve"]
    edit(out, "3.png", curve=curve | {"target": [value + 0.01 for value in curve["target"]]})
    assert verify(out) == explain.FAILED_ROWS
    assert problems(out)["3.png"] == [
        f"the curve of {row['target']!r} is not what the classifier says of the saved steps"
    ]


def test_only_the_classifier_of_the_folder_counts(
    out: Path, explained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy.toy_classifier(2).save(tmp_path / "other.pt")
    assert verify(out, "--classifier", str(tmp_path / "other.pt")) == 2
    assert "holds another classifier than the one that" in capsys.readouterr().err
    other = toy.toy_checkpoint(tmp_path / "other.ckpt", num_classes=2)
    assert verify(out, "--checkpoint", str(other)) == 2
    assert "is not the checkpoint that made" in capsys.readouterr().err
    assert not (out / "verification.json").exists()


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(tmp_path) == 2
    assert "holds no manifest.jsonl" in capsys.readouterr().err
    assert verify(tmp_path, "--input", "photos") == 2
    assert "--verify takes the folder of an earlier run alone: leave out --input" in capsys.readouterr().err


def test_a_new_run_removes_what_was_found(out: Path, explained: Path) -> None:
    assert verify(out) == 0
    where = ["--checkpoint", str(explained / "toy.ckpt"), "--input", str(explained / "photos"), "--output", str(out)]
    arguments = [*where, "--trusted", "toy", "--accelerator", "cpu", "--overwrite"]
    assert explain.main(arguments) == explain.FAILED_ROWS
    assert not (out / "verification.json").exists()


def test_another_changed_area_is_found_and_rows_without_one_are_confirmed(out: Path) -> None:
    edit(out, "3.png", changed_area=0.5)
    edit(out, "4.png", changed_area=None)
    assert verify(out) == explain.FAILED_ROWS
    assert list(problems(out)) == ["3.png"]
    (problem,) = problems(out)["3.png"]
    assert problem.startswith("its changed area is ")
    assert problem.endswith(", not 0.5")


@pytest.mark.parametrize("changes", [{"where": "bottom", "where_share": 0.9}, {"where": None, "where_share": None}])
def test_another_place_of_the_change_is_found(out: Path, changes: dict[str, Any]) -> None:
    edit(out, "3.png", **changes)
    assert verify(out) == explain.FAILED_ROWS
    assert list(problems(out)) == ["3.png"]
    (problem,) = problems(out)["3.png"]
    assert problem.startswith("the place of its change is ")
    assert problem.endswith(", not bottom (0.9000)" if changes["where"] else ", not nowhere")


def test_rows_of_earlier_versions_say_no_place_and_are_confirmed(out: Path) -> None:
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    for line in lines:
        for key in ("changed_area", "where", "where_share"):
            line.pop(key, None)
    (out / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert verify(out) == 0


def test_places_in_montages_are_those_in_every_slice(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def place(before: Tensor, after: Tensor, num_slices: int) -> list[tuple[str, float]]:
        asked.append(num_slices)
        return [("centre", 1.0)]

    monkeypatch.setattr(verification, "strongest_change", place)
    header, *rest = (out / "manifest.jsonl").read_text().splitlines(keepends=True)
    (out / "manifest.jsonl").write_text(json.dumps(json.loads(header) | {"num_slices": 4}) + "\n" + "".join(rest))
    edit(out, "3.png", where="centre", where_share=1.0)
    assert verify(out) == explain.FAILED_ROWS
    assert asked == [4] * 7
    assert "3.png" not in problems(out)
