"""Measures one explainer's answers batch by batch and keeps a few numbers per image.

Sources: evaluation, sections 3, 4, 7, 9 and 12; DXAI, section 5.
"""

from __future__ import annotations

import logging
import statistics as stdlib_statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.explanation import SUMMANDS, Decomposer, Explainer, Explanation, probability_along, runner_up
from cfe_lightning.losses import kl_from_uniform
from cfe_lightning.metrics import counterfactual as change
from cfe_lightning.metrics import faithfulness, localisation, path, perceptual, realism, reconstruction
from cfe_lightning.metrics.catalogue import METRICS, MISSING, Metric, Need, iso_key, iso_metrics
from cfe_lightning.metrics.equal_strength import smallest_edit
from cfe_lightning.metrics.robustness import survives
from cfe_lightning.metrics.statistics import Measurement, skipped, statistic, summarise, undefined

_log = logging.getLogger(__name__)

#: Flip rates before and after saving that differ by more than this earn a warning (evaluation, R4).
SAVED_GAP = 0.005
_WARM_UP = 2
#: Layers of the judge that are watched for the perceptual distance, from the finest on.
_STAGES = 5
_NO_CLEAN_HIT = "the classifier is right on none of these images"


@dataclass(kw_only=True, slots=True)
class Row:
    """One explainer's results.

    Attributes:
        name: The explainer's name in the table.
        measurements: One per metric that was asked for.
        curves: Mean curves by name, ``replaced``: the share of pixels exchanged along those of pixels, and
            ``class_probability`` [A, K, K]: strength, true class, class.
        per_image: Values per image by metric key, [N] each; NaN where undefined.
        predicted: What the judge decides on the images, [N]; None where nothing ran.
        target: The classes asked for, [N].
        seconds_per_image: Median over batches, of ``explain`` alone; None where nothing ran.
        notes: What a reader must know.
    """

    name: str
    measurements: dict[str, Measurement]
    curves: dict[str, Tensor] = field(default_factory=dict)
    per_image: dict[str, Tensor] = field(default_factory=dict)
    predicted: Tensor | None = None
    target: Tensor | None = None
    seconds_per_image: float | None = None
    notes: list[str] = field(default_factory=list)


class _Column:
    """Rows that arrive batch by batch, kept in one piece.

    Thousands of small tensors between large ones that come and go would keep the memory of those from being used again.
    """

    def __init__(self) -> None:
        self._rows: Tensor | None = None
        self._length = 0

    def add(self, rows: Tensor) -> None:
        """Appends rows [B, ...]."""
        end = self._length + len(rows)
        if self._rows is None or end > len(self._rows):
            grown = torch.empty((max(1024, 2 * end), *rows.shape[1:]), dtype=rows.dtype)
            if self._rows is not None:
                grown[: self._length] = self.joined()
            self._rows = grown
        self._rows[self._length : end] = rows.detach()
        self._length = end

    def joined(self) -> Tensor:
        """All rows so far, [N, ...]."""
        assert self._rows is not None, "a column begins with its first rows"
        return self._rows[: self._length]


