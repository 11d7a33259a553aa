"""What a tally's numbers come to: one row of the table, with intervals, curves, and reasons for what is missing.

Sources: evaluation, sections 0 (R2, R5), 5, 6.5, 10 and 12; DXAI, section 5.
"""

from __future__ import annotations

import statistics as stdlib_statistics
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cfe_lightning.evaluation.instruments import LPIPS_SIZE
from cfe_lightning.evaluation.tally import Measurer
from cfe_lightning.metrics import attributes, faithfulness, realism, reconstruction
from cfe_lightning.metrics.catalogue import MISSING, Metric, Need, Population
from cfe_lightning.metrics.statistics import Measurement, skipped, statistic, summarise, undefined

#: Flip rates before and after saving that differ by more than this earn a warning (evaluation, R4).
SAVED_GAP = 0.005
#: Batches that are left out of the clock, while things warm up.
_WARM_UP = 2
_NO_CLEAN_HIT = "the classifier is right on none of these images"


@dataclass(kw_only=True, slots=True)
class ResultRow:
    """One explainer's results.

    Attributes:
        name: The explainer's name in the table.
        measurements: One per metric that was asked for.
        curves: Mean curves by name, ``replaced``: the share of pixels exchanged along those of pixels, and
            ``class_probability`` [A, K, K]: strength, true class, class.
        per_image: Values per image by metric key, [N] each; NaN where undefined.
        features: The classifier's features, [N, D] each: ``before``, and of the edits at equal strength by level.
        predicted: What the judge decides on the images, [N]; None where nothing ran.
        target: The classes asked for, [N].
        notes: What a reader must know.
    """

    name: str
    measurements: dict[str, Measurement]
    curves: dict[str, Tensor] = field(default_factory=dict)
    per_image: dict[str, Tensor] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    predicted: Tensor | None = None
    target: Tensor | None = None
    notes: list[str] = field(default_factory=list)


def summarise_measurer(tally: Measurer, name: str, resamples: int, seed: int) -> ResultRow:
    """All measurements of one explainer.

    Args:
        tally: All its images are in.
        name: Of the explainer in the table.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
    """
    metrics = tally.measures.metrics
    if tally.failure is not None:
        broken = {metric.key: undefined(tally.failure, tally.num_images) for metric in metrics}
        return ResultRow(name=name, measurements=broken, notes=[f"{name} {tally.failure}"])
    decided = tally.columns["decisions"].joined()
    per_image = tally.columns["values"].joined()
    members: dict[Population, Tensor] = {"correct": decided["predicted"] == decided["label"]}
    if "flip_rate" in per_image:
        members["flipped"] = per_image["flip_rate"]
    populations: dict[str, Population] = {}
    if tally.measures.ace:
        populations = {m.key: m.published for m in metrics if m.published != "all"}
    counted = {
        key: torch.where(members[populations[key]], values.float(), torch.nan) if key in populations else values
        for key, values in per_image.items()
    }
    curves = tally.columns["curves"].joined()
    if "cout" in populations:
        # The curves are those of the number.
        curves |= {key: values[members["correct"]] for key, values in curves.items() if key.startswith("cout_")}
    measured = summarise(counted, populations | {"l1_truth": "correct"}, resamples=resamples, seed=seed)
    measured |= _areas(curves, resamples, seed)
    measured |= _robust(measured)
    row = ResultRow(
        name=name,
        measurements={},
        curves={key: values.float().mean(dim=0) for key, values in curves.items() if len(values)} | tally.positions,
        per_image=counted,
        predicted=decided["predicted"],
        target=decided["target"],
    )
    flipped = members.get("flipped") if populations else None
    distances, row.notes = _distances(tally, name, flipped, seed)
    measured |= distances | _correlations(tally, flipped) | _cost(tally)
    row.measurements = {m.key: measured.get(m.key) or _absent(m, tally) for m in metrics}
    features = tally.columns["features"].joined()
    if "f/before" in features:
        row.features = {"before": features["f/before"]} | tally.columns["iso_features"].joined()
    if "decomposition" in tally.available:
        counts = tally.class_counts.clamp_min(1)[None, :, None]
        row.curves["class_probability"] = (tally.class_sums / counts).float()
    row.notes += _notes(row, tally.size)
    return row


def _absent(metric: Metric, tally: Measurer) -> Measurement:
    missing: list[Need] = [need for need in metric.needs if need not in tally.available]
    if missing:
        return skipped(MISSING[missing[0]])
    if metric.key.startswith("sanity"):
        return skipped("the classifier has no layer that could forget what it learned")
    if metric.key == "sigma_l":
        return skipped("needs a classifier whose layers can be watched, or --weights lpips=FILE")
    if metric.key == "ssim":
        return skipped(f"images of less than {reconstruction.SSIM_MIN_SIZE} pixels a side are too small for it")
    return skipped("this explainer gives nothing to measure it on")


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


