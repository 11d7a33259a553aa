"""The atlas of an explainer: its directions for a whole data set, shown on the same few images, with their effects.

A method that learns a few directions for a whole data set is explained by them once, not image by image.
``explaining.atlas.write_atlas`` stores them for the report::

    atlas.json          everything except the pictures, which it names
    atlas/<p>-<d>.png   direction d of pair p, both from 0: one row per image, one column per strength

Shapes: N images, T strengths, C channels, H, W pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AtlasDirection:
    """One ranked direction of one pair of classes.

    Attributes:
        name: Display name, for example "direction 3, backwards".
        strengths: Lengths of the moves in standard deviations, ascending, with 0 in the middle, [T].
        images: The same images moved by each strength, [N, T, C, H, W] in [-1, 1].
        probabilities: The classifier's probability of the target, [N, T].
        step: Step of the search in standard deviations; its sign leads to the target.
        degree: Length of the step in the latent space.
        mean_change: Mean change of the target's logit margin by the step.
        flipped: Share of the kept images that this direction flips by itself.
        newly: Share of the kept images that this direction flips and no better ranked one does.
        change: Mean absolute change per pixel from the reconstruction, on the [0, 1] scale.
        inside: Share of the change within the known cause; None where the cause is not known.

    Raises:
        ValueError: If a shape disagrees, the strengths do not ascend around 0, or a number is not finite.
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
        # Shapes and finite values.
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
        # Strengths.
        if columns % 2 == 0 or self.strengths[columns // 2] != 0 or not bool((self.strengths.diff() > 0).all()):
            given = self.strengths.tolist()
            raise ValueError(f"AtlasDirection.strengths must ascend with 0 in the middle, got {given}.")
        # Numbers.
        for name, number in self.numbers().items():
            if number is not None and not math.isfinite(number):
                raise ValueError(f"AtlasDirection.{name} must be finite, got {number}.")

    def numbers(self) -> dict[str, float | None]:
        """Returns the scalar fields by name."""
        names = ("step", "degree", "mean_change", "flipped", "newly", "change", "inside")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AtlasPair:
    """The directions that lead from one class to another.

    Attributes:
        source: Name of the class that the directions leave.
        target: Name of the target class.
        num_images: Number of images of the source class in the search.
        num_kept: Number of these images with a reconstruction of the same decision.
        covered: Share of the kept images that at least one of the directions flips.
        directions: The directions, best first.
        curve: Pairs of a step in standard deviations and the share of images that it flips, ascending; may be empty.

    Raises:
        ValueError: If a share lies outside [0, 1].
    """

    source: str
    target: str
    num_images: int
    num_kept: int
    covered: float
    directions: Sequence[AtlasDirection]
    curve: Sequence[tuple[float, float]] = ()

    def __post_init__(self) -> None:
        for name, values in (("covered", [self.covered]), ("curve", [share for _, share in self.curve])):
            if not all(0 <= value <= 1 for value in values):
                raise ValueError(f"AtlasPair.{name} must hold shares from 0 to 1, got {values}.")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Atlas:
    """The directions of every pair of classes.

    Attributes:
        title: Heading, for example "Direction atlas".
        note: One or two sentences about the search and its limits.
        pairs: The pairs of classes in the order of the report.
    """

    title: str
    note: str
    pairs: Sequence[AtlasPair]
