"""The known-cause bench: do explanations raise an alarm when a classifier uses a planted mark, and only then?

A cell is a classifier of built-in shapes with one cue, one size of the cue, and a mark in a corner that follows the
class with probability p. Moving the mark and nothing else measures whether the classifier uses it. The alarm of an
explanation is the share of its change on the places of marks, relative to chance. The AUC of the alarms says how well
they separate images explained for classifiers that use the mark from images for classifiers that do not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.decisions import decides_for
from cfe_lightning.explanation import Explainer, Explanation
from cfe_lightning.metrics import counterfactual as change
from cfe_lightning.metrics import localisation
from cfe_lightning.metrics.pointing import pointed_at
from cfe_lightning.metrics.statistics import Measurement, interval, summarise, undefined

#: Mean absolute change of the decided class's probability from which a classifier counts as using the mark.
USES = 0.1
#: Mean absolute change below which it counts as blind to the mark; classifiers in between count in neither group.
BLIND = 0.02
_RESAMPLES = 1000

Verdict = Literal["uses", "between", "blind"]

#: Values of every explanation, [N] each, with their meanings; NaN where a value is undefined.
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
        cue: Feature that makes the class: lesion, colour or texture.
        cue_size: Factor on the size or contrast of the cue, 0.5 to 1.6.
        p: Probability that the mark of a training image follows the class; otherwise its corner is drawn at random
            among the corners of all classes. At 0 the mark tells nothing about the class, at 1 everything.
    """

    cue: str
    cue_size: float
    p: float

    @property
    def name(self) -> str:
        """Returns the cell's name in tables, which is also that of its folder."""
        return f"{self.cue}_{self.cue_size:g}_p{self.p:g}"

    def shortcut(self, num_classes: int = 2) -> float:
        """Returns the share of training images with the mark in their class's corner, including those by chance."""
        return self.p + (1 - self.p) / num_classes


@dataclass(frozen=True, kw_only=True, slots=True)
class MarkUse:
    """The effect of moving the mark on a classifier, on N test images.

    Attributes:
        cell: Cell of the classifier.
        probability: Absolute change of the decided class's probability, [N].
        decision: True where the decision changes, [N] bool.
        correct: True where the decision before was right, [N] bool; marks tell nothing on test images.
    """

    cell: Cell
    probability: Tensor
    decision: Tensor
    correct: Tensor

    @property
    def verdict(self) -> Verdict:
        """Classifies the classifier by the mean change of probability."""
        mean = float(self.probability.mean())
        return "uses" if mean >= USES else "blind" if mean < BLIND else "between"


@dataclass(kw_only=True, slots=True)
class Bench:
    """The results of all finished cells.

    Attributes:
        uses: Use of the mark, one entry per finished classifier.
        explainers: Names of the explainers in the order of tables.
        values: Values of ``VALUES``, [N] each, by names of cell and explainer.
        failures: Reasons for missing values by names of cell and explainer.
        num_cells: Number of cells of the whole bench.
    """

    uses: list[MarkUse] = field(default_factory=list)
    explainers: list[str] = field(default_factory=list)
    values: dict[tuple[str, str], dict[str, Tensor]] = field(default_factory=dict)
    failures: dict[tuple[str, str], str] = field(default_factory=dict)
    num_cells: int = 0

    def of(self, explainer: str, key: str, verdict: Verdict | None = None, cue: str | None = None) -> list[Tensor]:
        """Returns one explainer's values, [N] per cell, on the cells with this verdict and cue; None takes all."""
        return [
            self.values[use.cell.name, explainer][key]
            for use in self.uses
            if (verdict is None or use.verdict == verdict)
            and (cue is None or use.cell.cue == cue)
            and (use.cell.name, explainer) in self.values
        ]


@torch.no_grad()
def mark_use(cell: Cell, classifier: FrozenClassifier, image: Tensor, moved: Tensor, label: Tensor) -> MarkUse:
    """Measures the effect of moving the mark on the classifier of a cell.

    Args:
        cell: Cell of the classifier.
        classifier: Classifier of the cell.
        image: Test images, [N, C, H, W] in [-1, 1].
        moved: The same images with the mark in the corner of another class, all else equal bit for bit.
        label: True classes, [N].
    """
    before, after = classifier(image), classifier(moved)
    decided = before.argmax(dim=1)
    return MarkUse(
        cell=cell,
        probability=change.delta_p(before, after, decided).abs().cpu(),
        decision=(after.argmax(dim=1) != decided).cpu(),
        correct=(decided == label).cpu(),
    )