class Tally:
    """Measures one explainer batch by batch and keeps a few numbers per image."""

    def __init__(
        self,
        explainer: Explainer,
        judge: FrozenClassifier,
        curve_steps: int,
        max_batch: int,
        second: FrozenClassifier | None = None,
        iso: Sequence[float] = (),
    ) -> None:
        self.explainer = explainer
        self.iso = iso
        self.metrics: tuple[Metric, ...] = (*METRICS, *iso_metrics(iso))
        self.judge = judge
        self.second = second
        self.stages = judge.shallow_maps(_STAGES) if judge.spec.head is not None else []
        self.curve_steps = curve_steps
        self.max_batch = max_batch
        self.failure: str | None = None
        self.values: dict[str, _Column] = defaultdict(_Column)
        self.curves: dict[str, _Column] = defaultdict(_Column)
        self.available: set[Need] = {"explanation"}
        self.features: dict[str, _Column] = defaultdict(_Column)
        self.decisions: dict[str, _Column] = defaultdict(_Column)
        self.positions: dict[str, Tensor] = {}
        self.seconds: list[float] = []
        self.num_images = 0
        strengths = len(faithfulness.STRENGTHS)
        self.class_sums = torch.zeros(strengths, judge.num_classes, judge.num_classes, dtype=torch.float64)
        self.class_counts = torch.zeros(judge.num_classes, dtype=torch.float64)

    @torch.no_grad()
    def add(self, name: str, batch: dict[str, Any]) -> None:
        """Explains and measures one batch; images that came back broken end the tally with a reason."""
        self.num_images += len(batch["image"])
        if self.failure is not None:
            return
        image, label = batch["image"], batch["label"]
        logits = self.judge(image)
        target = _target(batch, self.explainer.classifier)
        started = _now(image.device)
        explanation = self.explainer.explain(image, target)
        self.seconds.append((_now(image.device) - started) / len(image))
        answer = {"attribution": explanation.attribution, **explanation.parts}
        if explanation.counterfactual is not None:
            answer["counterfactual"] = explanation.counterfactual
        if is_decomposer(self.explainer):
            answer["distinct part of the label"] = self.explainer.distinct(image, label)
        self.failure = _broken(answer, batch["name"])
        if self.failure is not None:
            _log.warning("%s %s: it is left out of the table.", name, self.failure)
            return
        self.decisions["predicted"].add(logits.argmax(dim=1))
        self.decisions["target"].add(explanation.target)
        self._decision(explanation, logits, label, batch)
        self._attribution(explanation, logits, batch)
        self._rendering(explanation, logits, label)
        if is_decomposer(self.explainer):
            self._decomposition(self.explainer, answer["distinct part of the label"], explanation, logits, batch)

    def _keep(self, **values: Tensor) -> None:
        for key, value in values.items():
            self.values[key].add(value)

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
        if self.second is not None:
            self.available.add("second")
            agreed = change.flipped(self.second(image), source)
            told = change.flipped(self.second(shown), target)
            self._keep(transfer_flip=torch.where(agreed, told.float(), torch.nan))
        # Of decompositions the steps lead elsewhere.
        steps = None if is_decomposer(self.explainer) else explanation.steps
        if steps is not None and explanation.strengths is not None:
            self._path(steps, explanation.strengths, explanation.intended, target)
        way = torch.stack([image, explanation.counterfactual], dim=1) if steps is None else steps
        self._equal_strength(image, way.clamp(-1, 1), target, maps)
        if self.curve_steps:
            score, source_curve, target_curve = faithfulness.cout(
                self.judge, image, shown, source, target, steps=self.curve_steps, max_batch=self.max_batch
            )
            self._keep(cout=score)
            self.curves["cout_source"].add(source_curve)
            self.curves["cout_target"].add(target_curve)
        if "mask" in batch:
            self._keep(mask_mass_cf=localisation.mask_mass(change.change_map(image, shown), batch["mask"]))
        if "counterfactual" in batch:
            right = (explanation.predicted == label) & (target == _true_target(label, logits.shape[1]))
            self._keep(l1_truth=torch.where(right, change.l1(batch["counterfactual"], shown), torch.nan))

    def _seen(self, image: Tensor, shown: Tensor, maps: list[Tensor]) -> None:
        """What the judge's layers make of the images, of which ``maps`` are at hand, and of their edits."""
        if self.judge.spec.head is None:
            return
        self.available.add("features")
        before, after = self.judge.features(image), self.judge.features(shown)
        self.features["before"].add(before.float())
        self.features["after"].add(after.float())
        self._keep(sim_f=realism.cosine(before, after))
        if self.stages:
            self.available.add("stages")
            self._keep(lpips_f=self._perceived(maps, shown))

    def _perceived(self, maps: list[Tensor], edited: Tensor) -> Tensor:
        """Distance in the judge's maps, of which those of the originals are at hand, [B]."""
        return perceptual.feature_distance(maps, self.judge.maps(edited, self.stages)[0])

    def _equal_strength(self, image: Tensor, way: Tensor, target: Tensor, maps: list[Tensor]) -> None:
        """The smallest edits on the explainer's way that are as sure as asked; judged where there is one."""
        for level in self.iso:
            found = smallest_edit(self.judge, way, target, level, max_batch=self.max_batch)
            values = _closeness(image, found.edit)
            if self.stages:
                values["lpips_f"] = self._perceived(maps, found.edit)
            if bool(found.reached.any()):
                self.available.add("iso")
            self._keep(**{iso_key(level, "reached"): found.reached})
            defined = {key: torch.where(found.reached, value, torch.nan) for key, value in values.items()}
            self._keep(**{iso_key(level, key): value for key, value in defined.items()})

    def _path(self, steps: Tensor, strengths: Tensor, intended: Tensor | None, target: Tensor) -> None:
        """The way to the counterfactual."""
        self.available.add("path")
        said = probability_along(self.judge.along(steps, self.max_batch), target)
        k = path.positions(strengths)
        self.curves["path"].add(path.resampled(k, said))
        self._keep(
            mono=path.monotone(said),
            rho=path.rank_correlation(k, said),
            regress=path.regress(said),
            crossing=path.crossing(k, said),
            smooth=path.roughness(steps),
        )
        if intended is not None:
            self.available.add("intended")
            self._keep(schedule=path.schedule_error(said, probability_along(intended.to(said), target)))

    def _attribution(self, explanation: Explanation, logits: Tensor, batch: dict[str, Any]) -> None:
        if "mask" in batch:
            self._keep(mask_mass_attribution=localisation.mask_mass(explanation.attribution, batch["mask"]))
        if not self.curve_steps:
            return
        self.available.add("curves")
        num_pixels = explanation.image[0, 0].numel()
        cuts = faithfulness.cut_points(num_pixels, self.curve_steps)
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
                steps=self.curve_steps,
                max_batch=self.max_batch,
            )
            self._keep(**{key: value})
            self.curves[key].add(curve)

    def _rendering(self, explanation: Explanation, logits: Tensor, label: Tensor) -> None:
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
        explainer: Decomposer,
        distinct: Tensor,
        explanation: Explanation,
        logits: Tensor,
        batch: dict[str, Any],
    ) -> None:
        self.available.add("decomposition")
        image, label = batch["image"], batch["label"]
        predicted = explanation.predicted
        along_label = faithfulness.sweep_logits(self.judge, image, distinct, max_batch=self.max_batch)
        # The two modes differ only where the classifier is wrong.
        distinct_predicted, along_predicted = distinct.clone(), along_label.clone()
        wrong = (predicted != label).nonzero().squeeze(1)
        if len(wrong):
            distinct_predicted[wrong] = explainer.distinct(image[wrong], predicted[wrong])
            along_predicted[wrong] = faithfulness.sweep_logits(
                self.judge, image[wrong], distinct_predicted[wrong], max_batch=self.max_batch
            )
        importance = localisation.magnitude(distinct)
        removed = faithfulness.removal_logits(self.judge, image, importance, max_batch=self.max_batch)
        for key, along, wanted in (
            ("dxai_label", along_label, label),
            ("dxai_prediction", along_predicted, label),
            ("dxai_fidelity", along_predicted, logits.argmax(dim=1)),
            ("removal", removed, label),
        ):
            self.curves[key].add(along.argmax(dim=2) == wanted[:, None])
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
        self.class_sums.index_add_(1, label, probabilities.double().cpu().transpose(0, 1))
        self.class_counts.index_add_(0, label, torch.ones(len(label), dtype=torch.float64))

    def row(self, name: str, resamples: int, seed: int) -> Row:
        """All measurements of this explainer."""
        if self.failure is not None:
            broken = {metric.key: undefined(self.failure, self.num_images) for metric in self.metrics}
            return Row(name=name, measurements=broken, notes=[f"{name} {self.failure}"])
        per_image = {key: column.joined() for key, column in self.values.items()}
        measured = summarise(per_image, {"l1_truth": "correct"}, resamples=resamples, seed=seed)
        curves = {key: column.joined() for key, column in self.curves.items()}
        measured |= _areas(curves, resamples, seed)
        measured |= _robust(measured)
        measured |= _distances({key: column.joined() for key, column in self.features.items()}, seed)
        row = Row(
            name=name,
            measurements={m.key: measured.get(m.key) or self._absent(m.needs) for m in self.metrics},
            curves={key: values.float().mean(dim=0) for key, values in curves.items()} | self.positions,
            per_image=per_image,
            predicted=self.decisions["predicted"].joined(),
            target=self.decisions["target"].joined(),
            seconds_per_image=stdlib_statistics.median(self.seconds[_WARM_UP:] or self.seconds),
        )
        if "decomposition" in self.available:
            counts = self.class_counts.clamp_min(1)[None, :, None]
            row.curves["class_probability"] = (self.class_sums / counts).float()
        row.notes = _notes(row)
        return row

    def _absent(self, needs: tuple[Need, ...]) -> Measurement:
        missing = [need for need in needs if need not in self.available]
        if missing:
            return skipped(MISSING[missing[0]])
        return skipped(f"images of less than {reconstruction.SSIM_MIN_SIZE} pixels a side are too small for it")


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


