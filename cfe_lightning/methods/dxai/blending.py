"""The mathematics of DXAI (arXiv 2401.00320): blending, its distances, the neutral strength.

Shapes: B images, C channels, H, W pixels, K classes, N branches.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.compute.precision import full_precision, to_float32
from cfe_lightning.decisions import kl_from_uniform


@dataclass(frozen=True, kw_only=True, slots=True)
class Blend:
    """Renderings of one batch in its own and in an alternative class.

    Attributes:
        own: Rendering in the own class, [B, C, H, W].
        alternative: Rendering in the alternative class, without a distinct part, [B, C, H, W].
        distinct: Branch 0 in the own class, [B, C, H, W].
        distinct_alternative: Branch 0 in the alternative class, which enters neither rendering, [B, C, H, W].
        counterfactual: The image with its distinct part exchanged for the alternative's, through which only the latter
            learns, [B, C, H, W]; None if no loss needs it.
        orthogonality: ``branch_orthogonality`` of the encoder's maps, []; None if it has no weight.
    """

    own: Tensor
    alternative: Tensor
    distinct: Tensor
    distinct_alternative: Tensor
    counterfactual: Tensor | None = None
    orthogonality: Tensor | None = None


def blend(branches_own: Tensor, branches_alternative: Tensor, alpha: Tensor) -> Blend:
    """Mixes all branches but branch 0 between two classes of the same image (equation 5).

    Args:
        branches_own: Branch images in the image's own class, [B, N, C, H, W].
        branches_alternative: Branch images in the alternative class, [B, N, C, H, W]; its branch 0 enters no rendering.
        alpha: Share that each image keeps of its own branches, [B, N - 1, 1, 1, 1] in [0, 1].
    """
    own, alternative = branches_own[:, 1:], branches_alternative[:, 1:]
    distinct = branches_own[:, 0]
    difference = alpha * (own - alternative)
    return Blend(
        own=distinct + (alternative + difference).sum(dim=1),
        alternative=(own - difference).sum(dim=1),
        distinct=distinct,
        distinct_alternative=branches_alternative[:, 0],
    )


def distance(image: Tensor, other: Tensor) -> Tensor:
    """Adds the mean squared and the mean absolute difference over all elements (equation 7)."""
    difference = image - other
    return difference.square().mean() + difference.abs().mean()


def masked_distance(distinct: Tensor, rendering: Tensor, image: Tensor) -> Tensor:
    """Measures the distance where the distinct part exceeds its spatial mean, per image and channel (equation 12).

    The mean runs over the selected elements, as in the published code; no gradient passes the mask.
    """
    magnitude = distinct.detach().abs()
    mask = (magnitude > magnitude.mean(dim=(2, 3), keepdim=True)).to(image.dtype)
    difference = (rendering - image) * mask
    # A constant distinct part selects nothing: 0 / 1 instead of 0 / 0.
    return (difference.square().sum() + difference.abs().sum()) / mask.sum().clamp_min(1.0)


def branch_orthogonality(maps: list[Tensor], num_branches: int) -> Tensor:
    """Averages the squared correlation between feature channels of different branches; only the published code has it.

    Args:
        maps: Grouped feature maps, each [B, N c, H, W].
        num_branches: Number of branches, N.
    """
    total = to_float32(maps[0]).new_zeros(())
    for feature in maps:
        # Standardise channels.
        channels = to_float32(feature).flatten(2)
        channels = channels - channels.mean(dim=2, keepdim=True)
        channels = channels / channels.square().mean(dim=2, keepdim=True).add(1e-8).sqrt()
        # Correlate branches, every pair once.
        with full_precision(channels):
            correlation = channels @ channels.transpose(1, 2) / channels.shape[2]
        width = feature.shape[1] // num_branches
        blocks = correlation.unflatten(2, (num_branches, width)).unflatten(1, (num_branches, width))
        total = total + blocks.square().mean(dim=(0, 2, 4)).tril(diagonal=-1).sum()
    return total / len(maps)


@torch.no_grad()
def neutral_strength(classifier: FrozenClassifier, image: Tensor, distinct: Tensor) -> Tensor:
    """Finds the share, [B], of the distinct part whose removal leaves the classifier as undecided as possible.

    Minimises KL(uniform || classifier(image - strength * distinct)) over strengths from 0 to 2: a grid of 0.1, refined
    twice around its best point to 0.004. The classifier judges a bounded number of images at a time.

    Args:
        classifier: The frozen classifier.
        image: Images, [B, C, H, W] in [-1, 1].
        distinct: Distinct parts at strength 1, [B, C, H, W].
    """
    strength = image.new_full((len(image),), 1.0)
    for reach, num_points in ((1.0, 21), (0.1, 11), (0.02, 11)):
        offsets = torch.linspace(-reach, reach, num_points, device=image.device, dtype=image.dtype)
        candidates = (strength[:, None] + offsets).clamp(0, 2)
        removed = image[:, None] - candidates[:, :, None, None, None] * distinct[:, None]
        undecided = kl_from_uniform(classifier.along(removed).flatten(0, 1)).view(len(image), num_points)
        strength = candidates.gather(1, undecided.argmin(dim=1, keepdim=True)).squeeze(1)
    return strength
