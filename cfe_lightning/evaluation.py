"""Runs explainers over the same images and measures them all the same way, whoever made the explanations.

Explanations are measured and thrown away batch by batch; what stays is a few numbers per image (see ``tally``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.explanation import Explainer
from cfe_lightning.metrics.catalogue import METRICS, Metric, iso_metrics
from cfe_lightning.metrics.statistics import skipped
from cfe_lightning.tally import Row, Tally


@dataclass(kw_only=True, slots=True)
class Evaluation:
    """The results of several explainers on the same images.

    Attributes:
        rows: One per explainer.
        image_names: The images, N.
        labels: Their true classes, [N].
        class_names: K names.
        metrics: What was asked for, in the order of tables.
        iso: Probabilities at which explainers were compared at equal strength.
    """

    rows: list[Row]
    image_names: list[str]
    labels: Tensor
    class_names: tuple[str, ...]
    metrics: tuple[Metric, ...] = METRICS
    iso: tuple[float, ...] = ()


def evaluate(
    explainers: Mapping[str, Explainer],
    batches: Iterable[dict[str, Any]],
    *,
    judge: FrozenClassifier | None = None,
    second: FrozenClassifier | None = None,
    iso: Sequence[float] = (),
    device: torch.device | str = "cpu",
    curve_steps: int = 50,
    max_batch: int = 256,
    resamples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Explains every image with every explainer and measures the answers.

    Args:
        explainers: Name to explainer, on ``device`` and in eval mode.
        batches: Batches of the batch contract (see ``data.image_data``), read once.
        judge: Classifier that decides everywhere; None lets every explainer be judged by its own (DXAI, table 3).
        second: A classifier trained by itself for the same classes, for ``transfer_flip``; None skips it.
        iso: Probabilities of the target at which explainers are also compared at equal strength (each costs some
            twenty classifier passes per image).
        device: Where images go.
        curve_steps: Blocks of COUT, insertion and deletion; 0 skips them (each costs that many classifier passes).
        max_batch: Largest batch of the judge along a curve.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        ValueError: If there is no explainer or no image, or a label is outside the classifier's classes.
    """
    if not explainers:
        raise ValueError("There is nothing to evaluate: give at least one explainer.")
    tallies = {
        name: Tally(explainer, judge or explainer.classifier, curve_steps, max_batch, second, iso)
        for name, explainer in explainers.items()
    }
    class_names = next(iter(tallies.values())).judge.class_names
    image_names: list[str] = []
    labels: list[Tensor] = []
    for batch in batches:
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        _check_labels(moved["label"], class_names)
        for name, tally in tallies.items():
            tally.add(name, moved)
        image_names += list(batch["name"])
        labels.append(batch["label"].cpu())
    if not image_names:
        raise ValueError("There is no image to evaluate: the split is empty.")
    rows = [tally.row(name, resamples, seed) for name, tally in tallies.items()]
    return Evaluation(
        rows=rows,
        image_names=image_names,
        labels=torch.cat(labels),
        class_names=class_names,
        metrics=(*METRICS, *iso_metrics(iso)),
        iso=tuple(iso),
    )


def unavailable(name: str, reason: str, iso: Sequence[float] = ()) -> Row:
    """The row of an explainer that cannot run here: every metric is skipped for the same reason."""
    metrics = (*METRICS, *iso_metrics(iso))
    return Row(name=name, measurements={metric.key: skipped(reason) for metric in metrics}, notes=[reason])


def sample_indices(total: int, limit: int | None, seed: int = 0) -> list[int]:
    """At most ``limit`` indices drawn over the whole set, in order: the first ones may all be of one class."""
    if limit is None or limit >= total:
        return list(range(total))
    drawn = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:limit]
    return sorted(drawn.tolist())


def _check_labels(label: Tensor, class_names: Sequence[str]) -> None:
    if int(label.min()) < 0 or int(label.max()) >= len(class_names):
        raise ValueError(
            f"The data has label {int(label.max())}, but the classifier knows {len(class_names)} classes "
            f"({', '.join(class_names)}): evaluate on the data the classifier was made for."
        )
