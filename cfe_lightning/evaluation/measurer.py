"""Measures one explainer's answers batch by batch and keeps a few numbers per image, which ``summary`` sums up."""

import logging
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.classifier.counting import Calls, counted
from cfe_lightning.compute.clock import clock
from cfe_lightning.decisions import runner_up
from cfe_lightning.evaluation.columns import Columns
from cfe_lightning.evaluation.guarded import FaultyExplainerError, GuardedExplainer, is_decomposer
from cfe_lightning.explanation import Explainer, Explanation, seed_of
from cfe_lightning.metrics.case import Case, Measures
from cfe_lightning.metrics.catalogue import GROUPS
from cfe_lightning.metrics.decomposition import STRENGTHS
from cfe_lightning.metrics.localisation import true_target
from cfe_lightning.metrics.repetition import forgetful

_log = logging.getLogger(__name__)

#: Number of the judge's layers that are watched for the perceptual distance, from the finest on.
_STAGES = 5
#: Attributes that an evaluation stores as they are.
_PLAIN = ("failure", "positions", "peak_memory", "num_images", "size")


class Measurer:
    """Measures one explainer batch by batch and keeps a few numbers per image.

    Attributes:
        columns: Rows per image by kind (see ``metrics.case.Kept.rows``).
        class_sums: Sums of the probabilities along the DXAI curve by true class, [A, K, K]; ``class_counts``, [K],
            tells how many images each sum has.
        positions: Positions along curves by name, [T] each.
        available: Needs that a batch met so far.
        failure: Reason why the explainer is left out; None where it is not.
        size: Shorter side of the images, in pixels.
    """

    def __init__(self, explainer: Explainer, judge: FrozenClassifier, measures: Measures) -> None:
        self.explainer, self.judge, self.measures = explainer, judge, measures
        self.stages = judge.shallow_maps(_STAGES) if judge.spec.head is not None else []
        self.failure: str | None = None

        # Numbers.
        self.columns: dict[str, Columns] = defaultdict(Columns)
        self.available: set[str] = set()
        self.positions: dict[str, Tensor] = {}
        self.seconds: list[float] = []
        self.peak_memory = 0
        self.num_images = 0
        self.size = 0
        self.class_sums = torch.zeros(len(STRENGTHS), judge.num_classes, judge.num_classes, dtype=torch.float64)
        self.class_counts = torch.zeros(judge.num_classes, dtype=torch.float64)

        self._asked = GuardedExplainer(explainer)
        self._twins: dict[str, Explainer | None] = {}
        self._new_labels: set[int] = set()
        self._told_seconds = 0

    @torch.no_grad()
    def add(self, name: str, batch: dict[str, Any]) -> Explanation | None:
        """Explains and measures one batch; None where the explainer is left out, for the reason in ``failure``."""
        self.num_images += len(batch["image"])
        if self.failure is not None:
            return None
        try:
            return self._measured(batch)
        except FaultyExplainerError as fault:
            self.failure = str(fault)
        _log.warning("%s %s: it is left out of the table.", name, self.failure)
        return None

    def _measured(self, batch: dict[str, Any]) -> Explanation:
        image, label = batch["image"], batch["label"]
        self.size = min(image.shape[-2:])
        self._asked.names = batch["name"]

        # The answer.
        logits = self.judge(image)
        explanation, calls = self._explain(batch)
        case = Case(
            batch=batch,
            logits=logits,
            explanation=explanation,
            distinct=self._asked.distinct(image, label) if is_decomposer(self.explainer) else None,
            explainer=self._asked,
            twin=self._twin,
            judge=self.judge,
            stages=self.stages,
            measures=self.measures,
            calls=calls,
        )

        # Its measurements.
        self.available |= case.available
        self.columns["decisions"].add({"predicted": case.source, "target": case.target, "label": label})
        for group in GROUPS:
            if group.needs <= case.available:
                self._keep(group.measure(case), label)
        return explanation

    def _keep(self, found: dict[str, Tensor], label: Tensor) -> None:
        """Keeps what a group measured: ``l1`` is a metric, ``curves/path`` a row of another kind."""
        for key, rows in found.items():
            kind, slash, name = key.partition("/")
            if not slash:
                self.columns["values"].add({key: rows})
            elif kind == "positions":
                self.positions[name] = rows
            elif kind == "by_class":
                self._count_classes(rows, label.cpu())
            else:
                self.columns[kind].add({name: rows})

    def _count_classes(self, probabilities: Tensor, label: Tensor) -> None:
        """Adds probabilities [B, A, K] to the sums per true class."""
        self._new_labels |= set(label.tolist())
        self.class_sums.index_add_(1, label, probabilities.double().cpu().transpose(0, 1))
        self.class_counts.index_add_(0, label, torch.ones(len(label), dtype=torch.float64))

    def _explain(self, batch: dict[str, Any]) -> tuple[Explanation, Calls]:
        image, target = batch["image"], _target(batch, self.explainer.classifier, self.measures.ace)
        # Random numbers depend on the images alone, so that an evaluation that goes on draws the same.
        torch.manual_seed(seed_of(batch["name"]))
        if image.is_cuda:
            torch.cuda.reset_peak_memory_stats(image.device)
        started = clock(image.device)
        with counted() as calls:
            explanation = self._asked.explain(image, target)
        self.seconds.append((clock(image.device) - started) / len(image))
        if image.is_cuda:
            self.peak_memory = max(self.peak_memory, torch.cuda.max_memory_allocated(image.device))
        return explanation, calls

    def _twin(self, layers: str) -> GuardedExplainer | None:
        """Returns the explainer with random weights in its classifier's ``layers``, made once; None without weights."""
        if layers not in self._twins:
            self._twins[layers] = forgetful(self.explainer, layers)
        twin = self._twins[layers]
        return None if twin is None else GuardedExplainer(twin, self._asked.names)

    @torch.no_grad()
    def read_reference(self, picture: Tensor) -> None:
        """Reads held-out images [B, C, H, W] in [-1, 1], with which edits are compared instead of their originals."""
        self.columns["reference"].add(self.measures.instruments.embed(picture, self.judge))

    def state(self) -> dict[str, Any]:
        """Returns everything new since the last call as plain data; ``restore`` of all states rebuilds the measurer."""
        # Sums are handed over for the classes that changed.
        labels = sorted(self._new_labels)
        news = {
            # Held-out images are read again.
            "columns": {kind: columns.take_new() for kind, columns in self.columns.items() if kind != "reference"},
            "available": sorted(self.available),
            "seconds": self.seconds[self._told_seconds :],
            **{name: getattr(self, name) for name in _PLAIN},
            "labels": labels,
            "class_sums": self.class_sums[:, labels].clone(),
            "class_counts": self.class_counts[labels].clone(),
        }
        self._new_labels.clear()
        self._told_seconds = len(self.seconds)
        return news

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over one result of ``state``."""
        for kind, news in state["columns"].items():
            self.columns[kind].add(news)
            self.columns[kind].take_new()
        self.available = set(state["available"])
        for name in _PLAIN:
            setattr(self, name, state[name])

        # Costs and sums.
        self.seconds += state["seconds"]
        self._told_seconds = len(self.seconds)
        self.class_sums[:, state["labels"]] = state["class_sums"]
        self.class_counts[state["labels"]] = state["class_counts"]


def _target(batch: dict[str, Any], classifier: FrozenClassifier, ace: bool) -> Tensor | None:
    """Returns the target classes [B]: those of the exact counterfactual where there is one and the classifier is right.

    In the published protocol of DiME and ACE the edit of an image that is decided wrongly has to repair that. None
    leaves the choice to the explainer.
    """
    if "counterfactual" not in batch and not ace:
        return None
    logits, label = classifier(batch["image"]), batch["label"]
    wanted = true_target(label, logits.shape[1]) if "counterfactual" in batch else runner_up(logits)
    return torch.where(logits.argmax(dim=1) == label, wanted, label if ace else runner_up(logits))
