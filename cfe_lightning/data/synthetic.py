"""Shapes with a known cause: images generated from seeds, each with its exact counterfactual and mask.

Every image is nuisance plus cue. The nuisance (background gradient, body ellipse with colour and faint pattern, a
distractor blob outside the body, noise) does not depend on the class; only the cue does. So the image of any other
class is the same scene with another cue, and an explanation has a right answer. No value ever reaches -1 or 1, so
nothing is clamped: image minus counterfactual is exactly cue minus cue.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cfe_lightning.data.base import ImageData, Sample, Split
from cfe_lightning.images import save_image

Cue = Literal["lesion", "colour", "texture"]
LesionPlace = Literal["landmark", "anywhere"]

#: A change of more than half a grey level survives saving as 8 bit, so the pixel counts as different.
VISIBLE = 1.0 / 255.0
#: Names and hue angles in degrees, of equal lightness, per number of classes.
_HUES = {
    2: (("rose", 0.0), ("teal", 180.0)),
    3: (("rose", 0.0), ("green", 120.0), ("blue", 240.0)),
    4: (("rose", 0.0), ("lime", 90.0), ("teal", 180.0), ("violet", 270.0)),
}
_LESIONS = ("no_lesion", "one_lesion", "two_lesions", "three_lesions")
_BLOB_HEIGHT = 0.72
_NOISE = 0.02
#: Separates the random numbers that choose wrong cues from those of the scenes.
_WRONG_CUES = 0x5BD1E995


class SyntheticShapes(ImageData):
    """Images of a body in which one known cue decides the class.

    The classes take turns, so ``balanced`` changes nothing. Flips change the directions of three or four textures, and
    quarter turns those of all textures.

    Args:
        image_size: Side of the images in pixels, 28 to 256.
        cue: Cue that decides the class: ``lesion``, bright blobs inside the body (sparse, additive; class k has k
            blobs); ``colour``, the hue of the body (dense); ``texture``, the direction of stripes in it (dense, zero
            mean). ``colour`` needs 3 channels.
        num_classes: Number of classes, 2 to 4.
        cue_size: Factor of the lesion's radius, the colour's saturation or the stripes' amplitude, 0.5 to 1.6.
        lesion_place: Place of the lesions: ``landmark`` (upper right of the body's centre, then a third of a turn on,
            with some jitter) or ``anywhere`` around the centre. Anywhere, a healthy image does not tell the place of
            its lesion, so no explanation can be right about it: the exact counterfactual is one of many.
        shortcut: Probability that a small mark sits in the corner that belongs to the class, else in the corner of
            another class; None plants no mark. The mark is part of the nuisance: the counterfactual keeps it.
        cue_agreement: Probability that an image shows the cue of its class, else that of another class, as if it were
            labelled wrongly. Below 1 a mark can tell more than the cue, and classifiers come to use it.
        num_train: Number of training images.
        num_val: Number of validation images.
        num_test: Number of test images.
        seed: Seed of the images; another seed gives other images.
        loading: Options of ``ImageData``.

    Raises:
        ValueError: If an argument is outside its range, or the cue cannot be drawn with these channels.
    """

    def __init__(
        self,
        *,
        image_size: int = 32,
        cue: Cue = "lesion",
        num_classes: int = 2,
        cue_size: float = 1.0,
        lesion_place: LesionPlace = "landmark",
        shortcut: float | None = None,
        cue_agreement: float = 1.0,
        num_train: int = 4000,
        num_val: int = 500,
        num_test: int = 500,
        seed: int = 0,
        **loading: Any,
    ) -> None:
        super().__init__(image_size=image_size, **loading)
        self.class_names = _class_names(cue, num_classes)
        self.cue = cue
        self.cue_size = cue_size
        self.lesion_place = lesion_place
        self.shortcut = shortcut
        self.cue_agreement = cue_agreement
        self.seed = seed
        self.counts: dict[Split, int] = {"train": num_train, "val": num_val, "test": num_test}
        _check(self)

    def dataset(self, split: Split) -> Shapes:
        """Returns the images of one split with ``mask``, ``counterfactual`` and, with a shortcut, ``mark``."""
        return Shapes(
            split=split, count=self.counts[split], image_size=self.image_size, channels=self.channels, seed=self.seed,
            class_names=self.class_names, cue=self.cue, cue_size=self.cue_size, lesion_place=self.lesion_place,
            shortcut=self.shortcut, cue_agreement=self.cue_agreement,
        )  # fmt: skip

    def write_folder(self, split: Split, folder: str | Path, count: int | None = None) -> list[Path]:
        """Writes images as ``<folder>/<class>/<split>_<index>.png``, as ``ImageFolder`` reads them; returns the paths.

        Args:
            split: Split to write.
            folder: Folder of the class folders, created if missing.
            count: Number of images, from the first one on; None writes the whole split.
        """
        shapes = self.dataset(split)
        paths = []
        for index in range(len(shapes) if count is None else min(count, len(shapes))):
            sample = shapes[index]
            paths.append(Path(folder) / f"{sample['name']}.png")
            save_image(sample["image"], paths[-1])
        return paths


def _class_names(cue: Cue, num_classes: int) -> tuple[str, ...]:
    """Returns the names of the classes; raises a ValueError if there is no such cue or number of classes."""
    if cue not in get_args(Cue):
        raise ValueError(f"cue must be one of {', '.join(get_args(Cue))}, got {cue!r}.")
    if not 2 <= num_classes <= 4:
        raise ValueError(f"num_classes must be 2, 3 or 4, got {num_classes}.")
    if cue == "lesion":
        return ("healthy", "lesion") if num_classes == 2 else _LESIONS[:num_classes]
    if cue == "colour":
        return tuple(name for name, _ in _HUES[num_classes])
    return tuple(f"stripes_{180 * k // num_classes}" for k in range(num_classes))


def _check(data: SyntheticShapes) -> None:
    """Raises a ValueError at the first argument outside its range."""
    if not 28 <= data.image_size <= 256:
        raise ValueError(f"SyntheticShapes draws images of 28 to 256 pixels, got image_size={data.image_size}.")
    if data.cue == "colour" and data.channels == 1:
        raise ValueError("The cue 'colour' is the body's hue and needs channels=3: choose cue='lesion' or 'texture'.")
    if not 0.5 <= data.cue_size <= 1.6:
        raise ValueError(f"cue_size must be from 0.5 to 1.6, got {data.cue_size}.")
    if data.lesion_place not in get_args(LesionPlace):
        raise ValueError(f"lesion_place must be one of {', '.join(get_args(LesionPlace))}, got {data.lesion_place!r}.")

    # Probabilities and counts.
    if data.shortcut is not None and not 0 <= data.shortcut <= 1:
        raise ValueError(f"shortcut is a probability from 0 to 1, or null for no mark, got {data.shortcut}.")
    if not 0 <= data.cue_agreement <= 1:
        raise ValueError(f"cue_agreement is a probability from 0 to 1, got {data.cue_agreement}.")
    for split, count in data.counts.items():
        if not 1 <= count <= 2**30:
            raise ValueError(f"num_{split} must be at least 1, got {count}.")


@dataclass(kw_only=True, slots=True)
class _Scene:
    """One image without its cue."""

    base: Tensor  # [C, H, W], nuisance
    body: Tensor  # [H, W] in [0, 1], soft mask of the body
    across: Tensor  # [H, W], distance to the right of the body's centre, as a share of the image's side
    down: Tensor  # [H, W], distance below the body's centre, as a share of the image's side
    cue_draws: list[float]  # uniform numbers that place the cue, the same for every class
    axes: tuple[float, float, float]  # semi-axes (share of the side) and rotation (radians) of the body
    corner: int  # class of the corner with the mark, if there is a shortcut


@dataclass(kw_only=True, eq=False)
class Shapes(Dataset[Sample]):
    """One split of ``SyntheticShapes``, with the same options; image ``index`` depends on seed, split and index alone.

    Attributes:
        labels: Class of each image, [N] int64: the classes take turns.
    """

    split: Split
    count: int
    image_size: int
    channels: int
    cue: Cue
    class_names: tuple[str, ...]
    cue_size: float
    lesion_place: LesionPlace
    shortcut: float | None
    seed: int
    cue_agreement: float = 1.0

    def __post_init__(self) -> None:
        self.labels = torch.arange(self.count) % len(self.class_names)
        # Each split has 2**30 of the generator's 32-bit seeds to itself, so splits share no image.
        start = int.from_bytes(hashlib.sha256(str(self.seed).encode()).digest()[:4], "big")
        self._first_seed = start + get_args(Split).index(self.split) * 2**30
        centres = (torch.arange(self.image_size) + 0.5) / self.image_size
        self._x = centres[None, :]
        self._y = centres[:, None]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        """Returns image, label, name, mask [1, H, W] and counterfactual, the same scene as class (label + 1) % K.

        An image with the cue of another class has the counterfactual of that class, as if it were labelled correctly.
        With a shortcut, ``mark`` [1, H, W] in {0, 1} covers the places of marks in all K corners.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside the {len(self)} images.")

        # The same scene with two cues.
        label = int(self.labels[index])
        scene = self._scene(index, label)
        shown = self._shown(index, label)
        image = self._draw(scene, shown)
        counterfactual = self._draw(scene, (shown + 1) % len(self.class_names))

        # Truth.
        difference = (image - counterfactual).abs().amax(dim=0, keepdim=True)
        sample: Sample = {
            "image": image,
            "label": label,
            "name": f"{self.class_names[label]}/{self.split}_{index:06d}",
            "mask": (difference > VISIBLE).float(),
            "counterfactual": counterfactual,
        }
        if self.shortcut is not None:
            sample["mark"] = self._mark_places()
        return sample

    def render(self, index: int, label: int, corner: int | None = None) -> Tensor:
        """Draws a scene with the cue of any class, [C, H, W]; with the cue it shows it is the image itself.

        Args:
            index: Index of the scene.
            label: Class of the cue.
            corner: Class of the corner that gets the mark, all else bit for bit equal; None does not move the mark.

        Raises:
            ValueError: If a corner is given for images without a mark, or for a class that does not exist.
        """
        if corner is not None and self.shortcut is None:
            raise ValueError(f"These images have no mark to put into corner {corner}: set shortcut from 0 to 1.")
        if corner is not None and not 0 <= corner < len(self.class_names):
            raise ValueError(f"corner is the number of one of {len(self.class_names)} classes, got {corner}.")
        return self._draw(self._scene(index, int(self.labels[index]), corner), label)

    def mark_corner(self, index: int) -> int:
        """Returns the class of the corner with the mark of image ``index``; a ValueError if images have no mark."""
        if self.shortcut is None:
            raise ValueError("These images have no mark: set shortcut from 0 to 1.")
        return self._scene(index, int(self.labels[index])).corner

    def _shown(self, index: int, label: int) -> int:
        """Returns the class of the cue that image ``index`` shows."""
        if self.cue_agreement == 1:
            return label
        # A generator of its own, so the scene draws the same numbers as without wrong cues.
        generator = torch.Generator().manual_seed(_scrambled(_scrambled(self._first_seed + index) ^ _WRONG_CUES))
        agrees, which = torch.rand(2, generator=generator).tolist()
        num_classes = len(self.class_names)
        return label if agrees < self.cue_agreement else (label + 1 + int(which * (num_classes - 1))) % num_classes

    def _scene(self, index: int, label: int, corner: int | None = None) -> _Scene:
        """Draws the nuisance of an image; the order of the draws decides on every image and must stay."""
        generator = torch.Generator().manual_seed(_scrambled(self._first_seed + index))
        draws = iter(torch.rand(48, generator=generator).tolist())

        def between(low: float, high: float) -> float:
            return low + (high - low) * next(draws)

        # Body: it moves away from the distractor's corner, so the two never meet.
        corner_x, corner_y = (1 if next(draws) < 0.5 else -1 for _ in range(2))
        centre_x, centre_y = 0.5 - corner_x * between(0, 0.06), 0.5 - corner_y * between(0, 0.06)
        axes = (between(0.27, 0.33), between(0.27, 0.33), between(0, math.pi))
        across, down = self._x - centre_x, self._y - centre_y
        body = self._ellipse(across, down, axes)

        # Background: a tinted gradient.
        heading, slope = between(0, 2 * math.pi), between(0, 0.15)
        ramp = ((self._x - 0.5) * math.cos(heading) + (self._y - 0.5) * math.sin(heading)) * slope * math.sqrt(2)
        background = ramp + self._colour(between(-0.72, -0.45), between(0, 360), 0.05)

        # Body: one colour and an egg-crate pattern without a preferred direction. Under the cue `colour` the cue itself
        # carries the hue; elsewhere a weak random hue is nuisance.
        saturation = 0.0 if self.cue == "colour" else 0.1
        tone = self._colour(between(-0.3, 0.02), between(0, 360), saturation)
        turn, wave = between(0, math.pi), 2 * math.pi * between(3.0, 4.5)
        along = across * math.cos(turn) + down * math.sin(turn)
        athwart = down * math.cos(turn) - across * math.sin(turn)
        pattern = 0.05 * torch.sin(along * wave + between(0, 6.28)) * torch.sin(athwart * wave + between(0, 6.28))
        base = background + body * (tone + pattern - background)

        # Distractor: half of the images have one; it looks like the lesion.
        spot_x = self._x - 0.5 - corner_x * between(0.34, 0.37)
        spot_y = self._y - 0.5 - corner_y * between(0.34, 0.37)
        radius = self._radius(next(draws))
        if next(draws) < 0.5:
            base = base + _BLOB_HEIGHT * _blob(spot_x, spot_y, radius)

        # Mark and noise.
        drawn = self._corner(label, next(draws), next(draws))
        corner = drawn if corner is None else corner
        if self.shortcut is not None:
            base = base + self._mark(corner)
        noise = torch.randn(self.channels, self.image_size, self.image_size, generator=generator)
        base = base + noise.clamp_(-3, 3).mul_(_NOISE)
        return _Scene(base=base, body=body, across=across, down=down, cue_draws=list(draws), axes=axes, corner=corner)

    def _draw(self, scene: _Scene, label: int) -> Tensor:
        """Adds the cue of a class to a scene, [C, H, W]."""
        if self.cue == "lesion":
            return scene.base + self._lesions(scene, label)
        first, second = scene.cue_draws[:2]
        if self.cue == "colour":
            hue = _HUES[len(self.class_names)][label][1] + 30 * (first - 0.5)
            return scene.base + scene.body * self._colour(0.0, hue, (0.2 + 0.08 * second) * self.cue_size)
        angle = math.pi * (label / len(self.class_names) + (first - 0.5) / 12)
        # Class 0 has upright stripes: brightness changes along x. A bright stripe crosses the body's centre in any
        # direction, so the image tells the places of another class's stripes.
        phase = (scene.across * math.cos(angle) + scene.down * math.sin(angle)) * (2 * math.pi * (7 + 2 * second))
        return scene.base + scene.body * (torch.cos(phase) * (0.28 * self.cue_size))

    def _lesions(self, scene: _Scene, count: int) -> Tensor:
        """Draws the first ``count`` of three blobs around the centre, [H, W]; their maximum keeps overlaps in range."""
        wide, high, turn = scene.axes
        first_angle, *draws = scene.cue_draws
        if self.lesion_place == "landmark":
            # The body's own rotation is undone, because a nearly round body does not show it.
            first_angle = -1 / 8 - turn / (2 * math.pi) + 0.06 * (first_angle - 0.5)

        # Size: one blob may lie anywhere except at the rim; several are smaller and keep to their third of the body.
        single = len(self.class_names) == 2
        scale, nearest, spread, jitter = (1.0, 0.3, 0.18, 0.3) if single else (0.75, 0.46, 0.08, 0.1)

        # Blobs.
        height = torch.zeros(self.image_size, self.image_size)
        for k in range(count):
            angle = 2 * math.pi * (first_angle + (k + jitter * (draws[3 * k] - 0.5)) / 3)
            reach = nearest + spread * draws[3 * k + 1]
            u, v = wide * reach * math.cos(angle), high * reach * math.sin(angle)
            x, y = u * math.cos(turn) - v * math.sin(turn), u * math.sin(turn) + v * math.cos(turn)
            blob = _blob(scene.across - x, scene.down - y, self._radius(draws[3 * k + 2]) * scale)
            height = torch.maximum(height, blob)
        return height * _BLOB_HEIGHT

    def _radius(self, draw: float) -> float:
        """Returns the radius of a lesion or distractor; only the cue ``lesion`` scales it."""
        return (0.107 + 0.016 * draw) * (self.cue_size if self.cue == "lesion" else 1.0)

    def _ellipse(self, across: Tensor, down: Tensor, axes: tuple[float, float, float]) -> Tensor:
        """Draws an ellipse, [H, W]: 1 inside, 0 outside, with an edge of about 1.5 pixels."""
        wide, high, turn = axes
        u = (across * math.cos(turn) + down * math.sin(turn)) / wide
        v = (down * math.cos(turn) - across * math.sin(turn)) / high
        inside = 1 - torch.sqrt(u * u + v * v)
        return (inside * (min(wide, high) * self.image_size / 1.5) + 0.5).clamp_(0, 1)

    def _colour(self, tone: float, hue: float, saturation: float) -> Tensor:
        """Returns a colour with mean ``tone`` over its channels, [C, 1, 1]; a single channel gets the tone alone."""
        if self.channels == 1:
            return torch.full((1, 1, 1), tone)
        channels = [tone + saturation * math.cos(math.radians(hue - 120 * c)) for c in range(3)]
        return torch.tensor(channels).view(3, 1, 1)

    def _corner(self, label: int, corner_draw: float, agrees_draw: float) -> int:
        """Returns the class of the mark's corner: the image's own, or by chance another one."""
        num_classes = len(self.class_names)
        other = (label + 1 + int(corner_draw * (num_classes - 1))) % num_classes
        return label if agrees_draw < (self.shortcut or 0.0) else other

    def _mark(self, corner: int) -> Tensor:
        """Draws a small cross in the corner that belongs to class ``corner``, [H, W]."""
        mark = torch.zeros(self.image_size, self.image_size)
        patch = mark[self._patch(corner)]
        stroke = slice((len(patch) - 1) // 3, len(patch) - (len(patch) - 1) // 3)
        patch[stroke] = patch[:, stroke] = 0.6
        return mark

    def _patch(self, corner: int) -> tuple[slice, slice]:
        """Returns rows and columns of a corner's mark: top left, top right, bottom left, bottom right."""
        arm, size = max(round(self.image_size * 0.09), 3), self.image_size
        near, far = slice(1, 1 + arm), slice(size - 1 - arm, size - 1)
        return near if corner in (0, 1) else far, near if corner in (0, 2) else far

    def _mark_places(self) -> Tensor:
        """Returns the squares of all classes' marks, [1, H, W] in {0, 1}."""
        places = torch.zeros(1, self.image_size, self.image_size)
        for corner in range(len(self.class_names)):
            places[0][self._patch(corner)] = 1.0
        return places


def _scrambled(number: int) -> int:
    """Maps 32-bit numbers one to one (the finaliser of MurmurHash3): neighbouring indices get unrelated seeds."""
    number &= 0xFFFFFFFF
    number = ((number ^ (number >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    number = ((number ^ (number >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return number ^ (number >> 16)


def _blob(x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Draws 1 - (distance / radius)^4, cut off at 0: a flat top, a soft edge and exact zeros outside, [H, W]."""
    square = (x * x + y * y) / radius**2
    return (1 - square * square).clamp_min_(0)
