"""What lies behind a table of means: paired differences between explainers, and every pair of classes by itself.

Source: evaluation, section 12.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from cfe_lightning.evaluation.evaluate import Evaluation
from cfe_lightning.evaluation.summary import ResultRow
from cfe_lightning.metrics import realism
from cfe_lightning.metrics.catalogue import ISO_CLOSENESS, ISO_REALISM, METRICS, iso_key
from cfe_lightning.metrics.statistics import Measurement, summarise, undefined

#: Images that a distance of sets needs at least.
_FEWEST = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One metric of two explainers on the same images.

    Attributes:
        first: Name of one.
        second: Name of the other.
        key: Of the metric.
        measured: First minus second, with a bootstrap interval over images on which both are defined.
    """

    first: str
    second: str
    key: str
    measured: Measurement


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupMean:
    """One metric of one explainer on the images of one pair of classes, or of one true class.

    Attributes:
        explainer: Its name.
        source: The class before, or the true class.
        target: The class asked for; None for a true class.
        key: Of the metric.
        measured: With its interval.
    """

    explainer: str
    source: str
    target: str | None
    key: str
    measured: Measurement


def paired_differences(evaluation: Evaluation, *, resamples: int = 1000, seed: int = 0) -> list[Difference]:
    """Every metric that two explainers have of the same images, for every two of them."""
    wanted = [metric.key for metric in evaluation.measures.metrics]
    found: list[Difference] = []
    for one, other in combinations(evaluation.rows, 2):
        keys = [key for key in wanted if key in one.per_image and key in other.per_image]
        values = {key: one.per_image[key].double() - other.per_image[key].double() for key in keys}
        measured = summarise(values, resamples=resamples, seed=seed)
        found += [Difference(first=one.name, second=other.name, key=key, measured=measured[key]) for key in keys]
    return found


def group_means(evaluation: Evaluation, *, resamples: int = 1000, seed: int = 0) -> list[GroupMean]:
    """Every metric per pair of classes before and asked for, and per true class: a mean hides its worst part."""
    names = evaluation.class_names
    found: list[GroupMean] = []
    for row in evaluation.rows:
        values = {m.key: row.per_image[m.key] for m in evaluation.measures.metrics if m.key in row.per_image}
        for source, target, members in _groups(row.predicted, row.target, evaluation.labels):
            part = {key: value[members] for key, value in values.items()}
            measured = summarise(part, resamples=resamples, seed=seed)
            found += [
                GroupMean(
                    explainer=row.name,
                    source=names[source],
                    target=None if target is None else names[target],
                    key=key,
                    measured=measured[key],
                )
                for key in part
            ]
    return found


def at_equal_strength(
    evaluation: Evaluation, level: float, *, resamples: int = 1000, seed: int = 0
) -> tuple[int, dict[str, dict[str, Measurement]]]:
    """Closeness and realism at equal confidence, on the images for which every explainer has an edit that is so sure.

    Returns:
        How many images these are, and by explainer and metric key what is measured on them.
    """
    reached = iso_key(level, "reached")
    rows = [row for row in evaluation.rows if reached in row.per_image]
    if not rows:
        return 0, {}
    common = torch.stack([row.per_image[reached] for row in rows]).all(dim=0)
    found = {}
    for row in rows:
        values = {
            key: row.per_image[iso_key(level, key)] for key in ISO_CLOSENESS if iso_key(level, key) in row.per_image
        }
        found[row.name] = summarise(
            {key: value[common] for key, value in values.items()}, resamples=resamples, seed=seed
        )
        found[row.name] |= _realism(row, f"{level:g}", common, seed)
    return int(common.sum()), found


def _realism(row: ResultRow, level: str, common: Tensor, seed: int) -> dict[str, Measurement]:
    """Distances of the sets of originals and edits in the classifier's features."""
    total, used = len(common), int(common.sum())
    if level not in row.features:
        return {}
    if used < _FEWEST:
        return {key: undefined(f"fewer than {_FEWEST} images", total) for key in ISO_REALISM}
    before, after = row.features["before"][common], row.features[level][common]
    kernel, _ = realism.kid(before, after, seed)
    return {
        key: Measurement(status="ok", value=value, n_used=used, n_total=total)
        for key, value in zip(ISO_REALISM, (realism.fid(before, after), kernel), strict=True)
    }


def worst_pair(groups: list[GroupMean], explainer: str, key: str) -> GroupMean | None:
    """The pair of classes on which an explainer does worst in a metric, by the metric's own direction."""
    better = next(metric.better for metric in METRICS if metric.key == key)
    found = [
        group
        for group in groups
        if (group.explainer, group.key) == (explainer, key)
        and group.target is not None
        and group.measured.value is not None
    ]
    if not found or better == "neither":
        return None
    sign = 1 if better == "higher" else -1
    return min(found, key=lambda group: sign * (group.measured.value or 0.0))


def _groups(
    predicted: Tensor | None, target: Tensor | None, labels: Tensor
) -> Iterator[tuple[int, int | None, Tensor]]:
    """Class before, class asked for (None for true classes), and which images."""
    if predicted is not None and target is not None:
        for source, asked in torch.unique(torch.stack([predicted, target], dim=1), dim=0).tolist():
            yield source, asked, (predicted == source) & (target == asked)
    for label in labels.unique().tolist():
        yield label, None, labels == label
