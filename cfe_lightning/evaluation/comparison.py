"""Comparisons behind the table of means: paired differences between explainers, and means per pair of classes."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from operator import itemgetter

import torch
from torch import Tensor

from cfe_lightning.evaluation.evaluate import Evaluation
from cfe_lightning.evaluation.summary import ResultRow
from cfe_lightning.metrics import realism
from cfe_lightning.metrics.catalogue import METRICS
from cfe_lightning.metrics.equal_strength import ISO_CLOSENESS, ISO_REALISM, iso_key
from cfe_lightning.metrics.statistics import Measurement, summarise, undefined

#: Smallest number of images for a distance between two sets.
_FEWEST = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One metric of two explainers on the same images.

    Attributes:
        first: Name of the first explainer.
        second: Name of the second explainer.
        key: Key of the metric.
        measured: First minus second, with a bootstrap interval over the images on which both are defined.
    """

    first: str
    second: str
    key: str
    measured: Measurement


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupMean:
    """One metric of one explainer on the images of one pair of classes, or of one true class.

    Attributes:
        explainer: Name of the explainer.
        source: Class decided before the edit, or the true class.
        target: Target class; None if the group is a true class.
        key: Key of the metric.
        measured: Mean over the group with its interval.
    """

    explainer: str
    source: str
    target: str | None
    key: str
    measured: Measurement


def paired_differences(evaluation: Evaluation) -> list[Difference]:
    """Compares every two explainers in every metric that both have per image."""
    wanted = [metric.key for metric in evaluation.metrics]
    found: list[Difference] = []
    for one, other in combinations(evaluation.rows, 2):
        keys = [key for key in wanted if key in one.per_image and key in other.per_image]
        values = {key: one.per_image[key].double() - other.per_image[key].double() for key in keys}
        measured = summarise(values)
        found += [Difference(first=one.name, second=other.name, key=key, measured=measured[key]) for key in keys]
    return found


def group_means(evaluation: Evaluation) -> list[GroupMean]:
    """Averages every metric per pair of decided and target class, and per true class: a mean hides its worst part."""
    names = evaluation.class_names
    found: list[GroupMean] = []
    for row in evaluation.rows:
        values = {m.key: row.per_image[m.key] for m in evaluation.metrics if m.key in row.per_image}
        for source, target, members in _groups(row.predicted, row.target, evaluation.labels):
            measured = summarise({key: value[members] for key, value in values.items()})
            asked = None if target is None else names[target]
            found += [
                GroupMean(explainer=row.name, source=names[source], target=asked, key=key, measured=measured[key])
                for key in values
            ]
    return found


def at_equal_strength(evaluation: Evaluation, level: float) -> tuple[int, dict[str, dict[str, Measurement]]]:
    """Measures closeness and realism on the images that every explainer can change to the target probability ``level``.

    Returns:
        The number of these images, and the measurements by explainer and metric key.
    """
    reached = iso_key(level, "reached")
    rows = [row for row in evaluation.rows if reached in row.per_image]
    if not rows:
        return 0, {}
    # Images that every explainer can change so far.
    common = torch.stack([row.per_image[reached] for row in rows]).all(dim=0)
    found, keys = {}, {key: iso_key(level, key) for key in ISO_CLOSENESS}
    for row in rows:
        values = {key: row.per_image[iso][common] for key, iso in keys.items() if iso in row.per_image}
        found[row.name] = summarise(values) | _realism(row, f"{level:g}", common)
    return int(common.sum()), found


def _realism(row: ResultRow, level: str, common: Tensor) -> dict[str, Measurement]:
    """Measures distances between the sets of originals and of edits in the classifier's features."""
    total, used = len(common), int(common.sum())
    if level not in row.features:
        return {}
    if used < _FEWEST:
        return dict.fromkeys(ISO_REALISM, undefined(f"fewer than {_FEWEST} images", total))
    before, after = row.features["before"][common], row.features[level][common]
    distances = realism.fid(before, after), realism.kid(before, after)[0]
    found = (Measurement(value=value, n_used=used, n_total=total) for value in distances)
    return dict(zip(ISO_REALISM, found, strict=True))


def worst_pair(groups: list[GroupMean], explainer: str, key: str) -> GroupMean | None:
    """Finds the pair of classes on which an explainer does worst in a metric; None for metrics without a direction."""
    sign = {"higher": 1, "lower": -1, "neither": 0}[next(metric.better for metric in METRICS if metric.key == key)]
    found = [
        (sign * one.measured.value, one)
        for one in groups
        if (one.explainer, one.key) == (explainer, key) and one.target is not None and one.measured.value is not None
    ]
    return min(found, key=itemgetter(0))[1] if found and sign else None


def _groups(
    predicted: Tensor | None, target: Tensor | None, labels: Tensor
) -> Iterator[tuple[int, int | None, Tensor]]:
    """Yields decided class, target class (None for a true class), and the images of the group, [N] bool."""
    if predicted is not None and target is not None:
        for source, asked in torch.unique(torch.stack([predicted, target], dim=1), dim=0).tolist():
            yield source, asked, (predicted == source) & (target == asked)
    for label in labels.unique().tolist():
        yield label, None, labels == label
