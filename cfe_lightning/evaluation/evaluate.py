"""Runs explainers over the same images and measures all of them in the same way.

Explanations are measured and thrown away batch by batch. A few numbers per image remain (see ``measurer``). A store
keeps them on disk, so that a killed evaluation resumes where it stopped.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.evaluation.gallery import Gallery
from cfe_lightning.evaluation.measurer import Measurer
from cfe_lightning.evaluation.store import EvaluationStore
from cfe_lightning.evaluation.summary import ResultRow, summarise_measurer
from cfe_lightning.explanation import Explainer, Explanation
from cfe_lightning.metrics.case import Measures
from cfe_lightning.metrics.catalogue import metrics_with
from cfe_lightning.metrics.metric import Metric
from cfe_lightning.metrics.pointing import pointed_at, rank_agreement
from cfe_lightning.metrics.statistics import skipped


@dataclass(kw_only=True, slots=True)
class Evaluation:
    """The results of several explainers on the same images.

    Attributes:
        rows: Results, one row per explainer.
        image_names: Names of the N images.
        labels: True classes of the images, [N].
        class_names: Names of the K classes.
        measures: Settings that say what was measured.
        agreement: Rank correlation between the maps of every two explainers, mean over images, [P, P]; NaN if one of
            the two maps is constant on every image.
        agreeing: Names of the P explainers that answered, in the order of ``agreement``.
    """

    rows: list[ResultRow]
    image_names: list[str]
    labels: Tensor
    class_names: tuple[str, ...]
    measures: Measures = field(default_factory=Measures)
    agreement: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    agreeing: tuple[str, ...] = ()

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Returns the metrics in the order of tables."""
        return metrics_with(self.measures.iso)


