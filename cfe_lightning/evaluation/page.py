"""The page of an evaluation: tables, curves and what could not be measured, in one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfe_lightning.evaluation.evaluate import Evaluation
from cfe_lightning.evaluation.tables import Table
from cfe_lightning.metrics.faithfulness import STRENGTHS
from cfe_lightning.metrics.path import RESAMPLED
from cfe_lightning.report.html import write_page

#: Of the drawing area, in units of the SVG.
_LEFT, _TOP, _WIDTH, _HEIGHT = 34.0, 8.0, 258.0, 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A line chart or, of single points, a scatter plot; all values lie in [0, 1] on both axes.

    Attributes:
        title: What is drawn.
        note: How to read it.
        x_label: Of the horizontal axis.
        x_ticks: Positions and texts.
        lines: Name, index of the colour and points of every series, as SVG wants them.
        dots: Name, index of the colour, place and vertical interval of every point.
    """

    title: str
    note: str
    x_label: str
    x_ticks: list[tuple[float, str]]
    lines: list[dict[str, Any]]
    dots: list[dict[str, Any]]


def write_evaluation_html(
    evaluation: Evaluation,
    tables: Sequence[Table],
    folder: Path,
    facts: Mapping[str, str],
    gallery: Path | None = None,
) -> Path:
    """Writes ``report.html`` beside the tables.

    Args:
        evaluation: What was measured.
        tables: What to show, the short one first and the full one last.
        folder: Exists.
        facts: Named facts of the run, shown at the end.
        gallery: The page beside this one that shows explanations; None where there is none.

    Returns:
        The page.
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
    """Every chart that at least one explainer has something for."""
    strengths = torch.tensor(STRENGTHS)
    made = [
        _lines(
            evaluation,
            "cout_target",
            None,
            "Counterfactual transition (COUT)",
            "Probability of the target while the most changed pixels are exchanged first. The sooner it rises, the "
            "fewer pixels carry the decision.",
            "share of pixels exchanged",
        ),
        _lines(
            evaluation,
            "path",
            torch.linspace(0, 1, RESAMPLED),
            "Along the path",
            "Probability of the target on the method's own way.",
            "position on the path",
        ),
        _lines(
            evaluation,
            "del_auc",
            None,
            "Deletion",
            "Probability of the decision while pixels are blurred, attribution first. The sooner it falls, the better.",
            "share of pixels blurred",
        ),
        _lines(
            evaluation,
            "ins_auc",
            None,
            "Insertion",
            "Probability of the decision while pixels are inserted into a blurred image, attribution first.",
            "share of pixels inserted",
        ),
        _lines(
            evaluation,
            "dxai_label",
            strengths,
            "Removing the distinct part",
            "Accuracy while the class-distinct part is removed. Chance is where nothing of the class is left.",
            "share of the distinct part removed",
        ),
        _scatter(evaluation),
    ]
    return [chart for chart in made if chart.lines or chart.dots]


def _lines(evaluation: Evaluation, key: str, positions: Tensor | None, title: str, note: str, x_label: str) -> Chart:
    lines = []
    for colour, row in enumerate(evaluation.rows):
        curve = row.curves.get(key)
        if curve is None:
            continue
        # Pixels are exchanged in blocks, of which the last may be shorter.
        x = row.curves["replaced"] if positions is None else positions
        points = " ".join(f"{_x(a):.1f},{_y(b):.1f}" for a, b in zip(x.tolist(), curve.tolist(), strict=True))
        lines.append({"name": row.name, "colour": colour % 10, "dashed": colour >= 10, "points": points})
    ticks = [(_x(value), f"{value:g}") for value in (0, 0.5, 1)]
    return Chart(title=title, note=note, x_label=x_label, x_ticks=ticks, lines=lines, dots=[])


def _scatter(evaluation: Evaluation) -> Chart:
    """Flip rate against L1."""
    found = [
        (colour, row.name, row.measurements["flip_rate"], row.measurements["l1"])
        for colour, row in enumerate(evaluation.rows)
        if row.measurements["flip_rate"].value is not None and row.measurements["l1"].value is not None
    ]
    largest = max((change.value or 0.0 for *_, change in found), default=0.0) * 1.1 or 1.0
    dots = [
        {
            "name": name,
            "colour": colour % 10,
            "x": _x((change.value or 0.0) / largest),
            "y": _y(flips.value or 0.0),
            "low": _y(flips.low if flips.low is not None else flips.value or 0.0),
            "high": _y(flips.high if flips.high is not None else flips.value or 0.0),
            "label": f"{name}: flip rate {flips.value:.3f}, L1 {change.value:.4f}",
        }
        for colour, name, flips, change in found
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
