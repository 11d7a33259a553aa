"""Decompositions: does removing the class-distinct part remove the decision, and is the agnostic part undecided?

Source: DXAI (arXiv 2401.00320), equation 9 and table 2. Images [B, C, H, W] in [-1, 1]; ``classify`` maps them to
logits [B, K].
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from cfe_lightning.decisions import kl_from_uniform, probability
from cfe_lightning.explanation import SUMMANDS
from cfe_lightning.metrics.case import Case, Kept
from cfe_lightning.metrics.faithfulness import Classify, area, path_logits, rank
from cfe_lightning.metrics.localisation import magnitude
from cfe_lightning.metrics.metric import rows
from cfe_lightning.metrics.statistics import Measurement, statistic

#: Strengths at which the distinct part is removed along the DXAI curve.
STRENGTHS = tuple(round(0.1 * step, 1) for step in range(11))
#: Shares of pixels removed along the pixel-removal curve (table 2 of the paper).
REMOVED = (0.0, 0.05, 0.1, 0.15, 0.2)
_NO_CLEAN_HIT = "the classifier is right on none of these images"

REMOVAL = rows("""
needs: decomposition
key                      title      better   range          meaning
dxai_auc_label           AUC label  lower    [0, 1/A(0)]
    area under accuracy while the true class's distinct part is removed, over clean accuracy A(0); 1 = no effect
dxai_auc_prediction      AUC pred.  lower    [0, 1/A(0)]
    as dxai_auc_label with the distinct part of the predicted class
dxai_auc_fidelity        AUC fid.   lower    [0, 1]
    as dxai_auc_prediction, counting agreement with the decision on the image instead of accuracy
dxai_auc_label_raw       -          lower    [0, 1]         area of dxai_auc_label, not divided by A(0)
dxai_auc_prediction_raw  -          lower    [0, 1]         area of dxai_auc_prediction, not divided by A(0)
removal_auc              removal    lower    [0, 0.2/A(0)]  area under accuracy over A(0) while up to 20 % of the
    pixels, largest distinct part first, turn grey; 0.2 = no effect
