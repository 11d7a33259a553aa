"""The atlas of an explainer's directions: what each of them does to the same few images, and to the decisions of all.

A method that learns a handful of directions for a whole data set is explained by them once, not image by image.
``write_atlas`` puts them beside the explanations, where the report finds them::

    atlas.json              everything but the pictures, which it names
    atlas/<p>-<d>.png       direction d of pair p, counted from 0: one row per image, one column per strength
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


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
