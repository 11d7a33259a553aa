"""Mirror-CFE, which looks inside its classifier, on classifiers that are not ours: named in YAML and nowhere else."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cases import MIRROR
from toy import toy_images

from cfe_lightning import images
from cfe_lightning.cli import explain, train
from cfe_lightning.explainer import load_explainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

_OWN = """
import torch
from torch import nn

class TheirNet(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU())
        self.late = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.decide = nn.Linear(2 * width, 2)

    def forward(self, image):
        return self.decide(torch.relu(self.late(self.early(image))).mean(dim=(2, 3)))
"""


def their_network() -> dict[str, Any]:
    """Writes a class and its weights into two files of a user."""
    Path("their_package.py").write_text(_OWN)
    from their_package import TheirNet  # type: ignore[import-not-found]

    torch.save(TheirNet(4).state_dict(), "theirs.pth")
    arguments = {
        "class_path": "their_package.TheirNet",
        "init_args": {"width": 4},
        "state_dict_path": "theirs.pth",
        "class_names": ["a", "b"],
        "image_size": 64,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2],
    }
    return {"class_path": "cfe_lightning.classifier.wrap_classifier", "init_args": arguments}


def torchvision_network() -> dict[str, Any]:
    arguments = {"name": "resnet18", "class_names": ["a", "b"], "image_size": 64}
    return {"class_path": "cfe_lightning.classifier.torchvision_classifier", "init_args": arguments}


@pytest.mark.parametrize("classifier", [torchvision_network, their_network])
def test_a_classifier_named_in_yaml_alone(
    classifier: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.syspath_prepend(str(tmp_path))
    for index, image in enumerate(toy_images(24, 3, image_size=64)):
        images.save_image(image, tmp_path / "photos" / "ab"[index % 2] / f"{index}.png")

    # Train.
    config = {
        "model": {
            "class_path": "cfe_lightning.methods.mirror_cfe.MirrorCFE",
            "init_args": {**MIRROR, "classifier": classifier(), "num_steps": 3},
        },
        "data": {
            "class_path": "cfe_lightning.data.folder.ImageFolder",
            "init_args": {"root": "photos", "image_size": 64, "batch_size": 4},
        },
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False},
    }
    Path("own.yaml").write_text(yaml.safe_dump(config))
    trusted = ["--trusted", "their_package"]
    assert train.main(["--config", "own.yaml", "--skip-classifier-check", *trusted]) == 0
    checkpoint = "checkpoints/own/last.ckpt"
    explainer = load_explainer(checkpoint, ["their_package"])
    assert explainer.classifier.class_names == ("a", "b")
    assert explainer.classifier.spec.feature_map in ("layer4", "late")

    # Explain.
    arguments = ["--checkpoint", checkpoint, "--input", "photos", "--output", "out", "--limit", "3", *trusted]
    arguments += ["--accelerator", "cpu"]
    assert explain.main([*arguments, "--animation", "gif"]) == 0
    assert len(list(Path("out").rglob("steps.gif"))) == 3
    assert len((Path("out") / "manifest.csv").read_text().splitlines()) == 4
    monkeypatch.setattr("cfe_lightning.images.can_save_video", lambda: False)
    capsys.readouterr()
    assert explain.main([*arguments, "--animation", "mp4"]) == 2
    assert "--animation mp4 needs the package av: pip install av" in capsys.readouterr().err
