"""``cfe-evaluate --bench`` as a user runs it: files, nothing done twice, and one sentence for what is wrong."""

from __future__ import annotations

import ast
import csv
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from cfe_lightning.cli import bench, bench_cell, evaluate, train
from cfe_lightning.cli.bench import _method
from cfe_lightning.evaluation.known_cause import Cell
from cfe_lightning.evaluation.options import EvaluateOptions
from cfe_lightning.files.arguments import options_of
from cfe_lightning.files.text import VERSION
from cfe_lightning.methods.steerable_lens import SteerableLens

SMALL = ("--cues", "lesion", "--cue-sizes", "1.4", "--shortcuts", "0,1", "--budget", "0.03", "--limit", "4")


def run(*arguments: object) -> int:
    return evaluate.main(["--bench", "synthetic", "--device", "cpu", *map(str, arguments)])


def rows(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (folder / "known_cause.csv").open(newline="") as stream:
        return {(row["cell"], row["explainer"]): row for row in csv.DictReader(stream)}


def test_files_and_nothing_done_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (*SMALL, "--output", tmp_path, "--methods", "steerable_lens", "--baselines", "random")
    assert run(*arguments) == 0
    printed = capsys.readouterr()
    assert "| steerable_lens" in printed.out
    assert f"written to {tmp_path}" in printed.out
    assert "[2/2] lesion_1.4_p1: classifier trained in" in printed.err
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"bench.json", "cells", "known_cause.csv", "known_cause.html", "known_cause.json", "known_cause.md"}
    cell = tmp_path / "cells/lesion_1.4_p0"
    assert {"classifier.pt", "random.json", "random.png", "steerable_lens.json", "truth.png"} < {
        path.name for path in cell.iterdir()
    }
    found = rows(tmp_path)
    assert list(found) == [(f"lesion_1.4_p{p}", name) for p in (0, 1) for name in ("steerable_lens", "random")]
    assert float(found["lesion_1.4_p1", "steerable_lens"]["alarm"]) >= 0
    assert float(found["lesion_1.4_p0", "random"]["alarm"]) == pytest.approx(1, abs=0.4)
    content = json.loads((tmp_path / "known_cause.json").read_text())
    assert (content["budget"], content["limit"], content["seed"]) == (0.03, 4, 0)
    # A place of marks covers two squares of 3 x 3 pixels.
    assert content["chance"] == pytest.approx(18 / 1024)
    page = (tmp_path / "known_cause.html").read_text()
    assert page.count("data:image/png;base64,") == 6

    # Again: neither training nor explaining, and the same numbers.
    def refuse(*_: Any) -> int:
        raise AssertionError("this was done before")

    with monkeypatch.context() as patch:
        patch.setattr(train, "main", refuse)
        patch.setattr(SteerableLens, "explain", refuse)
        assert run(*arguments) == 0
        assert "explained" not in capsys.readouterr().err
        assert rows(tmp_path) == found
        # Another number of images is measured anew, with the classifiers that are there.
        patch.undo()
        patch.setattr(train, "main", refuse)
        assert run(*arguments, "--limit", "6") == 0
        assert rows(tmp_path)["lesion_1.4_p0", "random"]["n"] == "6"
        # And so is another number of images at a time.
        capsys.readouterr()
        assert run(*arguments, "--limit", "6", "--batch-size", "4") == 0
        assert "lesion_1.4_p0: random explained in" in capsys.readouterr().err

    # Another seed would replace what is there.
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run(*arguments, "--seed", "1", "--budget", "2") == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path} holds a bench with --budget 0.03 and --seed 0, and --budget 2.0 and --seed 1 was asked "
        "for, which would replace its trainings: give another --output.\n"
    )
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    # What another version has trained is trained again.
    with monkeypatch.context() as patch:
        patch.setattr(bench_cell, "VERSION", f"{VERSION}.after")
        patch.setattr(train, "main", refuse)
        assert run(*arguments) == 1
        assert "AssertionError: this was done before" in capsys.readouterr().err


def test_an_interrupted_training_is_done_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (*SMALL, "--output", tmp_path, "--methods", "", "--baselines", "random")
    with monkeypatch.context() as patch:
        patch.setattr(train, "main", lambda _: 130)
        assert run(*arguments) == 130
    said = capsys.readouterr().err
    assert said.strip() == (
        f"interrupted: what is measured at --batch-size 32 is kept in {tmp_path}, the same command again does the rest"
    )
    assert not list(tmp_path.rglob("trained.json"))


