"""The page of an evaluation: tables, charts and the reasons for missing numbers, in one file that needs no network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cfe_lightning.evaluation.evaluate import Evaluation
from cfe_lightning.evaluation.tables import Table
from cfe_lightning.metrics.decomposition import STRENGTHS
from cfe_lightning.metrics.path import RESAMPLED
from cfe_lightning.report.html import write_page

#: Drawing area in units of the SVG.
_LEFT, _TOP, _WIDTH, _HEIGHT = 34.0, 8.0, 258.0, 120.0
# fmt: off
#: Line charts: key of the curve, title, label of the horizontal axis, and how to read the chart.
_CURVES = (
    ("cout_target", "Counterfactual transition (COUT)", "share of pixels exchanged",
     "Probability of the target while the most changed pixels are exchanged first. The sooner it rises, the fewer "
     "pixels carry the decision."),
    ("path", "Along the path", "position on the path", "Probability of the target on the method's own way."),
    ("del_auc", "Deletion", "share of pixels blurred",
     "Probability of the decision while pixels are blurred, attribution first. The sooner it falls, the better."),
    ("ins_auc", "Insertion", "share of pixels inserted",
     "Probability of the decision while pixels are inserted into a blurred image, attribution first."),
    ("dxai_label", "Removing the distinct part", "share of the distinct part removed",
     "Accuracy while the class-distinct part is removed. Chance is where nothing of the class is left."),
)
# fmt: on
#: Positions in [0, 1] of curves that do not exchange pixels.
_POSITIONS = {"path": torch.linspace(0, 1, RESAMPLED), "dxai_label": torch.tensor(STRENGTHS)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A line chart, or a scatter plot of single points; vertical values lie in [0, 1].

    Attributes:
        title: Title above the chart.
        note: Sentence that says how to read it.
        x_label: Label of the horizontal axis.
        x_ticks: Positions of the ticks in units of the SVG, and their texts.
        lines: Name, number of the colour, dashes and points of every series, as the SVG needs them.
        dots: Name, number of the colour, place, vertical interval and label of every point.
    """

    title: str
    note: str
    x_label: str
    x_ticks: list[tuple[float, str]]
    lines: list[dict[str, Any]]
    dots: list[dict[str, Any]]


def write_evaluation_html(
    evaluation: Evaluation, tables: Sequence[Table], folder: Path, facts: Mapping[str, str], gallery: Path | None = None
) -> Path:
    """Writes ``report.html`` to an existing folder and returns its path.

    The short table is the first of ``tables``, the full one the last. ``facts`` are settings of the run, shown at the
    end. The page links to ``gallery`` in the same folder, if there is one.
    """
    return write_page(
        folder / "report.html",
        "evaluation/evaluation.html.j2",
        styles=["evaluation/evaluation.css"],
        evaluation=evaluation,
        names=[row.name for row in evaluation.rows],
        short=tables[0],
        others=tables[1:-1],
        full=tables[-1],
        charts=charts(evaluation),
        facts=facts,
        gallery=None if gallery is None else gallery.name,
    )


def charts(evaluation: Evaluation) -> list[Chart]:
    """Draws every chart for which at least one explainer has values."""
    made = [*(_lines(evaluation, *curve) for curve in _CURVES), _scatter(evaluation)]
    return [chart for chart in made if chart.lines or chart.dots]


def _lines(evaluation: Evaluation, key: str, title: str, x_label: str, note: str) -> Chart:
    lines = []
    for colour, row in enumerate(evaluation.rows):
        curve = row.curves.get(key)
        if curve is None:
            continue
        # Pixels are exchanged in blocks, of which the last may be shorter.
        x = _POSITIONS[key] if key in _POSITIONS else row.curves["replaced"]
        points = " ".join(f"{_x(a):.1f},{_y(b):.1f}" for a, b in zip(x.tolist(), curve.tolist(), strict=True))
        lines.append({"name": row.name, "colour": colour % 10, "dashed": colour >= 10, "points": points})
    ticks = [(_x(value), f"{value:g}") for value in (0, 0.5, 1)]
    return Chart(title=title, note=note, x_label=x_label, x_ticks=ticks, lines=lines, dots=[])


def _scatter(evaluation: Evaluation) -> Chart:
    """Draws the flip rate against the L1 distance, one point per explainer."""
    # Explainers that have both.
    found = []
    for colour, row in enumerate(evaluation.rows):
        flips, change = row.measurements["flip_rate"], row.measurements["l1"].value
        if flips.value is not None and change is not None:
            found.append((colour % 10, row.name, flips, flips.value, change))
    # With room to the right of the largest change.
    largest = max((change for *_, change in found), default=0.0) * 1.1 or 1.0

    # Points with the intervals of the flip rate.
    dots = [
        {
            "name": name,
            "colour": colour,
            "x": _x(change / largest),
            "y": _y(rate),
            "low": _y(rate if flips.low is None else flips.low),
            "high": _y(rate if flips.high is None else flips.high),
            "label": f"{name}: flip rate {rate:.3f}, L1 {change:.4f}",
        }
        for colour, name, flips, rate, change in found
    ]
    return Chart(
        title="Flip rate against change",
        note="Upper left is better: more decisions changed by less.",
        x_label="L1",
        x_ticks=[(_x(share), f"{share * largest:.3g}") for share in (0, 0.5, 1)],
        lines=[],
        dots=dots,
    )


def _x(share: float) -> float:
    return _LEFT + _WIDTH * share


def _y(share: float) -> float:
    return _TOP + _HEIGHT * (1 - share)
