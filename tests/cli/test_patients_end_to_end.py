"""Four slices per patient from a CSV to explanations: the published configs, made small, through the real commands."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

from cfe_lightning import images
from cfe_lightning.cli import explain
from cfe_lightning.cli.train import main as train

CONFIGS = Path(__file__).parents[2] / "configs"
SIZE = 32  # DenseNet-121 halves five times

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def write_patients(root: Path, count: int = 24) -> None:
    """Patients of five slices; those with a finding have a bright corner in all of them."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for patient in range(count):
        split = "test" if patient >= count - 4 else "val" if patient >= count - 8 else "train"
        for number in range(5):
            slice_ = torch.rand(1, SIZE, SIZE, generator=generator) - 1
            slice_[:, 4:9, 4:9] += patient % 2
            name = f"{split}/p{patient:02d}/{number}.png"
            images.save_image(slice_, root / name)
            rows.append((f"p{patient:02d}", name, "finding" if patient % 2 else "healthy", split))
    with (root / "slices.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("patient", "path", "label", "split"), *rows])


def run(config: str, **options: object) -> None:
    flags = [f"--{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in options.items()]
    # One epoch teaches the classifier nothing that its check would accept.
    always = ["--trainer.accelerator=cpu", "--skip-classifier-check"]
    assert train(["--config", str(CONFIGS / config), *always, *flags]) == 0


def test_patients_from_the_table_to_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("WANDB_MODE", "disabled")
    write_patients(tmp_path / "ct")
    data = {
        "data.root": "ct",
        "data.slice_size": SIZE,
        "data.window": None,
        "data.num_workers": 0,
        "data.batch_size": 4,
        "trainer.max_epochs": 1,
        "trainer.logger": False,
        "trainer.enable_progress_bar": False,
    }
    run("classifier_fld_ct.yaml", **data, **{"model.output": "classifier.pt"})
    small = {
        "model.image_size": SIZE,
        "model.width": 4,
        "model.multipliers": [1, 2],
        "model.encoder_multipliers": [1, 2],
        "model.blocks": 1,
        "model.attention_sizes": [16],
        "model.code_dim": 6,
        "model.time_dim": 8,
        "model.groups": 2,
    }
    run("diffusion_autoencoder_fld_ct.yaml", **data, **small)
    run(
        "diff_explainer_fld_ct.yaml",
        **data,
        **{
            "model.classifier.init_args.path": "classifier.pt",
            "model.autoencoder": "checkpoints/diffusion_autoencoder_fld_ct/best.ckpt",
            "model.metric": "covariance",  # nor would the calibration
            "model.diffusion_steps": 2,
            "model.num_steps": 3,
        },
    )
    arguments = ["--checkpoint", "checkpoints/diff_explainer_fld_ct/best.ckpt", "--input", "ct/test", "--output", "out"]
    assert explain.main([*arguments, "--accelerator", "cpu"]) == 0
    with Path("out/manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["p20", "p21", "p22", "p23"]
    picture = images.read_image(Path("out") / rows[0]["counterfactual"], 1)
    assert list(picture.shape) == [1, 2 * SIZE, 2 * SIZE]
    assert Path("out/report.html").is_file()
