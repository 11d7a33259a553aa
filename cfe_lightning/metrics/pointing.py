"""The places that an explanation points at, as a map that compares explainers of all kinds, and seeds of one."""

import torch
from torch import Tensor

from cfe_lightning.explanation import Explanation
from cfe_lightning.metrics.counterfactual import change_map
from cfe_lightning.metrics.path import standardised_ranks


def pointed_at(explanation: Explanation) -> Tensor:
    """Maps the change |counterfactual - image|, or the attribution without a counterfactual, [B, 1, H, W].

    A method that draws the whole image anew changes it everywhere before it is asked for a target. Its change counts
    from its own rendering, so that the autoencoder's faults are not taken for the classifier's reasons. Parts of a
    decomposition are made to sum up to the image, so its change counts from there.
    """
    if explanation.counterfactual is None:
        return explanation.attribution
    # The start of the change.
    start = explanation.image if "agnostic" in explanation.parts else explanation.parts.get("reconstruction")
    start = explanation.image if start is None else start.clamp(-1, 1)
    return change_map(start, explanation.counterfactual.clamp(-1, 1))


def rank_agreement(maps: Tensor) -> Tensor:
    """Computes the rank correlation of every two maps of an image.

    Args:
        maps: Maps of P explainers, [P, B, 1, H, W].

    Returns:
        [B, P, P] in [-1, 1]; NaN where a map is constant and thus points nowhere.
    """
    ranks = torch.stack([standardised_ranks(one.flatten(1)) for one in maps])
    found = torch.einsum("pbm,qbm->bpq", ranks, ranks)
    # Ranks have length 1, or 0 where a map is constant.
    somewhere = ranks.square().sum(dim=2).T > 0.5
    return torch.where(somewhere[:, :, None] & somewhere[:, None], found, torch.nan).clamp(-1, 1).float()