@torch.no_grad()
def measure(explainer: Explainer, batch: Mapping[str, Any]) -> tuple[Explanation, dict[str, Tensor]]:
    """Explains images with known causes, towards the runner-up class, and measures the explanation.

    Args:
        explainer: Explainer in eval mode, on the device of the images.
        batch: Batch of the data contract with ``image``, ``label``, ``mask``, ``mark`` and ``counterfactual``.

    Returns:
        The explanation, and the values of ``VALUES``, [B] each.

    Raises:
        ValueError: If the explanation is not finite.
    """
    # Explanation.
    image, label = batch["image"], batch["label"]
    explanation = explainer.explain(image)
    shown = explanation.counterfactual
    # Checked before the map, which clamps infinite values to the range of images.
    if shown is not None and not shown.isfinite().all():
        raise ValueError("gave a counterfactual that is not finite")
    where = pointed_at(explanation)
    if not where.isfinite().all():
        raise ValueError("gave an explanation that is not finite")

    # Place of the change.
    values = dict.fromkeys(VALUES, torch.full((len(image),), torch.nan, device=image.device)) | {
        "mark_share": localisation.mask_mass(where, batch["mark"]),
        "alarm": localisation.lift(where, batch["mark"]),
        "cue_share": localisation.mask_mass(where, batch["mask"]),
    }

    # Edit.
    if shown is not None:
        shown = shown.clamp(-1, 1)
        asked = explanation.target == localisation.true_target(label, explanation.logits.shape[1])
        right = (explanation.predicted == label) & asked
        values["truth_l1"] = torch.where(right, change.l1(batch["counterfactual"], shown), torch.nan)
        values["l1"] = change.l1(image, shown)
        values["flip"] = decides_for(explainer.classifier(shown), explanation.target).float()
    return explanation, {key: value.float().cpu() for key, value in values.items()}


def wins(positive: Tensor, negative: Tensor) -> Tensor:
    """Compares [N] and [M] to [N, M]: 1 where the first is larger, 0.5 for ties, else 0; NaN where one is undefined."""
    difference = positive.double()[:, None] - negative.double()[None]
    return torch.where(difference.isnan(), torch.nan, (difference.sign() + 1) / 2)


def area_under_curve(positive: Tensor, negative: Tensor) -> float:
    """Returns the AUC: the share of pairs in which the positive [N] exceeds the negative [M]; a tie counts half.

    That is the Mann-Whitney statistic over N * M. NaN entries are left out; the result is NaN if a side has none left.
    """
    return float(wins(positive, negative).nanmean())


def image_auc(positive: Sequence[Tensor], negative: Sequence[Tensor], seed: int = 0) -> Measurement:
    """Returns the AUC between the images of two groups of cells, with an interval over scenes.

    Every cell shows the same N scenes. The bootstrap therefore draws scenes: images of one scene are not independent.
    The classifiers are taken as given.

    Args:
        positive: Alarms [N] of each cell whose classifier uses the mark; NaN where undefined.
        negative: Alarms [N] of each cell whose classifier is blind to it; NaN where undefined.
        seed: Seed of the bootstrap.
    """
    if not positive or not negative:
        return undefined(f"no classifier here {'is blind to' if positive else 'uses'} the mark")

    # Pairs of scenes, summed over pairs of cells.
    won = torch.zeros(len(positive[0]), len(negative[0]), dtype=torch.float64)
    pairs = torch.zeros_like(won)
    for ours in positive:
        for theirs in negative:
            each = wins(ours, theirs)
            won += each.nan_to_num(0)
            pairs += each.isfinite()
    alarms = torch.cat([*positive, *negative])
    if pairs.sum() == 0:
        return undefined("no explanation changes anything", len(alarms))

    # Bootstrap.
    num_scenes = len(won)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(num_scenes, (_RESAMPLES, num_scenes), generator=generator)
    counts = torch.zeros(_RESAMPLES, num_scenes, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
    samples = ((counts @ won) * counts).sum(dim=1) / ((counts @ pairs) * counts).sum(dim=1)
    low, high = interval(samples) if num_scenes > 1 else (None, None)
    value, used = float(won.sum() / pairs.sum()), int(alarms.isfinite().sum())
    return Measurement(value=value, low=low, high=high, n_used=used, n_total=len(alarms))


def classifier_auc(positive: Sequence[Tensor], negative: Sequence[Tensor]) -> Measurement:
    """Returns the AUC between the mean alarms of the classifiers of ``image_auc``; too few for an interval."""
    ours, theirs = (torch.tensor([float(v.nanmean()) for v in side]) for side in (positive, negative))
    defined = int(ours.isfinite().sum()), int(theirs.isfinite().sum())
    total = len(ours) + len(theirs)
    if 0 in defined:
        return undefined("there are not both kinds of classifiers", total)
    return Measurement(value=area_under_curve(ours, theirs), n_used=sum(defined), n_total=total)


def headline(bench: Bench, explainer: str, seed: int = 0) -> dict[str, Measurement]:
    """Summarises one explainer by key: AUCs, also of each cue as ``auc_<cue>``, and means as ``<value>_<verdict>``."""
    # AUC.
    verdicts: tuple[Verdict, ...] = ("uses", "blind")
    used, blind = (bench.of(explainer, "alarm", verdict) for verdict in verdicts)
    found = {"auc_images": image_auc(used, blind, seed), "auc_classifiers": classifier_auc(used, blind)}
    for cue in dict.fromkeys(use.cell.cue for use in bench.uses):
        used, blind = (bench.of(explainer, "alarm", verdict, cue) for verdict in verdicts)
        found[f"auc_{cue}"] = image_auc(used, blind, seed)

    # Means.
    for key in VALUES:
        for verdict in verdicts:
            cells = bench.of(explainer, key, verdict)
            # Scenes are the unit here, too: a scene counts with its mean over the cells.
            scenes = torch.stack(cells).nanmean(dim=0) if cells else torch.full((0,), torch.nan)
            found[f"{key}_{verdict}"] = summarise({key: scenes}, seed=seed)[key]
    return found
