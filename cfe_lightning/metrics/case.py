"""The input of metrics: settings, one batch with its explanation, and the numbers that are kept of all batches."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.classifier.counting import Calls
from cfe_lightning.explanation import Decomposer, Explainer, Explanation
from cfe_lightning.metrics.metric import Population
from cfe_lightning.metrics.statistics import Measurement

#: Images [B, C, H, W] in [-1, 1] to features [B, D].
Embedding = Callable[[Tensor], Tensor]

#: Conditions of metrics, each with the reason why a metric is skipped if no batch meets it.
NEEDS: dict[str, str] = {
    # The answer.
    "counterfactual": "this explainer makes no counterfactual image",
    "decomposition": "this explainer does not split an image into parts",
    "agnostic": "this explainer shows no agnostic part",
    "reconstruction": "this explainer does not render the image itself",
    "path": "this explainer shows no path to a counterfactual",
    "intended": "this explainer does not say what its steps are meant to be",
    "ranked": "this explainer does not choose among ranked directions",
    # The data and the judge.
    "mask": "the data has no known mask: only synthetic data has",
    "truth": "the data has no known counterfactual: only synthetic data has",
    "cuda": "is measured on a GPU only",
    "features": "the classifier's features cannot be read",
    "stages": "the classifier has no layers that can be watched",
    "multi_label": "the classifier knows no other labels than the one that is explained",
    # The settings.
    "curves": "switched off: evaluate with curve steps of at least 1",
    "second": "no second classifier: give a file of one with --second",
    "cycles": "switched off, since it asks every explainer eleven times more: --cycles",
    "diversity": "switched off, since it asks every explainer again: --diversity N, from 2 on",
    "sanity": "switched off, since it asks every explainer again twice: --sanity",
    # Networks from files.
    "lpips": "needs a backbone: --weights lpips=FILE; lpips_f stands in",
    "inception": "needs Inception's weights: --weights inception=FILE; fid_f and kid_f stand in",
    "user": "needs a feature extractor of yours: --weights user=FILE; fid_f and kid_f stand in",
    "face": "needs a face embedding: --weights face=FILE; only for faces; sim_f stands in",
    "simsiam": "needs SimSiam's weights: --weights simsiam=FILE; sim_f stands in",
    "oracle": "needs a classifier of many labels: --weights oracle=FILE; collateral may stand in",
    "asked": "needs the label that is asked for: --asked NAME with an oracle",
    "table": "needs the data's labels and the one that is asked for: an oracle, --attributes CSV and --asked NAME",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Instruments:
    """Networks that measure beside the judge; None where no file was given.

    Attributes:
        lpips: Maps images and their edits to perceptual distances, [B].
        inception: Features for the published FID and KID, [B, 2048].
        user: Features of the user's own network, [B, D].
        face: Embeddings of faces, [B, 2048].
        simsiam: Embeddings of images of any kind, [B, 2048].
        oracle: Multi-label network; its ``label_probabilities`` tell the attributes of an image.
        correlations: Correlation of every label with the asked one in a table of labels, [L] float64 in [-1, 1].
        asked: Index among the oracle's labels of the label that edits are asked to change.
        hashes: SHA-256 of every file by its name; the table of labels is called ``attributes``.
    """

    lpips: Callable[[Tensor, Tensor], Tensor] | None = None
    inception: Embedding | None = None
    user: Embedding | None = None
    face: Embedding | None = None
    simsiam: Embedding | None = None
    oracle: FrozenClassifier | None = None
    correlations: Tensor | None = None
    asked: int | None = None
    hashes: dict[str, str] = field(default_factory=dict)

    def embed(self, image: Tensor, judge: FrozenClassifier) -> dict[str, Tensor]:
        """Returns features [B, D] on the CPU by extractor: ``inception``, ``user``, and ``f`` for the judge's own.

        Raises:
            ValueError: If a feature is not finite.
        """
        extractors = {"inception": self.inception, "user": self.user}
        found = {name: extract(image).float().cpu() for name, extract in extractors.items() if extract is not None}
        if judge.spec.head is not None:
            found["f"] = judge.features(image).float().cpu()
        for name, features in found.items():
            if not features.isfinite().all():
                which = "the classifier" if name == "f" else f"the network given as {name}"
                raise ValueError(f"The features of {which} are not finite on these images: give another network.")
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Measures:
    """Selects what an evaluation measures.

    Attributes:
        curve_steps: Number of blocks of COUT, insertion and deletion, one classifier pass each; 0 skips the curves.
        max_batch: Largest batch of the judge along a curve.
        iso: Target probabilities at which explainers are also compared at equal strength (each costs some twenty
            classifier passes per image).
        cycles: Also measures composition and reversibility (eleven more explanations per image).
        diversity: Number of edits per image, made with different random numbers, that are compared; 0 compares none.
        sanity: Also explains for classifiers with random weights (two more explanations per image).
        ace: Takes populations and targets of the published protocol of DiME and ACE (arXiv 2303.09962).
        second: Classifier trained independently for the same classes, for ``transfer_flip``; None skips it.
        instruments: Networks from files of the user.
    """

    curve_steps: int = 50
    max_batch: int = 256
    iso: tuple[float, ...] = ()
    cycles: bool = False
    diversity: int = 0
    sanity: bool = False
    ace: bool = False
    second: FrozenClassifier | None = None
    instruments: Instruments = field(default_factory=Instruments)


@dataclass(kw_only=True)
class Case:
    """One batch of images with one explainer's answer: all that a metric may look at.

    Attributes:
        batch: Batch of the data contract (see ``data.base``); synthetic data adds ``mask`` and ``counterfactual``.
        logits: The judge's logits of the images, [B, K].
        explanation: The explainer's answer for the images.
        distinct: Distinct part for the true class, [B, C, H, W]; None if the explainer is no decomposer.
        explainer: The explainer, for further explanations; a failure leaves it out of the table.
        twin: Returns the explainer for a copy of its classifier with random weights in its ``head`` or in ``all``
            layers; None if those layers have no weights.
        judge: Classifier that decides.
        stages: Names of the judge's layers for perceptual distances, finest first; empty if it has none.
        measures: Settings of the evaluation.
        calls: Classifier passes that the explanation took.
        image: The explained images, [B, C, H, W] in [-1, 1].
        label: True classes, [B].
        source: The judge's decisions on the images, [B].
        target: Target classes of the explanation, [B].
        instruments: Networks from files of the user.
        available: Names of the needs that this batch meets.
    """

    batch: dict[str, Any]
    logits: Tensor
    explanation: Explanation
    distinct: Tensor | None
    explainer: Decomposer
    twin: Callable[[str], Explainer | None]
    judge: FrozenClassifier
    stages: Sequence[str]
    measures: Measures
    calls: Calls

    def __post_init__(self) -> None:
        self.image, self.label = self.explanation.image, self.batch["label"]
        self.source, self.target = self.logits.argmax(dim=1), self.explanation.target
        self.instruments = self.measures.instruments
        self.available = frozenset(need for need, met in self._conditions().items() if met)

    def _conditions(self) -> dict[str, bool]:
        """Tells for every key of ``NEEDS`` whether this batch meets it."""
        answer, spec, measures, given = self.explanation, self.judge.spec, self.measures, self.instruments
        files = ("lpips", "inception", "user", "face", "simsiam", "oracle")
        asked = given.oracle is not None and given.asked is not None
        return {
            # The answer.
            "counterfactual": answer.counterfactual is not None,
            "decomposition": self.distinct is not None,
            "agnostic": "agnostic" in answer.parts,
            "reconstruction": "reconstruction" in answer.parts,
            "path": answer.counterfactual is not None and self.steps is not None,
            "intended": answer.intended is not None,
            "ranked": "rank" in answer.scores,
            # The data and the judge.
            "mask": "mask" in self.batch,
            "truth": "counterfactual" in self.batch,
            "cuda": self.batch["image"].is_cuda,
            "features": spec.head is not None,
            "stages": bool(self.stages),
            "multi_label": spec.label is not None and len(spec.class_names) > 1,
            # The settings.
            "curves": measures.curve_steps > 0,
            "second": measures.second is not None,
            "cycles": measures.cycles,
            "diversity": measures.diversity > 1,
            "sanity": measures.sanity,
            # Networks from files.
            "asked": asked,
            "table": asked and given.correlations is not None,
            **{name: getattr(given, name) is not None for name in files},
        }

    @property
    def counterfactual(self) -> Tensor:
        """Returns the counterfactuals as the explainer made them, [B, C, H, W]."""
        assert self.explanation.counterfactual is not None, "the need counterfactual is met"
        return self.explanation.counterfactual

    @cached_property
    def shown(self) -> Tensor:
        """Clamps the counterfactuals to [-1, 1]: values outside cannot be shown, so closeness ignores them."""
        return self.counterfactual.clamp(-1, 1)

    @cached_property
    def after(self) -> Tensor:
        """Computes the judge's logits of the counterfactuals, [B, K]."""
        return self.judge(self.counterfactual)

    @property
    def steps(self) -> Tensor | None:
        """Returns the path to the counterfactual, [B, T, C, H, W]; None for decomposers, whose steps lead elsewhere."""
        return self.explanation.steps if self.distinct is None else None

    @cached_property
    def maps(self) -> list[Tensor]:
        """Computes the judge's maps of the images in ``stages``, each [B, C_i, H_i, W_i]."""
        return self.judge.maps(self.image, self.stages)[0]

    @cached_property
    def embedded(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Computes features of the images and of their counterfactuals by extractor, [B, D] each."""
        before, after = (self.instruments.embed(one, self.judge) for one in (self.image, self.shown))
        return {name: (before[name], after[name]) for name in before}


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """The numbers that are kept of all batches of one explainer: measurements of whole sets are computed from them.

    Attributes:
        means: Means of the metrics per image, by metric key.
        rows: Rows by kind and name, empty where there are none. ``values``: [N] by metric key; ``curves``: [N, T];
            ``features``: [N, D], ``f/before`` and ``f/after`` of the judge, likewise of other networks;
            ``iso_features``: [N, D] of edits at equal strength by level; ``reference``: [M, D] of held-out images by
            extractor; ``attributes``: the oracle's decisions ``before`` and ``after``, [N, L] bool; ``decisions``:
            ``predicted``, ``target`` and ``label``, [N].
        members: Index of the images that distances of sets are about, [N] bool; ``slice(None)`` takes all.
        population: Name of these images, ``all`` or ``flipped``.
        instruments: Networks from files of the user.
        num_images: Number of explained images.
        seconds: Seconds per image of every batch.
        peak_memory: Largest memory of an explained batch on the GPU in bytes; 0 on other devices.
        seed: Seed of all draws.
    """

    means: dict[str, Measurement]
    rows: defaultdict[str, dict[str, Tensor]]
    members: Tensor | slice
    population: Population
    instruments: Instruments
    num_images: int
    seconds: list[float]
    peak_memory: int
    seed: int
