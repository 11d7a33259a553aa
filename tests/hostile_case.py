"""What a hostile case is, and the good files that most of them are made from by one change."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import toy
import yaml
from PIL import Image

from cfe_lightning import images
from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.cli import explain, train

Command = Literal["explain", "train", "evaluate"]


@dataclass(frozen=True)
class Place:
    """Where one case runs.

    Attributes:
        here: The current folder of the command; it may write below ``out`` and ``checkpoints`` in it only.
        base: Good files that all cases share, see ``write_base``.
    """

    here: Path
    base: Path

    @property
    def canary(self) -> Path:
        """A file that whatever is executed creates."""
        return self.here.parent / "canary"

    @property
    def outside(self) -> Path:
        """Where a name that leaves the folder leads."""
        return self.here.parent / "outside"

    def write(self, name: str, content: bytes | str) -> str:
        """A file below ``here``; its name."""
        path = self.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)
        return name

    def explain(self, *more: str, checkpoint: str | None = None, photos: str | None = None) -> list[str]:
        """Arguments of explain.py, on good files where none are named."""
        source = photos or str(self.base / "photos")
        named = checkpoint or str(self.base / "good.ckpt")
        return ["--checkpoint", named, "--input", source, "--output", "out", "--accelerator", "cpu", *TRUSTED, *more]

    def classify(self, classifier: str) -> list[str]:
        """Arguments of explain.py for a classifier file and a method that needs no training."""
        method = ["--method", "steerable_lens", "--set", "num_steps=3", "--classifier", classifier]
        return [*method, "--input", str(self.base / "photos"), "--output", "out", "--accelerator", "cpu"]

    def evaluate(self, data: str, *more: str) -> list[str]:
        """Arguments of cfe-evaluate on the good checkpoint."""
        fixed = [
            "--checkpoint",
            str(self.base / "good.ckpt"),
            "--output",
            "out",
            "--device",
            "cpu",
            "--curve-steps",
            "0",
        ]
        return [*fixed, "--data", data, "--gallery", "0", *TRUSTED, *more]

    def train(self, text: str, *more: str) -> list[str]:
        """Arguments of train.py for a config of this text."""
        self.write("config/given.yaml", text)
        return ["--config", "config/given.yaml", "--run", "run", "--skip-classifier-check", *more]

    def tensors(self, name: str, content: Any) -> str:
        """A file of torch.save; its name."""
        torch.save(content, self.here / name)
        return name


TRUSTED = ("--trusted", "toy")

Prepare = Callable[[Place], list[str]]


@dataclass(frozen=True)
class Case:
    """One input that a careless or a hostile person could hand to a command.

    Attributes:
        name: What it is, in words.
        kind: The heading it is listed below.
        command: Which command takes it.
        prepare: Writes the files and returns the arguments.
        harmless: Strange, but there is nothing wrong with it: the command may succeed.
    """

    name: str
    kind: str
    command: Command
    prepare: Prepare
    harmless: bool = False


def config(**changes: Any) -> dict[str, Any]:
    """A config that trains in a second; ``model__amplitude=...`` changes or adds, None of a section removes it."""
    load = {"path": "../../../base/classifier.pt"}
    content: dict[str, Any] = {
        "model": {
            "class_path": "toy.ToyExplainer",
            "init_args": {
                "classifier": {"class_path": "cfe_lightning.classifier.load_classifier", "init_args": load},
            },
        },
        "data": {"class_path": "toy.ToyData", "init_args": {"batch_size": 4, "num_images": 8}},
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": False,
        },
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        part = content
        for section in sections:
            part = part[section]
        part[last] = value
    return content


def as_yaml(**changes: Any) -> str:
    """``config`` as text."""
    return yaml.safe_dump(config(**changes))


def large_toy_classifier() -> FrozenClassifier:
    """The toy classifier, by a class of this package, so that nobody need be trusted."""
    from cases import pooled_classifier

    return pooled_classifier(2)


def write_base(base: Path) -> None:
    """Good files: photos, a classifier, a checkpoint, a finished training and an explained folder."""
    for index, image in enumerate(toy.toy_images(3)):
        images.save_image(image, base / "photos" / f"{index}.png")
    for index, image in enumerate(toy.toy_images(12)):
        images.save_image(image, base / "labelled" / f"stripe {index % 2}" / f"{index}.png")
    toy.toy_checkpoint(base / "good.ckpt")
    toy.toy_classifier().save(base / "classifier.pt")
    large_toy_classifier().save(base / "pooled.pt")
    (base / "runs").mkdir()
    load = {"path": str(base / "classifier.pt")}
    (base / "run.yaml").write_text(as_yaml(model__init_args__classifier__init_args=load))
    fixed = ["--config", str(base / "run.yaml"), "--output", str(base / "runs"), "--skip-classifier-check"]
    assert train.main([*fixed, *TRUSTED]) == 0
    place = Place(base, base)
    assert explain.main([*place.explain(), "--output", str(base / "explained")]) == 0
    assert sorted(path.name for path in (base / "runs" / "run").glob("*.ckpt")) == ["best.ckpt", "last.ckpt"]


def copy_explained(place: Place) -> Path:
    """The good output folder, to be spoilt."""
    shutil.copytree(place.base / "explained", place.here / "out")
    return place.here / "out"


def picture(mode: str = "RGB", size: tuple[int, int] = (20, 16)) -> Image.Image:
    """A picture that decodes."""
    return Image.linear_gradient("L").resize(size).convert(mode)


def changed(content: dict[str, Any], /, **changes: Any) -> dict[str, Any]:
    """A checkpoint with other entries; ``classifier__image_size=...`` reaches into its parts."""
    result = dict(content)
    for key, value in changes.items():
        *sections, last = key.split("__")
        part = result
        for section in sections:
            part[section] = dict(part[section])
            part = part[section]
        part[last] = value
    return result
