"""Every config builds: a renamed class or argument fails here, not after a user's data has been downloaded."""

from __future__ import annotations

import itertools
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer
from PIL import Image

from cfe_lightning.classifier import ClassifierSpec, FrozenClassifier
from cfe_lightning.classifier.file import build_network
from cfe_lightning.data.base import ImageData
from cfe_lightning.data.chexpert import PATHOLOGIES
from cfe_lightning.methods.diff_explainer import DiffusionAutoencoder
from cfe_lightning.training.run import ConfiguredRun

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def size_of(data: dict[str, Any]) -> tuple[int, int]:
    """Channels and side of the images; slices, which are tiled, and radiographs are grey unless said otherwise."""
    if "slice_size" in data:
        return data.get("channels", 1), data["slice_size"] * math.isqrt(data["num_slices"])
    return data.get("channels", 1 if "pathology" in data else 3), data["image_size"]


def classifier_file(folder: Path, data: dict[str, Any], pairs: list[list[str]] | None) -> Path:
    """A classifier of the size of a config's data, in place of the one that the user would have trained."""
    channels, image_size = size_of(data)
    names = tuple(itertools.chain.from_iterable(pairs)) if pairs else ("a", "b")
    spec = ClassifierSpec(
        class_path="cfe_lightning.classifier.networks.PooledCnn",
        init_args={"num_classes": len(names), "channels": channels},
        head="fc",
        feature_map="stage3",
        class_names=names,
        image_size=image_size,
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
    )
    FrozenClassifier(build_network(spec), spec).save(folder / "classifier.pt")
    return folder / "classifier.pt"


def autoencoder_file(folder: Path, data: dict[str, Any]) -> Path:
    """The smallest autoencoder of a config's kind of images, in place of the one that takes days."""
    arguments = {"multipliers": [1], "encoder_multipliers": [1], "width": 4, "groups": 2, "blocks": 1, "code_dim": 4}
    channels, image_size = size_of({**data, "num_slices": 1})
    module = DiffusionAutoencoder(image_size=image_size, channels=channels, **arguments, attention_sizes=[], time_dim=4)
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", default_root_dir=str(folder))
    trainer.strategy.connect(module)
    trainer.save_checkpoint(folder / "autoencoder.ckpt")
    return folder / "autoencoder.ckpt"


def data_files(root: Path) -> None:
    """A few images where a config looks for its own: class folders, and the layouts of CelebA and MNIST."""
    picture = Image.new("RGB", (8, 8))
    for split, label, patient in itertools.product(("train", "val", "test"), ("a", "b"), range(2)):
        folder = root / split / label
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{split}{label}{patient}_0.png")
    for patient in range(40):
        (root / f"slice{patient}.dcm").write_bytes(b"")
    rows = [f"{patient},slice{patient}.dcm,{'ab'[patient % 2]}" for patient in range(40)]
    (root / "slices.csv").write_text("\n".join(["patient,path,label", *rows]))
    faces = root / "celeba" / "img_align_celeba"
    faces.mkdir(parents=True)
    for number in (1, 2, 3):
        picture.save(faces / f"00000{number}.jpg")
    attributes = "".join(f"00000{number}.jpg {has} {has}\n" for number, has in ((1, 1), (2, -1), (3, 1)))
    (root / "celeba" / "list_attr_celeba.txt").write_text(f"3\nMale Mouth_Slightly_Open\n{attributes}")
    partition = "".join(f"00000{number}.jpg {number - 1}\n" for number in (1, 2, 3))
    (root / "celeba" / "list_eval_partition.txt").write_text(partition)
    for name, prefix in itertools.product(("MNIST", "FashionMNIST"), ("train", "t10k")):
        raw = root / name / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, 10, 28, 28) + bytes(10 * 28 * 28))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 10) + bytes(range(10)))


def chexpert_files(root: Path) -> None:
    """A few radiographs with and without every finding: both of CheXpert's tables and their images."""
    for part in ("train", "valid"):
        lines = [",".join(("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", "No Finding", *PATHOLOGIES))]
        for patient, healthy in enumerate((1, 0) * 10, start=1 if part == "train" else 64541):
            name = f"{part}/patient{patient:05d}/study1/view1_frontal.jpg"
            (root / name).parent.mkdir(parents=True)
            Image.new("L", (10, 8)).save(root / name)
            findings = "," * (len(PATHOLOGIES) - 1) if healthy else ",".join(["1.0"] * len(PATHOLOGIES))
            no_finding = "1.0" if healthy else ""
            lines.append(f"CheXpert-v1.0-small/{name},Male,60,Frontal,AP,{no_finding},{findings}")
        (root / f"{part}.csv").write_text("\n".join(lines))


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_config_builds(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    overrides = ["--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    if "root" in content["data"]["init_args"]:
        is_chexpert = content["data"]["class_path"] == "cfe_lightning.data.chexpert.CheXpert"
        (chexpert_files if is_chexpert else data_files)(tmp_path / content["data"]["init_args"]["root"])
    classifier = content["model"]["init_args"].get("classifier")
    if classifier is not None:
        assert classifier["class_path"] == "cfe_lightning.classifier.load_classifier"
        file = classifier_file(tmp_path, content["data"]["init_args"], content["model"]["init_args"].get("pairs"))
        overrides += ["--model.classifier.init_args.path", str(file)]
    if "autoencoder" in content["model"]["init_args"]:
        overrides += ["--model.autoencoder", str(autoencoder_file(tmp_path, content["data"]["init_args"]))]
    run = ConfiguredRun([path.resolve()], overrides, tmp_path / "run", None)
    assert isinstance(run.datamodule, ImageData)
    assert isinstance(run.trainer, Trainer)
    assert run.trainer.max_epochs or not run.model.needs_training


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_config_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    # The first lines show how it is started, by its own name.
    assert f"--config {path.name}" in text.split("seed_everything")[0]
    # No interpolation and no other file: a config is complete.
    assert "${" not in text
    assert {"seed_everything", "model", "data"} == yaml.safe_load(text).keys() - {"trainer"}


def test_there_are_configs() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_config_does_not_repeat_what_every_run_has(path: Path) -> None:
    trainer = yaml.safe_load(path.read_text(encoding="utf-8")).get("trainer", {})
    assert {"logger", "inference_mode", "devices"}.isdisjoint(trainer)
    by_itself = {f"cfe_lightning.training.{name}" for name in ("Throughput", "NonFiniteGuard", "LastCheckpoint")}
    for callback in trainer.get("callbacks", []):
        assert "init_args" in callback or callback["class_path"] not in by_itself
        assert callback.get("init_args", {}).get("monitor") != "val/loss"