outside_range            -          neither  [0, 1]         share of the sweep's values that no image file could hold
""")
UNDECIDED = rows("""
key                title  better   range     needs          meaning
additivity         -      lower    [0, inf)  agnostic       largest |image - sum of the parts|, in [0, 1] units
kl_agnostic        -      lower    [0, inf)  agnostic       KL(uniform || classifier) of the generated agnostic part
kl_removed         KL     lower    [0, inf)  decomposition  KL(uniform || classifier) of image - distinct
max_p_agnostic     -      lower    [1/K, 1]  agnostic       largest class probability of the agnostic part
max_p_removed      max p  lower    [1/K, 1]  decomposition  largest class probability of image - distinct
accuracy_agnostic  -      neither  [0, 1]    agnostic       share of agnostic parts decided as the label
accuracy_removed   -      neither  [0, 1]    decomposition  share of image - distinct decided as the label
former_p_agnostic  -      neither  [0, 1]    agnostic       probability of the former class on the agnostic part
former_p_removed   -      neither  [0, 1]    decomposition  probability of the former class on image - distinct
""")


def measure(case: Case) -> dict[str, Tensor]:
    """Measures the decompositions of a batch, [B] by metric key, and the curves of accuracy, [B, T]."""
    agnostic = _measure_agnostic(case) if "agnostic" in case.available else {}
    return agnostic | (_measure_distinct(case, case.distinct) if case.distinct is not None else {})


def _measure_agnostic(case: Case) -> dict[str, Tensor]:
    # Summands that an explainer leaves out are zero.
    parts = case.explanation.parts
    whole = torch.stack([parts[name] for name in SUMMANDS if name in parts]).sum(dim=0)
    keys = ("kl_agnostic", "max_p_agnostic", "accuracy_agnostic", "former_p_agnostic")
    undecided = _undecided(case, case.judge(parts["agnostic"]), keys)
    return {"additivity": (case.image - whole).abs().flatten(1).amax(dim=1) / 2, **undecided}


def _measure_distinct(case: Case, distinct: Tensor) -> dict[str, Tensor]:
    image, label, max_batch = case.batch["image"], case.label, case.measures.max_batch
    predicted = case.explanation.predicted

    # The distinct part of the true class.
    along_label = sweep_logits(case.judge, image, distinct, max_batch=max_batch)

    # The distinct part of the predicted class differs only where the classifier is wrong.
    along_predicted = along_label.clone()
    wrong = (predicted != label).nonzero().squeeze(1)
    if len(wrong):
        other = case.explainer.distinct(image[wrong], predicted[wrong])
        along_predicted[wrong] = sweep_logits(case.judge, image[wrong], other, max_batch=max_batch)

    # Pixels, and what is left of the decision.
    removed = removal_logits(case.judge, image, magnitude(distinct), max_batch=max_batch)
    keys = ("kl_removed", "max_p_removed", "accuracy_removed", "former_p_removed")
    return {
        "curves/dxai_label": along_label.argmax(dim=2) == label[:, None],
        "curves/dxai_prediction": along_predicted.argmax(dim=2) == label[:, None],
        "curves/dxai_fidelity": along_predicted.argmax(dim=2) == case.source[:, None],
        "curves/removal": removed.argmax(dim=2) == label[:, None],
        "by_class/class_probability": along_label.softmax(dim=2),
        "outside_range": outside_range(image, distinct),
        **_undecided(case, along_predicted[:, -1], keys),
    }


def _undecided(case: Case, logits: Tensor, keys: Sequence[str]) -> dict[str, Tensor]:
    """Computes KL from uniform, largest probability, hits of the label and probability of the class before, [B]."""
    largest, right = logits.softmax(dim=1).amax(dim=1), logits.argmax(dim=1) == case.label
    return dict(zip(keys, (kl_from_uniform(logits), largest, right, probability(logits, case.source)), strict=True))


def summarise(kept: Kept) -> dict[str, Measurement]:
    """Measures the areas under accuracy curves; the intervals are over images, as only a set has an accuracy."""
    curves = kept.rows["curves"]
    if "dxai_label" not in curves:
        return {}
    # Areas of a curve of means, by metric key.
    strengths, fractions = (torch.tensor(positions, dtype=torch.float64) for positions in (STRENGTHS, REMOVED))
    normalised, raw = partial(normalised_area, positions=strengths), partial(area, positions=strengths)
    areas = {
        "dxai_auc_label": ("dxai_label", normalised),
        "dxai_auc_prediction": ("dxai_prediction", normalised),
        "dxai_auc_fidelity": ("dxai_fidelity", normalised),
        "dxai_auc_label_raw": ("dxai_label", raw),
        "dxai_auc_prediction_raw": ("dxai_prediction", raw),
        "removal_auc": ("removal", partial(removal_area, positions=fractions)),
    }
    return {
        key: statistic(curves[name], area_of, _NO_CLEAN_HIT, seed=kept.seed) for key, (name, area_of) in areas.items()
    }


def normalised_area(curve: Tensor, positions: Tensor) -> Tensor:
    """Computes the DXAI AUC of accuracy curves [..., T]: area / (first value * last position), [...].

    1 is a removal without effect, lower is better; NaN where the first value is 0.
    """
    return _over_clean(area(curve, positions) / positions[-1].to(curve), curve)


def removal_area(curve: Tensor, positions: Tensor) -> Tensor:
    """Computes the pixel-removal AUC of accuracy curves [..., T]: area / first value, [...].

    The ceiling is the last fraction; NaN where the first value is 0.
    """
    return _over_clean(area(curve, positions), curve)


def _over_clean(value: Tensor, curve: Tensor) -> Tensor:
    # Without a clean hit there is nothing to lose.
    return torch.where(curve[..., 0] > 0, value / curve[..., 0], torch.nan)


def sweep_logits(
    classify: Classify, image: Tensor, distinct: Tensor, strengths: Sequence[float] = STRENGTHS, max_batch: int = 256
) -> Tensor:
    """Computes logits of image - a * distinct for every strength a, unclamped as the paper defines it, [B, T, K]."""
    return path_logits(classify, lambda index: image - strengths[index] * distinct, len(strengths), max_batch)


def outside_range(image: Tensor, distinct: Tensor, strengths: Sequence[float] = STRENGTHS) -> Tensor:
    """Computes the share of the sweep's values outside [-1, 1], which no image file could hold, [B]."""
    # The slack forgives rounding.
    outside = torch.stack([((image - a * distinct).abs() > 1 + 1e-6).flatten(1).float().mean(1) for a in strengths])
    return outside.mean(dim=0)


def removal_logits(
    classify: Classify, image: Tensor, importance: Tensor, fractions: Sequence[float] = REMOVED, max_batch: int = 256
) -> Tensor:
    """Computes logits with the most important share of pixels set to mid-grey, [B, T, K].

    Paper: pixels strictly above the value of a rank, which removes fewer where values tie; here: exactly the share.
    """
    ranks = rank(importance)
    # The slack keeps 0.15 * 20 from becoming 2.
    counts = [math.floor(fraction * ranks[0].numel() + 1e-9) for fraction in fractions]
    return path_logits(classify, lambda index: image * (ranks >= counts[index]), len(counts), max_batch)
