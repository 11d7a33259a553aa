"""Runs explainers over the same images and measures them all the same way, whoever made the explanations.

Explanations are measured and thrown away batch by batch; what stays is a few numbers per image (see ``tally``), which
a store keeps, so that an evaluation that was killed goes on where it was.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.evaluation.gallery import Gallery
from cfe_lightning.evaluation.store import EvaluationStore
from cfe_lightning.evaluation.summary import ResultRow, summarise_measurer
from cfe_lightning.evaluation.tally import Measurer, Measures
from cfe_lightning.explanation import Explainer, Explanation
from cfe_lightning.metrics.agreement import rank_agreement
from cfe_lightning.metrics.pointing import pointed_at
from cfe_lightning.metrics.statistics import skipped


@dataclass(kw_only=True, slots=True)
class Evaluation:
    """The results of several explainers on the same images.

    Attributes:
        rows: One per explainer.
        image_names: The images, N.
        labels: Their true classes, [N].
        class_names: K names.
        measures: What was asked for.
        agreement: Rank correlation of where every two of ``agreeing`` point, mean over images, [P, P]; NaN where one of
            them points nowhere.
        agreeing: Names of the explainers that answered, P.
    """

    rows: list[ResultRow]
    image_names: list[str]
    labels: Tensor
    class_names: tuple[str, ...]
    measures: Measures = field(default_factory=Measures)
    agreement: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    agreeing: tuple[str, ...] = ()


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
    resamples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Explains every image with every explainer and measures the answers.

    Args:
        explainers: Name to explainer, on ``device`` and in eval mode.
        batches: Batches of the batch contract (see ``data.image_data``), read once; without those that ``store`` has.
        judge: Classifier that decides everywhere; None lets every explainer be judged by its own (DXAI, table 3).
        measures: What is measured, and with what.
        reference: Held-out images, batches [B, C, H, W] in [-1, 1], read once: FID and KID compare edits with them
            instead of with their own originals.
        store: Where finished batches are kept and come back from; None keeps none.
        gallery: Is given the images ``shown`` with everybody's answers; None keeps none.
        shown: Numbers of images in the order of evaluation.
        device: Where images go.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        ValueError: If there is no explainer or no image, or a label is outside the classifier's classes.
    """
    if not explainers:
        raise ValueError("There is nothing to evaluate: give at least one explainer.")
    measures = measures or Measures()
    tallies = {
        name: Measurer(explainer, judge or explainer.classifier, measures) for name, explainer in explainers.items()
    }
    class_names = next(iter(tallies.values())).judge.class_names
    # First, because a folder that holds none must not cost hours.
    for picture in reference:
        for tally in tallies.values():
            tally.read_reference(picture.to(device))
    image_names: list[str] = []
    labels: list[Tensor] = []
    agreement = _Agreement(tuple(explainers))
    for state in store.finished() if store is not None else ():
        for name, tally in tallies.items():
            tally.restore(state["tallies"][name])
        if gallery is not None and state["gallery"] is not None:
            gallery.load(state["gallery"])
        agreement.sums, agreement.counts = state["agreement"]
        image_names += state["names"]
        labels.append(state["labels"])
    for batch in batches:
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        _check_labels(moved["label"], class_names)
        places = [place for place in range(len(batch["name"])) if len(image_names) + place in shown]
        maps: dict[str, Tensor] = {}
        for name, tally in tallies.items():
            explanation = tally.add(name, moved)
            if gallery is not None and places:
                _show(gallery, name, tally, moved, explanation, places)
            if explanation is not None:
                maps[name] = pointed_at(explanation)
        agreement.add(maps)
        image_names += list(batch["name"])
        labels.append(batch["label"].cpu())
        if store is not None:
            store.add(
                {
                    "names": list(batch["name"]),
                    "labels": labels[-1],
                    "agreement": [agreement.sums.clone(), agreement.counts.clone()],
                    "tallies": {name: tally.state() for name, tally in tallies.items()},
                    "gallery": gallery.state() if gallery is not None and places else None,
                }
            )
    if not image_names:
        raise ValueError("There is no image to evaluate: the split is empty.")
    agreeing, agreed = agreement.result([name for name, tally in tallies.items() if tally.failure is None])
    return Evaluation(
        rows=[summarise_measurer(tally, name, resamples, seed) for name, tally in tallies.items()],
        image_names=image_names,
        labels=torch.cat(labels),
        class_names=class_names,
        measures=measures,
        agreement=agreed,
        agreeing=agreeing,
    )


class _Agreement:
    """Adds up how much explainers agree on where to look."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.sums = torch.zeros(len(names), len(names), dtype=torch.float64)
        self.counts = torch.zeros(len(names), len(names), dtype=torch.float64)

    def add(self, maps: Mapping[str, Tensor]) -> None:
        """Takes the maps [B, 1, H, W] of those who answered."""
        if not maps:
            return
        found = rank_agreement(torch.stack([one.float() for one in maps.values()])).double().cpu()
        places = torch.tensor([self.names.index(name) for name in maps])
        self.sums[places[:, None], places] += found.nansum(dim=0)
        self.counts[places[:, None], places] += (~found.isnan()).sum(dim=0)

    def result(self, wanted: Sequence[str]) -> tuple[tuple[str, ...], Tensor]:
        """Names and means [P, P] of the explainers ``wanted``."""
        places = torch.tensor([self.names.index(name) for name in wanted], dtype=torch.int64)
        return tuple(wanted), (self.sums / self.counts)[places[:, None], places].float()


def unavailable(name: str, reason: str, measures: Measures) -> ResultRow:
    """The row of an explainer that cannot run here: every metric is skipped for the same reason."""
    return ResultRow(name=name, measurements={m.key: skipped(reason) for m in measures.metrics}, notes=[reason])


def sample_indices(total: int, limit: int | None, seed: int = 0) -> list[int]:
    """At most ``limit`` indices drawn over the whole set, in order: the first ones may all be of one class."""
    if limit is None or limit >= total:
        return list(range(total))
    drawn = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:limit]
    return sorted(drawn.tolist())


def evenly(total: int, count: int) -> list[int]:
    """At most ``count`` numbers below ``total``, spread over them: files come class by class."""
    return list(range(total)) if count >= total else [index * total // count for index in range(count)]


@torch.no_grad()
def _show(
    gallery: Gallery,
    name: str,
    tally: Measurer,
    batch: dict[str, Any],
    explanation: Explanation | None,
    places: Sequence[int],
) -> None:
    """Hands some images of a batch over to the gallery, judged as saved."""
    if explanation is None:
        gallery.fail(name, tally.failure or "")
        return
    chosen = explanation.select(torch.tensor(places, device=explanation.image.device))
    after = None
    if chosen.counterfactual is not None:
        after = tally.judge(images.saved(chosen.counterfactual.clamp(-1, 1))).softmax(dim=1)
    names = [batch["name"][place] for place in places]
    before = tally.judge(chosen.image).softmax(dim=1)
    gallery.add(name, names, batch["label"][places], chosen, before, after)


def _check_labels(label: Tensor, class_names: Sequence[str]) -> None:
    if int(label.min()) < 0 or int(label.max()) >= len(class_names):
        raise ValueError(
            f"The data has label {int(label.max())}, but the classifier knows {len(class_names)} classes "
            f"({', '.join(class_names)}): evaluate on the data the classifier was made for."
        )
