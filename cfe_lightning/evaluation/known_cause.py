"""The known-cause bench: do explanations raise an alarm when a classifier uses a planted mark, and only then?

A cell is a classifier of built-in shapes with one cue, one size of it and a mark in the corner that follows the class
with probability p. Whether the classifier uses the mark is not assumed but measured, by moving the mark and nothing
else. The alarm of an explanation is how much of its change lies where marks are; its AUC says how well alarms tell
images explained for classifiers that use the mark from those for classifiers that do not. Source: evaluation, section
9.6; intervals, section 12.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.explanation import Explainer, Explanation
from cfe_lightning.metrics import counterfactual as change
from cfe_lightning.metrics import localisation
from cfe_lightning.metrics.pointing import pointed_at
from cfe_lightning.metrics.statistics import Measurement, interval, summarise, undefined

#: Mean absolute change of the decided class's probability from which a classifier uses the mark ...
USES = 0.1
#: ... and below which it does not; what lies between counts in neither group.
BLIND = 0.02

Verdict = Literal["uses", "between", "blind"]

#: What is measured of every explanation, [N] each; NaN where it is undefined.
VALUES: dict[str, str] = {
    "mark_share": "share of the change on the places of marks",
    "alarm": "mark_share over the share of the image that these places cover",
    "cue_share": "share of the change on the pixels that make the class",
    "truth_l1": "mean distance of the counterfactual from the exact one, where classifier and target are right",
    "l1": "mean change of a pixel",
    "flip": "whether the counterfactual is classified as the target",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One classifier of the bench.

    Attributes:
        cue: What makes the class: lesion, colour or texture.
        cue_size: How large it is.
        p: With this probability the mark follows the class of a training image, else its corner is drawn at random
            among those of all classes: 0 is no information, 1 is full information.
    """

    cue: str
    cue_size: float
    p: float

    @property
    def name(self) -> str:
        """Of its folder and in tables."""
        return f"{self.cue}_{self.cue_size:g}_p{self.p:g}"

    def shortcut(self, num_classes: int = 2) -> float:
        """How often a training image has the mark in the corner of its class: a random corner may be that, too."""
        return self.p + (1 - self.p) / num_classes


@dataclass(frozen=True, kw_only=True, slots=True)
class MarkUse:
    """How a classifier answers to a mark that moves, on N test images.

    Attributes:
        cell: Which classifier.
        probability: Absolute change of the decided class's probability, [N].
        decision: Whether the decision changes, [N] bool.
        correct: Whether the decision before was right, [N] bool; marks tell nothing on test images.
    """

    cell: Cell
    probability: Tensor
    decision: Tensor
    correct: Tensor

    @property
    def verdict(self) -> Verdict:
        """From the mean change of probability."""
        mean = float(self.probability.mean())
        return "uses" if mean >= USES else "blind" if mean < BLIND else "between"


@dataclass(kw_only=True, slots=True)
class Bench:
    """What is known so far.

    Attributes:
        uses: One per cell whose classifier is there.
        explainers: Names in the order of tables.
        values: By name of cell and explainer: the values of ``VALUES``, [N] each.
        failures: By name of cell and explainer: why there are none.
        num_cells: How many cells were asked for.
    """

    uses: list[MarkUse] = field(default_factory=list)
    explainers: list[str] = field(default_factory=list)
    values: dict[tuple[str, str], dict[str, Tensor]] = field(default_factory=dict)
    failures: dict[tuple[str, str], str] = field(default_factory=dict)
    num_cells: int = 0

    def of(self, explainer: str, key: str, verdict: Verdict | None = None, cue: str | None = None) -> list[Tensor]:
        """Values of one explainer, [N] per cell, of the cells with this verdict and cue."""
        return [
            self.values[use.cell.name, explainer][key]
            for use in self.uses
            if (verdict is None or use.verdict == verdict)
            and (cue is None or use.cell.cue == cue)
            and (use.cell.name, explainer) in self.values
        ]


@torch.no_grad()
def mark_use(cell: Cell, classifier: FrozenClassifier, image: Tensor, moved: Tensor, label: Tensor) -> MarkUse:
    """What moving the mark does to a classifier.

    Args:
        cell: Which one it is.
        classifier: The classifier.
        image: Test images, [N, C, H, W] in [-1, 1].
        moved: The same images with the mark in the corner of another class, all else bit for bit equal.
        label: Their true classes, [N].
    """
    before, after = classifier(image), classifier(moved)
    decided = before.argmax(dim=1)
    shift = change.probability(after, decided) - change.probability(before, decided)
    return MarkUse(
        cell=cell,
        probability=shift.abs().cpu(),
        decision=(after.argmax(dim=1) != decided).cpu(),
        correct=(decided == label).cpu(),
    )


