"""From reflected features back to a feature map, and the region of the picture that may change (equations 12 to 17).

Averaging over the map discards place, so every map that averages to the reflected features is admissible. Three exact
choices are offered. The class maps show where source and target are seen: there the decoder may redraw the picture.

Source: Chowdhury et al., ICCV 2025, arXiv 2509.16822, section 3 and supplement; the water-filling spread is ours.

Shapes: B samples, D features, K classes, h, w cells of the feature map, n = h w.
"""

from typing import Literal

import torch
from torch import Tensor

from cfe_lightning.compute.precision import full_precision, to_float32
from cfe_lightning.methods.mirror_cfe.geometry import mirrored

Spread = Literal["uniform", "location", "waterfill"]
#: Share of the strongest place that the prior leaves to every place, so that each can be reached.
_FLOOR = 0.02


def spread_change(feature_map: Tensor, features: Tensor, rows: Tensor, offset: Tensor, spread: Spread) -> Tensor:
    """Returns the change after which a map, [B, D, h, w], averages to reflected features [B, D].

    ``rows`` [B, 2, D] and ``offset`` [B, 2] are the head's rows and biases for source and target.
    """
    reflected = spread_uniform(feature_map, features)
    if spread == "location":
        reflected = spread_by_location(feature_map, features, rows[:, 0] - rows[:, 1], offset[:, 0] - offset[:, 1])
    elif spread == "waterfill":
        # The change stays even for an image with negative reflected features.
        inside = (features >= 0).all(dim=1)[:, None, None, None]
        filled = spread_by_water_filling(feature_map, features.clamp_min(0), prior_of(class_maps(feature_map, rows)))
        reflected = torch.where(inside, filled, reflected)
    return reflected - feature_map


def spread_uniform(feature_map: Tensor, features: Tensor) -> Tensor:
    """Shifts all places alike until the map averages to the features, [B, D, h, w] and [B, D] -> [B, D, h, w]."""
    return feature_map + (features - feature_map.mean(dim=(2, 3)))[:, :, None, None]


def spread_by_location(feature_map: Tensor, features: Tensor, normal: Tensor, offset: Tensor) -> Tensor:
    """Reflects the features of every place in the mirror, then shifts all places alike to the features.

    A place moves in proportion to how much more it speaks for the source than for the target.

    Args:
        feature_map: Feature maps of the images, [B, D, h, w].
        features: Wanted average of the map, [B, D].
        normal: The source's row of the head minus the target's, [B, D].
        offset: The source's bias minus the target's, [B].
    """
    height, width = feature_map.shape[2:]
    places = feature_map.flatten(2).transpose(1, 2).flatten(0, 1)  # [B n, D]
    repeats = height * width
    moved = mirrored(places, normal.repeat_interleave(repeats, dim=0), offset.repeat_interleave(repeats))
    return spread_uniform(moved.unflatten(0, (-1, repeats)).transpose(1, 2).unflatten(2, (height, width)), features)


def spread_by_water_filling(feature_map: Tensor, features: Tensor, prior: Tensor) -> Tensor:
    """Changes a map in proportion to a prior until it averages to the features, and never goes below zero.

    A growing feature grows by the prior. A shrinking one loses the same multiple of the prior everywhere, cut off at
    zero; the multiple that gives the right average is found exactly by sorting.

    Args:
        feature_map: Non-negative feature maps, [B, D, h, w].
        features: Wanted average of the map, non-negative, [B, D].
        prior: Positive weights of the places, [B, h, w], on any scale.
    """
    # Growing features.
    values = feature_map.flatten(2)
    share = (prior / prior.sum(dim=(1, 2), keepdim=True)).flatten(1)[:, None].expand_as(values)
    num_places = values.shape[2]
    change = features - values.mean(dim=2)
    grown = values + (num_places * change)[:, :, None] * share
    # Shrinking features. Their mean is piecewise linear in the level; its kinks are the ratios value / share.
    ratio, order = (values / share).sort(dim=2, descending=True)
    level = values.gather(2, order).cumsum(dim=2) - num_places * features[:, :, None]
    level = level / share.gather(2, order).cumsum(dim=2)
    following = torch.cat([ratio[:, :, 1:], torch.zeros_like(ratio[:, :, :1])], dim=2)
    # The first level that is not below the next kink is the root: exactly the places before it stay above zero.
    first = (level >= following).to(torch.int8).argmax(dim=2, keepdim=True)
    shrunk = (values - level.gather(2, first) * share).clamp_min(0)
    return torch.where((change >= 0)[:, :, None], grown, shrunk).view_as(feature_map)


def class_maps(feature_map: Tensor, rows: Tensor) -> Tensor:
    """Shows where each class is seen: the positive part of its row over the map, scaled to a maximum of 1.

    The maps, [B, M, h, w] in [0, 1], are all zero for a class that is seen nowhere.

    Args:
        feature_map: Feature maps, [B, D, h, w].
        rows: Rows of the head for M classes per sample, [B, M, D].
    """
    feature_map = to_float32(feature_map)
    with full_precision(feature_map):
        maps = torch.einsum("bmd,bdhw->bmhw", rows.to(feature_map), feature_map).relu()
    return maps / (maps.amax(dim=(2, 3), keepdim=True) + 1e-8)


def prior_of(maps: Tensor) -> Tensor:
    """Returns the prior of ``spread_by_water_filling``: the sum of class maps [B, M, h, w] over a floor, [B, h, w]."""
    together = maps.sum(dim=1)
    together = together + _FLOOR * together.amax(dim=(1, 2), keepdim=True)
    # Without any class in sight all places are alike.
    return torch.where(together.amax(dim=(1, 2), keepdim=True) > 0, together, torch.ones_like(together))


def edit_mask(maps: Tensor, step: Tensor, limits: tuple[float, float] = (0.1, 0.5), soft: bool = False) -> Tensor:
    """Marks the places that may be redrawn: those where source or target is seen above a threshold (equation 14).

    The threshold 1 - step, kept within limits, falls along the path, so the region grows. No gradient passes the mask,
    [B, 1, h, w] in [0, 1].

    Args:
        maps: Class maps of source and target (equation 13), [B, 2, h, w].
        step: Position on the path, [B] in [0, 1].
        limits: Lowest and highest threshold.
        soft: Takes a sigmoid of width 0.05 instead of a hard threshold, for smooth animations.
    """
    lowest, highest = limits
    threshold = (1 - step).clamp(lowest, highest).to(maps)[:, None, None, None]
    strongest = maps.detach().amax(dim=1, keepdim=True)
    return torch.sigmoid((strongest - threshold) / 0.05) if soft else (strongest > threshold).to(maps.dtype)
