"""Measures a change on the pixels that are saved: its area, its place, and whether its flip survives mild treatment.

Images are [B, C, H, W] in [-1, 1], maps [B, 1, H, W] without negative values; see ``docs/evaluating.md``.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.explanation import Explanation
from cfe_lightning.metrics import counterfactual as measures
from cfe_lightning.metrics.robustness import TRANSFORMATIONS, survives

#: The ninths of a picture, row by row.
REGIONS = ("upper left", "top", "upper right", "left", "centre", "right", "lower left", "bottom", "lower right")
SPREAD = "spread over the picture"
#: A region is named from this many times its share of the area.
CONCENTRATION = 2.0
#: Mild transformations that a flip is tried under, without the rounding to 8 bits, which the saved pixels have passed.
MILD = tuple(name for name in TRANSFORMATIONS if name != "quant8")
#: Width of a picture's frame as a share of its height and of its width.
FRAME = 1 / 8

# 8-bit levels are integers, so "> 8" equals "> 8.5", which is safe against float rounding.
_VISIBLE = 8.5 / 255
# Decimals of a region's share of a map.
_DECIMALS = 9

#: Name of a region and its share of a map: ``SPREAD`` and None without a strongest region, None twice for a zero map.
Place = tuple[str | None, float | None]


class SavedChange(NamedTuple):
    """Measurements of one saved change.

    Attributes:
        attribution: Region that holds most of the attribution.
        area: Share of pixels with a channel that changed by more than eight levels; None without a counterfactual.
        place: Region that holds most of the change.
        survives: Mild transformations under which the flip stays. None where nothing flipped, or where the image's own
            decision survives no transformation; one that it does not survive is in neither list.
        lost_under: Mild transformations that undo the flip.
    """

    attribution: Place = (None, None)
    area: float | None = None
    place: Place = (None, None)
    survives: list[str] | None = None
    lost_under: list[str] | None = None


def measure(
    explanation: Explanation, classifier: FrozenClassifier, flipped: Tensor | None, num_slices: int = 1
) -> list[SavedChange]:
    """Measures the saved change and the attribution of every image.

    Args:
        explanation: The batch's explanation.
        classifier: Judges the transformed pixels.
        flipped: True where the saved counterfactual is a flip, [B] bool; None without counterfactuals.
        num_slices: Number of slices in an image that is a montage, otherwise 1.
    """
    # On the CPU, where the files come from: other devices divide otherwise in the last place, or know no float64.
    attributed = strongest_region(_made_finite(explanation.attribution).cpu().clamp_min(0), num_slices)
    if explanation.counterfactual is None or flipped is None:
        return [SavedChange(attribution) for attribution in attributed]

    # Area and place.
    both = (explanation.image, explanation.counterfactual)
    before, after = (images.saved(_made_finite(image).cpu()) for image in both)
    areas, places = changed_area(before, after).tolist(), strongest_change(before, after, num_slices)

    # Robustness of the flips.
    chosen = flipped.nonzero()[:, 0].tolist()
    survival = dict(zip(chosen, _survival(explanation, classifier, chosen), strict=True))
    measured = enumerate(zip(attributed, areas, places, strict=True))
    return [SavedChange(*found, *survival.get(index, (None, None))) for index, found in measured]


def changed_area(before: Tensor, after: Tensor) -> Tensor:
    """Returns the share of pixels with a channel that changed by more than eight levels, of 8-bit images, [B]."""
    return measures.changed_area(before, after, _VISIBLE)


def strongest_change(before: Tensor, after: Tensor, num_slices: int = 1) -> list[Place]:
    """Finds the ``strongest_region`` of the change between 8-bit images."""
    return strongest_region(measures.change_map(before, after), num_slices)


def strongest_region(strength: Tensor, num_slices: int = 1) -> list[Place]:
    """Finds the ninth of the picture that holds most of a map, and its share of the whole.

    Args:
        strength: The map, [B, 1, H, W].
        num_slices: Number of slices in a montage, otherwise 1. The slices are laid upon each other, so that a ninth is
            one of every slice.

    Returns:
        B pairs: a name of ``REGIONS`` and the share; ``SPREAD`` and None where the strongest ninth holds less than
        twice its share of the area; None twice where the map is zero.
    """
    # Share of every ninth.
    strength = images.cut_montage(strength.double(), num_slices).sum(dim=1)
    height, width = strength.shape[-2:]
    rows, columns = _thirds(height).to(strength.device), _thirds(width).to(strength.device)
    mass = torch.einsum("bhw,ih,jw->bij", strength[:, 0], rows, columns).flatten(1)
    area = torch.einsum("ih,jw->ij", rows, columns).flatten() / (height * width)
    total = mass.sum(dim=1)
    # Rounded, so that a tie on paper is not decided by the last digit, which depends on the machine.
    shares = (mass / total.clamp_min(torch.finfo(torch.float64).tiny)[:, None]).round(decimals=_DECIMALS)

    # Strongest ninth.
    found: list[Place] = []
    for whole, share, best in zip(total.tolist(), shares, shares.argmax(dim=1).tolist(), strict=True):
        if whole <= 0:
            found.append((None, None))
        elif share[best] < CONCENTRATION * area[best] - 10**-_DECIMALS:
            found.append((SPREAD, None))
        else:
            found.append((REGIONS[best], float(share[best])))
    return found


@lru_cache(maxsize=8)
def frame_mask(height: int, width: int, num_slices: int = 1) -> Tensor:
    """Marks the pixels within an eighth of the edge, at least one pixel, of every slice of a montage, [H, W] bool.

    The same call returns the same tensor, which must not be changed.
    """
    side = images.montage_side(num_slices)
    inside = torch.zeros(height // side, width // side, dtype=torch.bool)
    down, across = (max(1, round(length * FRAME)) for length in inside.shape)
    inside[down : inside.shape[0] - down, across : inside.shape[1] - across] = True
    return (~inside).repeat(side, side)


def _thirds(length: int) -> Tensor:
    """Marks the third of a side that every pixel's centre lies in, one row per third, [3, length]."""
    third = ((torch.arange(length) + 0.5) * 3 / length).long()
    return torch.nn.functional.one_hot(third, 3).T.double()


def _survival(explanation: Explanation, classifier: FrozenClassifier, chosen: list[int]) -> list[Any]:
    """Returns ``survives`` and ``lost_under`` of the chosen images, judged in one call for each transformation."""
    if not chosen:
        return []
    assert explanation.counterfactual is not None, "an image that flipped has a counterfactual"
    both = (explanation.image, explanation.counterfactual)
    before, after = (images.saved(_made_finite(image[chosen])) for image in both)

    # Every transformation, then every image.
    source, target = explanation.predicted[chosen], explanation.target[chosen]
    tried = survives(classifier, before, after, source, target, MILD)
    decided = {name: (kept.tolist(), flips.tolist()) for name, (kept, flips) in tried.items()}
    lists: list[Any] = []
    for index in range(len(chosen)):
        stays = {name: flips[index] for name, (kept, flips) in decided.items() if kept[index]}
        kinds = ([name for name, stay in stays.items() if stay == kind] for kind in (True, False))
        lists.append(tuple(kinds) if stays else (None, None))
    return lists


def _made_finite(image: Tensor) -> Tensor:
    """Replaces values that are not finite: their image fails, but not the batch that it is in."""
    return image.detach().float().nan_to_num(nan=0.0, posinf=1.0, neginf=-1.0)
