"""Did the decision change, and how little of the image: validity, confidence, closeness and sparsity, per image.

Source: evaluation, sections 3 and 4. Images come as everywhere in the package, [B, C, H, W] in [-1, 1]; numbers are in
units of [0, 1] images. Every function returns one value per image, [B]; NaN marks an image where it is undefined.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.decisions import decides_for

#: A change below this is not visible: eight levels of an 8-bit image.
CHANGE_THRESHOLD = 8 / 255


def unit(image: Tensor, what: str = "image") -> Tensor:
    """The metrics' own door: [-1, 1] to [0, 1] (evaluation, R1).

    Raises:
        ValueError: If a value leaves the range by more than rounding, or is not finite; nothing is guessed or clamped.
    """
    converted = images.to_unit(image)
    low, high = converted.aminmax()
    if not (low >= -1e-4 and high <= 1 + 1e-4):
        raise ValueError(
            f"The {what} must lie in [-1, 1], got values from {float(image.min()):.4g} to {float(image.max()):.4g}: "
            "clamp generated images before they are compared."
        )
    return converted


def flipped(logits_after: Tensor, target: Tensor) -> Tensor:
    """Whether the decision is the target, [B] bool; a tie counts as not flipped (3.1)."""
    return decides_for(logits_after, target)


def flipped_any(logits_before: Tensor, logits_after: Tensor) -> Tensor:
    """Whether the decision is any other than before, [B] bool (3.1, untargeted)."""
    return ~decides_for(logits_after, logits_before.argmax(dim=1))


def probability(logits: Tensor, wanted: Tensor) -> Tensor:
    """Softmax probability of class ``wanted``, [B, K] and [B] -> [B]."""
    return logits.softmax(dim=1).gather(1, wanted[:, None]).squeeze(1)


def delta_p(logits_before: Tensor, logits_after: Tensor, target: Tensor) -> Tensor:
    """Signed change of the target's probability, [B] in [-1, 1] (3.2); its magnitude is ``mad``."""
    return probability(logits_after, target) - probability(logits_before, target)


def bkl(logits_after: Tensor, target: Tensor) -> Tensor:
    """Bounded remapping of the KL divergence to the wanted decision: 1 - p_t, [B] in [0, 1] (3.3)."""
    return 1 - probability(logits_after, target)


def l1(image: Tensor, counterfactual: Tensor) -> Tensor:
    """Mean absolute change, [B] in [0, 1] (4.1)."""
    return _difference(image, counterfactual).abs().flatten(1).mean(dim=1)


def l2(image: Tensor, counterfactual: Tensor) -> Tensor:
    """Root of the mean squared change, [B] in [0, 1] (4.1)."""
    return _difference(image, counterfactual).square().flatten(1).mean(dim=1).sqrt()


def linf(image: Tensor, counterfactual: Tensor) -> Tensor:
    """Largest absolute change, [B] in [0, 1] (4.1)."""
    return _difference(image, counterfactual).abs().flatten(1).amax(dim=1)


def changed_area(image: Tensor, counterfactual: Tensor, threshold: float = CHANGE_THRESHOLD) -> Tensor:
    """Share of pixels of which a channel changed by more than ``threshold`` (in [0, 1] units), [B] (4.3)."""
    change = _difference(image, counterfactual).abs().amax(dim=1)
    return (change > threshold).flatten(1).float().mean(dim=1)


def area90(change: Tensor) -> Tensor:
    """Smallest share of pixels that holds 90 % of a change map [B, 1, H, W]; NaN where nothing changed, [B] (4.3)."""
    ordered = change.flatten(1).double().sort(dim=1, descending=True).values
    cumulative = ordered.cumsum(dim=1)
    total = cumulative[:, -1:]
    # The slack is relative, so that the unit of the map does not matter.
    reached = cumulative >= 0.9 * total - 1e-9 * total
    first = reached.float().argmax(dim=1) + 1
    return torch.where(total[:, 0] > 0, first / ordered.shape[1], torch.nan).float()


def gini(change: Tensor) -> Tensor:
    """Concentration of a change map [B, 1, H, W]: 0 spread evenly, near 1 one pixel; NaN without change, [B] (4.3)."""
    ordered = change.flatten(1).double().sort(dim=1).values
    num_pixels = ordered.shape[1]
    total = ordered.sum(dim=1)
    position = torch.arange(1, num_pixels + 1, device=change.device, dtype=torch.float64)
    weighted = (ordered * (num_pixels - position + 0.5)).sum(dim=1) / num_pixels
    return torch.where(total > 0, 1 - 2 * weighted / total, torch.nan).float()


def change_map(image: Tensor, other: Tensor) -> Tensor:
    """Absolute change per pixel, mean over channels, [B, 1, H, W] in [0, 1] (section 1)."""
    return _difference(image, other).abs().mean(dim=1, keepdim=True)


def _difference(image: Tensor, counterfactual: Tensor) -> Tensor:
    return unit(counterfactual, "counterfactual") - unit(image)
