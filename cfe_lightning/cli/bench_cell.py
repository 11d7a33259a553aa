"""One cell of the known-cause bench: its classifier, its explainers and their measurements, each made once."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cfe_lightning.cli import train
from cfe_lightning.compute.signals import StopRequested
from cfe_lightning.evaluation.options import NUM_TEST, EvaluateOptions
from cfe_lightning.files.atomic import write_json
from cfe_lightning.files.text import VERSION, digest, one_line
from cfe_lightning.training import folder as run_folder

if TYPE_CHECKING:
    import torch

    from cfe_lightning.classifier import FrozenClassifier
    from cfe_lightning.data.synthetic import Cue, SyntheticShapes
    from cfe_lightning.evaluation.known_cause import Bench, Cell, MarkUse
    from cfe_lightning.explanation import Explainer

#: The config that trains every cell's classifier.
CLASSIFIER = "classifier_synthetic.yaml"
#: Share of a config's training images at budget 1: enough to learn shapes, in minutes instead of hours for all cells.
_SHARE = 1 / 3
_NUM_VAL = 200
#: Options that every training of an output folder shares.
_SHARED = ("budget", "seed", "cue_agreement")


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchMethod:
    """The parts of a method's config that the bench needs."""

    name: str
    config: Path
    class_path: str
    arguments: dict[str, Any]
    needs_training: bool
    autoencoder: Path | None  # config of the autoencoder that the method is built on


