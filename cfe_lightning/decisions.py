"""What logits decide: who wins, who comes second, by how much, and how undecided a classifier is.

Shapes: B images, T steps, K classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from cfe_lightning.compute.precision import to_float32


def decides_for(logits: Tensor, target: Tensor) -> Tensor:
    """Whether logits [B, K] decide strictly for ``target`` [B]: larger than every other class, so a tie does not count.

    Source: evaluation, section 3.1.
    """
    asked = logits.gather(1, target[:, None])
    others = logits.scatter(1, target[:, None], -torch.inf)
    return (asked > others.amax(dim=1, keepdim=True)).squeeze(1)


def confidence_gap(intended: Tensor, logits: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of intended and measured target probability along a path, [B, T, K] twice -> [B]."""
    difference = probability_along(intended, target) - probability_along(logits.double(), target)
    return difference.abs().mean(dim=1).to(logits.dtype)


def probability_along(logits: Tensor, target: Tensor) -> Tensor:
    """Probability of the targets [B] at every step of a path, logits [B, T, K] -> [B, T]."""
    return logits.softmax(dim=2).gather(2, target[:, None, None].expand(-1, logits.shape[1], 1)).squeeze(2)


def runner_up(logits: Tensor) -> Tensor:
    """The most probable class that is not the predicted one, [B, K] -> [B]; what ``target=None`` means."""
    return logits.topk(2, dim=1).indices[:, 1]


def alternative_class(label: Tensor, num_classes: int) -> Tensor:
    """A class other than ``label`` for every sample, uniform over the others, [B] -> [B]."""
    return (label + torch.randint(1, num_classes, label.shape, device=label.device)) % num_classes


#: By how much the target's probability must lead: on the boundary itself saving as 8 bit would decide.
_LEAD = 0.02


def leads(logits: Tensor, target: Tensor) -> Tensor:
    """Whether a classifier clearly decides for the targets [B] at every step, logits [B, T, K] -> [B, T]."""
    p = logits.softmax(dim=2)
    asked = target[:, None, None].expand(-1, p.shape[1], 1)
    return p.gather(2, asked).squeeze(2) >= p.scatter(2, asked, 0.0).amax(dim=2) + _LEAD


def sure_enough(logits: Tensor, target: Tensor, confidence: float | None) -> Tensor:
    """Whether the targets' probability is at least ``confidence``, or without one leads, [B, T, K] -> [B, T]."""
    return leads(logits, target) if confidence is None else probability_along(logits, target) >= confidence


def kl_between_logits(teacher: Tensor, student: Tensor) -> Tensor:
    """KL divergence from the teacher's to the student's softmax, logits [B, K] -> mean over the batch, []."""
    return F.kl_div(
        F.log_softmax(to_float32(student), dim=1),
        F.log_softmax(to_float32(teacher), dim=1),
        log_target=True,
        reduction="batchmean",
    )


def kl_from_uniform(logits: Tensor) -> Tensor:
    """KL(uniform || softmax), logits [B, K] -> [B]; zero exactly when every class is equally probable."""
    # Rounding can leave an undecided classifier a hair below zero.
    return (-math.log(logits.shape[1]) - F.log_softmax(to_float32(logits), dim=1).mean(dim=1)).clamp_min(0)
