"""Comparison with a known cause: does an explanation point at the pixels that make the class, with the right change?

Images [B, C, H, W] in [-1, 1]; change maps [B, 1, H, W] >= 0 (see ``counterfactual.change_map``); numbers are in units
of [0, 1] images. One value per image, [B]; NaN is undefined.
"""

import torch
from torch import Tensor

from cfe_lightning.metrics.case import Case
from cfe_lightning.metrics.counterfactual import change_map, l1
from cfe_lightning.metrics.metric import rows

METRICS = rows("""
key                    title     better   range          needs                 meaning
mask_mass              mask      higher   [0, 1]         decomposition mask    share of |distinct| inside the true mask
mask_chance            -         neither  [0, 1]         mask                  what an even map scores in mask_mass
mask_lift              -         higher   [0, 1/chance]  decomposition mask    mask_mass over chance
leak                   -         lower    [0, 1]         decomposition mask    mean |distinct| outside the mask
mask_mass_cf           -         higher   [0, 1]         counterfactual mask
    share of |image - counterfactual| inside the mask
mask_mass_edit         -         higher   [0, 1]         counterfactual reconstruction mask
    share of |rendering - counterfactual| inside the mask
mask_mass_attribution  -         higher   [0, 1]         mask                  share of the attribution inside the mask
correlation            corr.     higher   [-1, 1]        decomposition truth
    over pixels, of |distinct| and |image - true counterfactual|
signed_cosine          -         higher   [-1, 1]        decomposition truth
    of distinct and image - true counterfactual, mean-free, with sign
amplitude              -         neither  [0, 1]         decomposition         mean |distinct|
true_amplitude         -         neither  [0, 1]         truth                 mean |image - true counterfactual|
l1_truth               l1 truth  lower    [0, 1]         counterfactual truth
    l1 between counterfactual and the exact one (images the classifier has right)
""")


def measure(case: Case) -> dict[str, Tensor]:
    """Compares the explanations of a batch with the known cause, [B] by metric key."""
    found = {}
    if case.distinct is not None:
        found["amplitude"] = amplitude(case.distinct)
    if "mask" in case.available:
        found |= _measure_mask(case, case.batch["mask"])
    if "truth" in case.available:
        found |= _measure_truth(case, case.batch["counterfactual"])
    return found


def _measure_mask(case: Case, mask: Tensor) -> dict[str, Tensor]:
    found = {"mask_chance": chance(mask), "mask_mass_attribution": mask_mass(case.explanation.attribution, mask)}

    # Distinct part.
    if case.distinct is not None:
        change = magnitude(case.distinct)
        found |= {"mask_mass": mask_mass(change, mask), "mask_lift": lift(change, mask), "leak": leak(change, mask)}

    # Counterfactual.
    if "counterfactual" in case.available:
        found["mask_mass_cf"] = mask_mass(change_map(case.image, case.shown), mask)
        if "reconstruction" in case.available:
            drawn = case.explanation.parts["reconstruction"].clamp(-1, 1)
            found["mask_mass_edit"] = mask_mass(change_map(drawn, case.shown), mask)
    return found


def _measure_truth(case: Case, exact: Tensor) -> dict[str, Tensor]:
    difference = case.batch["image"] - exact
    found = {"true_amplitude": amplitude(difference)}
    if case.distinct is not None:
        found["correlation"] = correlation(case.distinct, difference)
        found["signed_cosine"] = signed_cosine(case.distinct, difference)
    if "counterfactual" in case.available:
        # Otherwise the explainer was asked for another class than that of the exact counterfactual.
        asked = case.target == true_target(case.label, case.logits.shape[1])
        right = (case.explanation.predicted == case.label) & asked
        found["l1_truth"] = torch.where(right, l1(exact, case.shown), torch.nan)
    return found


def true_target(label: Tensor, num_classes: int) -> Tensor:
    """Returns the class of the exact counterfactual of synthetic data, [B] (see ``data.base``)."""
    return (label + 1) % num_classes


def mask_mass(change: Tensor, mask: Tensor) -> Tensor:
    """Computes the share of a change map inside the mask [B, 1, H, W] of {0, 1}; NaN where nothing changed, [B]."""
    total = change.flatten(1).sum(dim=1)
    inside = (change * mask).flatten(1).sum(dim=1)
    return torch.where(total > 0, inside / total, torch.nan)


def chance(mask: Tensor) -> Tensor:
    """Computes the ``mask_mass`` of an even map, which is the mask's share of the image, [B]."""
    return mask.flatten(1).float().mean(dim=1)


def lift(change: Tensor, mask: Tensor) -> Tensor:
    """Computes ``mask_mass`` in multiples of chance; NaN where the mask is empty, [B]."""
    # An empty mask has no chance level.
    area = chance(mask)
    return torch.where(area > 0, mask_mass(change, mask) / area, torch.nan)


def leak(change: Tensor, mask: Tensor) -> Tensor:
    """Computes the mean of a change map outside the mask; NaN where the mask covers everything, [B]."""
    outside = 1 - mask
    pixels = outside.flatten(1).sum(dim=1)
    return torch.where(pixels > 0, (change * outside).flatten(1).sum(dim=1) / pixels, torch.nan)


def magnitude(difference: Tensor) -> Tensor:
    """Computes the change map [B, 1, H, W] of a difference of images: mean over channels, in [0, 1] units."""
    return difference.abs().mean(dim=1, keepdim=True) / 2


def amplitude(difference: Tensor) -> Tensor:
    """Computes the mean magnitude of a difference of images, such as a distinct part or the true difference, [B]."""
    return magnitude(difference).flatten(1).mean(dim=1)


def correlation(distinct: Tensor, true_difference: Tensor) -> Tensor:
    """Computes Pearson's correlation over pixels of two magnitudes; NaN where one is constant, [B] in [-1, 1]."""
    return _cosine(_centred(magnitude(distinct)), _centred(magnitude(true_difference)))


def signed_cosine(distinct: Tensor, true_difference: Tensor) -> Tensor:
    """Computes the cosine of distinct part and true difference, each free of its mean per channel, [B] in [-1, 1].

    1 is the true change, -1 its opposite: a distinct part that removes the class has the sign of image minus
    counterfactual.
    """
    return _cosine(_centred(distinct), _centred(true_difference))


def _centred(values: Tensor) -> Tensor:
    values = values.double()
    return (values - values.mean(dim=(2, 3), keepdim=True)).flatten(1)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    # A constant map has no direction: 0 / 0 is NaN, the mark of undefined values.
    return ((a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1))).float()
