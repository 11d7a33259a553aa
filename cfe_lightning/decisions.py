"""Decisions in logits: the winner, margins between classes, and divergences between answers.

Shapes: B images, T steps, K classes. [B, ..., K] is [B, K] or, along a path, [B, T, K]. A target is one class per
image, [B], or one number for all of them.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from cfe_lightning.compute.precision import to_float32

#: Smallest lead in probability that counts as clear: on the boundary itself, rounding to 8 bits would decide.
_CLEAR_LEAD = 0.02


def decides_for(logits: Tensor, target: Tensor | int) -> Tensor:
    """Tells whether the target's logit is strictly the largest: a tie does not count, [B, ..., K] -> [B, ...]."""
    value, best_other = _target_and_best_other(logits, target)
    return value > best_other


def runner_up(logits: Tensor) -> Tensor:
    """Returns the most probable class after the predicted one, [B, K] -> [B]; ``target=None`` means this class."""
    return logits.topk(2, dim=1).indices[:, 1]


def alternative_class(label: Tensor, num_classes: int) -> Tensor:
    """Draws a class other than ``label`` for every image, uniformly among the others, [B] -> [B]."""
    return (label + torch.randint(1, num_classes, label.shape, device=label.device)) % num_classes


def probability(logits: Tensor, target: Tensor | int) -> Tensor:
    """Returns the softmax probability of the target, [B, ..., K] -> [B, ...] in [0, 1]."""
    return _entry(logits.softmax(dim=-1), target)


def margin(logits: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Returns the source's logit minus the target's, [B, ..., K] -> [B, ...]."""
    return _entry(logits, source) - _entry(logits, target)


def lead(logits: Tensor, target: Tensor | int) -> Tensor:
    """Returns the target's logit minus the largest logit of the others, [B, ..., K] -> [B, ...]."""
    value, best_other = _target_and_best_other(logits, target)
    return value - best_other


def target_margin(logits: Tensor, target: Tensor | int) -> Tensor:
    """Returns the target's log-odds: its logit minus the log-sum-exp of the others, [B, ..., K] -> [B, ...]."""
    classes = torch.arange(logits.shape[-1] - 1, device=logits.device)
    others = logits.gather(-1, classes + (classes >= _index(logits, target)))
    return _entry(logits, target) - others.logsumexp(dim=-1)


def leads(logits: Tensor, target: Tensor | int) -> Tensor:
    """Tells whether the target's probability exceeds that of every other class by 0.02, [B, ..., K] -> [B, ...]."""
    value, best_other = _target_and_best_other(logits.softmax(dim=-1), target)
    return value >= best_other + _CLEAR_LEAD


def sure_enough(logits: Tensor, target: Tensor, confidence: float | None) -> Tensor:
    """Tells whether the target's probability reaches ``confidence``, or ``leads`` for None, [B, ..., K] -> [B, ...]."""
    return leads(logits, target) if confidence is None else probability(logits, target) >= confidence


def confidence_gap(intended: Tensor, logits: Tensor, target: Tensor) -> Tensor:
    """Returns the mean absolute difference of intended and measured target probability, [B, T, K] twice -> [B]."""
    difference = probability(intended, target) - probability(logits.double(), target)
    return difference.abs().mean(dim=1).to(logits.dtype)


def kl_between_logits(teacher: Tensor, student: Tensor) -> Tensor:
    """Returns KL(teacher || student) of the softmax of logits [B, K], averaged over the batch, []."""
    log_q, log_p = (F.log_softmax(to_float32(logits), dim=1) for logits in (student, teacher))
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def kl_from_uniform(logits: Tensor) -> Tensor:
    """Returns KL(uniform || softmax) of logits, [B, K] -> [B]; 0 exactly when all classes are equally probable."""
    # Rounding can make the divergence of an undecided classifier slightly negative.
    return (-math.log(logits.shape[1]) - F.log_softmax(to_float32(logits), dim=1).mean(dim=1)).clamp_min(0)


def _index(values: Tensor, target: Tensor | int) -> Tensor:
    index = torch.as_tensor(target, device=values.device)
    return index.view(-1, *[1] * (values.ndim - 1)).expand(*values.shape[:-1], 1)


def _entry(values: Tensor, target: Tensor | int) -> Tensor:
    return values.gather(-1, _index(values, target)).squeeze(-1)


def _target_and_best_other(values: Tensor, target: Tensor | int) -> tuple[Tensor, Tensor]:
    others = values.scatter(-1, _index(values, target), -torch.inf)
    return _entry(values, target), others.amax(dim=-1)
