"""Do explanations of the same image point at the same places: between explainers, and between seeds of one."""

from __future__ import annotations

import torch
from torch import Tensor

from cfe_lightning.metrics.path import standardised_ranks


def rank_agreement(maps: Tensor) -> Tensor:
    """Rank correlation of every two maps of an image.

    Args:
        maps: Of P explainers, [P, B, 1, H, W].

    Returns:
        [B, P, P] in [-1, 1]; NaN where a map is constant, since it points nowhere.
    """
    ranks = torch.stack([standardised_ranks(one.flatten(1)) for one in maps])
    found = torch.einsum("pbm,qbm->bpq", ranks, ranks)
    somewhere = ranks.square().sum(dim=2).T > 0.5
    return torch.where(somewhere[:, :, None] & somewhere[:, None], found, torch.nan).clamp(-1, 1).float()