def _areas(curves: dict[str, Tensor], resamples: int, seed: int) -> dict[str, Measurement]:
    """The areas under accuracy curves; with intervals over images, since an accuracy exists for a set only."""
    if "dxai_label" not in curves:
        return {}
    strengths = torch.tensor(faithfulness.STRENGTHS, dtype=torch.float64)
    fractions = torch.tensor(faithfulness.REMOVED, dtype=torch.float64)
    measured = {
        f"dxai_auc_{mode}": statistic(
            curves[f"dxai_{mode}"],
            lambda curve: faithfulness.normalised_area(curve, strengths),
            _NO_CLEAN_HIT,
            resamples=resamples,
            seed=seed,
        )
        for mode in ("label", "prediction", "fidelity")
    }
    for mode in ("label", "prediction"):
        measured[f"dxai_auc_{mode}_raw"] = statistic(
            curves[f"dxai_{mode}"],
            lambda curve: faithfulness.area(curve, strengths),
            _NO_CLEAN_HIT,
            resamples=resamples,
            seed=seed,
        )
    measured["removal_auc"] = statistic(
        curves["removal"],
        lambda curve: faithfulness.removal_area(curve, fractions),
        _NO_CLEAN_HIT,
        resamples=resamples,
        seed=seed,
    )
    return measured