@torch.no_grad()
def measure(explainer: Explainer, batch: Mapping[str, Any]) -> tuple[Explanation, dict[str, Tensor]]:
    """Explains images whose causes are known; the target is the runner-up class.

    Args:
        explainer: In eval mode, on the device of the images.
        batch: ``image``, ``label``, ``mask``, ``mark`` and ``counterfactual`` of the batch contract.

    Returns:
        The explanation and the values of ``VALUES``, [B] each.

    Raises:
        ValueError: If the explanation is not finite.
    """
    image, label = batch["image"], batch["label"]
    explanation = explainer.explain(image)
    shown = explanation.counterfactual
    # Before the map: infinite values are cut off to the range of images there, as they are below.
    if shown is not None and not shown.isfinite().all():
        raise ValueError("gave a counterfactual that is not finite")
    where = pointed_at(explanation)
    if not where.isfinite().all():
        raise ValueError("gave an explanation that is not finite")
    nothing = torch.full((len(image),), torch.nan, device=image.device)
    values = {
        "mark_share": localisation.mask_mass(where, batch["mark"]),
        "alarm": localisation.lift(where, batch["mark"]),
        "cue_share": localisation.mask_mass(where, batch["mask"]),
        "truth_l1": nothing,
        "l1": nothing,
        "flip": nothing,
    }
    if shown is not None:
        shown = shown.clamp(-1, 1)
        wanted = (label + 1) % explanation.logits.shape[1]
        right = (explanation.predicted == label) & (explanation.target == wanted)
        values["truth_l1"] = torch.where(right, change.l1(batch["counterfactual"], shown), torch.nan)
        values["l1"] = change.l1(image, shown)
        values["flip"] = change.flipped(explainer.classifier(shown), explanation.target).float()
    return explanation, {key: value.float().cpu() for key, value in values.items()}


def wins(positive: Tensor, negative: Tensor) -> Tensor:
    """1 where the first is larger, 0.5 where they are equal, else 0; NaN where one is undefined, [N, M]."""
    difference = positive.double()[:, None] - negative.double()[None]
    return torch.where(difference.isnan(), torch.nan, (difference.sign() + 1) / 2)


def area_under_curve(positive: Tensor, negative: Tensor) -> float:
    """AUC as the share of pairs in which the positive [N] is larger than the negative [M], ties counted half.

    That is the Mann-Whitney statistic over N * M. NaN entries are left out; NaN where one side has none left.
    """
    return float(wins(positive, negative).nanmean())


def image_auc(
    positive: Sequence[Tensor], negative: Sequence[Tensor], *, resamples: int = 1000, seed: int = 0
) -> Measurement:
    """AUC of all images of some cells against all of others, with an interval over images.

    The same N scenes are in every cell, so scenes are drawn, not images: those of one scene are no independent ones.
    Classifiers are taken as they are.

    Args:
        positive: Alarms [N] of each cell whose classifier uses the mark; NaN is undefined.
        negative: Alarms [N] of each cell whose classifier does not.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
    """
    if not positive or not negative:
        missing = "uses" if not positive else "is blind to"
        return undefined(f"no classifier here {missing} the mark")
    won = torch.zeros(len(positive[0]), len(negative[0]), dtype=torch.float64)
    pairs = torch.zeros_like(won)
    for ours in positive:
        for theirs in negative:
            each = wins(ours, theirs)
            won += each.nan_to_num(0.0)
            pairs += each.isfinite()
    total = sum(len(values) for values in (*positive, *negative))
    used = sum(int(values.isfinite().sum()) for values in (*positive, *negative))
    if pairs.sum() == 0:
        return undefined("no explanation changes anything", total)
    num_scenes = len(won)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(num_scenes, (resamples, num_scenes), generator=generator)
    counts = torch.zeros(resamples, num_scenes, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
    samples = ((counts @ won) * counts).sum(dim=1) / ((counts @ pairs) * counts).sum(dim=1)
    low, high = interval(samples) if num_scenes > 1 else (None, None)
    return Measurement(
        status="ok", value=float(won.sum() / pairs.sum()), low=low, high=high, n_used=used, n_total=total
    )


def classifier_auc(positive: Sequence[Tensor], negative: Sequence[Tensor]) -> Measurement:
    """AUC of the mean alarms of classifiers: one number per cell, and no interval over so few; arguments as above."""
    ours, theirs = (torch.tensor([float(v.nanmean()) for v in side]) for side in (positive, negative))
    defined = int(ours.isfinite().sum()), int(theirs.isfinite().sum())
    if 0 in defined:
        return undefined("there are not both kinds of classifiers", len(ours) + len(theirs))
    value = area_under_curve(ours, theirs)
    return Measurement(status="ok", value=value, n_used=sum(defined), n_total=len(ours) + len(theirs))


def headline(bench: Bench, explainer: str, resamples: int = 1000, seed: int = 0) -> dict[str, Measurement]:
    """What the bench says of one explainer, by key; ``auc_<cue>`` are image AUCs within one cue.

    Args:
        bench: The results.
        explainer: One of its explainers.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
    """
    used, blind = (bench.of(explainer, "alarm", verdict) for verdict in ("uses", "blind"))  # type: ignore[arg-type]
    found = {
        "auc_images": image_auc(used, blind, resamples=resamples, seed=seed),
        "auc_classifiers": classifier_auc(used, blind),
    }
    for cue in dict.fromkeys(use.cell.cue for use in bench.uses):
        sides = (bench.of(explainer, "alarm", "uses", cue), bench.of(explainer, "alarm", "blind", cue))
        found[f"auc_{cue}"] = image_auc(*sides, resamples=resamples, seed=seed)
    verdicts: tuple[Verdict, ...] = ("uses", "blind")
    for key in VALUES:
        for verdict in verdicts:
            cells = bench.of(explainer, key, verdict)
            # Scenes are the unit here, too: a scene counts with its mean over the cells.
            scenes = torch.stack(cells).nanmean(dim=0) if cells else torch.full((0,), torch.nan)
            found[f"{key}_{verdict}"] = summarise({key: scenes}, resamples=resamples, seed=seed)[key]
    return found