class BenchCell:
    """Trains and measures one cell; every result is kept in ``<output>/cells/<cell>`` and reused."""

    def __init__(self, cell: Cell, options: EvaluateOptions, device: torch.device, title: str) -> None:
        self.cell = cell
        self.options = options
        self.device = device
        self.title = title
        self.folder: Path = options.folder / "cells" / cell.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shapes = shapes_of(cell, options)
        self.batch = self._batch()
        self.classifier = self._trained_classifier()

    def use(self) -> MarkUse:
        """Measures how moving the mark changes the classifier's answers."""
        import torch

        from cfe_lightning.compute.rows import joined
        from cfe_lightning.evaluation.known_cause import mark_use

        # Images with the mark in the other corner.
        data = self.shapes.dataset("test")
        moved = [data.render(index, int(data.labels[index]), 1 - data.mark_corner(index)) for index in range(len(data))]
        parts = []
        for start in range(0, len(data), self.options.batch_size):
            part = slice(start, start + self.options.batch_size)
            images = (self.batch["image"][part], torch.stack(moved[part]).to(self.device))
            parts.append(mark_use(self.cell, self.classifier, *images, self.batch["label"][part]))
        # Verdict over all images.
        found = joined(parts)
        accuracy, used = found.correct.double().mean(), found.probability.mean()
        self._say(f"accuracy {accuracy:.3f}, use of the mark {used:.3f} ({found.verdict})")
        return found

    def measure(self, name: str, configs: Sequence[Path | None], build: Callable[[], Explainer], bench: Bench) -> None:
        """Adds one explainer's numbers to the bench, from its file or by explaining the test images."""
        import torch

        # Reuse the file of the same settings.
        texts = [config.read_text(encoding="utf-8") for config in configs if config is not None]
        measured = [self.classifier.fingerprint(), self.options.limit, self.options.batch_size]
        made_from = digest([name, texts, *measured, *self._training_settings()])
        path = self.folder / f"{name}.json"
        kept = _read(path)
        key = (self.cell.name, name)
        if kept.get("settings") != made_from:
            try:
                values, seconds = self._explain(name, build())
            except ValueError as error:
                # Failures are not kept: the next run tries again.
                bench.failures[key] = one_line(error)
                self._say(f"{name} is left out: {bench.failures[key]}")
                return
            rows = {k: [None if math.isnan(one) else one for one in v.tolist()] for k, v in values.items()}
            kept = {"settings": made_from, "seconds_per_image": seconds, "values": rows}
            write_json(path, kept)
        bench.values[key] = {
            k: torch.tensor([math.nan if one is None else one for one in v]) for k, v in kept["values"].items()
        }

    def _explain(self, name: str, explainer: Explainer) -> tuple[dict[str, torch.Tensor], float]:
        import torch

        from cfe_lightning.compute.rows import joined, rows_of
        from cfe_lightning.evaluation import known_cause, known_cause_page

        # Timed explanations.
        torch.manual_seed(self.options.seed)
        started, found = time.perf_counter(), []
        size = self.options.batch_size
        for start in range(0, len(self.batch["label"]), size):
            found.append(known_cause.measure(explainer, rows_of(self.batch, slice(start, start + size)))[1])
        seconds = time.perf_counter() - started
        values = joined(found)
        # Pictures of one image per class.
        explanation, _ = known_cause.measure(explainer, rows_of(self.batch, slice(0, 2)))
        known_cause_page.draw(explanation, self.folder / f"{name}.png")
        self._say(f"{name} explained in {seconds:.1f} s, alarm {values['alarm'].nanmean():.2f}")
        return values, seconds / len(self.batch["label"])

    def method(self, method: BenchMethod) -> Explainer:
        """Returns a method for this cell's classifier, trained if it learns anything."""
        from cfe_lightning.explainer import load_explainer
        from cfe_lightning.methods.find import build_untrained

        if not method.needs_training:
            name = method.class_path.split(".")[-2]
            return build_untrained(name, self.classifier, method.arguments).to(self.device)
        overrides = ["--model.classifier.init_args.path", str(self.folder / "classifier.pt")]
        beneath = [self.classifier.fingerprint()]
        if method.autoencoder is not None:
            base = self._train("autoencoder", method.autoencoder, ())
            overrides += ["--model.autoencoder", str(base / "best.ckpt")]
            beneath.append(method.autoencoder.read_text(encoding="utf-8"))
        run = self._train(method.name, method.config, overrides, beneath)
        return load_explainer(run / "best.ckpt").to(self.device)

    def baseline(self, name: str) -> Explainer:
        """Returns a baseline for this cell's classifier."""
        from cfe_lightning.methods.baselines.captum import build_baseline

        return build_baseline(name, self.classifier, self.options.seed)

    def _trained_classifier(self) -> FrozenClassifier:
        from cfe_lightning.classifier import load_classifier

        (config,) = run_folder.find_configs([CLASSIFIER])
        path = self.folder / "classifier.pt"
        # Some methods need a classifier that averages its last map.
        self._train("classifier", config, ["--model.architecture", "pooled", "--model.output", str(path)])
        return load_classifier(str(path)).to(self.device)

    def _train(self, name: str, config: Path, overrides: Sequence[str], beneath: Sequence[str] = ()) -> Path:
        """Trains into ``<cell>/runs/<name>`` unless a finished run has these settings, and returns the folder.

        ``overrides`` are command-line arguments over the config, besides the cell's data. ``beneath`` identifies the
        networks that the run builds on (fingerprint or config): others need another training.

        Raises:
            ValueError: If it cannot be trained.
        """
        # Reuse a finished training.
        run = self.folder / "runs" / name
        # The identity of a training does not depend on the place of its folder.
        told = [override.replace(str(self.folder), "") for override in overrides]
        made_from = digest([config.read_text(encoding="utf-8"), told, *beneath, *self._training_settings()])
        done = run / "trained.json"
        if _read(done).get("settings") == made_from:
            return run
        # First of all: a run that is stopped half way must not look like the finished one before it.
        done.unlink(missing_ok=True)
        # Train.
        started = time.perf_counter()
        arguments = ["--config", str(config), "--run", name, "--output", str(run.parent), "--overwrite"]
        arguments += ["--skip-classifier-check", *overrides, *self._data_overrides(config)]
        if (reason := _training_error(arguments)) is not None:
            raise ValueError(f"{name} of {self.cell.name} could not be trained: {reason}")
        seconds = time.perf_counter() - started
        write_json(done, {"settings": made_from, "seconds": seconds})
        self._say(f"{name} trained in {seconds:.0f} s")
        return run

    def _data_overrides(self, config: Path) -> list[str]:
        """Returns overrides for the cell's training data: one epoch with a share of the images of the whole config."""
        from cfe_lightning.files.configs import load_config

        # Images of all epochs at the bench's budget.
        content = load_config(config)
        data, trainer = content["data"].get("init_args", {}), content.get("trainer", {})
        shown = data.get("num_train", 4000) * trainer.get("max_epochs", 1)
        num_train = max(round(shown * _SHARE * self.options.budget), data.get("batch_size", 32))
        # Overrides.
        cell = self.cell
        given: dict[str, Any] = {
            "data.cue": cell.cue,
            "data.cue_size": cell.cue_size,
            "data.shortcut": cell.shortcut(),
            "data.cue_agreement": self.options.cue_agreement,
            "data.seed": self.options.seed,
            "data.num_train": num_train,
            "data.num_val": _NUM_VAL,
            "seed_everything": self.options.seed,
            "trainer.max_epochs": 1,
            "trainer.logger": "false",
            "trainer.enable_progress_bar": "false",
            "trainer.enable_model_summary": "false",
            "trainer.accelerator": {"cuda": "gpu"}.get(self.device.type, self.device.type),
        }
        return [word for name, value in given.items() for word in (f"--{name}", str(value))]

    def _training_settings(self) -> list[Any]:
        return [VERSION, self.cell.name, *_shared(self.options).values(), _SHARE, _NUM_VAL]

    def _batch(self) -> dict[str, torch.Tensor]:
        """Renders all test images of the cell, and draws the picture of their right answer."""
        import torch

        from cfe_lightning.evaluation import known_cause_page

        data = self.shapes.dataset("test")
        samples = [data[index] for index in range(len(data))]
        batch = {key: torch.stack([s[key] for s in samples]) for key in ("image", "mask", "mark", "counterfactual")}
        known_cause_page.draw_truth(batch["image"][:2], batch["counterfactual"][:2], self.folder / "truth.png")
        batch["label"] = data.labels.clone()
        return {key: value.to(self.device) for key, value in batch.items()}

    def _say(self, text: str) -> None:
        sys.stderr.write(f"{self.title}: {text}\n")