def _robust(measured: dict[str, Measurement]) -> dict[str, Measurement]:
    """The headline: the least of all transformations (3.4)."""
    found = [one for key, one in measured.items() if key.startswith("robust_flip_") and one.value is not None]
    return {"robust_flip": min(found, key=lambda one: one.value or 0.0)} if found else {}


def _distances(features: dict[str, Tensor], seed: int) -> dict[str, Measurement]:
    """Distances of the sets of originals and edits (5.1 to 5.3), of at most so many images."""
    if not features:
        return {}
    total = len(features["before"])
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[: realism.LARGEST_SAMPLE]
    before, after = features["before"][order], features["after"][order]
    keys = ("fid_f", "fid_f_floor", "sfid_f", "kid_f")
    if total < 4:
        return {key: undefined("fewer than 4 counterfactuals", total) for key in keys}

    def measured(value: float, low: float | None = None, high: float | None = None) -> Measurement:
        return Measurement(
            status="ok", value=value, low=low, high=high, n_used=len(before), n_total=total, population="all"
        )

    splits = realism.split_fid(before, after, seed=seed)
    mean, deviation = realism.kid(before, after, seed)
    return {
        "fid_f": measured(realism.fid(before, after)),
        "fid_f_floor": measured(realism.fid_floor(before, seed)),
        "sfid_f": measured(float(splits.mean()), float(splits.min()), float(splits.max())),
        "kid_f": measured(mean, mean - deviation, mean + deviation) if deviation else measured(mean),
    }


def _notes(row: Row) -> list[str]:
    notes = []
    tensor, saved = row.measurements["flip_rate"].value, row.measurements["flip_rate_saved"].value
    if tensor is not None and saved is not None and abs(tensor - saved) > SAVED_GAP:
        notes.append(
            f"{row.name}: flip rate {tensor:.3f} on tensors but {saved:.3f} on saved 8-bit images; "
            "some flips live below the resolution of a file"
        )
    if "psnr" in row.per_image:
        capped = int((row.per_image["psnr"] >= reconstruction.PSNR_CAP).sum())
        if capped:
            notes.append(
                f"{row.name}: {capped} images are rendered exactly and count as {reconstruction.PSNR_CAP:g} dB"
            )
    return notes


def _true_target(label: Tensor, num_classes: int) -> Tensor:
    """The class of the exact counterfactual of synthetic data (see the batch contract)."""
    return (label + 1) % num_classes


def _target(batch: dict[str, Any], classifier: FrozenClassifier) -> Tensor | None:
    """The class to ask for: that of the exact counterfactual where there is one and the classifier is right."""
    if "counterfactual" not in batch:
        return None
    logits = classifier(batch["image"])
    wanted = _true_target(batch["label"], logits.shape[1])
    return torch.where(logits.argmax(dim=1) == batch["label"], wanted, runner_up(logits))


def _broken(answer: dict[str, Tensor], names: Sequence[str]) -> str | None:
    """What is not finite, and for which image."""
    for what, value in answer.items():
        finite = value.flatten(1).isfinite().all(dim=1)
        if not finite.all():
            return f"gave a {what} that is not finite for image {names[int((~finite).nonzero()[0])]!r}"
    return None


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def is_decomposer(explainer: Explainer) -> TypeGuard[Decomposer]:
    """Whether an explainer can give the part of an image that makes it a class."""
    return callable(getattr(explainer, "distinct", None))
