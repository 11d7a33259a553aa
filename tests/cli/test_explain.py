import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest
import torch
import toy
from explained import (
    NoisyToy,
    StackToy,
    checkpoint,
    content,
    photos,
    restore_process_settings,
    run,
    sentence,
    table,
)
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from medical import write_dicom
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.cli import explain
from cfe_lightning.data.patient_slices import middle_slices
from cfe_lightning.explaining.folder import OutputFolder

__all__ = ["checkpoint", "photos", "restore_process_settings"]


def test_a_folder_is_explained(checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    assert run(checkpoint, photos, out) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        *("global", "global.json", "images", "manifest.csv", "manifest.jsonl", "report.html", "summary.json"),
    ]
    rows = table(out)
    assert list(rows) == ["a/0.png", "a/2.png", "a/4.png", "a/6.png", "b/1.png", "b/3.png", "b/5.png"]
    for name, row in rows.items():
        stripe = int(Path(name).stem) % 3
        assert (row["status"], row["predicted"]) == ("ok", f"stripe {stripe}")
        assert (row["flipped"], row["flipped_saved"]) == ("true", "true")
        for key in ("image", "counterfactual", "difference", "attribution", "steps", "part_distinct"):
            assert (out / row[key]).is_file()
        assert torch.equal(images.read_image(out / row["image"], 3), images.saved(images.read_image(photos / name, 3)))
        assert 0 < float(row["changed_area"]) <= 1
        assert row["sentence"].endswith(".")
        assert f"moved '{row['target']}' from " in row["sentence"]
        assert {*row["survives"].split(), *row["lost_under"].split()} <= {"jpeg90", "blur1", "down_up"}
    view = json.loads((out / "global.json").read_text())
    assert sum(pair["num_used"] for pair in view["pairs"]) == 7
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["n_planned"], summary["n_done"], summary["n_failed"]) == (7, 7, 0)
    assert summary["flip_rate"]["value"] == 1.0
    assert (summary["method"], summary["classes"]) == ("toy.FixedToyExplainer", list(toy.toy_class_names(3)))
    printed = capsys.readouterr().out
    assert "flip rate          1.0000 [0.646, 1.000]" in printed
    assert str(out / "report.html") in printed


@pytest.mark.parametrize("method", ["fixed", "noisy"])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
):
    kind = {"fixed": toy.FixedToyExplainer, "noisy": NoisyToy}[method]
    checkpoint = toy.save_checkpoint(kind(toy.toy_classifier(3)), tmp_path / "toy.ckpt")
    (photos / "a" / "1.png").write_bytes(b"broken")
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(checkpoint, photos, whole) == explain.FAILED_ROWS

    append = OutputFolder.append

    def dies_after_two_batches(self: OutputFolder, rank: int, rows: Any) -> None:
        append(self, rank, rows)
        if self.path.joinpath("manifest.0.jsonl").read_text().count('"end"') == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "append", dies_after_two_batches)
        assert run(checkpoint, photos, out) == 130
    explained: list[str] = []

    def record(self: OutputFolder, rank: int, rows: Any) -> None:
        explained.extend(row.name for row in rows)
        append(self, rank, rows)

    monkeypatch.setattr(OutputFolder, "append", record)
    assert run(checkpoint, photos, out) == explain.FAILED_ROWS
    assert explained == ["a/6.png", "b/1.png", "b/3.png", "b/5.png", "a/1.png"]
    assert content(out) == content(whole)
    # Once more: only the failure is tried again.
    explained.clear()
    assert run(checkpoint, photos, out) == explain.FAILED_ROWS
    assert explained == ["a/1.png"]
    assert content(out) == content(whole)
    # And again from scratch, with the same bytes.
    assert run(checkpoint, photos, out, "--overwrite") == explain.FAILED_ROWS
    assert content(out) == content(whole)


