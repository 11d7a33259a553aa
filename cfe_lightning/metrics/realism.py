"""Realism of edited images: distances between two sets of features.

FID (arXiv 1706.08500), KID (arXiv 1801.01401), and the split FID of ACE (arXiv 2303.09962). Features [N, D], one row
per image, are computed in float64; never compare values across extractors or across N.
"""

import warnings
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from cfe_lightning.metrics.case import Case, Kept
from cfe_lightning.metrics.metric import rows
from cfe_lightning.metrics.statistics import Measurement, undefined

#: Largest number of images per side; of more, these are drawn.
LARGEST_SAMPLE = 10_000
#: FID, its floor, split FID and KID by extractor.
KEYS = {
    "f": ("fid_f", "fid_f_floor", "sfid_f", "kid_f"),
    "inception": ("fid_inception", "fid_inception_floor", "sfid_inception", "kid_inception"),
    "user": ("fid_user", "fid_user_floor", "sfid_user", "kid_user"),
}
_FEWEST = 4
_SPLITS = 10
_KID_SUBSETS = 100
_KID_SUBSET_SIZE = 1000

METRICS = rows("""
needs: counterfactual
key                  better   range      needs      published  meaning
fid_f                lower    [0, inf)   features   flipped
    Frechet distance of originals and edits in the classifier's features; which edits may fool
fid_f_floor          neither  [0, inf)   features   -
    fid_f between two halves of what edits are compared with: no honest method is below it at this n
sfid_f               lower    [0, inf)   features   flipped
    fid_f of edits and other originals, mean and range of ten random halves
kid_f                lower    (-e, inf)  features   flipped    kernel distance in the classifier's features
fid_inception        lower    [0, inf)   inception  flipped    as fid_f, in Inception's features, as published
fid_inception_floor  neither  [0, inf)   inception  -          as fid_f_floor, in Inception's features, as published
sfid_inception       lower    [0, inf)   inception  flipped    as sfid_f, in Inception's features, as published
kid_inception        lower    (-e, inf)  inception  flipped    as kid_f, in Inception's features, as published
fid_user             lower    [0, inf)   user       flipped    as fid_f, in the features of your own network
fid_user_floor       neither  [0, inf)   user       -          as fid_f_floor, in the features of your own network
sfid_user            lower    [0, inf)   user       flipped    as sfid_f, in the features of your own network
kid_user             lower    (-e, inf)  user       flipped    as kid_f, in the features of your own network
""")


def measure(case: Case) -> dict[str, Tensor]:
    """Keeps the features of a batch and of its edits, [B, D]."""
    found: dict[str, Tensor] = {}
    for name, (before, after) in case.embedded.items():
        found |= {f"features/{name}/before": before, f"features/{name}/after": after}
    return found


def summarise(kept: Kept) -> dict[str, Measurement]:
    """Measures distances between originals, or held-out images, and edits in the features of every extractor."""
    found: dict[str, Measurement] = {}
    for name, keys in KEYS.items():
        if f"{name}/after" in kept.rows["features"]:
            found |= dict(zip(keys, _distances(name, kept), strict=True))
    return found


def _distances(name: str, kept: Kept) -> Sequence[Measurement]:
    """Measures FID, its floor, split FID and KID in the features of one extractor."""
    # The population, of which a sample bounds the cost.
    features, population, seed = kept.rows["features"], kept.population, kept.seed
    before, after = (features[f"{name}/{when}"][kept.members] for when in ("before", "after"))
    total = len(features[f"{name}/before"])
    if len(before) < _FEWEST:
        return [undefined(f"fewer than {_FEWEST} counterfactuals", total, population)] * 4
    order = _shuffled(len(before), seed)[:LARGEST_SAMPLE]
    before, after = before[order], after[order]
    real, edited, reference = before, after, kept.rows["reference"].get(name)
    if reference is not None:
        # Both sides get the same size, since the distance depends on it.
        size = min(len(reference), len(after))
        if size < _FEWEST:
            return [undefined(f"fewer than {_FEWEST} images to compare with", total, population)] * 4
        real, edited = reference[_shuffled(len(reference), seed)[:size]], after[:size]

    # Split FID and KID have a spread. Split FID compares edits with other originals, never with held-out images.
    measured = partial(Measurement, n_total=total, population=population)
    splits = split_fid(before, after, seed=seed)
    mean, deviation = kid(real, edited, seed)
    low, high = (mean - deviation, mean + deviation) if deviation else (None, None)
    return (
        measured(value=fid(real, edited), n_used=len(edited)),
        measured(value=fid_floor(real, seed), n_used=len(edited)),
        measured(value=float(splits.mean()), low=float(splits.min()), high=float(splits.max()), n_used=len(before)),
        measured(value=mean, low=low, high=high, n_used=len(edited)),
    )


