"""Every config builds: a renamed class or argument fails here, not after a user's data has been downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer

from cfe_lightning.classifier import ClassifierSpec, FrozenClassifier, build_network
from cfe_lightning.cli.configured_run import ConfiguredRun
from cfe_lightning.data.image_data import ImageData

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def classifier_file(folder: Path, data: dict[str, Any]) -> Path:
    """A classifier of the size of a config's data, in place of the one that the user would have trained."""
    channels, image_size = data.get("channels", 3), data["image_size"]
    spec = ClassifierSpec(
        class_path="cfe_lightning.networks.classifiers.SimpleCnn",
        init_args={"num_classes": 2, "channels": channels, "image_size": image_size},
        head=None,
        class_names=("a", "b"),
        image_size=image_size,
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
    )
    FrozenClassifier(build_network(spec), spec).save(folder / "classifier.pt")
    return folder / "classifier.pt"


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_config_builds(path: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    overrides = ["--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    classifier = content["model"]["init_args"].get("classifier")
    if classifier is not None:
        assert classifier["class_path"] == "cfe_lightning.classifier.load_classifier"
        file = classifier_file(tmp_path, content["data"]["init_args"])
        overrides += ["--model.classifier.init_args.path", str(file)]
    run = ConfiguredRun([path], overrides, tmp_path / "run", None)
    assert isinstance(run.datamodule, ImageData)
    assert isinstance(run.trainer, Trainer)
    assert run.trainer.max_epochs
    # The logger was switched off for this test only.
    loggers = content["trainer"].get("logger", {"class_path": "the default"})
    assert loggers["class_path"] in ("the default", "lightning.pytorch.loggers.WandbLogger")


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_config_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    # The first lines show how it is started, by its own name.
    assert f"--config {path.name}" in text.split("seed_everything")[0]
    # No interpolation and no other file: a config is complete.
    assert "${" not in text
    assert {"seed_everything", "model", "data", "trainer"} == yaml.safe_load(text).keys()


def test_there_are_configs() -> None:
    assert CONFIGS
