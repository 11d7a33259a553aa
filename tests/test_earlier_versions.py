"""Files of version 0.1.0 stay loadable, resumable and verifiable; ``data/version_0_1_0.tar.xz`` holds some of them.

The archive has one small training run per method (last checkpoint and config, ``metrics_of_two_epochs.csv`` of the run
straight on), a classifier file, four images, two output folders of ``explain.py``, and version 0.1.0's explanations of
the four images (``expected.pt``); ``made_by.py`` in it wrote them.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cfe_lightning import images, load_classifier, load_explainer
from cfe_lightning.cli import explain, train
from cfe_lightning.files.trust import present_path

ARCHIVE = Path(__file__).parent / "data" / "version_0_1_0.tar.xz"
METHODS = ("dxai", "stylex", "mirror_cfe", "diff_explainer", "steerable_lens")
TRAINED = ("dxai", "stylex", "mirror_cfe", "diff_explainer", "diffusion_autoencoder")
#: Another processor rounds otherwise; a search that stops at another step would differ by far more.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files, in the folder that the configs name them from."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path / "version_0_1_0")
    return tmp_path / "version_0_1_0"


def checkpoint(root: Path, name: str) -> Path:
    (path,) = (root / "runs" / name).glob("*.ckpt")
    return path


def photos(root: Path) -> Tensor:
    names = images.find_images(root / "photos")
    return torch.stack([images.read_image(root / "photos" / name, 3) for name in names])


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_explains_as_it_did(kept: Path, name: str) -> None:
    expected = torch.load(kept / "expected.pt", weights_only=True)[name]
    torch.manual_seed(0)
    explanation = load_explainer(checkpoint(kept, name)).explain(photos(kept))
    assert explanation.counterfactual is not None
    assert explanation.counterfactual_logits is not None
    torch.testing.assert_close(
        explanation.counterfactual_logits.detach(), expected["counterfactual_logits"], **TOLERANCE
    )
    levels = images.to_uint8(explanation.counterfactual).int()
    assert (levels - expected["counterfactual"].int()).abs().max() <= 1
    strength = explanation.attribution.detach().mean(dim=(1, 2, 3))
    torch.testing.assert_close(strength, expected["attribution"], **TOLERANCE)


@pytest.mark.parametrize("name", TRAINED)
def test_a_run_is_resumed_with_its_config(kept: Path, name: str) -> None:
    run = kept / "runs" / name
    more = ["--model.autoencoder", "runs/diffusion_autoencoder/last.ckpt"] if name == "diff_explainer" else []
    assert train.main(["--resume", str(run / "last.ckpt"), "--trainer.max_epochs", "2", *more]) == 0
    measured, expected = (_rows(run / file) for file in ("metrics.csv", "metrics_of_two_epochs.csv"))
    assert [row["epoch"] for row in measured] == ["0", "1"]
    for key, value in expected[-1].items():
        assert float(measured[-1][key]) == pytest.approx(float(value), rel=0.02, abs=0.02), key


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("val/loss")]


def test_a_run_with_nothing_to_train_is_made_again_with_its_config(kept: Path, tmp_path: Path) -> None:
    config = kept / "runs" / "steerable_lens" / "config.yaml"
    assert train.main(["--config", str(config), "--output", str(tmp_path), "--run", "lens"]) == 0
    assert load_explainer(tmp_path / "lens" / "best.ckpt").explain(photos(kept)).counterfactual is not None


def test_a_classifier_file_decides_as_it_did(kept: Path) -> None:
    rows = [row for row in _manifest(kept / "explained" / "dxai") if "name" in row]
    classifier = load_classifier(kept / "classifier.pt")
    with torch.no_grad():
        probabilities = classifier(photos(kept)).softmax(dim=1)
    assert [row["predicted"] for row in rows] == [classifier.class_names[k] for k in probabilities.argmax(dim=1)]
    expected = torch.tensor([row["p_predicted_before"] for row in rows])
    torch.testing.assert_close(probabilities.amax(dim=1), expected, **TOLERANCE)


def _manifest(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("folder", "who"),
    [
        ("dxai", ["--checkpoint", "runs/dxai/last.ckpt"]),
        ("untrained_integrated_gradients", ["--method", "integrated_gradients", "--classifier", "classifier.pt"]),
    ],
)
def test_an_output_folder_goes_on(kept: Path, folder: str, who: list[str]) -> None:
    output = kept / "explained" / folder
    header, *lines = _manifest(output)
    # The photos lie elsewhere now, and an archive does not keep their times to the nanosecond.
    lines_before = [row for row in lines if "name" in row]
    for row in lines_before:
        os.utime(kept / "photos" / row["name"], ns=(row["source"][1], row["source"][1]))
    content = [header | {"input": str((kept / "photos").resolve())}, *lines]
    (output / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content), encoding="utf-8")
    assert explain.main([*who, "--input", "photos", "--output", str(output), "--accelerator", "cpu"]) == 0
    assert [row for row in _manifest(output) if "name" in row] == lines_before, "no image is explained again"
    assert (output / "report.html").is_file()
    if folder == "dxai":
        assert explain.main(["--verify", str(output), *who]) == 0


#: Classes and functions that checkpoints, classifier files and configs of version 0.1.0 could name, by module.
NAMED = """
acceleration: ChannelsLast CompileBlocks RecomputeActivations
baselines: Baseline
callbacks: EMA FreshMetrics NonFiniteGuard SampleGrid Throughput WandbRun
checkpointing: AtomicCheckpointIO LastCheckpoint RandomState
classifier: load_classifier
classifier_sources: exported_classifier torchvision_classifier wrap_classifier
classifier_training: ClassifierTraining
csv_log: CsvLog
methods.diffusion_autoencoder: DiffusionAutoencoder
networks.classifiers: DenseNet121 PooledCnn ResNet18 SimpleCnn SliceStack
networks.discriminators: ResidualCritic
networks.exported: ExportedNetwork
"""


@pytest.mark.parametrize("line", NAMED.strip().splitlines())
def test_what_files_could_name_is_found_today(line: str) -> None:
    earlier, _, names = line.partition(": ")
    for each in names.split():
        module, _, name = present_path(f"cfe_lightning.{earlier}.{each}").rpartition(".")
        assert getattr(importlib.import_module(module), name).__name__ == each
