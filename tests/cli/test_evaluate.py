"""``cfe-evaluate`` as a user runs it: files, data from YAML or folders, and one sentence for what is wrong."""

import ast
import csv
import json
import signal
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from toy import FixedToyExplainer, ToyData, save_checkpoint, toy_checkpoint, toy_classifier

from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.cli import evaluate
from cfe_lightning.evaluation import evaluate as evaluation
from cfe_lightning.evaluation.store import EvaluationStore
from cfe_lightning.images import save_image

FILES = [
    *("curves.npz", "differences.csv", "gallery.html", "groups.csv", "metrics.json", "per_image.csv"),
    *("report.html", "table.csv", "table.md"),
]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "runs/toy_run").mkdir(parents=True)
    return toy_checkpoint(tmp_path / "runs/toy_run/best.ckpt")


def write_config(path: Path, **arguments: object) -> Path:
    path.write_text(
        yaml.safe_dump(
            {"model": {"class_path": "ignored"}, "data": {"class_path": "toy.ToyData", "init_args": arguments}}
        )
    )
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "toy.yaml", num_images=10)


def run(*arguments: object) -> int:
    return evaluate.main([*map(str, arguments), "--trusted", "toy", "--device", "cpu", "--curve-steps", "2"])


def table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "table.csv").open(newline="") as stream:
        return {row["explainer"]: row for row in csv.DictReader(stream)}


def stop_after_two(monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGINT) -> list[object]:
    """A signal once two batches are kept; returns the names of all batches that are kept from now on."""
    add, calls = EvaluationStore.add, list[object]()

    def stopping(self: EvaluationStore, state: dict[str, object]) -> None:
        add(self, state)
        calls.append(state["names"])
        if len(calls) == 2:
            signal.raise_signal(number)

    monkeypatch.setattr(EvaluationStore, "add", stopping)
    return calls


