"""Do edited images look like real ones: distances between two sets of features, whatever they are features of.

Source: evaluation, section 5. Features [N, D], one row per image, computed in float64; never compare values across
extractors or across N.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

#: More images than this are drawn from, on both sides alike.
LARGEST_SAMPLE = 10_000
_SPLITS = 10
_KID_SUBSETS = 100
_KID_SUBSET_SIZE = 1000


class _Given(nn.Module):
    """Hands features on: torchmetrics takes any module that makes them."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid(real: Tensor, edited: Tensor) -> float:
    """Frechet distance of two sets of features (5.1).

    Raises:
        ValueError: If a side has fewer than two images.
    """
    _check(real, edited)
    metric = FrechetInceptionDistance(feature=_Given(real.shape[1]), normalize=True).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(edited.double(), real=False)
    return max(0.0, float(metric.compute()))


def split_fid(
    real: Tensor, edited: Tensor, *, halves: Tensor | None = None, repeats: int = _SPLITS, seed: int = 0
) -> Tensor:
    """Frechet distances between originals and the edits of *other* originals, [R] (5.2).

    An edit shares its unedited pixels with its own original, which flatters a plain distance.

    Args:
        real: Features of the originals, [N, D].
        edited: Features of their edits, in the same order.
        halves: Which images are in the first half, [R, N] bool; None draws ``repeats`` of them.
        repeats: R.
        seed: Of the draw.

    Raises:
        ValueError: If there are fewer than four images.
    """
    if len(real) != len(edited) or len(real) < 4:
        raise ValueError(f"A split needs at least four images and their edits, got {len(real)} and {len(edited)}.")
    if halves is None:
        generator = torch.Generator().manual_seed(seed)
        order = torch.stack([torch.randperm(len(real), generator=generator) for _ in range(repeats)])
        halves = order < len(real) // 2
    values = [
        (fid(real[first], edited[~first]) + fid(real[~first], edited[first])) / 2 for first in halves.to(real.device)
    ]
    return torch.tensor(values, dtype=torch.float64)


def fid_floor(real: Tensor, seed: int = 0) -> float:
    """Frechet distance between two random halves of the originals: no honest method is below it (5.1)."""
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed)).to(real.device)
    half = len(real) // 2
    return fid(real[order[:half]], real[order[half : 2 * half]])


def kid(real: Tensor, edited: Tensor, seed: int = 0) -> tuple[float, float]:
    """Kernel distance, mean and standard deviation over subsets; unbiased, so it may be negative (5.3).

    Raises:
        ValueError: If a side has fewer than two images.
    """
    _check(real, edited)
    size = min(_KID_SUBSET_SIZE, len(real), len(edited))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*will save all extracted features.*")
        torch.manual_seed(seed)
        # Of all images there is but one subset.
        subsets = 1 if size == len(real) == len(edited) else _KID_SUBSETS
        metric = KernelInceptionDistance(
            feature=_Given(real.shape[1]), subsets=subsets, subset_size=size, normalize=True
        )
        metric.update(real.double().cpu(), real=True)
        metric.update(edited.double().cpu(), real=False)
        mean, deviation = metric.compute()
    return float(mean), 0.0 if subsets == 1 else float(deviation)


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Similarity of two embeddings of the same images, [B, D] twice -> [B] in [-1, 1] (6.1, 6.3)."""
    return torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=1).float()


def _check(real: Tensor, edited: Tensor) -> None:
    if min(len(real), len(edited)) < 2:
        raise ValueError(f"A distance of sets needs two images on each side, got {len(real)} and {len(edited)}.")
