"""The path to a counterfactual: the target's probability along the steps of an explanation, per image.

Probabilities q and positions k are [B, T]; one value per image, [B]; NaN is undefined.
"""

import torch
from torch import Tensor

from cfe_lightning.decisions import probability
from cfe_lightning.metrics.case import Case
from cfe_lightning.metrics.metric import rows

_ROUNDING = 1e-6
#: Number of positions at which paths of different lengths are compared.
RESAMPLED = 21

METRICS = rows("""
needs: path
key       better   range     needs     meaning
mono      higher   [0, 1]    -         share of steps on which the target's probability does not fall
rho       higher   [-1, 1]   -         rank correlation of position and the target's probability
regress   lower    [0, 1]    -         deepest fall of the target's probability along the path
crossing  neither  [0, 1]    -         position at which the target's probability reaches one half
schedule  lower    [0, 1]    intended  mean difference of the target's probability from what the method meant it to be
smooth    lower    [1, inf)  -         longest step over the mean one
agree     higher   [0, 1]    intended
    share of edited pictures on the way that are decided as the method meant; below 0.9 do not trust it
agent_kl  lower    [0, inf)  intended  KL(classifier || what the method meant) on edited pictures on the way
""")


def measure(case: Case) -> dict[str, Tensor]:
    """Measures the paths of a batch, [B] by metric key, and keeps the curve of the target's probability."""
    steps, strengths, intended = case.steps, case.explanation.strengths, case.explanation.intended
    assert steps is not None, "the need path is met"
    assert strengths is not None, "an explanation with steps has strengths"

    # The target's probability.
    logits = case.judge.along(steps, case.measures.max_batch)
    q, k = probability(logits, case.target), positions(strengths)
    found = {
        "mono": monotone(q),
        "rho": rank_correlation(k, q),
        "regress": regress(q),
        "crossing": crossing(k, q),
        "smooth": roughness(steps),
        "curves/path": resampled(k, q),
    }

    # Agreement with the method's own intention.
    if intended is not None:
        meant = intended.to(q)
        log_p, log_meant = logits.log_softmax(dim=2), meant.log_softmax(dim=2)
        found |= {
            "schedule": schedule_error(q, probability(meant, case.target)),
            "agree": (meant.argmax(dim=2) == logits.argmax(dim=2)).float().mean(dim=1),
            "agent_kl": (log_p.exp() * (log_p - log_meant)).sum(dim=2).mean(dim=1),
        }
    return found


def positions(strengths: Tensor) -> Tensor:
    """Rescales strengths [B, T], ascending, to positions from 0 to 1; all 0 where they do not differ."""
    first, last = strengths[:, :1], strengths[:, -1:]
    length = last - first
    return torch.where(length > 0, (strengths - first) / length.clamp_min(torch.finfo(length.dtype).tiny), 0.0)


def monotone(q: Tensor) -> Tensor:
    """Computes the share of steps on which the probability does not fall, [B] in [0, 1]; NaN of a single frame."""
    return (q.diff(dim=1) >= -_ROUNDING).float().mean(dim=1)


def rank_correlation(k: Tensor, q: Tensor) -> Tensor:
    """Computes Spearman's correlation of rows [B, T], ties by their mean rank; 0 where one is constant, [B]."""
    return (standardised_ranks(k) * standardised_ranks(q)).sum(dim=1).float()


def standardised_ranks(values: Tensor) -> Tensor:
    """Ranks every row [B, T], ties by their mean, with mean 0 and length 1; zeros where a row is constant."""
    ordered, values = values.sort(dim=1).values, values.contiguous()
    # Equal values hold the ranks from ``below`` to ``up_to`` - 1.
    below, up_to = torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)
    ranks = (below + up_to - 1).double() / 2
    # A constant row has no order.
    centred = ranks - ranks.mean(dim=1, keepdim=True)
    norm = centred.norm(dim=1, keepdim=True)
    return torch.where(norm > 0, centred / norm.clamp_min(1e-12), 0.0)


def regress(q: Tensor) -> Tensor:
    """Finds the deepest fall below an earlier probability, [B] in [0, 1]."""
    return (q.cummax(dim=1).values - q).amax(dim=1)


def crossing(k: Tensor, q: Tensor, level: float = 0.5) -> Tensor:
    """Finds where the probability first reaches ``level``, interpolated linearly; NaN where it never does, [B]."""
    reached = q >= level
    first = reached.to(torch.int8).argmax(dim=1, keepdim=True)
    before = (first - 1).clamp_min(0)
    # Between the first frame at the level and the frame before it.
    high, low = q.gather(1, first), q.gather(1, before)
    share = torch.where(first > 0, (level - low) / (high - low).clamp_min(1e-12), 0.0)
    start, end = k.gather(1, before), k.gather(1, first)
    return torch.where(reached.any(dim=1), (start + share * (end - start)).squeeze(1), torch.nan)


def schedule_error(q: Tensor, intended: Tensor) -> Tensor:
    """Computes the mean absolute difference from the probability that the method intended, [B] in [0, 1]."""
    return (q - intended).abs().mean(dim=1)


def roughness(steps: Tensor) -> Tensor:
    """Divides the longest step by the mean one, in L1, images [B, T, C, H, W] -> [B] >= 1; NaN where nothing moves."""
    lengths = steps.diff(dim=1).abs().flatten(2).mean(dim=2)
    mean = lengths.mean(dim=1)
    return torch.where(mean > 0, lengths.amax(dim=1) / mean.clamp_min(1e-12), torch.nan)


def resampled(k: Tensor, q: Tensor, points: int = RESAMPLED) -> Tensor:
    """Interpolates probabilities linearly at evenly spaced positions, [B, ``points``]."""
    wanted = torch.linspace(0, 1, points, device=q.device, dtype=q.dtype).expand(len(q), -1).contiguous()
    above = torch.searchsorted(k.to(q.dtype).contiguous(), wanted).clamp(1, max(1, k.shape[1] - 1))
    above = above.clamp_max(k.shape[1] - 1)
    # A path of one frame has no interval.
    below = (above - 1).clamp_min(0)
    start, end = k.gather(1, below).to(q.dtype), k.gather(1, above).to(q.dtype)
    share = ((wanted - start) / (end - start).clamp_min(1e-12)).clamp(0, 1)
    return torch.lerp(q.gather(1, below), q.gather(1, above), share)
