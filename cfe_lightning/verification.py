"""Checks an output folder of ``explain.py`` against its manifest: are the pictures those, and is what is said true?

Only the saved pictures and the classifier are needed; no method runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.explanation import decides_for
from cfe_lightning.manifest import OutputFolder, Row
from cfe_lightning.saved_change import changed_area

#: Probabilities of the same pixels on another machine or in another batch; of pixels before they were rounded.
SAVED_TOLERANCE = 2e-3
ROUNDED_TOLERANCE = 0.1
#: Of shares of pixels, which rows hold with six digits.
AREA_TOLERANCE = 1e-5


def verify(output: Path, classifier: FrozenClassifier) -> Iterator[tuple[str, list[str]]]:
    """Opens every picture again, asks the classifier again, and compares with the manifest, row by row.

    Args:
        output: A folder that ``explain.py`` wrote.
        classifier: The one that was explained, in eval mode.

    Yields:
        The name of every explained image and what is wrong with its row, nothing if all of it is confirmed.

    Raises:
        FileNotFoundError: If the folder holds no manifest.
    """
    for row in OutputFolder(output).rows():
        if row["status"] != "ok":
            continue
        problems, pictures = _open(row, output)
        yield row["name"], problems or _claims(row, pictures, classifier)


def _open(row: Row, output: Path) -> tuple[list[str], dict[str, Tensor]]:
    """Every picture of a row that is there and has the pixels that were saved, [C, H, W] in [-1, 1]."""
    problems, pictures = [], {}
    digests: dict[str, str] = row.get("digests", {})
    root = output.resolve()
    for key, file in row["files"].items():
        path = output / row["folder"] / file
        if not path.resolve().is_relative_to(root):
            problems.append(f"{file} lies outside the folder")
            continue
        try:
            with Image.open(path, formats=["PNG"]) as picture:
                picture.load()
                digest = images.pixel_digest(picture)
                pictures[key] = images.from_pil(picture, 1 if picture.mode == "L" else 3)
        except FileNotFoundError:
            problems.append(f"{file} is missing")
            continue
        except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError):
            problems.append(f"{file} cannot be read as the PNG that was saved")
            continue
        if digest != digests.get(key):
            problems.append(f"{file} has other pixels than those that were saved")
    return problems, pictures


@torch.no_grad()
def _claims(row: Row, pictures: dict[str, Tensor], classifier: FrozenClassifier) -> list[str]:
    """What the classifier says otherwise than the row."""
    names = list(classifier.class_names)
    if row["predicted"] not in names or row["target"] not in names:
        return ["its classes are not those of the classifier"]
    predicted, target = names.index(row["predicted"]), names.index(row["target"])
    frames = [pictures["image"]]
    if "counterfactual" in pictures:
        frames.append(pictures["counterfactual"])
    num_steps = len(row["curve"]["strength"]) if "curve" in row else 0
    if num_steps:
        if "steps" not in pictures or pictures["steps"].shape[2] % num_steps:
            return ["its strip of steps has not as many frames as its curve"]
        frames += pictures["steps"].chunk(num_steps, dim=2)
    device = next((value.device for value in classifier.buffers()), torch.device("cpu"))
    logits = classifier(torch.stack(frames).to(device)).float().cpu()
    p = logits.softmax(dim=1)
    problems = _differing("before", row, p[0], predicted, target, "before", ROUNDED_TOLERANCE)
    rest = p[1:]
    if "counterfactual" in pictures:
        problems += _differing("after saving", row, p[1], predicted, target, "saved", SAVED_TOLERANCE)
        rest = p[2:]
        others = p[1].clone()
        others[target] = 0
        # On the boundary itself another machine may decide otherwise.
        clear = abs(float(p[1, target] - others.max())) > SAVED_TOLERANCE
        flips = bool(decides_for(logits[1:2], torch.tensor([target])))
        if row["flipped_saved"] is not None and clear and flips != row["flipped_saved"]:
            problems.append(f"its saved counterfactual is {'a' if flips else 'no'} flip, which the row denies")
        problems += _areas(row, pictures)
    for key, index in (("predicted", predicted), ("target", target)):
        said = torch.tensor(row["curve"][key] if num_steps else [])
        if len(said) and float((rest[:, index] - said).abs().max()) > SAVED_TOLERANCE:
            problems.append(f"the curve of {row[key]!r} is not what the classifier says of the saved steps")
    return problems


def _areas(row: Row, pictures: dict[str, Tensor]) -> list[str]:
    """Whether as many pixels changed as the row says; rows of earlier versions do not say it."""
    claimed = row.get("changed_area")
    if claimed is None:
        return []
    area = float(changed_area(pictures["image"][None], pictures["counterfactual"][None]))
    return [] if abs(claimed - area) <= AREA_TOLERANCE else [f"its changed area is {area:.4f}, not {claimed}"]


def _differing(
    when: str, row: dict[str, Any], p: Tensor, predicted: int, target: int, suffix: str, tolerance: float
) -> list[str]:
    problems = []
    for key, index in (("predicted", predicted), ("target", target)):
        claimed = row.get(f"p_{key}_{suffix}")
        if claimed is None or abs(claimed - float(p[index])) > tolerance:
            problems.append(f"the probability of {row[key]!r} {when} is {float(p[index]):.4f}, not {claimed}")
    return problems
