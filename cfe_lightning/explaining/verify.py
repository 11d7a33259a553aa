"""Checks the pictures and the claims of an output folder of ``explain.py`` against its manifest.

Only the saved pictures and the classifier are needed; no method runs. Not checked are the transformations that a flip
survives, which another machine's JPEG may decide otherwise, and the place of an attribution, whose picture is scaled.
"""

from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.decisions import decides_for
from cfe_lightning.explaining.folder import SCHEMA, OutputFolder
from cfe_lightning.explaining.row import Row
from cfe_lightning.explaining.saved_change import Place, changed_area, strongest_change

#: Tolerance of probabilities of the same pixels, on another machine or in another batch.
SAVED_TOLERANCE = 2e-3
#: Tolerance of probabilities of pixels before they were rounded to 8 bits.
ROUNDED_TOLERANCE = 0.1
#: Tolerance of shares of pixels and of the change, which rows hold with six digits.
AREA_TOLERANCE = 1e-5

Classes = Sequence[tuple[str, int]]
_NEEDED = ("files", "folder", "predicted", "target", "flipped_saved")


def verify(output: Path, classifier: FrozenClassifier, num_slices: int = 1) -> Iterator[tuple[str, list[str]]]:
    """Opens every picture again, asks the classifier again, and compares with the manifest, row by row.

    Args:
        output: A folder that ``explain.py`` wrote.
        classifier: The classifier that was explained, in eval mode.
        num_slices: Number of slices in an image that is a montage, otherwise 1.

    Yields:
        The name of every explained image and the problems of its row, none if all of it is confirmed.

    Raises:
        ValueError: If the folder is of another version or about other classes, or rows are lost.
    """
    # The folder as a whole.
    folder = OutputFolder(output)
    header, names = folder.header() or {}, list(classifier.class_names)
    if header.get("schema") != SCHEMA or header.get("classes", names) != names:
        raise ValueError(
            f"{output} was written by another version (schema {header.get('schema')!r}, here {SCHEMA}) or is about "
            "other classes than those of the classifier: give the --output of this explain.py."
        )

    # Every row.
    num_explained = 0
    for row in folder.rows():
        if row.status == "ok":
            num_explained += 1
            yield row.name, _problems(row, output, classifier, num_slices)

    # Lost rows.
    expected = folder.summary().get("n_done", num_explained)
    if num_explained != expected or not num_explained:
        raise ValueError(
            f"{folder.manifest_path} holds {num_explained} explained images, summary.json says {expected}: rows are "
            "lost or the run is not finished, and the same command of explain.py does what is missing."
        )


def _problems(row: Row, output: Path, classifier: FrozenClassifier, num_slices: int) -> list[str]:
    # Keys may be missing at any depth: in the row itself, which is checked first, and in its files and curve.
    try:
        itemgetter(*_NEEDED)(vars(row))
        problems, pictures = _open(row, output)
        return problems or _claims(row, pictures, classifier, num_slices)
    except KeyError as error:
        return [f"it does not say its {error}"]


def _open(row: Row, output: Path) -> tuple[list[str], dict[str, Tensor]]:
    """Lists unreadable and changed pictures of a row, and returns the readable ones, [C, H, W] in [-1, 1]."""
    problems, pictures, root = [], {}, output.resolve()
    for key, file in row.files.items():
        try:
            pictures[key], digest = images.read_saved(output / row.folder / file, root)
            if digest != (row.digests or {}).get(key):
                problems.append(f"{file} has other pixels than those that were saved")
        except images.UnreadableImageError as error:
            problems.append(f"{file} {error}")
    return problems, pictures


@torch.no_grad()
def _claims(row: Row, pictures: dict[str, Tensor], classifier: FrozenClassifier, num_slices: int) -> list[str]:
    """Lists the claims of a row that differ from what the classifier says of the saved pictures."""
    # Image, counterfactual and steps.
    names = list(classifier.class_names)
    if row.predicted not in names or row.target not in names:
        return ["its classes are not those of the classifier"]
    classes = ((row.predicted, names.index(row.predicted)), (row.target, names.index(row.target)))
    frames = [pictures[key] for key in ("image", "counterfactual") if key == "image" or key in pictures]
    num_single, num_steps = len(frames), len(row.curve["strength"]) if row.curve else 0
    if num_steps:
        if "steps" not in pictures or pictures["steps"].shape[2] % num_steps:
            return ["its strip of steps has not as many frames as its curve"]
        frames += pictures["steps"].chunk(num_steps, dim=2)
    device = next((value.device for value in classifier.buffers()), torch.device("cpu"))
    logits = classifier(torch.stack(frames).to(device)).float().cpu()

    # Probabilities.
    p = logits.softmax(dim=1)
    claimed = (row.p_predicted_before, row.p_target_before)
    problems = _differing("before", classes, p[0], claimed, ROUNDED_TOLERANCE)
    if "counterfactual" in pictures:
        claimed_saved = (row.p_predicted_saved, row.p_target_saved)
        problems += _differing("after saving", classes, p[1], claimed_saved, SAVED_TOLERANCE)
        problems += _flip(row, logits[1], classes[1][1]) + _change(row, pictures, num_slices)

    # Steps.
    for key, (name, index) in zip(("predicted", "target"), classes, strict=True):
        curve = torch.tensor(row.curve[key] if row.curve and num_steps else [])
        if len(curve) and float((p[num_single:, index] - curve).abs().max()) > SAVED_TOLERANCE:
            problems.append(f"the curve of {name!r} is not what the classifier says of the saved steps")
    return problems


def _differing(when: str, classes: Classes, p: Tensor, claimed: Sequence[float | None], tolerance: float) -> list[str]:
    """Compares the probabilities [K] of a picture with those that its row claims for two classes."""
    return [
        f"the probability of {name!r} {when} is {float(p[index]):.4f}, not {said}"
        for (name, index), said in zip(classes, claimed, strict=True)
        if said is None or abs(said - float(p[index])) > tolerance
    ]


def _flip(row: Row, logits: Tensor, target: int) -> list[str]:
    """Decides once more whether the saved counterfactual is a flip, by its logits [K]."""
    p = logits.softmax(dim=0)
    # On the boundary itself another machine may decide otherwise.
    clear = abs(float(p[target] - torch.cat([p[:target], p[target + 1 :]]).max())) > SAVED_TOLERANCE
    flips = bool(decides_for(logits[None], torch.tensor([target])))
    if row.flipped_saved is None or not clear or flips == row.flipped_saved:
        return []
    return [f"its saved counterfactual is {'a' if flips else 'no'} flip, which the row denies"]


def _change(row: Row, pictures: dict[str, Tensor], num_slices: int) -> list[str]:
    """Measures area and place of the change once more; rows of earlier versions do not claim them."""
    problems, before, after = [], pictures["image"][None], pictures["counterfactual"][None]
    area = float(changed_area(before, after))
    if row.changed_area is not None and abs(row.changed_area - area) > AREA_TOLERANCE:
        problems.append(f"its changed area is {area:.4f}, not {row.changed_area}")
    if "where" in vars(row):
        (found,), claimed = strongest_change(before, after, num_slices), (row.where, row.where_share)
        if found[0] != claimed[0] or abs((found[1] or 0) - (claimed[1] or 0)) > AREA_TOLERANCE:
            problems.append(f"the place of its change is {_place(found)}, not {_place(claimed)}")
    return problems


def _place(place: Place) -> str:
    where, share = place
    return f"{where or 'nowhere'}{'' if share is None else f' ({share:.4f})'}"
