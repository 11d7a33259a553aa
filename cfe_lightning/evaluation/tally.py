"""Measures one explainer's answers batch by batch and keeps a few numbers per image.

Sources: evaluation, sections 3, 4 and 6 to 10; DXAI, section 5. What becomes of the numbers is in ``tally_summary``.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.classifier.counting import counted
from cfe_lightning.compute.clock import clock
from cfe_lightning.decisions import kl_from_uniform, probability_along, runner_up
from cfe_lightning.evaluation.columns import Columns
from cfe_lightning.evaluation.guarded import FaultyExplainerError, GuardedExplainer, is_decomposer
from cfe_lightning.evaluation.instruments import Instruments
from cfe_lightning.explanation import SUMMANDS, Explainer, Explanation, seed_of
from cfe_lightning.metrics import attributes, faithfulness, localisation, path, perceptual, realism, reconstruction
from cfe_lightning.metrics import counterfactual as change
from cfe_lightning.metrics import repetition as again
from cfe_lightning.metrics.catalogue import METRICS, Metric, Need, iso_key, iso_metrics
from cfe_lightning.metrics.equal_strength import smallest_edit
from cfe_lightning.metrics.identity import verified
from cfe_lightning.metrics.pointing import pointed_at
from cfe_lightning.metrics.robustness import survives

_log = logging.getLogger(__name__)

#: Layers of the judge that are watched for the perceptual distance, from the finest on.
_STAGES = 5
#: Ranks of a method's own directions up to which its sufficiency is told.
_SUFFICIENT = (1, 3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measures:
    """What is measured, and with what.

    Attributes:
        curve_steps: Blocks of COUT, insertion and deletion; 0 skips them (each costs that many classifier passes).
        max_batch: Largest batch of the judge along a curve.
        iso: Probabilities of the target at which explainers are also compared at equal strength (each costs some
            twenty classifier passes per image).
        cycles: Also ask again from the edits: composition and reversibility (eleven more explanations).
        diversity: Edits of each image, made with different random numbers, that are compared; 0 compares none.
        sanity: Also explain for classifiers with random weights (two more explanations).
        ace: Populations and targets of the published protocol of DiME and ACE (evaluation, R2 and R3).
        second: A classifier trained by itself for the same classes, for ``transfer_flip``; None skips it.
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

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics in the order of tables."""
        return (*METRICS, *iso_metrics(self.iso))


class Measurer:
    """Measures one explainer batch by batch and keeps a few numbers per image.

    Attributes:
        columns: Numbers per image: ``values`` by metric key; ``curves`` by name; ``features`` before and after by
            extractor, and of the edits at equal strength; ``decisions``: predicted, target, label.
        available: What there is to measure.
        failure: Why the explainer is left out; None where it is not.
        size: Shorter side of the images, in pixels.
    """

    def __init__(self, explainer: Explainer, judge: FrozenClassifier, measures: Measures) -> None:
        self.explainer = explainer
        self.judge = judge
        self.measures = measures
        self.stages = judge.shallow_maps(_STAGES) if judge.spec.head is not None else []
        self.failure: str | None = None
        self.columns: dict[str, Columns] = defaultdict(Columns)
        self.available: set[Need] = {"explanation"}
        self.positions: dict[str, Tensor] = {}
        self.seconds: list[float] = []
        self.peak_memory = 0
        self.num_images = 0
        self.size = 0
        strengths = len(faithfulness.STRENGTHS)
        self.class_sums = torch.zeros(strengths, judge.num_classes, judge.num_classes, dtype=torch.float64)
        self.class_counts = torch.zeros(judge.num_classes, dtype=torch.float64)
        self._forgetful: dict[str, Explainer | None] = {}
        self._asked = GuardedExplainer(explainer)
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
        logits = self.judge(image)
        target = _target(batch, self.explainer.classifier, self.measures.ace)
        self._asked.names = batch["name"]
        explanation = self._explain(image, target, batch["name"])
        distinct = self._asked.distinct(image, label) if is_decomposer(self.explainer) else None
        self.columns["decisions"].add({"predicted": logits.argmax(dim=1), "target": explanation.target, "label": label})
        self._decision(explanation, logits, label, batch)
        self._attribution(explanation, logits, batch)
        self._rendering(explanation, logits, label, batch)
        if distinct is not None:
            self._decomposition(distinct, explanation, logits, batch)
        self._again(explanation, logits, batch["name"])
        return explanation

    def state(self) -> dict[str, Any]:
        """What came since this was last asked for, as plain data: ``restore`` of it all makes the same tally again."""
        labels = sorted(self._new_labels)
        news = {
            # Held-out images are read again.
            "columns": {group: columns.take_new() for group, columns in self.columns.items() if group != "reference"},
            "available": sorted(self.available),
            "failure": self.failure,
            "positions": self.positions,
            "seconds": self.seconds[self._told_seconds :],
            "peak_memory": self.peak_memory,
            "num_images": self.num_images,
            "size": self.size,
            "labels": labels,
            "class_sums": self.class_sums[:, labels].clone(),
            "class_counts": self.class_counts[labels].clone(),
        }
        self._new_labels.clear()
        self._told_seconds = len(self.seconds)
        return news

    def restore(self, state: dict[str, Any]) -> None:
        """Takes what ``state`` gave."""
        for group, news in state["columns"].items():
            self.columns[group].add(news)
            self.columns[group].take_new()
        self.available = set(state["available"])
        for name in ("failure", "positions", "peak_memory", "num_images", "size"):
            setattr(self, name, state[name])
        self.seconds += state["seconds"]
        self._told_seconds = len(self.seconds)
        self.class_sums[:, state["labels"]] = state["class_sums"]
        self.class_counts[state["labels"]] = state["class_counts"]

    @torch.no_grad()
    def read_reference(self, picture: Tensor) -> None:
        """Held-out images [B, C, H, W] in [-1, 1]: edits are compared with these instead of their own originals."""
        self.columns["reference"].add(self._embedded(picture))

    def _explain(self, image: Tensor, target: Tensor | None, names: Sequence[str]) -> Explanation:
        """Asks the explainer, with its clock and its classifier watched."""
        # What is random depends on the images alone, so that an evaluation that goes on finds the same.
        torch.manual_seed(seed_of(names))
        if image.is_cuda:
            torch.cuda.reset_peak_memory_stats(image.device)
            self.available.add("cuda")
        started = clock(image.device)
        with counted() as calls:
            explanation = self._asked.explain(image, target)
        self.seconds = [*self.seconds, (clock(image.device) - started) / len(image)]
        if image.is_cuda:
            self.peak_memory = max(self.peak_memory, torch.cuda.max_memory_allocated(image.device))
        ones = torch.ones(len(image))
        self._keep(
            classifier_forwards=ones * calls.forwards / len(image),
            classifier_backwards=ones * calls.backwards / len(image),
        )
        return explanation

    def _keep(self, **values: Tensor) -> None:
        self.columns["values"].add(values)

    def _decision(self, explanation: Explanation, logits: Tensor, label: Tensor, batch: dict[str, Any]) -> None:
        if "counterfactual" in batch:
            self.available.add("truth")
            self._keep(true_amplitude=localisation.amplitude(batch["image"] - batch["counterfactual"]))
        if "mask" in batch:
            self.available.add("mask")
            self._keep(mask_chance=localisation.chance(batch["mask"]))
        if explanation.counterfactual is None:
            return
        self.available.add("counterfactual")
        image, target, source = explanation.image, explanation.target, logits.argmax(dim=1)
        # What leaves the range cannot be shown: closeness is that of the image that can.
        shown = explanation.counterfactual.clamp(-1, 1)
        after = self.judge(explanation.counterfactual)
        gain = change.delta_p(logits, after, target)
        self._keep(
            flip_rate=change.flipped(after, target),
            flip_rate_saved=change.flipped(self.judge(images.saved(shown)), target),
            flip_rate_any=change.flipped_any(logits, after),
            delta_p=gain,
            mad=gain.abs(),
            bkl=change.bkl(after, target),
            linf=change.linf(image, shown),
            **_closeness(image, shown),
        )
        found = survives(self.judge, image, shown, source, target)
        self._keep(
            **{f"robust_flip_{name}": torch.where(kept, hit.float(), torch.nan) for name, (kept, hit) in found.items()}
        )
        maps = self.judge.maps(image, self.stages)[0] if self.stages else []
        self._seen(image, shown, maps)
        if self.measures.second is not None:
            self.available.add("second")
            agreed = change.flipped(self.measures.second(image), source)
            told = change.flipped(self.measures.second(shown), target)
            self._keep(transfer_flip=torch.where(agreed, told.float(), torch.nan))
        if "rank" in explanation.scores:
            self.available.add("ranked")
            hit = change.flipped(after, target)
            self._keep(**{f"dir_sufficiency_{m}": hit & (explanation.scores["rank"].round() <= m) for m in _SUFFICIENT})
        # Of decompositions the steps lead elsewhere.
        steps = None if is_decomposer(self.explainer) else explanation.steps
        if steps is not None and explanation.strengths is not None:
            self._path(steps, explanation.strengths, explanation.intended, target)
        way = torch.stack([image, explanation.counterfactual], dim=1) if steps is None else steps
        self._equal_strength(image, way.clamp(-1, 1), target, maps)
        if self.measures.curve_steps:
            score, source_curve, target_curve = faithfulness.cout(
                self.judge,
                image,
                shown,
                source,
                target,
                steps=self.measures.curve_steps,
                max_batch=self.measures.max_batch,
            )
            self._keep(cout=score)
            self.columns["curves"].add({"cout_source": source_curve, "cout_target": target_curve})
        if "mask" in batch:
            self._keep(mask_mass_cf=localisation.mask_mass(change.change_map(image, shown), batch["mask"]))
        if "counterfactual" in batch:
            right = (explanation.predicted == label) & (target == _true_target(label, logits.shape[1]))
            self._keep(l1_truth=torch.where(right, change.l1(batch["counterfactual"], shown), torch.nan))

    def _seen(self, image: Tensor, shown: Tensor, maps: list[Tensor]) -> None:
        """What networks make of the images, of which the judge's ``maps`` are at hand, and of their edits."""
        instruments = self.measures.instruments
        before, after = self._embedded(image), self._embedded(shown)
        for name in before:
            self.columns["features"].add({f"{name}/before": before[name], f"{name}/after": after[name]})
        if "f" in before:
            self.available.add("features")
            self._keep(sim_f=realism.cosine(before["f"], after["f"]))
        if self.stages:
            self.available.add("stages")
            self._keep(lpips_f=self._perceived(maps, shown))
        if instruments.lpips is not None:
            self._keep(lpips=instruments.lpips(image, shown))
        if instruments.face is not None:
            similar = realism.cosine(instruments.face(image), instruments.face(shown))
            self._keep(fs=similar, fva=verified(similar))
        if instruments.simsiam is not None:
            self._keep(s3=realism.cosine(instruments.simsiam(image), instruments.simsiam(shown)))
        for need in ("lpips", "face", "simsiam", "inception", "user", "oracle"):
            if getattr(instruments, need) is not None:
                self.available.add(need)
        self._labels(image, shown)

    def _embedded(self, image: Tensor) -> dict[str, Tensor]:
        """Features by extractor, [B, D] each."""
        extractors = {name: getattr(self.measures.instruments, name) for name in ("inception", "user")}
        found = {name: extract(image).float().cpu() for name, extract in extractors.items() if extract is not None}
        if self.judge.spec.head is not None:
            found["f"] = self.judge.features(image).float().cpu()
        for name, features in found.items():
            if not features.isfinite().all():
                which = "the classifier" if name == "f" else f"the network given as {name}"
                raise ValueError(f"The features of {which} are not finite on these images: give another network.")
        return found

    def _labels(self, image: Tensor, shown: Tensor) -> None:
        """Which other labels went along: in the eyes of the classifier itself, and in those of an oracle."""
        spec, instruments = self.judge.spec, self.measures.instruments
        if spec.label is not None and len(spec.class_names) > 1:
            self.available.add("multi_label")
            before, after = (self.judge.label_probabilities(one) > 0.5 for one in (image, shown))
            self._keep(collateral=attributes.collateral(before, after, spec.class_names.index(spec.label)))
        if instruments.oracle is None:
            return
        before, after = (instruments.oracle.label_probabilities(one) > 0.5 for one in (image, shown))
        self._keep(mnac=attributes.attributes_changed(before, after))
        if instruments.asked is None:
            return
        self.available.add("asked")
        self._keep(mnac_others=attributes.collateral(before, after, instruments.asked))
        if instruments.correlations is not None:
            self.available.add("table")
            self.columns["attributes"].add({"before": before.cpu(), "after": after.cpu()})

    def _perceived(self, maps: list[Tensor], edited: Tensor) -> Tensor:
        """Distance in the judge's maps, of which those of the originals are at hand, [B]."""
        return perceptual.feature_distance(maps, self.judge.maps(edited, self.stages)[0])

    def _equal_strength(self, image: Tensor, way: Tensor, target: Tensor, maps: list[Tensor]) -> None:
        """The smallest edits on the explainer's way that are as sure as asked; judged where there is one."""
        for level in self.measures.iso:
            found = smallest_edit(self.judge, way, target, level, max_batch=self.measures.max_batch)
            values = _closeness(image, found.edit)
            if self.stages:
                values["lpips_f"] = self._perceived(maps, found.edit)
            if bool(found.reached.any()):
                self.available.add("iso")
            self._keep(**{iso_key(level, "reached"): found.reached})
            if self.judge.spec.head is not None:
                # Of images that do not get there these are of the end of the way; nobody asks for them.
                self.columns["iso_features"].add({f"{level:g}": self.judge.features(found.edit).float().cpu()})
            defined = {key: torch.where(found.reached, value, torch.nan) for key, value in values.items()}
            self._keep(**{iso_key(level, key): value for key, value in defined.items()})

    def _path(self, steps: Tensor, strengths: Tensor, intended: Tensor | None, target: Tensor) -> None:
        """The way to the counterfactual."""
        self.available.add("path")
        logits = self.judge.along(steps, self.measures.max_batch)
        said = probability_along(logits, target)
        k = path.positions(strengths)
        self.columns["curves"].add({"path": path.resampled(k, said)})
        self._keep(
            mono=path.monotone(said),
            rho=path.rank_correlation(k, said),
            regress=path.regress(said),
            crossing=path.crossing(k, said),
            smooth=path.roughness(steps),
        )
        if intended is not None:
            self.available.add("intended")
            meant = intended.to(said)
            kl = (logits.log_softmax(dim=2).exp() * (logits.log_softmax(dim=2) - meant.log_softmax(dim=2))).sum(dim=2)
            self._keep(
                schedule=path.schedule_error(said, probability_along(meant, target)),
                agree=(meant.argmax(dim=2) == logits.argmax(dim=2)).float().mean(dim=1),
                agent_kl=kl.mean(dim=1),
            )

    def _attribution(self, explanation: Explanation, logits: Tensor, batch: dict[str, Any]) -> None:
        if "mask" in batch:
            self._keep(mask_mass_attribution=localisation.mask_mass(explanation.attribution, batch["mask"]))
        if not self.measures.curve_steps:
            return
        self.available.add("curves")
        num_pixels = explanation.image[0, 0].numel()
        cuts = faithfulness.cut_points(num_pixels, self.measures.curve_steps)
        self.positions["replaced"] = torch.tensor(cuts) / num_pixels
        image, source = explanation.image, logits.argmax(dim=1)
        baseline = faithfulness.blurred(image)
        for key, curve_of in (("ins_auc", faithfulness.insertion), ("del_auc", faithfulness.deletion)):
            value, curve = curve_of(
                self.judge,
                image,
                explanation.attribution,
                source,
                baseline,
                steps=self.measures.curve_steps,
                max_batch=self.measures.max_batch,
            )
            self._keep(**{key: value})
            self.columns["curves"].add({key: curve})

    def _rendering(self, explanation: Explanation, logits: Tensor, label: Tensor, batch: dict[str, Any]) -> None:
        image, parts = explanation.image, explanation.parts
        if "reconstruction" in parts:
            self.available.add("reconstruction")
            rendering = parts["reconstruction"]
            self._keep(
                psnr=reconstruction.psnr(image, rendering),
                recon_flip=change.flipped_any(logits, self.judge(rendering)),
            )
            if min(image.shape[-2:]) >= reconstruction.SSIM_MIN_SIZE:
                self._keep(ssim=reconstruction.ssim(image, rendering))
            if explanation.counterfactual is not None:
                drawn, shown = rendering.clamp(-1, 1), explanation.counterfactual.clamp(-1, 1)
                self._keep(l1_edit=change.l1(drawn, shown), changed_area_edit=change.changed_area(drawn, shown))
                if "mask" in batch:
                    edit = change.change_map(drawn, shown)
                    self._keep(mask_mass_edit=localisation.mask_mass(edit, batch["mask"]))
        if "agnostic" in parts:
            self.available.add("agnostic")
            summands = [parts[name] for name in SUMMANDS if name in parts]
            gap = (image - torch.stack(summands).sum(dim=0)).abs().flatten(1).amax(dim=1) / 2
            self._keep(additivity=gap, **self._undecided("agnostic", self.judge(parts["agnostic"]), logits, label))

    def _undecided(self, what: str, after: Tensor, before: Tensor, label: Tensor) -> dict[str, Tensor]:
        return {
            f"kl_{what}": kl_from_uniform(after),
            f"max_p_{what}": after.softmax(dim=1).amax(dim=1),
            f"accuracy_{what}": after.argmax(dim=1) == label,
            f"former_p_{what}": change.probability(after, before.argmax(dim=1)),
        }

    def _decomposition(
        self,
        distinct: Tensor,
        explanation: Explanation,
        logits: Tensor,
        batch: dict[str, Any],
    ) -> None:
        self.available.add("decomposition")
        image, label = batch["image"], batch["label"]
        predicted = explanation.predicted
        along_label = faithfulness.sweep_logits(self.judge, image, distinct, max_batch=self.measures.max_batch)
        # The two modes differ only where the classifier is wrong.
        distinct_predicted, along_predicted = distinct.clone(), along_label.clone()
        wrong = (predicted != label).nonzero().squeeze(1)
        if len(wrong):
            distinct_predicted[wrong] = self._asked.distinct(image[wrong], predicted[wrong])
            along_predicted[wrong] = faithfulness.sweep_logits(
                self.judge, image[wrong], distinct_predicted[wrong], max_batch=self.measures.max_batch
            )
        importance = localisation.magnitude(distinct)
        removed = faithfulness.removal_logits(self.judge, image, importance, max_batch=self.measures.max_batch)
        for key, along, wanted in (
            ("dxai_label", along_label, label),
            ("dxai_prediction", along_predicted, label),
            ("dxai_fidelity", along_predicted, logits.argmax(dim=1)),
            ("removal", removed, label),
        ):
            self.columns["curves"].add({key: along.argmax(dim=2) == wanted[:, None]})
        self._count_classes(along_label.softmax(dim=2), label)
        self._keep(
            amplitude=localisation.amplitude(distinct),
            outside_range=faithfulness.outside_range(image, distinct),
            **self._undecided("removed", along_predicted[:, -1], logits, label),
        )
        if "mask" in batch:
            self._keep(
                mask_mass=localisation.mask_mass(importance, batch["mask"]),
                mask_lift=localisation.lift(importance, batch["mask"]),
                leak=localisation.leak(importance, batch["mask"]),
            )
        if "counterfactual" in batch:
            truth = image - batch["counterfactual"]
            self._keep(
                correlation=localisation.correlation(distinct, truth),
                signed_cosine=localisation.signed_cosine(distinct, truth),
            )

    def _count_classes(self, probabilities: Tensor, label: Tensor) -> None:
        """Adds [B, A, K] to the sums per true class."""
        label = label.cpu()
        self._new_labels |= set(label.tolist())
        self.class_sums.index_add_(1, label, probabilities.double().cpu().transpose(0, 1))
        self.class_counts.index_add_(0, label, torch.ones(len(label), dtype=torch.float64))

    def _again(self, explanation: Explanation, logits: Tensor, names: Sequence[str]) -> None:
        """What the explainer says when it is asked again."""
        image, target, source = explanation.image, explanation.target, logits.argmax(dim=1)
        shown = None if explanation.counterfactual is None else explanation.counterfactual.clamp(-1, 1)
        if self.measures.cycles and shown is not None:
            self.available.add("cycles")
            composed = again.compositions(self._asked, image, source)
            self._keep(**{f"composition_{times}": distance for times, distance in composed.items()})
            back = again.there_and_back(self._asked, self.judge, image, shown, source)
            if back is not None:
                hit = change.flipped(self.judge(shown), target)
                self._keep(
                    reversibility_l1=torch.where(hit, back[0], torch.nan),
                    reversibility=torch.where(hit, back[1].float(), torch.nan),
                )
        distance = self.measures.instruments.lpips or (self._distance if self.stages else None)
        if self.measures.diversity > 1:
            self.available.add("diversity")
        if self.measures.diversity > 1 and shown is not None and distance is not None:
            edits = [shown]
            for repeat in range(1, self.measures.diversity):
                torch.manual_seed(seed_of([*names, str(repeat)]))
                other = self._asked.explain(image, target).counterfactual
                assert other is not None, "it made edits before"
                edits.append(other.clamp(-1, 1))
            self._keep(sigma_l=again.diversity(edits, distance))
        if self.measures.sanity:
            self.available.add("sanity")
            pointed = pointed_at(explanation)
            for part in ("head", "all"):
                if part not in self._forgetful:
                    self._forgetful[part] = again.forgetful(self.explainer, part)
                twin = self._forgetful[part]
                if twin is not None:
                    torch.manual_seed(seed_of(names))
                    # What it decides for already it would leave as it is.
                    decided = twin.classifier(image)
                    wanted = torch.where(decided.argmax(dim=1) == target, runner_up(decided), target)
                    other = pointed_at(GuardedExplainer(twin, names).explain(image, wanted))
                    self._keep(**{f"sanity_{part}": again.sensitivity(pointed, other)})

    def _distance(self, one: Tensor, other: Tensor) -> Tensor:
        """Distance of two batches of images in the judge's maps, [B]."""
        return self._perceived(self.judge.maps(one, self.stages)[0], other)


def _closeness(image: Tensor, edited: Tensor) -> dict[str, Tensor]:
    """How little of the image has changed, by metric key."""
    changed = change.change_map(image, edited)
    return {
        "l1": change.l1(image, edited),
        "l2": change.l2(image, edited),
        "changed_area": change.changed_area(image, edited),
        "area90": change.area90(changed),
        "gini": change.gini(changed),
    }


def _true_target(label: Tensor, num_classes: int) -> Tensor:
    """The class of the exact counterfactual of synthetic data (see the batch contract)."""
    return (label + 1) % num_classes


def _target(batch: dict[str, Any], classifier: FrozenClassifier, ace: bool) -> Tensor | None:
    """The class to ask for: that of the exact counterfactual where there is one and the classifier is right.

    In the published protocol the edit of an image that is decided wrongly has to repair that (evaluation, R3).
    """
    if "counterfactual" not in batch and not ace:
        return None
    logits, label = classifier(batch["image"]), batch["label"]
    wanted = _true_target(label, logits.shape[1]) if "counterfactual" in batch else runner_up(logits)
    return torch.where(logits.argmax(dim=1) == label, wanted, label if ace else runner_up(logits))