def test_config_and_baselines(
    checkpoint: Path,
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "deep/out"
    code = run(
        "--checkpoint",
        checkpoint,
        "--data",
        config,
        "--output",
        out,
        "--baselines",
        "saliency, guided_grad_cam,saliency",
    )
    printed = capsys.readouterr().out
    assert code == 0
    assert sorted(path.name for path in out.iterdir()) == FILES
    rows = table(out)
    assert list(rows) == ["toy_run", "saliency", "guided_grad_cam"]
    assert rows["toy_run"]["flip_rate"] == "1.0"
    assert rows["toy_run"]["l1_n"] == "10"
    assert rows["saliency"]["flip_rate"] == ""
    assert float(rows["saliency"]["dxai_auc_label"]) > float(rows["toy_run"]["dxai_auc_label"])
    # A baseline that cannot explain this classifier keeps an empty row and a reason.
    assert rows["guided_grad_cam"]["dxai_auc_label"] == ""
    assert "guided_grad_cam is left out: guided_grad_cam needs nn.ReLU layers" in caplog.text
    assert "| toy_run" in printed
    assert "- AUC label (`dxai_auc_label`" in printed
    content = json.loads((out / "metrics.json").read_text())
    assert content["split"] == "test"
    assert content["data"]["class_path"] == "toy.ToyData"
    assert len(content["config_hash"]) == len(content["checkpoints"]["toy_run"]) == 64
    assert content["judged_by"] == {"toy_run": toy_classifier().fingerprint()}
    assert content["n_images"] == 10


def test_results_lie_beside_the_checkpoint_unless_asked_otherwise(
    checkpoint: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--checkpoint", checkpoint, "--data", config) == 0
    assert sorted(path.name for path in (checkpoint.parent / "evaluated").iterdir()) == FILES
    assert f"written to {checkpoint.parent / 'evaluated'}" in capsys.readouterr().out


def test_same_command_gives_the_same_files(checkpoint: Path, config: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run("--checkpoint", checkpoint, "--data", config, "--output", tmp_path / name, "--baselines", "random")
    first, second = (
        {
            key: value
            for row in table(tmp_path / name).values()
            for key, value in row.items()
            if key[:11] != "s_per_image"
        }
        for name in ("a", "b")
    )
    assert first == second


def test_class_folders_of_one_split_or_all(checkpoint: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        for index, sample in enumerate(ToyData(num_images=6).dataset("test")):  # type: ignore[arg-type]
            name = f"stripe {int(sample['label'])}"
            # Another size than the explainer's: it is read as the explainer needs it.
            picture = sample["image"].repeat_interleave(2, 1).repeat_interleave(2, 2)
            save_image(picture, tmp_path / "photos" / split / name / f"{split}{index}.png")
    assert run("--checkpoint", checkpoint, "--data", tmp_path / "photos", "--output", tmp_path / "test") == 0
    assert table(tmp_path / "test")["toy_run"]["l1_n"] == "6"
    arguments = ("--checkpoint", checkpoint, "--data", tmp_path / "photos", "--output", tmp_path / "all")
    assert run(*arguments, "--split", "all") == 0
    assert table(tmp_path / "all")["toy_run"]["l1_n"] == "12"
    assert run(*arguments, "--split", "all", "--limit", 5) == 0
    assert table(tmp_path / "all")["toy_run"]["l1_n"] == "5"


def test_two_runs_keep_two_rows_and_baselines_follow_their_classifiers(
    checkpoint: Path, config: Path, tmp_path: Path
) -> None:
    twin = tmp_path / "other/toy_run/best.ckpt"
    twin.parent.mkdir(parents=True)
    classifier = toy_classifier()
    classifier.network.fc.weight.data.mul_(0.5)
    save_checkpoint(FixedToyExplainer(classifier), twin)
    out = tmp_path / "out"
    arguments = ("--data", config, "--output", out, "--baselines", "saliency")
    assert run("--checkpoint", checkpoint, twin, *arguments) == 0
    assert list(table(out)) == [
        "toy_run/best",
        "toy_run/best (2)",
        "saliency on the classifier of toy_run/best",
        "saliency on the classifier of toy_run/best (2)",
    ]
    assert run("--checkpoint", checkpoint, checkpoint, *arguments) == 0
    assert list(table(out)) == ["toy_run/best", "toy_run/best (2)", "saliency"]


def test_a_run_named_like_a_baseline_keeps_its_row(checkpoint: Path, config: Path, tmp_path: Path) -> None:
    renamed = checkpoint.parent.rename(tmp_path / "runs/saliency") / "best.ckpt"
    out = tmp_path / "out"
    assert run("--checkpoint", renamed, "--data", config, "--output", out, "--baselines", "saliency") == 0
    assert list(table(out)) == ["saliency", "saliency (baseline)"]


def test_another_classifier_judges(checkpoint: Path, config: Path, tmp_path: Path) -> None:
    judge = toy_classifier()
    judge.network.fc.weight.data = judge.network.fc.weight.data.flip(0)
    judge.save(tmp_path / "judge.pt")
    out = tmp_path / "out"
    code = run("--checkpoint", checkpoint, "--data", config, "--output", out, "--classifier", tmp_path / "judge.pt")
    assert code == 0
    assert table(out)["toy_run"]["flip_rate"] == "0.0"
    assert json.loads((out / "metrics.json").read_text())["judged_by"] == {"toy_run": judge.fingerprint()}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--baselines", "gradcam"], "There is no baseline 'gradcam': choose from integrated_gradients"),
        (["--data", "nowhere.yaml"], "There is no config 'nowhere.yaml'"),
        (["--data", "{tmp}/nodata.yaml"], "nodata.yaml has no data section"),
        (["--data", "{tmp}/badclass.yaml"], "The data section of"),
        (["--data", "{tmp}/broken.yaml"], "is not readable as YAML"),
        (
            ["--data", "{tmp}/three.yaml"],
            "The data's classes are ['stripe 0', 'stripe 1', 'stripe 2'], the classifier's are",
        ),
        (
            ["--data", "{tmp}/large.yaml"],
            "toy_run explains images of 16 pixels and 3 channels, but the data has 24 and 3",
        ),
        (["--checkpoint", "{tmp}/none.ckpt"], "There is no checkpoint"),
        (["--checkpoint", "{tmp}/toy.yaml"], "cannot be read as a checkpoint"),
        (["--classifier", "{tmp}/none.pt"], "There is no classifier file"),
        (["--output", "{tmp}/toy.yaml"], "is a file: give a folder"),
        (["--output", "{tmp}/toy.yaml/out"], "toy.yaml is a file: give a folder"),
        (["--data", "{tmp}/runs"], "has no class folders with images"),
    ],
)
def test_errors_are_one_sentence(
    arguments: list[str],
    sentence: str,
    checkpoint: Path,
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "nodata.yaml").write_text("model: 1\n")
    (tmp_path / "broken.yaml").write_text("data: [\n")
    (tmp_path / "badclass.yaml").write_text("data: {class_path: toy.ToyNetwork}\n")
    write_config(tmp_path / "three.yaml", num_classes=3)
    write_config(tmp_path / "large.yaml", image_size=24)
    given = {"--checkpoint": str(checkpoint), "--data": str(config), "--output": str(tmp_path / "out")}
    given |= {key: value.format(tmp=tmp_path) for key, value in zip(arguments[::2], arguments[1::2], strict=True)}
    assert run(*(word for pair in given.items() for word in pair)) == 2
    printed, complained = capsys.readouterr()
    last = complained.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert sentence in last
    assert "Traceback" not in complained
    assert printed == ""
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_may_not_name_any_class(checkpoint: Path, config: Path, tmp_path: Path) -> None:
    arguments = ["--checkpoint", checkpoint, "--data", config, "--output", tmp_path / "out", "--device", "cpu"]
    assert evaluate.main([*map(str, arguments)]) == 2


def test_equal_strength_and_a_second_classifier(checkpoint: Path, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    toy_classifier().save(tmp_path / "second.pt")
    extra = ["--iso", "0.5,0.9", "--second", tmp_path / "second.pt", "--baselines", "random,lrp"]
    assert run("--checkpoint", checkpoint, "--data", config, "--output", out, *extra) == 0
    content = json.loads((out / "metrics.json").read_text())
    assert content["iso"] == [0.5, 0.9]
    assert content["second"] == toy_classifier().fingerprint()
    keys = {key for one in content["rows"] for key in one["metrics"]}
    assert {"iso_0.5_reached", "iso_0.9_l1", "transfer_flip"} <= keys
    assert len({tuple(sorted(one["metrics"])) for one in content["rows"]}) == 1
    assert "## At equal confidence (0.5)" in (out / "table.md").read_text()


def test_interrupt_says_so(
    checkpoint: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FrozenClassifier, "forward", interrupted)
    assert run("--checkpoint", checkpoint, "--data", config, "--output", tmp_path / "out") == 130
    said = f"interrupted: what is measured at --batch-size 32 is kept in {tmp_path / 'out'}, the same command again"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_too_little_memory_is_one_sentence_on_every_device(
    checkpoint: Path,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    monkeypatch.setattr(evaluation, "evaluate", Mock(side_effect=error))
    assert run("--checkpoint", checkpoint, "--data", config, "--output", tmp_path / "out") == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: Memory ran out ({error}): choose smaller batches or images, or a machine with more of it (what is "
        f"measured at --batch-size 32 is kept in {tmp_path / 'out'}, the same command again does the rest)."
    )


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--limit", "0"], ["--batch-size", "many"], ["--curve-steps", "-1"]),
        *(["--iso", "1"], ["--iso", "0.5,"], ["--iso", "half"]),
    ],
)
def test_numbers_are_checked(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--checkpoint", "a", "--data", "b", "--output", "c", *arguments])
    assert stopped.value.code == 2
    assert "must be" in capsys.readouterr().err


def test_help_names_every_baseline_and_imports_nothing_heavy(capsys: pytest.CaptureFixture[str]) -> None:
    from cfe_lightning.methods.baselines import BASELINES

    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in BASELINES)
    tree = ast.parse(Path(evaluate.__file__).read_text(encoding="utf-8"))
    imported = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    heavy = {name for name in imported if name.split(".")[0] not in sys.stdlib_module_names}
    light = "cli.bench cli.environment cli.guard evaluation.options files.arguments files.atomic"
    assert heavy == {f"cfe_lightning.{name}" for name in light.split()}


def test_a_killed_evaluation_goes_on_and_gives_the_same_files(
    checkpoint: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        "--checkpoint",
        checkpoint,
        "--data",
        config,
        "--baselines",
        "random",
        "--batch-size",
        3,
        "--iso",
        "0.9",
    )
    assert run(*arguments, "--output", tmp_path / "whole") == 0
    calls = stop_after_two(monkeypatch, signal.SIGUSR1)
    assert run(*arguments, "--output", tmp_path / "killed") == 138
    assert "the same command again does the rest" in capsys.readouterr().err
    assert not (tmp_path / "killed/table.csv").exists()
    # Another question is not answered with what is kept.
    assert run(*arguments, "--output", tmp_path / "killed", "--seed", 5) == 0
    assert len(calls) == 6
    assert run(*arguments, "--output", tmp_path / "killed") == 0
    assert len(calls) == 8
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == FILES
    for name in ("per_image.csv", "groups.csv", "gallery.html"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    whole, killed = (
        {key: cell for row in table(tmp_path / name).values() for key, cell in row.items() if key[:11] != "s_per_image"}
        for name in ("whole", "killed")
    )
    assert whole == killed


def test_extras_are_measured_and_wrong_ones_are_one_sentence(
    checkpoint: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for index, sample in enumerate(ToyData(num_images=6).dataset("test")):  # type: ignore[arg-type]
        save_image(sample["image"], tmp_path / f"held_out/{index}.png")
    (tmp_path / "held_out/broken.png").write_bytes(b"no picture")
    arguments = ("--checkpoint", checkpoint, "--data", config, "--output", out)
    more = ("--cycles", "--diversity", 2, "--sanity", "--protocol", "ace", "--fid-reference", tmp_path / "held_out")
    assert run(*arguments, *more, "--gallery", 0) == 0
    row = table(out)["toy_run"]
    for key in ("composition_10", "reversibility", "sanity_all", "fid_f", "classifier_forwards"):
        assert row[key], key
    content = json.loads((out / "metrics.json").read_text())
    assert content["protocol"] == "ace"
    assert content["rows"][0]["metrics"]["fid_f"]["population"] == "flipped"
    assert content["rows"][0]["metrics"]["lpips"]["reason"].startswith("needs a backbone: --weights lpips=FILE")
    # The toy classifier has no layers that can be watched.
    assert content["rows"][0]["metrics"]["sigma_l"]["reason"].startswith("needs a classifier whose layers can be")
    assert not (out / "gallery.html").exists()
    (tmp_path / "nothing").mkdir()
    for wrong, sentence in (
        (("--weights", f"lpips={tmp_path / 'gone.pt'}"), "There is no"),
        (("--weights", f"vgg={checkpoint}"), "vgg"),
        (("--fid-reference", tmp_path / "nothing"), "There is no readable image below"),
        (("--diversity", 1), "give at least 2, or 0 for none"),
        (("--attributes", tmp_path / "gone.csv", "--asked", "smile"), "There is no table of attributes"),
    ):
        capsys.readouterr()
        assert run(*arguments, *wrong) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert sentence in error


def test_an_interrupted_evaluation_does_not_go_on_with_other_images(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for index, sample in enumerate(ToyData(num_images=6).dataset("test")):  # type: ignore[arg-type]
        save_image(sample["image"], tmp_path / f"photos/test/stripe {int(sample['label'])}/{index}.png")
    calls = stop_after_two(monkeypatch)
    arguments = ("--checkpoint", checkpoint, "--data", tmp_path / "photos", "--batch-size", 2, "--output")
    assert run(*arguments, tmp_path / "out") == 130
    (tmp_path / "photos/test/stripe 0/0.png").rename(tmp_path / "photos/test/stripe 0/another.png")
    assert run(*arguments, tmp_path / "out") == 0
    assert len(calls) == 2 + 3
