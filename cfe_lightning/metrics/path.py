"""How a method gets there: the target's probability along the steps of an explanation, per image.

Source: evaluation, section 8. Probabilities q and positions k are [B, T]; one value per image, [B]; NaN is undefined.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDING = 1e-6
#: Positions at which paths of different lengths are compared.
RESAMPLED = 21


def positions(strengths: Tensor) -> Tensor:
    """Strengths [B, T], ascending, as positions from 0 to 1; all 0 where they do not differ."""
    first, last = strengths[:, :1], strengths[:, -1:]
    length = last - first
    return torch.where(length > 0, (strengths - first) / length.clamp_min(torch.finfo(length.dtype).tiny), 0.0)


def monotone(q: Tensor) -> Tensor:
    """Share of steps on which the probability does not fall, [B] in [0, 1]; NaN of a single frame."""
    return (q.diff(dim=1) >= -_ROUNDING).float().mean(dim=1)


def rank_correlation(k: Tensor, q: Tensor) -> Tensor:
    """Spearman's correlation of rows [B, T], ties by their mean rank; 0 where one is constant, [B] in [-1, 1]."""
    return (standardised_ranks(k) * standardised_ranks(q)).sum(dim=1).float()


def standardised_ranks(values: Tensor) -> Tensor:
    """Ranks within every row [B, T], ties by their mean, of mean 0 and length 1; zeros where a row is constant."""
    centred = _centred(_ranks(values))
    norm = centred.norm(dim=1, keepdim=True)
    return torch.where(norm > 0, centred / norm.clamp_min(1e-12), 0.0)


def regress(q: Tensor) -> Tensor:
    """The deepest fall below what was reached before, [B] in [0, 1]."""
    return (q.cummax(dim=1).values - q).amax(dim=1)


def crossing(k: Tensor, q: Tensor, level: float = 0.5) -> Tensor:
    """Where the probability first reaches ``level``, interpolated linearly; NaN where it never does, [B]."""
    reached = q >= level
    first = reached.to(torch.int8).argmax(dim=1, keepdim=True)
    before = (first - 1).clamp_min(0)
    high, low = q.gather(1, first), q.gather(1, before)
    share = torch.where(first > 0, (level - low) / (high - low).clamp_min(1e-12), 0.0)
    start, end = k.gather(1, before), k.gather(1, first)
    return torch.where(reached.any(dim=1), (start + share * (end - start)).squeeze(1), torch.nan)


def schedule_error(q: Tensor, intended: Tensor) -> Tensor:
    """Mean absolute difference from the probability that the method itself meant each step to have, [B] in [0, 1]."""
    return (q - intended).abs().mean(dim=1)


def roughness(steps: Tensor) -> Tensor:
    """The longest step over the mean one, in L1, images [B, T, C, H, W] -> [B], at least 1; NaN where nothing moves."""
    lengths = steps.diff(dim=1).abs().flatten(2).mean(dim=2)
    mean = lengths.mean(dim=1)
    return torch.where(mean > 0, lengths.amax(dim=1) / mean.clamp_min(1e-12), torch.nan)


def resampled(k: Tensor, q: Tensor, points: int = RESAMPLED) -> Tensor:
    """Probabilities at evenly spaced positions, interpolated linearly, [B, ``points``]."""
    wanted = torch.linspace(0, 1, points, device=q.device, dtype=q.dtype).expand(len(q), -1).contiguous()
    above = torch.searchsorted(k.to(q.dtype).contiguous(), wanted).clamp(1, max(1, k.shape[1] - 1))
    above = above.clamp_max(k.shape[1] - 1)
    below = (above - 1).clamp_min(0)
    start, end = k.gather(1, below).to(q.dtype), k.gather(1, above).to(q.dtype)
    share = ((wanted - start) / (end - start).clamp_min(1e-12)).clamp(0, 1)
    return torch.lerp(q.gather(1, below), q.gather(1, above), share)


def _ranks(values: Tensor) -> Tensor:
    """Ranks within every row [B, T], equal values share their mean."""
    ordered = values.sort(dim=1).values
    below = torch.searchsorted(ordered, values.contiguous())
    up_to = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (below + up_to - 1).double() / 2


def _centred(values: Tensor) -> Tensor:
    return values - values.mean(dim=1, keepdim=True)
