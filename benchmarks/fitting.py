"""Whole trainings for ``benchmarks/run.py``: time to a fixed quality, loss curves of two precisions, a GPU kept busy.

Only training and validation images are looked at. Networks of the time to a quality are those of ``configs/``, so are
the data; every run has the same seed.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from cells import AS_BUILT, Cell, Settings
from contenders import METHODS, Variant

from cfe_lightning.classifier import FrozenClassifier, load_classifier
from cfe_lightning.classifier.training import ClassifierTraining
from cfe_lightning.compute.acceleration import ChannelsLast, CompileBlocks, RecomputeActivations
from cfe_lightning.data.folder import ImageFolder
from cfe_lightning.data.synthetic import SyntheticShapes
from cfe_lightning.files.trust import resolve_class_path

_CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A validation value that a training should reach.

    Attributes:
        config: In ``configs/``; model, data and clipping are taken from it.
        metric: What is validated.
        value: What has to be reached,
        rises: from below; else from above.
        every: Training batches between two validations.
        most: Training batches after which it counts as not reached.
        images: Validation images.
        classifier: Architecture of the classifier that is trained before; None where there is none.
    """

    config: str
    metric: str
    value: float
    rises: bool
    every: int
    most: int
    images: int
    classifier: str | None

    def reached(self, value: float) -> bool:
        """Whether a validation has met it."""
        return value >= self.value if self.rises else value <= self.value

    def __str__(self) -> str:
        return f"{self.metric} {'>=' if self.rises else '<='} {self.value:g}"


GOALS = {
    # The image itself enters the network, so its PSNR is high from the start.
    "Dxai": Goal(
        config="dxai_synthetic.yaml",
        metric="val/loss",
        value=0.3,
        rises=False,
        every=25,
        most=800,
        images=64,
        classifier="simple",
    ),
    # With its noise map an untrained autoencoder reconstructs, too: what the code alone knows is what has to be learnt.
    "DiffusionAutoencoder": Goal(
        config="diffusion_autoencoder_synthetic.yaml",
        metric="val/psnr_code",
        value=18.0,
        rises=True,
        every=50,
        most=1500,
        images=32,
        classifier=None,
    ),
    "StylEx": Goal(
        config="stylex_synthetic.yaml",
        metric="val/loss",
        value=0.15,
        rises=False,
        every=50,
        most=1500,
        images=64,
        classifier="pooled",
    ),
    "MirrorCFE": Goal(
        config="mirror_synthetic.yaml",
        metric="val/loss",
        value=0.08,
        rises=False,
        every=25,
        most=1000,
        images=64,
        classifier="pooled",
    ),
}


class _Watch(pl.Callback):
    """Keeps seconds of training without validation, what is logged, and stops at a goal."""

    def __init__(self, goal: Goal | None = None, every: int = 1) -> None:
        self.goal = goal
        self.every = every
        self.seconds = 0.0
        self.batches = 0
        self.reached = False
        self.curve: list[dict[str, float]] = []
        self.losses: list[dict[str, float]] = []
        self._begin: float | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._begin is None:
            self._begin = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.batches += 1
        if self.batches % self.every == 0:
            logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name[:6] == "train/"}
            self.losses.append({"batches": self.batches, **logged})

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._begin is not None:
            _wait(pl_module)
            self.seconds += time.perf_counter() - self._begin
            self._begin = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name[:4] == "val/"}
        self.curve.append({"batches": self.batches, "seconds": self.seconds, **logged})
        if self.goal is not None and self.goal.reached(logged[self.goal.metric]):
            self.reached = trainer.should_stop = True


