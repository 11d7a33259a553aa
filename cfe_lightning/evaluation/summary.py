"""Sums up one explainer's numbers as a row of the table: intervals, curves, and reasons for what is missing."""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cfe_lightning.evaluation.instruments import LPIPS_SIZE
from cfe_lightning.evaluation.measurer import Measurer
from cfe_lightning.metrics import realism, reconstruction
from cfe_lightning.metrics.case import NEEDS, Kept
from cfe_lightning.metrics.catalogue import GROUPS, metrics_with
from cfe_lightning.metrics.metric import Metric, Population
from cfe_lightning.metrics.statistics import Measurement, skipped, summarise, undefined

#: A larger difference of flip rates before and after saving earns a warning.
SAVED_GAP = 0.005


@dataclass(kw_only=True, slots=True)
class ResultRow:
    """One explainer's results.

    Attributes:
        name: The explainer's name in the table.
        measurements: Measurements of all metrics by key.
        curves: Mean curves by name; ``replaced``, the share of pixels exchanged along those of pixels; and
            ``class_probability`` [A, K, K]: strength, true class, class.
        per_image: Values per image by metric key, [N] each; NaN where undefined.
        features: The classifier's features, [N, D] each: ``before``, and of the edits at equal strength by level.
        predicted: The judge's decisions on the images, [N]; None where nothing ran.
        target: The target classes, [N]; None where nothing ran.
        notes: Sentences that a reader must know.
    """

    name: str
    measurements: dict[str, Measurement]
    curves: dict[str, Tensor] = field(default_factory=dict)
    per_image: dict[str, Tensor] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    predicted: Tensor | None = None
    target: Tensor | None = None
    notes: list[str] = field(default_factory=list)


def summarise_measurer(measurer: Measurer, name: str, seed: int) -> ResultRow:
    """Computes all measurements of one explainer.

    Args:
        measurer: The measurer of the explainer, after its last image.
        name: The explainer's name in the table.
        seed: Seed of the bootstrap and of all other draws.
    """
    metrics = metrics_with(measurer.measures.iso)
    if measurer.failure is not None:
        broken = {metric.key: undefined(measurer.failure, measurer.num_images) for metric in metrics}
        return ResultRow(name=name, measurements=broken, notes=[f"{name} {measurer.failure}"])

    # Values of the population.
    columns = defaultdict(dict, {kind: rows.joined() for kind, rows in measurer.columns.items()})
    decided, values, curves = columns["decisions"], columns["values"], columns["curves"]
    correct = decided["predicted"] == decided["label"]
    populations: dict[str, Population] = {}
    if measurer.measures.ace:
        populations = {m.key: m.published for m in metrics if m.published != "all"}
        members = {"correct": correct, "flipped": values.get("flip_rate", correct)}
        for key in populations.keys() & values.keys():
            values[key] = torch.where(members[populations[key]], values[key].float(), torch.nan)
        # The curves are those of the number.
        curves |= {key: rows[correct] for key, rows in curves.items() if key.startswith("cout_")}

    # Measurements of images, then of sets.
    measured = summarise(values, populations | {"l1_truth": "correct"}, seed=seed)
    measured |= _measure_sets(measurer, columns, measured, seed)

    # The row.
    row = ResultRow(
        name=name,
        measurements={m.key: measured.get(m.key) or _absent(m, measurer.available) for m in metrics},
        curves={key: rows.float().mean(dim=0) for key, rows in curves.items() if len(rows)} | measurer.positions,
        per_image=values,
        predicted=decided["predicted"],
        target=decided["target"],
    )
    features = columns["features"]
    if "f/before" in features:
        row.features = {"before": features["f/before"]} | columns["iso_features"]
    if "decomposition" in measurer.available:
        counts = measurer.class_counts.clamp_min(1)[None, :, None]
        row.curves["class_probability"] = (measurer.class_sums / counts).float()
    row.notes = [f"{name}: {note}" for note in _notes(row, features, measurer.size)]
    return row


def _measure_sets(
    measurer: Measurer, rows: defaultdict[str, dict[str, Tensor]], means: dict[str, Measurement], seed: int
) -> dict[str, Measurement]:
    """Measures what exists only for a set of images, from ``rows`` by kind and ``means`` of the images."""
    # Distances of the published protocol are about flips alone.
    flipped = rows["values"].get("flip_rate") if measurer.measures.ace else None
    kept = Kept(
        means=means,
        rows=rows,
        members=slice(None) if flipped is None else flipped,
        population="all" if flipped is None else "flipped",
        instruments=measurer.measures.instruments,
        num_images=measurer.num_images,
        seconds=measurer.seconds,
        peak_memory=measurer.peak_memory,
        seed=seed,
    )

    found: dict[str, Measurement] = {}
    for group in GROUPS:
        if group.summarise is not None:
            found |= group.summarise(kept)
    return found


def _absent(metric: Metric, available: set[str]) -> Measurement:
    missing = [need for need in metric.needs if need not in available]
    return skipped(NEEDS[missing[0]] if missing else metric.absent)


def _notes(row: ResultRow, features: dict[str, Tensor], size: int) -> list[str]:
    """Lists what a reader must know of the numbers; ``size`` is the shorter side of the images in pixels."""
    notes, measured = [], row.measurements

    # Too few images for FID.
    for name, (fid, _, _, kid) in realism.KEYS.items():
        if f"{name}/after" in features:
            used, dimensions = measured[fid].n_used, features[f"{name}/after"].shape[1]
            if used < dimensions:
                notes.append(
                    f"{fid} is of {used} images in {dimensions} dimensions, too few for it: it is too large, read {kid}"
                )

    # Images that were changed for a metric, or flips that saving changes.
    if "lpips" in row.per_image and size < LPIPS_SIZE:
        notes.append(f"images of {size} pixels were enlarged to {LPIPS_SIZE} for lpips")
    tensor, saved = measured["flip_rate"].value, measured["flip_rate_saved"].value
    if tensor is not None and saved is not None and abs(tensor - saved) > SAVED_GAP:
        notes.append(
            f"flip rate {tensor:.3f} on tensors but {saved:.3f} on saved 8-bit images; "
            "some flips live below the resolution of a file"
        )

    # Exact renderings.
    if "psnr" in row.per_image:
        capped = int((row.per_image["psnr"] >= reconstruction.PSNR_CAP).sum())
        if capped:
            notes.append(f"{capped} images are rendered exactly and count as {reconstruction.PSNR_CAP:g} dB")
    return notes
