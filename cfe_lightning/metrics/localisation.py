"""Against a known cause: does an explanation point at the pixels that make the class, and with the right change?

Source: evaluation, section 9.6, and DXAI, section 8. Images [B, C, H, W] in [-1, 1]; change maps [B, 1, H, W] >= 0 (see
``counterfactual.change_map``); numbers are in units of [0, 1] images. One value per image, [B]; NaN is undefined.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mask_mass(change: Tensor, mask: Tensor) -> Tensor:
    """Share of a change map that lies in the mask [B, 1, H, W] of {0, 1}; NaN where nothing changed, [B]."""
    total = change.flatten(1).sum(dim=1)
    inside = (change * mask).flatten(1).sum(dim=1)
    return torch.where(total > 0, inside / total, torch.nan)


def chance(mask: Tensor) -> Tensor:
    """What an even map scores in ``mask_mass``: the mask's share of the image, [B]."""
    return mask.flatten(1).float().mean(dim=1)


def lift(change: Tensor, mask: Tensor) -> Tensor:
    """``mask_mass`` in multiples of chance; NaN where the mask is empty, [B]."""
    area = chance(mask)
    return torch.where(area > 0, mask_mass(change, mask) / area, torch.nan)


def leak(change: Tensor, mask: Tensor) -> Tensor:
    """Mean of a change map outside the mask; NaN where the mask covers everything, [B]."""
    outside = 1 - mask
    pixels = outside.flatten(1).sum(dim=1)
    return torch.where(pixels > 0, (change * outside).flatten(1).sum(dim=1) / pixels, torch.nan)


def magnitude(difference: Tensor) -> Tensor:
    """Change map [B, 1, H, W] of a difference of images [B, C, H, W]: mean over channels, in [0, 1] units."""
    return difference.abs().mean(dim=1, keepdim=True) / 2


def amplitude(difference: Tensor) -> Tensor:
    """Mean magnitude of a difference of images, [B]: the distinct part's against the true difference's."""
    return magnitude(difference).flatten(1).mean(dim=1)


def correlation(distinct: Tensor, true_difference: Tensor) -> Tensor:
    """Pearson correlation over pixels of the two magnitudes; NaN where one of them is constant, [B] in [-1, 1]."""
    return _cosine(_centred(magnitude(distinct)), _centred(magnitude(true_difference)))


def signed_cosine(distinct: Tensor, true_difference: Tensor) -> Tensor:
    """Cosine between distinct part and true difference with signs, each free of its mean per channel, [B] in [-1, 1].

    1 is the true change, -1 its opposite: a distinct part that removes the class has the sign of image minus
    counterfactual.
    """
    return _cosine(_centred(distinct), _centred(true_difference))


def _centred(values: Tensor) -> Tensor:
    values = values.double()
    return (values - values.mean(dim=(2, 3), keepdim=True)).flatten(1)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    # A constant map has no direction: 0 / 0 is NaN, which is what undefined looks like here.
    return ((a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1))).float()
