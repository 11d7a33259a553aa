"""The atlas of an explainer's directions: what each of them does to the same few images, and to the decisions of all.

A method that learns a handful of directions for a whole data set is explained by them once, not image by image.
``write_atlas`` puts them beside the explanations, where the report finds them::

    atlas.json              everything but the pictures, which it names
    atlas/<p>-<d>.png       direction d of pair p, counted from 0: one row per image, one column per strength
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cfe_lightning import images
from cfe_lightning.explaining.folder import ATLAS_PICTURE, ATLAS_SCHEMA
from cfe_lightning.files.atomic import whole_file

#: Sides that a cell of a picture has at least, in pixels; smaller images are enlarged by a whole factor.
SMALLEST_CELL = 48


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AtlasDirection:
    """One ranked direction of one pair of classes. Shapes: N images, T strengths.

    Attributes:
        name: What it is called, as "direction 3, backwards".
        strengths: How far the images are moved, in standard deviations, ascending, 0 in the middle, [T].
        images: The same images moved by each strength, [N, T, C, H, W] in [-1, 1].
        probabilities: The classifier's probability of the target, [N, T].
        step: The search's step in standard deviations; its sign is the way to the target.
        degree: The length of that step in the latent space.
        mean_change: Mean change of the target's logit margin at that step.
        flipped: Share of the kept images that this direction flips alone.
        newly: Share of the kept images that it flips and no better ranked direction does.
        change: Mean absolute change of a pixel against the reconstruction, on [0, 1].
        inside: Share of the change within the known cause; None where that is not known.

    Raises:
        ValueError: If a shape disagrees, the strengths are not as said, or a number is not finite.
    """

    name: str
    strengths: Tensor
    images: Tensor
    probabilities: Tensor
    step: float
    degree: float
    mean_change: float
    flipped: float
    newly: float
    change: float
    inside: float | None = None

    def __post_init__(self) -> None:
        if self.images.ndim != 5 or not self.images.numel():
            raise ValueError(f"AtlasDirection.images must be [N, T, C, H, W], got {list(self.images.shape)}.")
        rows, columns = self.images.shape[:2]
        for name, value, shape in (
            ("images", self.images, self.images.shape),
            ("strengths", self.strengths, (columns,)),
            ("probabilities", self.probabilities, (rows, columns)),
        ):
            if value.shape != shape:
                raise ValueError(f"AtlasDirection.{name} must be {list(shape)}, got {list(value.shape)}.")
            if not bool(value.isfinite().all()):
                raise ValueError(f"AtlasDirection.{name} must be finite, got values that are not.")
        if columns % 2 == 0 or self.strengths[columns // 2] != 0 or not bool((self.strengths.diff() > 0).all()):
            raise ValueError(
                f"AtlasDirection.strengths must ascend with 0 in the middle, got {self.strengths.tolist()}."
            )
        for name, number in self.numbers().items():
            if number is not None and not math.isfinite(number):
                raise ValueError(f"AtlasDirection.{name} must be finite, got {number}.")

    def numbers(self) -> dict[str, float | None]:
        """The fields that are one number, by name."""
        names = ("step", "degree", "mean_change", "flipped", "newly", "change", "inside")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AtlasPair:
    """The directions that lead from one class to another.

    Attributes:
        source: Name of the class that is left.
        target: Name of the class that is asked for.
        num_images: Images of the source that were searched.
        num_kept: Those of them whose reconstruction is decided like the image.
        covered: Share of the kept images that at least one of the directions flips.
        directions: The directions, best first.
        curve: Steps in standard deviations and the share that is flipped at each, ascending; may be empty.

    Raises:
        ValueError: If a share is no share.
    """

    source: str
    target: str
    num_images: int
    num_kept: int
    covered: float
    directions: Sequence[AtlasDirection]
    curve: Sequence[tuple[float, float]] = ()

    def __post_init__(self) -> None:
        shares = {"covered": [self.covered], "curve": [share for _, share in self.curve]}
        for name, values in shares.items():
            if not all(0 <= value <= 1 for value in values):
                raise ValueError(f"AtlasPair.{name} must hold shares from 0 to 1, got {values}.")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Atlas:
    """The directions of every pair of classes.

    Attributes:
        title: The heading, as "Direction atlas".
        note: How the directions were found and what to keep in mind, in a sentence or two.
        pairs: The pairs, in the order of the report.
    """

    title: str
    note: str
    pairs: Sequence[AtlasPair]


def write_atlas(atlas: Atlas, output: Path) -> None:
    """Writes ``atlas.json`` and ``atlas/``; an earlier atlas and its pictures give way, other files there stay.

    Args:
        atlas: What to write.
        output: The output folder of an explanation run.
    """
    path, folder = output / "atlas.json", output / "atlas"
    # First of all, and written last: whatever kills this, no numbers stand beside the pictures of others.
    path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [_write_pair(pair, index, output) for index, pair in enumerate(atlas.pairs)]
    written = {output / direction["file"] for pair in pairs for direction in pair["directions"]}
    for stale in set(folder.iterdir()) - written:
        if ATLAS_PICTURE.fullmatch(stale.name):
            stale.unlink()
    content = {"schema": ATLAS_SCHEMA, "title": atlas.title, "note": atlas.note, "pairs": pairs}
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=1, allow_nan=False) + "\n")


def _write_pair(pair: AtlasPair, index: int, output: Path) -> dict[str, Any]:
    """Writes the pictures of a pair and returns its part of atlas.json."""
    directions = []
    for rank, direction in enumerate(pair.directions):
        # Counted, because class names may hold anything.
        file = f"atlas/{index}-{rank}.png"
        picture, factor = _picture(direction.images)
        images.save_image(picture, output / file)
        rows, columns = direction.images.shape[:2]
        directions.append(
            {
                "name": direction.name,
                "file": file,
                "cell": [picture.shape[2] // columns, picture.shape[1] // rows],
                "enlarged": factor,
                "strengths": [_number(value) for value in direction.strengths.tolist()],
                "probabilities": [[_number(value) for value in row] for row in direction.probabilities.tolist()],
                **{name: None if value is None else _number(value) for name, value in direction.numbers().items()},
            }
        )
    return {
        "source": pair.source,
        "target": pair.target,
        "num_images": pair.num_images,
        "num_kept": pair.num_kept,
        "covered": _number(pair.covered),
        "curve": [[_number(step), _number(share)] for step, share in pair.curve],
        "directions": directions,
    }


def _picture(moved: Tensor) -> tuple[Tensor, int]:
    """Images [N, T, C, H, W] as one picture, [C, N * H * f, T * W * f], and its enlargement f."""
    factor = max(1, math.ceil(SMALLEST_CELL / min(moved.shape[-2:])))
    table = moved.detach().float().cpu().permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return table.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2), factor


def _number(value: float) -> float:
    """Six significant digits: what the measurement is good for."""
    return float(f"{value:.6g}")
