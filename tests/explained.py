"""A small folder, explained by the toy, and rows of a manifest, for tests of explain.py."""

import csv
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.cli import explain
from cfe_lightning.explaining.names import image_folder
from cfe_lightning.explaining.row import Row
from cfe_lightning.explanation import Explanation


class NoisyToy(toy.FixedToyExplainer):
    """Draws random numbers while explaining, as a diffusion method does."""

    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        return super().explain(image + torch.rand_like(image) * 0.05, target)


class StackToy(toy.FixedToyExplainer):
    """Explains montages of four slices."""

    def __init__(self, classifier: FrozenClassifier) -> None:
        super().__init__(classifier)
        self.num_slices = 4


@pytest.fixture(autouse=True)
def restore_process_settings() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    yield
    torch.use_deterministic_algorithms(False)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.toy_checkpoint(tmp_path_factory.mktemp("run") / "best.ckpt", num_classes=3)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for index, image in enumerate(toy.toy_images(7, 3)):
        images.save_image(image, tmp_path / "photos" / f"{'ab'[index % 2]}" / f"{index}.png")
    return tmp_path / "photos"


def run(checkpoint: Path, photos: Path, out: Path, *more: str) -> int:
    fixed = ["--trusted", "toy", "--trusted", "explained", "--accelerator", "cpu"]
    where = ["--checkpoint", str(checkpoint), "--input", str(photos), "--output", str(out)]
    return explain.main([*where, *fixed, "--batch-size", "2", *more])


def table(out: Path) -> dict[str, dict[str, str]]:
    with (out / "manifest.csv").open(newline="", encoding="utf-8") as file:
        return {line["name"]: line for line in csv.DictReader(file)}


def content(out: Path) -> dict[str, Any]:
    """Returns everything a run leaves behind, apart from seconds and the page that repeats it."""
    found: dict[str, Any] = {
        str(path.relative_to(out)): path.read_bytes()
        for path in [*sorted((out / "images").rglob("*")), *(out / "global").glob("*"), out / "global.json"]
        if path.is_file()
    }
    rows = table(out)
    for row in rows.values():
        del row["seconds"]
    names = sorted(path.name for path in out.iterdir())
    return {**found, "names": names, "rows": list(rows.items())}


def row(name: str, **changes: object) -> Row:
    """Makes the row of an explained image by hand."""
    done: dict[str, Any] = {
        **{"name": name, "source": [1, 2], "status": "ok", "predicted": "cat", "target": "dog", "note": None},
        **{"p_predicted_before": 0.9, "p_predicted_after": 0.2, "p_target_before": 0.1, "p_target_after": 0.8},
        **{"flipped": True, "flipped_saved": True, "l1": 0.02, "seconds": 0.5, "folder": image_folder(name)},
        **{"files": {"image": "image.png", "part_distinct": "part_distinct.png"}, "gains": {"distinct": 4.0}},
        **{"scores": {"change": 0.25}, "difference_scale": 0.3},
    }
    return Row(done | changes)


def failure(name: str) -> Row:
    """Makes the row of an unreadable image by hand."""
    return Row({"name": name, "source": [0, 0], "status": "failed", "error": "The file is empty."})


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1, error
    assert error[0].startswith("error: ")
    return error[0].removeprefix("error: ")
