"""What is measured of a change on the pixels that are saved: how much of the picture, where, and how firm its flip is.

Source: evaluation, sections 3.4 and 4.3. Images [B, C, H, W] in [-1, 1], maps [B, 1, H, W], not negative.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.explanation import Explanation
from cfe_lightning.metrics import counterfactual as measures
from cfe_lightning.metrics.robustness import TRANSFORMATIONS, survives

#: The ninths of a picture, row by row.
REGIONS = (
    *("upper left", "top", "upper right"),
    *("left", "centre", "right"),
    *("lower left", "bottom", "lower right"),
)
SPREAD = "spread over the picture"
#: A region is named from this many times its share of the area.
CONCENTRATION = 2.0
#: The mild transformations that a flip is tried under; 8 bits it has already gone through.
MILD = tuple(name for name in TRANSFORMATIONS if name != "quant8")
#: How far from the edge the frame of a picture reaches, as a share of its height and width.
FRAME = 1 / 8

# Saved levels are whole: more than eight of them is more than eight and a half, which no rounding of floats touches.
_VISIBLE = 8.5 / 255
# Of a share of a map.
_DECIMALS = 9


def measure(
    explanation: Explanation, classifier: FrozenClassifier, flipped: Tensor | None, num_slices: int = 1
) -> list[dict[str, Any]]:
    """What the manifest says of every saved change, besides the decisions.

    Args:
        explanation: The batch's explanation.
        classifier: Judges the transformed pixels.
        flipped: Whose saved counterfactual is a flip, [B] bool; None where there are no counterfactuals.
        num_slices: Of images that are montages.

    Returns:
        B dictionaries: ``changed_area``, the share of pixels of which a channel changed by more than eight levels;
        ``where``, the region that holds most of the change, and ``where_share``, how much of it (see
        ``strongest_region``); ``attribution_where`` and ``attribution_share`` likewise; ``survives`` and
        ``lost_under``, the mild transformations under which the flip stays and does not. A transformation that the
        image's own decision does not survive is in neither list; both are None where nothing flipped or no
        transformation leaves the image's decision. What needs a counterfactual is None without one.
    """
    rows: list[dict[str, Any]] = [
        {"changed_area": None, "where": None, "where_share": None, "survives": None, "lost_under": None}
        for _ in range(len(explanation))
    ]
    # On the CPU, where the files come from: other devices divide otherwise in the last place, or know no float64.
    attribution = _made_finite(explanation.attribution).cpu().clamp_min(0)
    for row, (where, share) in zip(rows, strongest_region(attribution, num_slices), strict=True):
        row |= {"attribution_where": where, "attribution_share": share}
    if explanation.counterfactual is None or flipped is None:
        return rows
    before, after = (
        images.saved(_made_finite(image).cpu()) for image in (explanation.image, explanation.counterfactual)
    )
    places = strongest_change(before, after, num_slices)
    for row, area, (where, share) in zip(rows, changed_area(before, after).tolist(), places, strict=True):
        row |= {"changed_area": area, "where": where, "where_share": share}
    chosen = flipped.nonzero()[:, 0].tolist()
    for index, found in zip(chosen, _survival(explanation, classifier, chosen), strict=True):
        rows[index] |= found
    return rows


def changed_area(before: Tensor, after: Tensor) -> Tensor:
    """Share of pixels of which a channel changed by more than eight levels, of images with whole levels, [B]."""
    return measures.changed_area(before, after, _VISIBLE)


def strongest_change(before: Tensor, after: Tensor, num_slices: int = 1) -> list[tuple[str | None, float | None]]:
    """``strongest_region`` of the change between images with whole levels."""
    return strongest_region(measures.change_map(before, after), num_slices)


def strongest_region(strength: Tensor, num_slices: int = 1) -> list[tuple[str | None, float | None]]:
    """The ninth of the picture that holds most of a map [B, 1, H, W], and its share of the whole.

    Args:
        strength: The map.
        num_slices: Of a montage; its slices are laid upon each other, so that a ninth is one of every slice.

    Returns:
        B pairs: a name of ``REGIONS`` and the share; ``SPREAD`` and None where the strongest ninth holds less than
        twice its share of the area; None twice where the map is zero.
    """
    strength = images.cut_montage(strength.double(), num_slices).sum(dim=1)
    height, width = strength.shape[-2:]
    rows, columns = _thirds(height).to(strength.device), _thirds(width).to(strength.device)
    mass = torch.einsum("bhw,ih,jw->bij", strength[:, 0], rows, columns).flatten(1)
    area = torch.einsum("ih,jw->ij", rows, columns).flatten() / (height * width)
    total = mass.sum(dim=1)
    # Rounded: what is equal on paper is not decided by the last digit, which depends on the machine.
    shares = (mass / total.clamp_min(torch.finfo(torch.float64).tiny)[:, None]).round(decimals=_DECIMALS)
    found: list[tuple[str | None, float | None]] = []
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
    """Which pixels lie within an eighth of the edge, at least one pixel, [H, W] bool; of every slice of a montage.

    Whoever asks again gets the same tensor: it is not to be changed.
    """
    side = images.montage_side(num_slices)
    down, across = (_near_the_ends(length // side) for length in (height, width))
    return (down[:, None] | across[None, :]).repeat(side, side)


def _near_the_ends(length: int) -> Tensor:
    reach = max(1, round(length * FRAME))
    place = torch.arange(length)
    return (place < reach) | (place >= length - reach)


def _thirds(length: int) -> Tensor:
    """Which third of a side every pixel's centre lies in, one row per third, [3, length]."""
    third = ((torch.arange(length) + 0.5) * 3 / length).long()
    return torch.nn.functional.one_hot(third, 3).T.double()


def _survival(explanation: Explanation, classifier: FrozenClassifier, chosen: list[int]) -> list[dict[str, Any]]:
    """``survives`` and ``lost_under`` of the chosen images, all of them in one call for each transformation."""
    if not chosen:
        return []
    assert explanation.counterfactual is not None, "what flipped has a counterfactual"
    before, after = (
        images.saved(_made_finite(image[chosen])) for image in (explanation.image, explanation.counterfactual)
    )
    source, target = explanation.predicted[chosen], explanation.target[chosen]
    found = survives(classifier, before, after, source, target, MILD)
    tried = {name: (kept.tolist(), flips.tolist()) for name, (kept, flips) in found.items()}
    rows = []
    for index in range(len(chosen)):
        stays = {name: flips[index] for name, (kept, flips) in tried.items() if kept[index]}
        kinds = (("survives", True), ("lost_under", False))
        rows.append({key: [n for n, stay in stays.items() if stay == kind] if stays else None for key, kind in kinds})
    return rows


def _made_finite(image: Tensor) -> Tensor:
    """Without what is no number: such an image fails, but not the batch that it is in."""
    return image.detach().float().nan_to_num(nan=0.0, posinf=1.0, neginf=-1.0)