def test_the_system_can_end_a_run_after_the_batch_in_flight(
    checkpoint: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    append = OutputFolder.append

    def is_told_to_end(self: OutputFolder, rank: int, rows: Any) -> None:
        append(self, rank, rows)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(OutputFolder, "append", is_told_to_end)
    assert run(checkpoint, photos, tmp_path / "out") == 128 + signal.SIGTERM
    assert (tmp_path / "out" / "manifest.0.jsonl").read_text().count('"name"') == 2


def test_results_do_not_depend_on_batches_or_loader_processes(checkpoint: Path, photos: Path, tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(checkpoint, photos, first) == 0
    assert run(checkpoint, photos, second, "--batch-size", "7", "--num-workers", "2") == 0
    one, other = content(first), content(second)
    numbers = ("p_predicted_before", "p_predicted_after", "p_target_before", "p_target_after", "l1")
    for (name, row), (same_name, same_row) in zip(one.pop("rows"), other.pop("rows"), strict=True):
        assert name == same_name
        for key in numbers:
            assert float(row[key]) == pytest.approx(float(same_row[key]), rel=1e-4)
        assert {key: row[key] for key in ("target", "flipped_saved")} == {
            key: same_row[key] for key in ("target", "flipped_saved")
        }
    assert one == other


def test_a_mended_file_is_explained_and_a_changed_one_again(checkpoint: Path, photos: Path, tmp_path: Path):
    out, mended, changed = tmp_path / "out", photos / "a" / "0.png", photos / "b" / "1.png"
    whole = mended.read_bytes()
    mended.write_bytes(whole[:50])
    assert run(checkpoint, photos, out) == explain.FAILED_ROWS
    assert table(out)["a/0.png"]["status"] == "failed"
    before = table(out)
    mended.write_bytes(whole)
    shutil.copyfile(photos / "b" / "3.png", changed)
    os.utime(changed, ns=(1, 1))
    assert run(checkpoint, photos, out) == 0
    after = table(out)
    assert after["a/0.png"]["status"] == "ok"
    assert (before["b/1.png"]["predicted"], after["b/1.png"]["predicted"]) == ("stripe 1", "stripe 0")
    assert after["b/5.png"] == before["b/5.png"]


def test_more_images_follow_a_limited_run(checkpoint: Path, photos: Path, tmp_path: Path):
    assert run(checkpoint, photos, tmp_path / "out", "--limit", "3") == 0
    assert list(table(tmp_path / "out")) == ["a/0.png", "a/2.png", "a/4.png"]
    assert run(checkpoint, photos, tmp_path / "out") == 0
    assert len(table(tmp_path / "out")) == 7


def test_a_target_is_asked_for_by_name(checkpoint: Path, photos: Path, tmp_path: Path):
    out = tmp_path / "out"
    assert run(checkpoint, photos, out, "--target", "stripe 2") == 0
    for name, row in table(out).items():
        same = int(Path(name).stem) % 3 == 2
        assert row["target"] == "stripe 2"
        assert row["flipped"] == ("" if same else "true")
        assert row["note"] == ("already predicted as the target: nothing to flip" if same else "")
    assert json.loads((out / "summary.json").read_text())["flip_rate"]["n"] == 5


def test_an_argument_can_differ_from_training(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(checkpoint, photos, tmp_path / "as trained", "--limit", "1") == 0
    assert run(checkpoint, photos, tmp_path / "weak", "--limit", "1", "--set", "amplitude=0.1") == 0
    trained, weak = (float(table(tmp_path / name)["a/0.png"]["l1"]) for name in ("as trained", "weak"))
    assert 0 < weak < trained / 4
    capsys.readouterr()
    # Another value is another run.
    assert run(checkpoint, photos, tmp_path / "weak", "--set", "amplitude=0.2") == 2
    assert "set was '{'amplitude': 0.1}' and is now '{'amplitude': 0.2}'" in sentence(capsys).replace('"', "'")
    assert run(checkpoint, photos, tmp_path / "new", "--set", "strength=1") == 2
    assert sentence(capsys) == "FixedToyExplainer has no argument strength: choose from amplitude."
    assert run(checkpoint, photos, tmp_path / "new", "--set", "amplitude=[]") == 2
    assert sentence(capsys) == "FixedToyExplainer takes a number as amplitude, not []."


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classifier") / "toy.pt"
    toy.toy_classifier(3).save(path)
    return path


def untrained(method: str, classifier: Path, photos: Path, out: Path, *more: str) -> int:
    where = ["--method", method, "--classifier", str(classifier), "--input", str(photos), "--output", str(out)]
    return explain.main([*where, "--trusted", "toy", "--accelerator", "cpu", "--batch-size", "3", *more])


def test_a_method_without_training_needs_a_classifier_only(
    classifier: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    settings = ["--set", "beta=1", "--set", "residual_gain=1", "--set", "num_steps=5"]
    assert untrained("steerable_lens", classifier, photos, out, *settings) == 0
    rows = [row for row in OutputFolder(out).rows() if row.status == "ok"]
    assert len(rows) == 7
    for row in rows:
        assert set(row.files) >= {"counterfactual", "steps", "motion", "part_magnified"}
        # Every step carries its probabilities, its change and its clipped share; no flip is called one.
        assert {len(values) for values in row.curve["scores"].values()} == {5}
        assert set(row.curve["scores"]) == {"l2_norm", "clipped"}
        assert len(row.curve["target"]) == 5
        assert row.flipped == row.flipped_saved == (row.scores["reached"] == 1)
        assert (row.note is None) == row.flipped
    summary = json.loads((out / "summary.json").read_text())
    assert summary["untrained"] == "steerable_lens"
    assert "no evidence of a recognisable change" in summary["caution"]
    page = (out / "report.html").read_text()
    assert summary["caution"] in page
    # The same command again has nothing to do; another classifier or method is another run.
    capsys.readouterr()
    finished = content(out)
    assert untrained("steerable_lens", classifier, photos, out, *settings) == 0
    assert content(out) == finished
    capsys.readouterr()
    assert untrained("saliency", classifier, photos, out) == 2
    assert "untrained was 'steerable_lens' and is now 'saliency'" in sentence(capsys)
    other = tmp_path / "other.pt"
    toy.toy_classifier(2).save(other)
    assert untrained("steerable_lens", other, photos, out, *settings) == 2
    assert "classifier_sha256 was" in sentence(capsys)


def test_a_network_of_torchvision_is_known_by_its_name(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    asked: list[tuple[str, str]] = []

    def with_weights(name: str, weights: str) -> FrozenClassifier:
        asked.append((name, weights))
        return toy.toy_classifier(3)

    monkeypatch.setattr("cfe_lightning.classifier.torchvision_classifier", with_weights)
    assert untrained("random", Path("resnet18"), photos, tmp_path / "out", "--limit", "1") == 0
    assert asked == [("resnet18", "DEFAULT")]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["classifier"] == "resnet18"
    assert summary["classifier_sha256"] == toy.toy_classifier(3).fingerprint()
    capsys.readouterr()
    assert untrained("random", Path("resnet17"), photos, tmp_path / "new") == 2
    assert sentence(capsys).startswith("There is no classifier file resnet17")


def test_a_baseline_explains_a_folder(classifier: Path, photos: Path, tmp_path: Path):
    assert untrained("integrated_gradients", classifier, photos, tmp_path / "out") == 0
    for row in table(tmp_path / "out").values():
        assert row["status"] == "ok"
        assert row["flipped"] == row["counterfactual"] == ""
        assert (tmp_path / "out" / row["attribution"]).is_file()
        assert row["changed_area"] == row["where"] == row["survives"] == ""
        assert "attribution" in row["sentence"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "integrated_gradients explanations, 7 images" in page
    # Without counterfactuals there is nothing to say of the whole folder.
    assert "Over the whole folder" not in page
    assert not (tmp_path / "out" / "global.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "steerable_lens"], "--method and --classifier go together: give both, or --checkpoint,"),
        (["--checkpoint", "x", "--classifier", "y"], "--method and --classifier go together"),
        (["--method", "steerable_lens", "--classifier", "nowhere.pt"], "There is no classifier file nowhere.pt"),
        (["--method", "dxai", "--classifier", "toy.pt"], "Dxai has to be trained first"),
        (["--method", "lens", "--classifier", "toy.pt"], "There is no method 'lens' to use untrained: choose from"),
        (["--method", "guided_grad_cam", "--classifier", "toy.pt"], "guided_grad_cam needs nn.ReLU layers"),
        (["--method", "random", "--classifier", "toy.pt", "--target", "x"], "--target 'x' is not a class"),
    ],
)
def test_mistakes_about_untrained_methods(
    classifier: Path,
    photos: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(photos.parent)
    shutil.copyfile(classifier, "toy.pt")
    code = explain.main([*arguments, "--input", "photos", "--output", "out", "--trusted", "toy"])
    assert code == 2
    assert sentence(capsys).startswith(message)
    assert not Path("out").exists()


def test_a_checkpoint_or_a_method_is_needed(capsys: pytest.CaptureFixture[str]):
    assert explain.main(["--input", "a", "--output", "b"]) == 2
    assert sentence(capsys).startswith("No explainer is given: add --checkpoint")
    with pytest.raises(SystemExit):
        explain.main(["--checkpoint", "x", "--method", "steerable_lens", "--input", "a", "--output", "b"])
    assert "--method" in capsys.readouterr().err
    assert explain.main(["--checkpoint", "x", "--input", "a"]) == 2
    assert sentence(capsys).startswith("--output must be given")


def test_dicom_files_are_images(
    checkpoint: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    shutil.rmtree(photos / "b")
    pixels = np.full((16, 16), 100, dtype=np.int16)
    write_dicom(photos / "ct.dcm", pixels)
    assert run(checkpoint, photos, tmp_path / "out", "--window", "0", "400") == 0
    row = table(tmp_path / "out")["ct.dcm"]
    # 100 lies half-way between the level and the upper edge of the window.
    expected = torch.full((3, 16, 16), 0.5)
    assert torch.equal(images.read_image(tmp_path / "out" / row["image"], 3), images.saved(expected))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert run(checkpoint, photos, tmp_path / "without") == explain.FAILED_ROWS
    row = table(tmp_path / "without")["ct.dcm"]
    assert row["status"] == "failed"
    assert "can be read only with the package pydicom: pip install pydicom" in row["error"]


def test_patients_are_explained_as_montages(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    checkpoint = toy.save_checkpoint(StackToy(toy.toy_classifier(3)), tmp_path / "stack.ckpt")
    patients, out = tmp_path / "patients", tmp_path / "out"
    for index, image in enumerate(toy.toy_images(6)):
        images.save_image(image, patients / "ward" / "anna" / f"{index + 5}.png")
    images.save_image(toy.toy_images(1)[0], patients / "ben" / "1.png")
    (patients / "carl").mkdir()
    (patients / "carl" / "1.png").write_bytes(b"broken")
    assert run(checkpoint, patients, out) == explain.FAILED_ROWS
    rows = table(out)
    assert {name: row["status"] for name, row in rows.items()} == {"ben": "ok", "carl": "failed", "ward/anna": "ok"}
    assert rows["carl"]["error"].startswith("1.png: ")
    # Ten comes after nine, and the slices are those in the middle of every quarter.
    slices = [images.read_image(patients / "ward" / "anna" / f"{i + 5}.png", 3, size=8) for i in middle_slices(6, 4)]
    header = OutputFolder(out).header()
    assert header is not None
    assert header["num_slices"] == 4
    expected = images.tile_montage(torch.stack(slices)[None])[0]
    assert torch.equal(images.read_image(out / rows["ward/anna"]["image"], 3), images.saved(expected))
    done = content(out)
    assert run(checkpoint, patients, out) == explain.FAILED_ROWS
    assert content(out) == done
    images.save_image(-toy.toy_images(1)[0], patients / "ben" / "1.png")
    images.save_image(toy.toy_images(1)[0], patients / "carl" / "1.png")
    assert run(checkpoint, patients, out) == 0
    assert content(out)[rows["ben"]["image"]] != done[rows["ben"]["image"]]
    capsys.readouterr()
    assert run(checkpoint, patients / "ben", tmp_path / "other") == 2
    assert sentence(capsys).endswith(
        "holds slices itself ('1.png'): give the folder that holds one folder for each patient."
    )


def test_another_checkpoint_or_option_is_refused(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    assert run(checkpoint, photos, out, "--limit", "2") == 0
    finished = content(out)
    capsys.readouterr()
    assert run(checkpoint, photos, out, "--target", "stripe 1") == 2
    assert "made otherwise (target was 'None' and is now 'stripe 1')" in sentence(capsys)
    other = toy.toy_checkpoint(tmp_path / "other.ckpt", num_classes=2)
    assert run(other, photos, out) == 2
    assert "checkpoint_sha256 was" in sentence(capsys)
    shutil.copytree(photos, tmp_path / "photos2")
    assert run(checkpoint, tmp_path / "photos2", out) == 2
    assert "input was" in sentence(capsys)
    assert content(out) == finished
    assert run(other, photos, out, "--overwrite", "--limit", "1") == 0
    assert list(table(out)) == ["a/0.png"]
    assert not (out / "images" / "a" / "2.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "zebra"], "--target 'zebra' is not a class of this classifier: choose from stripe 0, stripe 1,"),
        (["--input", "photos/a/0.png"], "The input photos/a/0.png is a file: give the folder that holds the images."),
        (["--input", "nowhere"], "There is no input folder nowhere."),
        (["--input", "nothing"], "There is no image below nothing: give a folder that holds some."),
        (["--window", "0", "0"], "window must be a level and a positive width in the files' units"),
        (["--output", "photos/out"], "The input photos and the output photos/out lie within one another"),
        (["--output", "."], "The input photos and the output . lie within one another"),
        (["--output", "photos"], "The input photos and the output photos lie within one another"),
        (["--output", "file"], "The output file is a file: give a folder."),
        (["--output", "taken"], "The output folder taken holds manifest.csv that no run of explain.py left there"),
        (["--checkpoint", "nowhere.ckpt"], "There is no checkpoint nowhere.ckpt: give a .ckpt file"),
        (["--checkpoint", "file"], "file cannot be read as a checkpoint"),
    ],
)
def test_mistakes_are_told_in_one_sentence(
    checkpoint: Path,
    photos: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(photos.parent)
    Path("file").write_text("precious")
    Path("nothing").mkdir()
    Path("taken").mkdir()
    Path("taken/manifest.csv").write_text("precious")
    before = sorted(Path().rglob("*"))
    assert run(checkpoint, Path("photos"), Path("out"), *arguments) == 2
    assert sentence(capsys).startswith(message)
    assert sorted(Path().rglob("*")) == before


def test_a_folder_of_nothing_but_failures_is_an_error_with_a_manifest(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "photos").mkdir()
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / "photos" / name).write_bytes(b"")
    assert run(checkpoint, tmp_path / "photos", tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "None of the 3 images below" in error
    assert "'a.png' failed with: The file is empty." in error
    assert [row["status"] for row in table(tmp_path / "out").values()] == ["failed"] * 3
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_full_disk_is_told_in_one_sentence_and_finished_work_is_kept(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    save_image = images.save_image

    def full(image: Tensor, path: Path) -> str:
        if "4.png" in str(path) and path.name == "steps.png":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return save_image(image, path)

    with monkeypatch.context() as patch:
        patch.setattr(images, "save_image", full)
        assert run(checkpoint, photos, tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: No space left on device: ")
    kept = f"what is finished at --batch-size 2 is kept in {tmp_path / 'out'}, the same command again does the rest"
    assert error.endswith(f"steps.png ({kept})")
    assert (tmp_path / "out" / "manifest.0.jsonl").read_text().count('"name"') == 2
    assert run(checkpoint, photos, tmp_path / "out") == 0
    assert len(table(tmp_path / "out")) == 7


def test_other_processes_leave_the_folder_and_the_exit_code_to_the_first(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    (photos / "a" / "1.png").write_bytes(b"broken")
    assert run(checkpoint, photos, tmp_path / "out") == explain.FAILED_ROWS
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    # Lightning takes any other code for a crash and stops the first process in the middle of its report.
    assert run(checkpoint, photos, tmp_path / "out", "--overwrite") == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    assert capsys.readouterr().out == ""


def explain_hostile_folder(checkpoint: Path, folder: Path, num_files: int) -> dict[str, str]:
    """Explains a folder of hostile files and returns the reasons of those that failed."""
    good, bad = hostile.write_hostile_folder(folder / "photos", num_files)
    outside = {path for path in folder.rglob("*") if "out" not in path.relative_to(folder).parts}
    out = folder / "out"
    assert run(checkpoint, folder / "photos", out) == explain.FAILED_ROWS
    assert {path for path in folder.rglob("*") if "out" not in path.relative_to(folder).parts} == outside
    rows = {row.name: row for row in OutputFolder(out).rows()}
    assert rows.keys() == good | bad
    assert {name for name, row in rows.items() if row.status == "ok"} == good
    folders = [row.folder.lower() for row in rows.values() if row.status == "ok"]
    assert len(set(folders)) == len(folders)
    for name in good:
        for file in rows[name].files.values():
            path = out / rows[name].folder / file
            assert path.is_file()
            assert path.resolve().is_relative_to(out.resolve() / "images")
    assert len(table(out)) == len(rows)
    page = (out / "report.html").read_text()
    assert "<script>alert" not in page
    # Pictures of the global view are ours; those of names are none.
    assert set(re.findall(r"<img (.{10})", page)) <= {'src="data:', 'src="globa', 'src="image'}
    return {name: rows[name].error for name in bad}


def test_hostile_files_become_rows(checkpoint: Path, tmp_path: Path):
    reasons = explain_hostile_folder(checkpoint, tmp_path, 40)
    assert reasons["empty.png"] == "The file is empty."
    assert "too large" in reasons["bomb.png"]
    assert all(reasons.values())


def test_help_is_immediate():
    code = (
        "import sys; from cfe_lightning.cli import explain; explain.parser().format_help(); "
        "import cfe_lightning.report.page; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_memory_layout_changes_no_result(checkpoint: Path, photos: Path, tmp_path: Path):
    assert run(checkpoint, photos, tmp_path / "plain") == 0
    assert run(checkpoint, photos, tmp_path / "channels_last", "--channels-last") == 0
    assert content(tmp_path / "channels_last") == content(tmp_path / "plain")


def test_what_cannot_be_compiled_is_told(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(checkpoint, photos, tmp_path / "out", "--compile") == 2
    assert "FixedToyExplainer names no blocks that could be compiled" in capsys.readouterr().err