def evaluate(
    explainers: Mapping[str, Explainer],
    batches: Iterable[dict[str, Any]],
    *,
    judge: FrozenClassifier | None = None,
    measures: Measures | None = None,
    reference: Iterable[Tensor] = (),
    store: EvaluationStore | None = None,
    gallery: Gallery | None = None,
    shown: Collection[int] = (),
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Evaluation:
    """Explains every image with every explainer and measures the answers.

    Args:
        explainers: Explainers by name, on ``device`` and in eval mode.
        batches: Batches of the data contract (see ``data.base``) without those that ``store`` holds; read once.
        judge: Classifier that decides for all explainers; None judges each explainer by its own classifier.
        measures: Settings that say what is measured.
        reference: Batches of held-out images, [B, C, H, W] in [-1, 1], read once; FID and KID compare edits with them
            instead of with the edits' own originals.
        store: Storage of finished batches, from which the evaluation resumes; None stores nothing.
        gallery: Collects the images ``shown`` with all answers; None collects nothing.
        shown: Positions of the gallery's images in the order of evaluation.
        device: Device that images are moved to.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: If there is no explainer or no image, or a label is outside the classifier's classes.
    """
    if not explainers:
        raise ValueError("There is nothing to evaluate: give at least one explainer.")
    measures = measures or Measures()
    measurers = {name: Measurer(one, judge or one.classifier, measures) for name, one in explainers.items()}
    class_names = next(iter(measurers.values())).judge.class_names
    progress = _Progress(measurers, gallery, shown)

    # Held-out images come first: a folder without any is found before hours are spent.
    for picture in reference:
        for measurer in measurers.values():
            measurer.read_reference(picture.to(device))

    # Finished batches, then the others.
    for state in store.finished() if store is not None else ():
        progress.restore(state)
    for batch in batches:
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        _check_labels(moved["label"], class_names)
        progress.add(moved, store)
    if not progress.image_names:
        raise ValueError("There is no image to evaluate: the split is empty.")

    agreeing = tuple(name for name, measurer in measurers.items() if measurer.failure is None)
    return Evaluation(
        rows=[summarise_measurer(measurer, name, seed) for name, measurer in measurers.items()],
        image_names=progress.image_names,
        labels=torch.cat(progress.labels),
        class_names=class_names,
        measures=measures,
        agreement=progress.agreement(agreeing),
        agreeing=agreeing,
    )


class _Progress:
    """The measurements of all explainers on the batches so far."""

    def __init__(self, measurers: Mapping[str, Measurer], gallery: Gallery | None, shown: Collection[int]) -> None:
        self.measurers, self.gallery, self.shown = measurers, gallery, shown
        self.order = list(measurers)
        self.image_names: list[str] = []
        self.labels: list[Tensor] = []
        # Sums and numbers of the rank correlations between the explainers' maps.
        self.sums = torch.zeros(len(measurers), len(measurers), dtype=torch.float64)
        self.counts = torch.zeros_like(self.sums)

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over a stored batch."""
        for name, measurer in self.measurers.items():
            measurer.restore(state["tallies"][name])
        if self.gallery is not None and state["gallery"] is not None:
            self.gallery.load(state["gallery"])
        self.sums, self.counts = state["agreement"]
        self.image_names += state["names"]
        self.labels.append(state["labels"])

    def add(self, batch: dict[str, Any], store: EvaluationStore | None) -> None:
        """Measures one more batch and stores the results."""
        # Explanations.
        places = [place for place in range(len(batch["name"])) if len(self.image_names) + place in self.shown]
        maps: dict[str, Tensor] = {}
        for name, measurer in self.measurers.items():
            explanation = measurer.add(name, batch)
            if self.gallery is not None and places:
                self._show(self.gallery, name, batch, explanation, places)
            if explanation is not None:
                maps[name] = pointed_at(explanation)
        if maps:
            self._add_agreement(maps)
        self.image_names += batch["name"]
        self.labels.append(batch["label"].cpu())

        # Storage.
        if store is not None:
            state = {
                "names": list(batch["name"]),
                "labels": self.labels[-1],
                "agreement": [self.sums.clone(), self.counts.clone()],
                "tallies": {name: measurer.state() for name, measurer in self.measurers.items()},
                "gallery": self.gallery.state() if self.gallery is not None and places else None,
            }
            store.add(state)

    @torch.no_grad()
    def _show(
        self, gallery: Gallery, name: str, batch: dict[str, Any], explanation: Explanation | None, places: Sequence[int]
    ) -> None:
        """Hands some images of a batch to the gallery, with the decisions on counterfactuals as saved."""
        measurer = self.measurers[name]
        if explanation is None:
            gallery.fail(name, measurer.failure or "")
            return
        chosen, after = explanation.select(torch.tensor(places, device=explanation.image.device)), None
        # A file holds 8-bit levels, on which the decision may differ.
        if chosen.counterfactual is not None:
            after = measurer.judge(images.saved(chosen.counterfactual.clamp(-1, 1))).softmax(dim=1)
        before = measurer.judge(chosen.image).softmax(dim=1)
        gallery.add(name, [batch["name"][place] for place in places], batch["label"][places], chosen, before, after)

    def _add_agreement(self, maps: Mapping[str, Tensor]) -> None:
        """Adds the correlations between maps [B, 1, H, W] of the explainers that answered."""
        # NaN marks images on which a map is constant.
        found = rank_agreement(torch.stack([one.float() for one in maps.values()])).double().cpu()
        places = torch.tensor([self.order.index(name) for name in maps])
        self.sums[places[:, None], places] += found.nansum(dim=0)
        self.counts[places[:, None], places] += (~found.isnan()).sum(dim=0)

    def agreement(self, names: Sequence[str]) -> Tensor:
        """Returns the mean correlations [P, P] between the maps of the explainers ``names``."""
        places = torch.tensor([self.order.index(name) for name in names], dtype=torch.int64)
        return (self.sums / self.counts)[places[:, None], places].float()


def unavailable(name: str, reason: str, measures: Measures) -> ResultRow:
    """Returns the row of an explainer that cannot run here: every metric is skipped for the same reason."""
    measurements = {metric.key: skipped(reason) for metric in metrics_with(measures.iso)}
    return ResultRow(name=name, measurements=measurements, notes=[reason])


def sample_indices(total: int, limit: int | None, seed: int = 0) -> list[int]:
    """Draws at most ``limit`` indices from the whole set, in ascending order: its start may hold one class only."""
    if limit is None or limit >= total:
        return list(range(total))
    return sorted(torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:limit].tolist())


def evenly(total: int, count: int) -> list[int]:
    """Spreads at most ``count`` indices evenly below ``total``: files are ordered by class."""
    return list(range(total)) if count >= total else [index * total // count for index in range(count)]


def _check_labels(label: Tensor, class_names: Sequence[str]) -> None:
    if int(label.min()) < 0 or int(label.max()) >= len(class_names):
        raise ValueError(
            f"The data has label {int(label.max())}, but the classifier knows {len(class_names)} classes "
            f"({', '.join(class_names)}): evaluate on the data the classifier was made for."
        )