def _distances(
    tally: Measurer, title: str, members: Tensor | None, seed: int
) -> tuple[dict[str, Measurement], list[str]]:
    """Distances of the sets of originals, or of held-out images, and edits (5.1 to 5.3); and what to know of them."""
    features, reference = tally.columns["features"].joined(), tally.columns["reference"].joined()
    found: dict[str, Measurement] = {}
    notes: list[str] = []
    for name in ("f", "inception", "user"):
        if f"{name}/after" not in features:
            continue
        before, after = features[f"{name}/before"], features[f"{name}/after"]
        total = len(before)
        if members is not None:
            before, after = before[members], after[members]
        order = torch.randperm(len(before), generator=torch.Generator().manual_seed(seed))[: realism.LARGEST_SAMPLE]
        found |= set_distances(
            name, before[order], after[order], reference.get(name), total, "all" if members is None else "flipped", seed
        )
        used = found[f"fid_{name}"].n_used
        if used < before.shape[1]:
            notes.append(
                f"{title}: fid_{name} is of {used} images in {before.shape[1]} dimensions, too few for it: it "
                f"is too large, read kid_{name}"
            )
    return found, notes


def set_distances(
    name: str,
    before: Tensor,
    after: Tensor,
    reference: Tensor | None,
    total: int,
    population: Population,
    seed: int,
) -> dict[str, Measurement]:
    """FID, its floor, split FID and KID in the features of one extractor.

    Args:
        name: Of the extractor.
        before: Features of originals, [N, D].
        after: Features of their edits, in the same order.
        reference: Features of held-out images, which FID and KID then compare with.
        total: Images that were explained.
        population: Which of them these are.
        seed: Of draws.
    """
    keys = (f"fid_{name}", f"fid_{name}_floor", f"sfid_{name}", f"kid_{name}")
    if len(before) < 4:
        return {key: undefined("fewer than 4 counterfactuals", total, population) for key in keys}
    real, edited = before, after
    if reference is not None:
        # Of equal size, since the distance depends on it.
        size = min(len(reference), len(after))
        if size < 4:
            return {key: undefined("fewer than 4 images to compare with", total, population) for key in keys}
        generator = torch.Generator().manual_seed(seed)
        real = reference[torch.randperm(len(reference), generator=generator)[:size]]
        edited = after[:size]

    def measured(value: float, low: float | None = None, high: float | None = None, used: int = 0) -> Measurement:
        return Measurement(
            status="ok",
            value=value,
            low=low,
            high=high,
            n_used=used or len(edited),
            n_total=total,
            population=population,
        )

    splits = realism.split_fid(before, after, seed=seed)
    mean, deviation = realism.kid(real, edited, seed)
    values = (
        measured(realism.fid(real, edited)),
        measured(realism.fid_floor(real, seed)),
        # Of edits and other originals, whatever else they are compared with.
        measured(float(splits.mean()), float(splits.min()), float(splits.max()), used=len(before)),
        measured(mean, mean - deviation, mean + deviation) if deviation else measured(mean),
    )
    return dict(zip(keys, values, strict=True))


def _correlations(tally: Measurer, members: Tensor | None) -> dict[str, Measurement]:
    """Whether attributes go along as they do in the data (6.5)."""
    decided = tally.columns["attributes"].joined()
    instruments = tally.measures.instruments
    if not decided or instruments.asked is None or instruments.correlations is None:
        return {}
    total, population = len(decided["before"]), "all" if members is None else "flipped"
    before, after = (decided[key] if members is None else decided[key][members] for key in ("before", "after"))
    if len(before) < 2:
        return {key: undefined("fewer than 2 counterfactuals", total, population) for key in ("cd", "cd_mean")}
    cd = float(attributes.correlation_difference(before, after, instruments.asked, instruments.correlations.cpu()))
    num_labels = before.shape[1]
    return {
        key: Measurement(status="ok", value=value, n_used=len(before), n_total=total, population=population)
        for key, value in (("cd", cd), ("cd_mean", cd / num_labels))
    }


def _cost(tally: Measurer) -> dict[str, Measurement]:
    """Seconds and memory (10)."""

    def measured(value: float) -> Measurement:
        return Measurement(status="ok", value=value, n_used=tally.num_images, n_total=tally.num_images)

    seconds = sorted(tally.seconds[_WARM_UP:] or tally.seconds)
    found = {
        "s_per_image": measured(stdlib_statistics.median(seconds)),
        "s_per_image_p95": measured(seconds[min(len(seconds) - 1, int(0.95 * len(seconds)))]),
    }
    if tally.peak_memory:
        found["peak_memory"] = measured(tally.peak_memory / 2**20)
    return found


def _notes(row: ResultRow, size: int) -> list[str]:
    notes = []
    if "lpips" in row.per_image and size < LPIPS_SIZE:
        notes.append(f"{row.name}: images of {size} pixels were enlarged to {LPIPS_SIZE} for lpips")
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
