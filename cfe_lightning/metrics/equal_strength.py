"""Closeness of all methods at the same confidence: the smallest edit on the way that reaches a target probability.

A method that stops just beyond the boundary looks closer than one that goes on. Here both stop at the same place.
Images [B, C, H, W] in [-1, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.compute.search import first_interval, refine
from cfe_lightning.decisions import sure_enough
from cfe_lightning.metrics import counterfactual, similarity
from cfe_lightning.metrics.case import Case
from cfe_lightning.metrics.faithfulness import Classify, path_logits
from cfe_lightning.metrics.metric import Metric

#: Metrics that are compared at equal confidence.
ISO_CLOSENESS = ("l1", "l2", "changed_area", "area90", "gini", "lpips_f")
ISO_REALISM = ("fid_f", "kid_f")
#: Smallest number of positions in the first pass over a way.
_GRID = 9


def iso_key(level: float, name: str) -> str:
    """Returns the key of a metric at equal confidence, such as ``iso_0.9_l1``."""
    return f"iso_{level:g}_{name}"


def metrics_at(levels: Sequence[float]) -> tuple[Metric, ...]:
    """Lists the metrics of the smallest edits that reach target probabilities."""
    # Closeness of the edits, with the direction and range of the plain metrics.
    compared = [m for m in (*similarity.PERCEPTION, *counterfactual.CLOSENESS) if m.key in ISO_CLOSENESS]
    found: list[Metric] = []
    for level in levels:
        sure = f"the smallest edit with a probability of the target of at least {level:g}"
        key, meaning = iso_key(level, "reached"), f"share of images that have {sure}"
        found.append(Metric(key=key, better="higher", value_range="[0, 1]", needs=("counterfactual",), meaning=meaning))
        found += [replace(m, key=iso_key(level, m.key), meaning=f"{m.key} of {sure}", title="") for m in compared]
    return tuple(found)


def measure(case: Case) -> dict[str, Tensor]:
    """Measures the smallest edits of a batch at every level, [B] by metric key, and keeps their features, [B, D]."""
    if "counterfactual" not in case.available or not case.measures.iso:
        return {}
    # Without steps the way is straight.
    way = torch.stack([case.image, case.counterfactual], dim=1) if case.steps is None else case.steps
    way = way.clamp(-1, 1)
    found = {}
    for level in case.measures.iso:
        smallest = smallest_edit(case.judge, way, case.target, level, max_batch=case.measures.max_batch)

        # Images that do not reach the level are undefined.
        values = counterfactual.closeness(case.image, smallest.edit)
        if case.stages:
            values["lpips_f"] = similarity.lpips_f(case, smallest.edit)
        found[iso_key(level, "reached")] = smallest.reached
        for key, value in values.items():
            found[iso_key(level, key)] = torch.where(smallest.reached, value, torch.nan)
        if "features" in case.available:
            # Features of images that do not reach the level are never read.
            found[f"iso_features/{level:g}"] = case.judge.features(smallest.edit).float().cpu()
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class EqualStrength:
    """The smallest edits of a batch.

    Attributes:
        edit: Edits as an 8-bit file holds them, [B, C, H, W]; the end of the way where the confidence is not reached.
        reached: Whether the edit reaches the confidence, [B] bool.
        position: Position of the edit on the way, 0 to 1, [B].
    """

    edit: Tensor
    reached: Tensor
    position: Tensor


@torch.no_grad()
def smallest_edit(
    judge: Classify, path: Tensor, target: Tensor, confidence: float, *, bisections: int = 7, max_batch: int = 256
) -> EqualStrength:
    """Searches along a way for the first picture with enough probability of the target.

    Args:
        judge: Maps images to logits [B, K].
        path: Frames of the way, [B, T, C, H, W]; pictures between them are blended.
        target: Target classes, [B].
        confidence: Probability that the target must reach.
        bisections: Number of halvings between the first sufficient point of a grid and the point before it.
        max_batch: Largest batch of the judge.
    """
    last = path.shape[1] - 1

    def pictures(position: Tensor, rows: Tensor) -> Tensor:
        """Renders the images ``rows`` at positions [R, S], [R, S, C, H, W]."""
        place, every = (position * last).clamp(0, last), rows[:, None]
        before = place.floor().long().clamp_max(max(last - 1, 0))
        share = (place - before).view(*place.shape, 1, 1, 1).to(path.dtype)
        return images.saved(torch.lerp(path[every, before], path[every, (before + 1).clamp_max(last)], share))

    def reached(position: Tensor, rows: Tensor) -> Tensor:
        # The pictures are judged as they would be saved.
        shown = pictures(position, rows)
        logits = path_logits(judge, lambda index: shown[:, index], shown.shape[1], max_batch)
        return sure_enough(logits.float(), target[rows], confidence)

    # Grid, then bisection.
    rows = torch.arange(len(path), device=path.device)
    grid = torch.linspace(0, 1, max(_GRID, last + 1), device=path.device, dtype=torch.float64).expand(len(path), -1)
    low, high, found = first_interval(grid, reached(grid, rows))
    refine(reached, low, high, rows[found & (high > 0)], points=1, rounds=bisections)
    return EqualStrength(edit=pictures(high[:, None], rows)[:, 0], reached=found, position=high)