def test_a_method_that_cannot_be_trained_is_left_out_and_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = train.main

    def fails(arguments: list[str]) -> int:
        if "dxai" not in arguments[arguments.index("--run") + 1]:
            return real(arguments)
        train.sys.stderr.write("much talk\nerror: the loss is not finite\n")
        return 1

    monkeypatch.setattr(train, "main", fails)
    options = (*SMALL, "--shortcuts", "0", "--output", tmp_path, "--methods", "dxai", "--baselines", "random")
    for _ in range(2):
        assert run(*options) == 0
        said = capsys.readouterr().err
        assert "dxai is left out: dxai of lesion_1.4_p0 could not be trained: the loss is not finite\n" in said
    assert rows(tmp_path)["lesion_1.4_p0", "dxai"]["failure"].endswith("the loss is not finite")
    assert rows(tmp_path)["lesion_1.4_p0", "random"]["n"] == "4"


def test_methods_are_found_by_config_or_module() -> None:
    assert _method("mirror").config == _method("mirror_cfe").config
    assert not _method("steerable_lens").needs_training
    base = _method("diff_explainer").autoencoder
    assert base is not None
    assert base.name == "diffusion_autoencoder_synthetic.yaml"


def bench_cell_in(folder: Path, *arguments: str) -> bench_cell.BenchCell:
    """A cell whose classifier nobody has trained."""
    cell = object.__new__(bench_cell.BenchCell)
    given = evaluate.parser().parse_args(["--bench", "synthetic", "--output", str(folder), *arguments])
    cell.options = options_of(EvaluateOptions, given)
    cell.cell, cell.device, cell.folder, cell.title = (
        Cell(cue="lesion", cue_size=1.0, p=1.0),
        torch.device("cpu"),
        folder,
        "x",
    )
    return cell


def test_another_autoencoder_trains_what_stands_on_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []

    def trains(arguments: list[str]) -> int:
        trained.append(arguments[arguments.index("--run") + 1])
        (tmp_path / "runs" / trained[-1]).mkdir(parents=True, exist_ok=True)
        return 0

    monkeypatch.setattr(train, "main", trains)
    monkeypatch.setattr("cfe_lightning.explainer.load_explainer", lambda path: torch.nn.Identity())
    cell = bench_cell_in(tmp_path)
    cell.classifier = SimpleNamespace(fingerprint=lambda: "aa")  # type: ignore[assignment]
    configs = {name: tmp_path / f"{name}.yaml" for name in ("agent", "base")}
    for path in configs.values():
        path.write_text("data: {}\n")
    method = bench_cell.BenchMethod(
        name="agent",
        config=configs["agent"],
        class_path="x.y.Z",
        arguments={},
        needs_training=True,
        autoencoder=configs["base"],
    )
    cell.method(method)
    cell.method(method)
    assert trained == ["autoencoder", "agent"]
    configs["base"].write_text("data: {}\nmodel: {}\n")
    cell.method(method)
    assert trained == ["autoencoder", "agent"] * 2


def test_the_use_of_the_mark_is_measured_a_batch_at_a_time(tmp_path: Path) -> None:
    seen: list[int] = []

    def judge(image: torch.Tensor) -> torch.Tensor:
        seen.append(len(image))
        value = image[:, :, 2, 2].mean(dim=1)
        return torch.stack([4 * value, -4 * value], dim=1)

    found = {}
    for size in ("4", "32"):
        cell = bench_cell_in(tmp_path, "--limit", "10", "--batch-size", size)
        cell.shapes = bench_cell.shapes_of(cell.cell, cell.options)
        cell.batch, cell.classifier = cell._batch(), judge  # type: ignore[assignment]
        found[size] = cell.use()
    assert seen == [4, 4, 4, 4, 2, 2, 10, 10]
    assert torch.equal(found["4"].probability, found["32"].probability)
    assert torch.equal(found["4"].decision, found["32"].decision)
    assert torch.equal(found["4"].correct, found["32"].correct)
    assert found["4"].cell == cell.cell