def _fit(
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    variant: Variant,
    settings: Settings,
    watch: pl.Callback,
    **options: Any,
) -> None:
    """One training with the callbacks that a user adds for a variant; nothing is written."""
    chosen = {
        ChannelsLast: variant.channels_last,
        CompileBlocks: variant.compiled,
        RecomputeActivations: variant.recompute,
    }
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    pl.Trainer(
        accelerator="gpu" if settings.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if variant.bf16 else "32-true",
        callbacks=[*(kind() for kind, wanted in chosen.items() if wanted), watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        inference_mode=False,
        **options,
    ).fit(module, datamodule=data)


def _trained_classifier(kind: str, size: int, settings: Settings) -> FrozenClassifier:
    """One of ``networks.classifiers``, trained for one epoch on the built-in shapes unless it was before."""
    path = Path(settings.folder) / "classifiers" / f"{kind}_{size}.pt"
    if not path.exists():
        pl.seed_everything(0, verbose=False)
        small_image = kind in ("resnet18", "densenet121") and size < 100
        training = ClassifierTraining(output=str(path), architecture=kind, small_image=small_image)
        data = SyntheticShapes(image_size=size)
        _fit(training, data, Variant(), settings, _Watch(), max_epochs=1)
    return load_classifier(path)


# --- time to a quality ---


def measure_quality(cell: Cell, settings: Settings) -> dict[str, Any]:
    """Seconds of training, validations apart, until the goal of a method is reached; compiling counts."""
    goal = GOALS[cell.method]
    config = yaml.safe_load((_CONFIGS / goal.config).read_text())
    arguments, of_data = config["model"]["init_args"], config["data"]["init_args"]
    if goal.classifier is not None:
        arguments["classifier"] = _trained_classifier(goal.classifier, of_data["image_size"], settings)
    pl.seed_everything(0, verbose=False)
    module = resolve_class_path(config["model"]["class_path"])(**arguments)
    data = SyntheticShapes(**of_data | {"num_train": goal.most * of_data["batch_size"], "num_val": goal.images})
    watch = _Watch(goal)
    _fit(
        module,
        data,
        Variant.named(cell.variant),
        settings,
        watch,
        max_epochs=1,
        val_check_interval=goal.every,
        gradient_clip_val=config["trainer"].get("gradient_clip_val"),
    )
    return {
        "goal": str(goal),
        "reached": watch.reached,
        "batches": watch.batches,
        "seconds": watch.seconds,
        "curve": watch.curve,
    }


# --- the same training in two precisions ---

_ARCHITECTURES = {"SimpleCnn": "simple", "PooledCnn": "pooled", "ResNet18": "resnet18", "DenseNet121": "densenet121"}


def _trainable(cell: Cell, settings: Settings) -> pl.LightningModule:
    """A method with a classifier that knows the built-in shapes."""
    method = METHODS[cell.method]
    kind = _ARCHITECTURES[method.classifier[0 if settings.small else 1]]
    classifier = _trained_classifier(kind, cell.size, settings)
    pl.seed_everything(0, verbose=False)
    return method.build(classifier, cell.size, settings.small)


def measure_curve(cell: Cell, settings: Settings) -> dict[str, Any]:
    """The losses on the way and the validation at the end of a training of fixed length."""
    module = _trainable(cell, settings)
    batches = settings.curve_batches
    data = SyntheticShapes(
        image_size=cell.size,
        batch_size=settings.train_images,
        num_train=batches * settings.train_images,
        num_val=8 * settings.train_images,
    )
    watch = _Watch(every=max(1, batches // 20))
    _fit(module, data, Variant.named(cell.variant), settings, watch, max_epochs=1)
    return {"batches": watch.batches, "losses": watch.losses, "validation": watch.curve[-1]}


# --- a GPU kept busy ---


class _Busy(pl.Callback):
    """Images per second and the GPU's utilisation from a batch on, and the end after some."""

    def __init__(self, warm: int, batches: int) -> None:
        self.warm = warm
        self.batches = batches
        self.images = 0
        self.seconds = 0.0
        self.samples: list[int] = []
        self.why_none: str | None = None
        self._batches = 0
        self._begin = 0.0
        self._done = threading.Event()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches += 1
        if self._batches > self.warm:
            self.images += len(batch["image"])
            trainer.should_stop = self._batches == self.batches
        elif self._batches == self.warm:
            _wait(pl_module)
            self._begin = time.perf_counter()
            threading.Thread(target=self._sample, args=(pl_module.device,), daemon=True).start()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _wait(pl_module)
        self.seconds = time.perf_counter() - self._begin
        self._done.set()

    def _sample(self, device: torch.device) -> None:
        """Asks ten times a second: the driver looks no more often."""
        if device.type != "cuda":
            self.why_none = "there is no GPU"
            return
        try:
            while not self._done.wait(0.1):
                self.samples.append(torch.cuda.utilization(device))
        except (ModuleNotFoundError, RuntimeError) as error:
            self.why_none = " ".join(str(error).split())


def _wait(module: pl.LightningModule) -> None:
    if module.device.type == "cuda":
        torch.cuda.synchronize()


def measure_steady(cell: Cell, settings: Settings) -> dict[str, Any]:
    """Training with images that are decoded from files all the time, after a warm-up."""
    module = _trainable(cell, settings)
    batches = settings.curve_batches
    with tempfile.TemporaryDirectory() as folder:
        files = SyntheticShapes(image_size=cell.size, num_train=max(64, 8 * settings.train_images))
        files.write_folder("train", folder)
        data = ImageFolder(
            root=folder,
            image_size=cell.size,
            batch_size=settings.train_images,
            num_workers=settings.workers,
        )
        busy = _Busy(warm=max(1, batches // 4), batches=batches)
        _fit(
            module, data, Variant.named(cell.variant), settings, busy, max_steps=-1, max_epochs=-1, limit_val_batches=0
        )
    return {
        "images_per_second": {AS_BUILT: busy.images / busy.seconds},
        "workers": settings.workers,
        "utilisation": sum(busy.samples) / len(busy.samples) if busy.samples else None,
        "samples": len(busy.samples),
        "why_no_utilisation": busy.why_none,
    }
