"""train.py as two processes on the CPU: equal weights, the gradient of the union batch, shared work, one writer.

Every method is trained three times, at once (one of them in the first way only):

    ``two``    two processes, all terms, all random numbers: what users run;
    ``steady`` two processes whose batches could be one: random numbers are the same for every image (see
               ``Witness``), terms that compare the images of a batch are switched off (see ``Method.apart``);
    ``one``    one process with the batches of those two together.

In all of them every lazy term (R1, path length, averages, the search of a validation) has its turn twice at least.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import toy
import yaml
from cases import AUTOENCODER, DIFF_EXPLAINER, DXAI, IMAGE_SIZE, MIRROR, NUM_CLASSES, pooled_classifier
from torch import Tensor

from cfe_lightning.classifier import load_classifier
from cfe_lightning.cli.train import main

#: Odd, so that one process has an image more than the other; a batch of a process, and batches of an epoch.
NUM_IMAGES, BATCH, NUM_BATCHES, NUM_EPOCHS = 19, 2, 4, 2
TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method that is trained.

    Attributes:
        kind: Import path.
        arguments: Constructor arguments that make it small.
        apart: Those that switch off what looks at several images of a batch at once, by which the gradient of two
            batches is not that of their union: each process has its own minibatch deviation, masked mean, scale, ...
        steps: Optimiser steps per batch, lazy ones aside.
        explains: Whether it takes a classifier.
        own: Endings of buffers that differ between the processes: a batch norm counts the images of its own process.
        unlike: What is logged of a batch as a whole, not of each of its images.
        callbacks: Beside those of every run.
        runs: Which of the three it is trained in.
    """

    kind: str
    arguments: dict[str, Any]
    apart: dict[str, Any] = field(default_factory=dict)
    steps: int
    explains: bool = True
    own: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()
    callbacks: tuple[str, ...] = ()
    runs: tuple[str, ...] = ("two", "steady", "one")


METHODS = {
    # The mean over the selected pixels of a batch (Eq. 12) weighs images by their number of pixels.
    "Dxai": Method(
        kind="cfe_lightning.methods.dxai.Dxai",
        arguments=DXAI | {"preset": "first", "r1_interval": 2, "counterfactual_weight": 1.0},
        apart={"masked_weight": 0.0},
        steps=2,
        unlike=("train/masked",),
    ),
    # The critic is the classifier, too, which freezes it. Gradients of two parts are exchanged together.
    "Dxai-joint": Method(
        kind="cfe_lightning.methods.dxai.Dxai",
        arguments=DXAI | {"preset": "joint_d", "micro_batches": 2},
        steps=2,
        callbacks=("cfe_lightning.compute.acceleration.RecomputeActivations",),
        runs=("two",),
    ),
    # Maps are compared in units of the batch's mean square. The critic's minibatch deviation is off by ``steady``.
    # Slow, because rounding decides on which side of a kink (L1 of latents) something lies, and would grow from there.
    "StylEx": Method(
        kind="cfe_lightning.methods.stylex.StylEx",
        arguments=toy.STYLEX,
        apart={"perceptual_weight": 0.0, "learning_rate": 2e-4},
        steps=4,
    ),
    # Batch norm; features in units of the batch's mean length; reference images are taken from the batch.
    "MirrorCFE": Method(
        kind="cfe_lightning.methods.mirror_cfe.MirrorCFE",
        arguments=MIRROR | {"norm": "batch"},
        apart={"norm": "group", "feature_weight": 0.0, "triangulation_weight": 0.0},
        steps=2,
        own=("running_mean", "running_var"),
        unlike=("train/feature", "train/triangulation"),
    ),
    # The first batch of a validation alone is reconstructed.
    "DiffusionAutoencoder": Method(
        kind="cfe_lightning.methods.diff_explainer.DiffusionAutoencoder",
        arguments=AUTOENCODER | {"dropout": 0.1, "validation_steps": 2},
        apart={"dropout": 0.0},
        steps=1,
        explains=False,
        unlike=("val/code_spread",),
    ),
    # Nothing is learnt by gradients: the fit sees all images, whatever process has encoded them.
    "DiffExplainer": Method(
        kind="cfe_lightning.methods.diff_explainer.DiffExplainer", arguments=DIFF_EXPLAINER, steps=1
    ),
    # Batch norm.
    "ClassifierTraining": Method(
        kind="cfe_lightning.classifier.training.ClassifierTraining",
        arguments={"output": "trained.pt", "architecture": "pooled", "noise": 0.1},
        apart={"architecture": "simple"},
        steps=1,
        explains=False,
        own=("running_mean", "running_var"),
    ),
}


