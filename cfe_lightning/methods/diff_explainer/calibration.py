"""Chooses the metric of DiffExplainer's step: moves codes equally far in every metric and asks the classifier.

The paper (arXiv 2406.15182) steps in raw codes. A better fitted agent need not have the better direction, so the choice
is measured; see ``docs/methods/diff_explainer.md``.

Shapes: B images, C channels, H, W pixels, T distances, K classes.
"""

from collections.abc import Mapping

from torch import Tensor

from cfe_lightning.decisions import margin
from cfe_lightning.methods.diff_explainer.agent import METRICS, StepMetric

#: Distances of the compared edits in standard deviations of the codes, towards the source and towards the target.
DISTANCES = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
#: Share of edits that the classifier must follow.
AGREED = 0.9
#: Flip rates that differ by at most this count as equal.
_EQUAL = 0.05


def responses(pictures: Tensor, logits: Tensor, source: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Measures the responses of pictures [B, T, C, H, W] and their logits [B, T, K] to edits of all ``DISTANCES``.

    The edits lead from classes ``source`` [B] to classes ``target`` [B].

    Returns:
        For every image, [B]: ``sign_agreement`` (share of edits that move the classifier's margin the right way),
        ``flip_rate`` (1 where the farthest edit reaches the target), ``monotone`` (share of steps on which the margin
        does not fall) and ``change`` (mean absolute change of the pixels).
    """
    # The unmoved code is in the middle.
    zero = len(DISTANCES) // 2
    margins = margin(logits, target, source)
    agreed = ((margins - margins[:, zero, None]).sign() == logits.new_tensor(DISTANCES).sign()).double()
    return {
        "sign_agreement": (agreed.sum(dim=1) - agreed[:, zero]) / (2 * zero),
        "flip_rate": (logits[:, -1].argmax(dim=1) == target).double(),
        "monotone": (margins.diff(dim=1) >= 0).double().mean(dim=1),
        "change": (pictures - pictures[:, zero, None]).abs().mean(dim=(1, 2, 3, 4)),
    }


def preferred_metric(table: Mapping[str, float]) -> StepMetric | None:
    """Chooses the metric to step in: of those that the classifier follows and that flip most, the least visible one.

    The least visible of all that are followed would not do: it may be the one that changes nothing.

    ``table`` holds the mean of every figure of ``responses`` for every metric, named ``<metric>_<figure>``. Returns
    None if the classifier follows no metric in nine of ten edits.
    """
    followed = [kind for kind in METRICS if table[f"{kind}_sign_agreement"] >= AGREED]
    if not followed:
        return None
    most = max(table[f"{kind}_flip_rate"] for kind in followed)
    able = [kind for kind in followed if table[f"{kind}_flip_rate"] >= most - _EQUAL]
    return min(able, key=lambda kind: table[f"{kind}_change"])
