"""Checks an output folder of ``explain.py`` against its manifest: are the pictures those, and is what is said true?

Only the saved pictures and the classifier are needed; no method runs. Not checked are the transformations that a flip
survives, which another machine's JPEG may decide otherwise, and where an attribution lies, whose picture is scaled.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.decisions import decides_for
from cfe_lightning.explaining.folder import SCHEMA, OutputFolder, Row
from cfe_lightning.explaining.saved_change import changed_area, strongest_change

#: Probabilities of the same pixels on another machine or in another batch; of pixels before they were rounded.
SAVED_TOLERANCE = 2e-3
ROUNDED_TOLERANCE = 0.1
#: Of shares of pixels and of the change, which rows hold with six digits.
AREA_TOLERANCE = 1e-5


def verify(output: Path, classifier: FrozenClassifier, num_slices: int = 1) -> Iterator[tuple[str, list[str]]]:
    """Opens every picture again, asks the classifier again, and compares with the manifest, row by row.

    Args:
        output: A folder that ``explain.py`` wrote.
        classifier: The one that was explained, in eval mode.
        num_slices: Of images that are montages.

    Yields:
        The name of every explained image and what is wrong with its row, nothing if all of it is confirmed.

    Raises:
        FileNotFoundError: If the folder holds no manifest.
        ValueError: If it is of another version or about other classes, or rows are lost.
    """
    folder = OutputFolder(output)
    header, names = folder.header() or {}, list(classifier.class_names)
    if header.get("schema") != SCHEMA or header.get("classes", names) != names:
        raise ValueError(
            f"{output} was written by another version (schema {header.get('schema')!r}, here {SCHEMA}) or is about "
            "other classes than those of the classifier: give the --output of this explain.py."
        )
    num_explained = 0
    for row in folder.rows():
        if row["status"] != "ok":
            continue
        num_explained += 1
        yield row["name"], _problems(row, output, classifier, num_slices)
    expected = folder.summary().get("n_done", num_explained)
    if num_explained != expected or not num_explained:
        raise ValueError(
            f"{folder.manifest_path} holds {num_explained} explained images, summary.json says {expected}: rows are "
            "lost or the run is not finished, and the same command of explain.py does what is missing."
        )


def _problems(row: Row, output: Path, classifier: FrozenClassifier, num_slices: int) -> list[str]:
    """What is wrong with one row, nothing if all of it is confirmed."""
    try:
        problems, pictures = _open(row, output)
        return problems or _claims(row, pictures, classifier, num_slices)
    except KeyError as error:
        return [f"it does not say its {error}"]


def _open(row: Row, output: Path) -> tuple[list[str], dict[str, Tensor]]:
    """Every picture of a row that is there and has the pixels that were saved, [C, H, W] in [-1, 1]."""
    problems, pictures = [], {}
    digests: dict[str, str] = row.get("digests", {})
    root = output.resolve()
    for key, file in row["files"].items():
        try:
            pictures[key], digest = images.read_saved(output / row["folder"] / file, root)
        except images.UnreadableImageError as error:
            problems.append(f"{file} {error}")
            continue
        if digest != digests.get(key):
            problems.append(f"{file} has other pixels than those that were saved")
    return problems, pictures


@torch.no_grad()
def _claims(row: Row, pictures: dict[str, Tensor], classifier: FrozenClassifier, num_slices: int) -> list[str]:
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
        problems += _areas(row, pictures) + _places(row, pictures, num_slices)
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


def _places(row: Row, pictures: dict[str, Tensor], num_slices: int) -> list[str]:
    """Whether the change lies where the row says; rows of earlier versions do not say it."""
    if "where" not in row:
        return []
    ((where, share),) = strongest_change(pictures["image"][None], pictures["counterfactual"][None], num_slices)
    claimed, claimed_share = row["where"], row.get("where_share")
    if where == claimed and abs((share or 0) - (claimed_share or 0)) <= AREA_TOLERANCE:
        return []
    return [f"the place of its change is {_place(where, share)}, not {_place(claimed, claimed_share)}"]


def _place(where: str | None, share: float | None) -> str:
    return f"{where or 'nowhere'}{'' if share is None else f' ({share:.4f})'}"


def _differing(
    when: str, row: dict[str, Any], p: Tensor, predicted: int, target: int, suffix: str, tolerance: float
) -> list[str]:
    problems = []
    for key, index in (("predicted", predicted), ("target", target)):
        claimed = row.get(f"p_{key}_{suffix}")
        if claimed is None or abs(claimed - float(p[index])) > tolerance:
            problems.append(f"the probability of {row[key]!r} {when} is {float(p[index]):.4f}, not {claimed}")
    return problems
