"""Counterfactuals: does the decision change, how sure is it, and how little of the image changes?

``bkl`` and the population of flips are those of DiME (arXiv 2203.15636), directions those of StylEx (arXiv 2104.13369).
Images [B, C, H, W] in [-1, 1]; numbers are in units of [0, 1] images. Every function returns one value per image, [B];
NaN marks an image where it is undefined.
"""

import torch
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.decisions import decides_for, probability
from cfe_lightning.metrics.case import Case
from cfe_lightning.metrics.metric import rows

#: A smaller change is invisible: eight levels of an 8-bit image.
CHANGE_THRESHOLD = 8 / 255

DECISION = rows("""
needs: counterfactual
key              title  better  range    meaning
flip_rate        flip   higher  [0, 1]   share of counterfactuals decided as their target
flip_rate_saved  -      higher  [0, 1]   as flip_rate, judged on the saved 8-bit image
flip_rate_any    -      higher  [0, 1]   share of counterfactuals decided as any other class
delta_p          -      higher  [-1, 1]  signed change of the target's probability
mad              -      higher  [0, 1]   absolute change of the target's probability; blind to the wrong way
bkl              -      lower   [0, 1]   1 - probability of the target on the counterfactual
""")
SUFFICIENCY = rows("""
needs: counterfactual ranked
key                better  range   meaning
dir_sufficiency_1  higher  [0, 1]  share of images that the best of the method's directions flips
dir_sufficiency_3  higher  [0, 1]  share of images that one of its three best directions flips
""")
CLOSENESS = rows("""
needs: counterfactual
key                title  better  range   needs           meaning
l1                 l1     lower   [0, 1]  -               mean absolute change of a pixel
l2                 -      lower   [0, 1]  -               root of the mean squared change
linf               -      lower   [0, 1]  -               largest change
changed_area       -      lower   [0, 1]  -               share of pixels with a change above 8/255
area90             -      lower   (0, 1]  -               smallest share of pixels that holds 90 % of the change
gini               -      higher  [0, 1)  -               concentration of the change
l1_edit            -      lower   [0, 1]  reconstruction
    as l1, from the method's own rendering: what the decision changed without what rendering changed
changed_area_edit  -      lower   [0, 1]  reconstruction  as changed_area, from the rendering
""")


def measure_decision(case: Case) -> dict[str, Tensor]:
    """Measures decisions on the counterfactuals of a batch, [B] by metric key."""
    # Saving may undo a flip, so the saved image is judged too.
    gain = delta_p(case.logits, case.after, case.target)
    return {
        "flip_rate": decides_for(case.after, case.target),
        "flip_rate_saved": decides_for(case.judge(images.saved(case.shown)), case.target),
        "flip_rate_any": flipped_any(case.logits, case.after),
        "delta_p": gain,
        "mad": gain.abs(),
        "bkl": bkl(case.after, case.target),
    }


def measure_sufficiency(case: Case) -> dict[str, Tensor]:
    """Tells which flips of a batch need only the best, or the three best, directions, [B] bool by metric key."""
    # Ranks count from 1; scores are floats.
    hit, place = decides_for(case.after, case.target), case.explanation.scores["rank"].round()
    return {"dir_sufficiency_1": hit & (place <= 1), "dir_sufficiency_3": hit & (place <= 3)}


def measure_closeness(case: Case) -> dict[str, Tensor]:
    """Measures how much the images of a batch change, [B] by metric key."""
    found = closeness(case.image, case.shown) | {"linf": linf(case.image, case.shown)}
    # The change beyond the method's own rendering.
    if "reconstruction" in case.available:
        drawn = case.explanation.parts["reconstruction"].clamp(-1, 1)
        found["l1_edit"], found["changed_area_edit"] = l1(drawn, case.shown), changed_area(drawn, case.shown)
    return found


def closeness(image: Tensor, edited: Tensor) -> dict[str, Tensor]:
    """Measures the change by the metrics that edits of equal strength are also compared by, [B] by metric key."""
    change = change_map(image, edited)
    return {
        "l1": l1(image, edited),
        "l2": l2(image, edited),
        "changed_area": changed_area(image, edited),
        "area90": area90(change),
        "gini": gini(change),
    }