def _shuffled(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


class _Given(nn.Module):
    """Returns the features it is given: torchmetrics takes any module that makes features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid(real: Tensor, edited: Tensor) -> float:
    """Computes the Frechet distance of two sets of features.

    Raises:
        ValueError: If a side has fewer than two images.
    """
    _check(real, edited)
    metric = FrechetInceptionDistance(feature=_Given(real.shape[1]), normalize=True).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(edited.double(), real=False)
    # Rounding can make the distance of equal sets negative.
    return max(0.0, float(metric.compute()))


def split_fid(
    real: Tensor, edited: Tensor, *, halves: Tensor | None = None, repeats: int = _SPLITS, seed: int = 0
) -> Tensor:
    """Computes Frechet distances between originals and the edits of *other* originals, in the same order, [R].

    An edit shares its unedited pixels with its own original, which flatters a plain distance. ``halves`` tells which
    images are in the first half, [R, N] bool; None draws ``repeats`` halves.

    Raises:
        ValueError: If there are fewer than four images.
    """
    if len(real) != len(edited) or len(real) < _FEWEST:
        raise ValueError(f"A split needs at least four images and their edits, got {len(real)} and {len(edited)}.")
    if halves is None:
        generator = torch.Generator().manual_seed(seed)
        halves = torch.stack([torch.randperm(len(real), generator=generator) for _ in range(repeats)]) < len(real) // 2
    # Either half's originals with the other half's edits.
    sums = [fid(real[one], edited[~one]) + fid(real[~one], edited[one]) for one in halves.to(real.device)]
    return torch.tensor(sums, dtype=torch.float64) / 2


def fid_floor(real: Tensor, seed: int = 0) -> float:
    """Computes the Frechet distance between two random halves of the originals: no honest method is below it."""
    order = _shuffled(len(real), seed).to(real.device)
    half = len(real) // 2
    return fid(real[order[:half]], real[order[half : 2 * half]])


def kid(real: Tensor, edited: Tensor, seed: int = 0) -> tuple[float, float]:
    """Computes the kernel distance, mean and standard deviation over subsets; unbiased, so it may be negative.

    Raises:
        ValueError: If a side has fewer than two images.
    """
    _check(real, edited)
    size = min(_KID_SUBSET_SIZE, len(real), len(edited))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # The warning is about memory, but all features are in memory already.
        warnings.filterwarnings("ignore", message=".*will save all extracted features.*")
        torch.manual_seed(seed)
        # All images form only one subset.
        subsets = 1 if size == len(real) == len(edited) else _KID_SUBSETS
        given = _Given(real.shape[1])
        metric = KernelInceptionDistance(feature=given, subsets=subsets, subset_size=size, normalize=True)
        metric.update(real.double().cpu(), real=True)
        metric.update(edited.double().cpu(), real=False)
        mean, deviation = metric.compute()
    return float(mean), 0.0 if subsets == 1 else float(deviation)


def _check(real: Tensor, edited: Tensor) -> None:
    if min(len(real), len(edited)) < 2:
        raise ValueError(f"A distance of sets needs two images on each side, got {len(real)} and {len(edited)}.")
