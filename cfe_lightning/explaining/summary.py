"""Statistics of a whole output folder, from its rows: counts, flip rates with intervals, and means."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from cfe_lightning.explaining.row import Row

#: Flip rates of floats and of the saved pixels that differ by more than this hint at changes below one grey level.
QUANTISATION_GAP = 0.005

#: Reason of every number that needs a flip.
_NOTHING_TO_FLIP = {"undefined": "No explained image has a counterfactual for a class other than its own."}


def summarise(rows: Iterable[Row]) -> dict[str, Any]:
    """Returns counts, flip rates with 95 % Wilson intervals, and means, by their keys in summary.json.

    Images that the classifier already gives to the target have nothing to flip and are in no flip rate and no mean.
    A value that cannot be computed is ``{"undefined": reason}``, never a zero.
    """
    # Rows are read once, one at a time: there may be 100,000.
    failed = already = 0
    flipped, flipped_saved, distances, gains, seconds = (list[Any]() for _ in range(5))
    for row in rows:
        if row.status != "ok":
            failed += 1
            continue
        seconds.append(row.seconds)
        already += row.predicted == row.target
        if row.flipped is not None and row.p_target_after is not None:
            flipped.append(row.flipped)
            flipped_saved.append(row.flipped_saved)
            distances.append(row.l1)
            gains.append(row.p_target_after - row.p_target_before)

    # Statistics.
    summary = {
        "n_done": len(seconds),
        "n_failed": failed,
        "n_already_target": already,
        "flip_rate": _share(flipped),
        "flip_rate_saved": _share(flipped_saved),
        "delta_p": _mean(gains),
        "l1": _mean(distances),
        "s_per_image": _quantiles(seconds),
    }
    if flipped and abs(sum(flipped) - sum(flipped_saved)) / len(flipped) > QUANTISATION_GAP:
        summary["warning"] = (
            "The flip rate of the saved 8-bit pixels differs from that of the computed images by more than half a "
            "point: some flips live in changes smaller than one grey level."
        )
    return summary


def _share(values: Sequence[bool]) -> dict[str, Any]:
    if not values:
        return _NOTHING_TO_FLIP
    # Imported here because it brings torch, which the report must not wait for.
    from cfe_lightning.metrics.statistics import wilson

    low, high = wilson(sum(values), len(values))
    return {"value": sum(values) / len(values), "interval": [low, high], "n": len(values), "population": "all"}


def _mean(values: Sequence[float]) -> dict[str, Any]:
    if not values:
        return _NOTHING_TO_FLIP
    return {"value": math.fsum(values) / len(values), "n": len(values), "population": "all"}


def _quantiles(seconds: Sequence[float]) -> dict[str, Any]:
    if not seconds:
        return {"undefined": "No image was explained."}
    p95 = sorted(seconds)[math.ceil(0.95 * len(seconds)) - 1]
    return {"median": statistics.median(seconds), "p95": p95, "n": len(seconds)}