def test_too_little_memory_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench, "_cells", fails)
    assert run("--output", tmp_path) == 2
    assert capsys.readouterr().err == (
        "error: Memory ran out (CUDA out of memory): choose smaller batches or images, or a machine with more of it "
        f"(what is measured at --batch-size 32 is kept in {tmp_path}, the same command again does the rest).\n"
    )
    monkeypatch.undo()
    monkeypatch.setattr(train, "_train", fails)
    assert run("--output", tmp_path, *SMALL) == 2
    assert capsys.readouterr().err.startswith(
        "error: classifier of lesion_1.4_p0 could not be trained: Memory ran out (CUDA out of memory): choose smaller "
    )


def test_budget_multiplies_what_a_config_asks_for(tmp_path: Path) -> None:
    given = evaluate.parser().parse_args(["--bench", "synthetic", "--output", str(tmp_path), "--budget", "0.5"])
    options = options_of(EvaluateOptions, given)
    cell = object.__new__(bench_cell.BenchCell)
    cell.cell, cell.options = Cell(cue="colour", cue_size=0.7, p=0.5), options
    cell.device = torch.device("cuda")
    words = cell._data_overrides(_method("mirror_cfe").config)
    found = dict(zip(words[::2], words[1::2], strict=True))
    # 1200 iterations of 32 images in the config.
    assert found["--data.num_train"] == str(round(1200 * 32 / 3 * 0.5))
    assert found["--data.shortcut"] == "0.75"
    assert found["--data.cue_agreement"] == "0.95"
    assert found["--trainer.accelerator"] == "gpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cues", "lesion,shape"), "There is no cue 'shape': choose from lesion, colour, texture."),
        (("--shortcuts", "0,1.5"), "--shortcuts are probabilities from 0 to 1, got 1.5."),
        (("--cue-sizes", "3"), "cue_size must be from 0.5 to 1.6, got 3.0."),
        (("--cue-agreement", "2"), "cue_agreement is a probability from 0 to 1, got 2.0."),
        (("--budget", "0"), "--budget multiplies the length of trainings and must be above 0, got 0."),
        (("--methods", "dxia"), "There is no method 'dxia' for the bench: choose from "),
        (("--methods", "diffusion_autoencoder"), "There is no method 'diffusion_autoencoder' for the bench"),
        (("--baselines", "nothing"), "There is no baseline 'nothing': choose from "),
        (("--methods", ""), "There is nothing to measure: name at least one of --methods and --baselines."),
        (("--limit", "1"), "at least one test image of each class: give --limit 2, not 1."),
        (("--iso", "0.9", "--fid-reference", "x"), "--bench does not take --iso and --fid-reference: leave it out."),
        (("--num-workers", "2", "--trusted", "x"), "--bench does not take --num-workers and --trusted: leave it out."),
        (("--checkpoint", "best.ckpt"), "leave out --checkpoint and --data."),
    ],
)
def test_one_sentence(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--output", tmp_path / "out", *arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", [bench, bench_cell])
def test_help_loads_nothing_heavy(module: ModuleType) -> None:
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    imported = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    heavy = {name for name in imported if name.split(".")[0] not in sys.stdlib_module_names}
    light = "cli cli.bench_cell compute.signals evaluation.options files.atomic files.text training"
    assert heavy <= {f"cfe_lightning.{name}" for name in light.split()}


def test_without_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    assert "--bench keeps its trainings and results in a folder: add --output DIR." in capsys.readouterr().err


def test_without_a_bench_checkpoints_and_data_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--data", "somewhere"]) == 2
    expected = "There is nothing to measure: give --checkpoint FILE and --data CONFIG|FOLDER, or --bench."
    assert expected in capsys.readouterr().err


def test_without_a_bench_its_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--checkpoint", "x.ckpt", "--data", "x", "--cue-sizes", "1", "--budget", "2"]) == 2
    expected = "error: Only the bench takes --cue-sizes and --budget: add --bench synthetic, or leave it out.\n"
    assert capsys.readouterr().err == expected


def test_the_help_names_what_the_bench_takes(capsys: pytest.CaptureFixture[str]) -> None:
    said = " ".join(evaluate.parser().format_help().split())
    assert "(with --output, --baselines, --limit, --seed, --device, --batch-size)" in said
    assert "on --limit images, 64 by default" in said