def unit(image: Tensor, what: str = "image") -> Tensor:
    """Converts images from [-1, 1] to [0, 1], the range in which metrics are defined.

    Raises:
        ValueError: If a value leaves the range by more than rounding, or is not finite; nothing is guessed or clamped.
    """
    converted = images.to_unit(image)
    low, high = converted.aminmax()
    # NaN fails both comparisons.
    if not (low >= -1e-4 and high <= 1 + 1e-4):
        raise ValueError(
            f"The {what} must lie in [-1, 1], got values from {float(image.min()):.4g} to {float(image.max()):.4g}: "
            "clamp generated images before they are compared."
        )
    return converted


def flipped_any(logits_before: Tensor, logits_after: Tensor) -> Tensor:
    """Tells whether the decision is any other than before, [B] bool."""
    return ~decides_for(logits_after, logits_before.argmax(dim=1))


def delta_p(logits_before: Tensor, logits_after: Tensor, target: Tensor) -> Tensor:
    """Computes the signed change of the target's probability, [B] in [-1, 1]; its magnitude is ``mad``."""
    return probability(logits_after, target) - probability(logits_before, target)


def bkl(logits_after: Tensor, target: Tensor) -> Tensor:
    """Maps the KL divergence from the target, -log p_t, to 1 - exp(-KL) = 1 - p_t, [B] in [0, 1]."""
    return 1 - probability(logits_after, target)


def l1(image: Tensor, counterfactual: Tensor) -> Tensor:
    """Computes the mean absolute change, [B] in [0, 1]."""
    return _difference(image, counterfactual).abs().flatten(1).mean(dim=1)


def l2(image: Tensor, counterfactual: Tensor) -> Tensor:
    """Computes the root of the mean squared change, [B] in [0, 1]."""
    return _difference(image, counterfactual).square().flatten(1).mean(dim=1).sqrt()


def linf(image: Tensor, counterfactual: Tensor) -> Tensor:
    """Computes the largest absolute change, [B] in [0, 1]."""
    return _difference(image, counterfactual).abs().flatten(1).amax(dim=1)


def changed_area(image: Tensor, counterfactual: Tensor, threshold: float = CHANGE_THRESHOLD) -> Tensor:
    """Computes the share of pixels with a channel that changed by more than ``threshold`` (in [0, 1] units), [B]."""
    change = _difference(image, counterfactual).abs().amax(dim=1)
    # The largest channel decides, so grey and replicated grey agree.
    return (change > threshold).flatten(1).float().mean(dim=1)


def area90(change: Tensor) -> Tensor:
    """Finds the smallest share of pixels that holds 90 % of a change map [B, 1, H, W]; NaN without change, [B]."""
    cumulative = change.flatten(1).double().sort(dim=1, descending=True).values.cumsum(dim=1)
    total = cumulative[:, -1:]
    # The slack is relative, so that the unit of the map does not matter.
    first = (cumulative >= 0.9 * total - 1e-9 * total).float().argmax(dim=1) + 1
    return torch.where(total[:, 0] > 0, first / cumulative.shape[1], torch.nan).float()


def gini(change: Tensor) -> Tensor:
    """Measures the concentration of a change map [B, 1, H, W]: 0 even, near 1 one pixel; NaN without change, [B]."""
    ordered = change.flatten(1).double().sort(dim=1).values
    num_pixels, total = ordered.shape[1], ordered.sum(dim=1)
    # Area under the Lorenz curve.
    weights = torch.arange(num_pixels, 0, -1, device=change.device, dtype=torch.float64) - 0.5
    weighted = (ordered * weights).sum(dim=1) / num_pixels
    return torch.where(total > 0, 1 - 2 * weighted / total, torch.nan).float()


def change_map(image: Tensor, other: Tensor) -> Tensor:
    """Computes the absolute change per pixel, mean over channels, [B, 1, H, W] in [0, 1]."""
    return _difference(image, other).abs().mean(dim=1, keepdim=True)


def _difference(image: Tensor, counterfactual: Tensor) -> Tensor:
    return unit(counterfactual, "counterfactual") - unit(image)