def shapes_of(cell: Cell, options: EvaluateOptions, cue_agreement: float = 1.0) -> SyntheticShapes:
    """Returns the test data of a cell: cues are right and marks uninformative, so that cells can be compared."""
    from cfe_lightning.data.synthetic import SyntheticShapes

    return SyntheticShapes(
        cue=cast("Cue", cell.cue),
        cue_size=cell.cue_size,
        shortcut=0.5,
        cue_agreement=cue_agreement,
        num_test=options.limit or NUM_TEST,
        seed=options.seed,
    )


def keep_settings(options: EvaluateOptions) -> None:
    """Writes the settings that all trainings of an output folder share into its ``bench.json``, once.

    Raises:
        ValueError: If the folder holds trainings with other settings, which would be replaced.
    """
    path, asked = options.folder / "bench.json", _shared(options)
    kept = _read(path)
    if not kept:
        write_json(path, asked)
        return
    if others := [name for name in asked if kept.get(name) != asked[name]]:
        found, given = (
            " and ".join(f"--{name.replace('_', '-')} {settings.get(name)}" for name in others)
            for settings in (kept, asked)
        )
        raise ValueError(
            f"{options.folder} holds a bench with {found}, and {given} was asked for, which would replace its "
            "trainings: give another --output."
        )


def _shared(options: EvaluateOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in _SHARED}


def _training_error(arguments: Sequence[str]) -> str | None:
    """Runs a training without its output, which would bury the bench's; returns the reason of a failure, or None."""
    spoken = io.StringIO()
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "cfe_lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(spoken), contextlib.redirect_stdout(spoken):
            code = train.main(arguments)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    if code > 128:
        raise StopRequested(code - 128)
    return None if code == 0 else spoken.getvalue().strip().rpartition("error: ")[2]


def _read(path: Path) -> dict[str, Any]:
    """Reads a kept result; an absent or broken file is an empty one."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}
