"""Where an explanation points: the map that explainers of all kinds are compared by."""

from __future__ import annotations

from torch import Tensor

from cfe_lightning.explanation import Explanation
from cfe_lightning.metrics.counterfactual import change_map


def pointed_at(explanation: Explanation) -> Tensor:
    """What the decision changed: |counterfactual - image|, or the attribution where nothing is changed, [B, 1, H, W].

    A method that draws the whole image anew changes it everywhere before anything is asked of it. Its change counts
    from its own rendering, so that the autoencoder's faults are not taken for the classifier's reasons. Parts of a
    decomposition are made to sum up to the image, so its change counts from there.
    """
    if explanation.counterfactual is None:
        return explanation.attribution
    start = explanation.image if "agnostic" in explanation.parts else explanation.parts.get("reconstruction")
    start = explanation.image if start is None else start.clamp(-1, 1)
    return change_map(start, explanation.counterfactual.clamp(-1, 1))