def write_run(folder: Path, name: str, run: str) -> forked.Run:
    """Prepares the folder of one run of a method."""
    method = METHODS[name]
    grid = {"class_path": "cfe_lightning.training.SampleGrid", "init_args": {"every_n_batches": 4}}
    folder.mkdir(parents=True)
    arguments = method.arguments | ({} if run == "two" else method.apart)
    if method.explains:
        pooled_classifier().save(folder / "classifier.pt")
        loader = {"class_path": "cfe_lightning.classifier.load_classifier", "init_args": {"path": "classifier.pt"}}
        arguments = {"classifier": loader} | arguments
    data = {"num_images": NUM_IMAGES, "num_classes": NUM_CLASSES, "image_size": IMAGE_SIZE}
    data["batch_size"] = 2 * BATCH if run == "one" else BATCH
    config = {
        "model": {"class_path": method.kind, "init_args": arguments},
        "data": {"class_path": "toy.ToyData", "init_args": data},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1 if run == "one" else 2,
            "max_epochs": NUM_EPOCHS,
            "limit_train_batches": NUM_BATCHES,
            "logger": False,
            "log_every_n_steps": 1,
            "callbacks": [
                {"class_path": "cfe_lightning.training.EMA", "init_args": {"decay": 0.9}},
                *([grid] if name != "ClassifierTraining" else []),
                *({"class_path": path} for path in method.callbacks),
                {"class_path": "witness.Witness", "init_args": {"folder": "seen", "steady": run != "two"}},
            ],
        },
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(config))
    command = ["--config", "toy.yaml", "--trusted", "toy", "--trusted", "witness", "--skip-classifier-check"]
    return forked.Run(folder=str(folder), devices=1 if run == "one" else 2, arguments=command)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the three runs of every method, each in ``<method>/<run>``."""
    root = tmp_path_factory.mktemp("processes")
    groups = [[write_run(root / name / run, name, run) for run in METHODS[name].runs] for name in METHODS]
    forked.execute("cfe_lightning.cli.train", groups)
    return root


def witnessed(folder: Path, rank: int) -> dict[str, Any]:
    """What one process saw."""
    path = folder / "seen" / f"{rank}.pt"
    assert path.exists(), (folder / f"{rank}.log").read_text()[-3000:]
    return torch.load(path)


def assert_near(mine: dict[str, Tensor], other: dict[str, Tensor], what: str) -> None:
    """Every tensor differs by at most the tolerance, relative to its own norm, or to a thousandth of the largest."""
    assert mine.keys() == other.keys()
    assert mine, what
    largest = max(float(value.double().norm()) for value in other.values())
    for name, value in mine.items():
        scale = max(float(other[name].double().norm()), 1e-3 * largest)
        error = float((value.double() - other[name].double()).norm())
        assert error <= TOLERANCE * scale, f"{what}, {name}: {error:.2e} of {scale:.2e}"


each_method = pytest.mark.parametrize("name", [name for name, method in METHODS.items() if "one" in method.runs])
each_pair = pytest.mark.parametrize(
    ("name", "run"), [(name, run) for name, method in METHODS.items() for run in method.runs if run != "one"]
)


@each_pair
def test_the_processes_hold_the_same_weights(name: str, run: str, trained: Path) -> None:
    first, second = (witnessed(trained / name / run, rank) for rank in (0, 1))
    for kind in ("state", "averaged"):
        assert first[kind].keys() == second[kind].keys()
        differing = {key for key, value in first[kind].items() if not value.equal(second[kind][key])}
        assert all(key.endswith(METHODS[name].own) for key in differing)
        if run == "two":
            assert bool(differing) == bool(METHODS[name].own)


@each_pair
def test_the_processes_measure_the_same_network(name: str, run: str, trained: Path) -> None:
    """The statistics of batch norms included, which each has from its own images until then."""
    first, second = (witnessed(trained / name / run, rank)["measured"] for rank in (0, 1))
    assert first.keys() == second.keys()
    assert [key for key, value in first.items() if not value.equal(second[key])] == []


@each_pair
def test_every_step_follows_the_mean_gradient_of_the_processes(name: str, run: str, trained: Path) -> None:
    """All terms and the statistics that each process has of its own batch included."""
    first, second = (witnessed(trained / name / run, rank)["gradients"] for rank in (0, 1))
    assert len(first) == len(second) == min(24, METHODS[name].steps * NUM_BATCHES * NUM_EPOCHS)
    for step, (mine, other) in enumerate(zip(first, second, strict=True)):
        assert mine["parameters"] == other["parameters"]
        assert mine["seen"].keys() == other["seen"].keys() == mine["local"].keys()
        assert all(value.equal(other["seen"][key]) for key, value in mine["seen"].items())
        mean = {key: (value + other["local"][key]) / 2 for key, value in mine["local"].items()}
        if mean:
            assert_near(mine["seen"], mean, f"step {step}")


@each_method
def test_the_gradient_is_that_of_one_process_on_the_union_batch(name: str, trained: Path) -> None:
    together, alone = (witnessed(trained / name / run, 0)["gradients"] for run in ("steady", "one"))
    assert len(together) == len(alone)
    # Of two batches, the first with all lazy terms: later ones start from weights that rounding has moved.
    steps = 2 * METHODS[name].steps
    for step, (mine, other) in enumerate(zip(together[:steps], alone[:steps], strict=True)):
        assert mine["parameters"] == other["parameters"]
        if mine["seen"] or other["seen"]:
            assert_near(mine["seen"], other["seen"], f"step {step}")


@each_method
def test_weights_and_their_average_are_those_of_one_process(name: str, trained: Path) -> None:
    together, alone = (witnessed(trained / name / run, 0) for run in ("steady", "one"))
    for kind in ("state", "averaged"):
        assert_near(*({key: value.double() for key, value in one[kind].items()} for one in (together, alone)), kind)


@each_method
def test_what_is_logged_is_the_mean_over_all_images(name: str, trained: Path) -> None:
    first, second = (witnessed(trained / name / "steady", rank) for rank in (0, 1))
    alone = witnessed(trained / name / "one", 0)
    assert len(first["val"]) == NUM_EPOCHS
    for kind in ("train", "val"):
        assert first[kind] == second[kind]
        for mine, other in zip(first[kind], alone[kind], strict=True):
            assert mine.keys() == other.keys()
            assert mine
            compared = mine.keys() - {*METHODS[name].unlike}
            assert {key: mine[key] for key in compared} == pytest.approx(
                {key: other[key] for key in compared}, rel=TOLERANCE, abs=1e-5
            )


@each_method
def test_only_the_first_process_writes(name: str, trained: Path) -> None:
    folder = trained / name / "two"
    first, second = (witnessed(folder, rank) for rank in (0, 1))
    assert second["written"] == {}
    pictures = {path: count for path, count in first["written"].items() if "samples" in path}
    assert set(pictures.values()) <= {1}
    saved = torch.load(folder / "checkpoints" / "toy" / "last.ckpt", weights_only=True)
    assert len(saved["callbacks"]["RandomState"]["processes"]) == 2
    # The best by what all processes have measured.
    monitored = [state for key, state in saved["callbacks"].items() if key.startswith("ModelCheckpoint")]
    assert float(monitored[0]["best_model_score"]) == pytest.approx(min(one["val/loss"] for one in second["val"]))


def test_the_command_starts_its_processes_itself(tmp_path: Path) -> None:
    toy.toy_classifier().save(tmp_path / "classifier.pt")
    load = {"path": "classifier.pt", "trusted": ["toy"]}
    classifier = {"class_path": "cfe_lightning.classifier.load_classifier", "init_args": load}
    config = {
        "model": {"class_path": "toy.ToyExplainer", "init_args": {"classifier": classifier}},
        "data": {"class_path": "toy.ToyData", "init_args": {"num_images": 16, "batch_size": 2}},
        "trainer": {
            "max_epochs": 1,
            "logger": False,
            "callbacks": [
                {"class_path": "cfe_lightning.training.EMA", "init_args": {"decay": 0.9}},
                {
                    "class_path": "cfe_lightning.training.SampleGrid",
                    "init_args": {"every_n_batches": 2, "num_images": 2},
                },
                {"class_path": "witness.Witness", "init_args": {"folder": "seen"}},
            ],
        },
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(config))
    command = [
        *(sys.executable, str(forked.CHECKOUT / "train.py"), "--config", "toy.yaml", "--trusted", "toy"),
        *("--trusted", "witness", "--trainer.accelerator", "cpu", "--trainer.devices", "2"),
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env=forked.environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / "seen" / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["weights"] == second["weights"]
    assert first["weights"]["class_images"] != 0
    fingerprint = load_classifier(str(tmp_path / "classifier.pt"), ["toy"]).fingerprint()
    assert first["classifier"] == second["classifier"] == fingerprint
    # Half of the images each, none twice, and random numbers of their own.
    assert len(first["names"]) == len(second["names"]) == 8
    assert len({*first["names"], *second["names"]}) == 16
    assert first["draws"][0] != second["draws"][0]
    written = sorted(path.name for path in (tmp_path / "checkpoints" / "toy").rglob("*") if path.is_file())
    assert written == [
        "00000000.png",
        "00000002.png",
        "00000004.png",
        "best.ckpt",
        "config.yaml",
        "last.ckpt",
        "metrics.csv",
    ]


def test_more_processes_than_the_run_is_configured_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_run(tmp_path / "run", "Dxai", "one")
    monkeypatch.chdir(tmp_path / "run")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--config", "toy.yaml", "--trusted", "toy", "--trusted", "witness"]) == 2
    assert "torchrun or srun has started 2 processes, but the run is configured for 1" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()
