"""An evaluation as files: tables with their legends, differences, groups, JSON, curves and one line per image."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cfe_lightning.evaluation.comparison import (
    Difference,
    GroupMean,
    at_equal_strength,
    group_means,
    paired_differences,
    worst_pair,
)
from cfe_lightning.evaluation.evaluate import Evaluation
from cfe_lightning.files.atomic import atomic_path, atomic_write
from cfe_lightning.metrics.catalogue import ISO_CLOSENESS, ISO_REALISM, Metric, iso_key
from cfe_lightning.metrics.statistics import Measurement

#: Probability of the decision on a wholly blurred image from which on deletion cannot tell maps apart.
_BLURRED_AWAY = 0.8
_ARROWS = {"higher": "higher is better", "lower": "lower is better", "neither": "for context"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table before it becomes Markdown or HTML.

    Attributes:
        title: Its heading, or empty.
        heading: Of the columns.
        lines: Cells as text, of as many columns.
        note: What stands under it, in paragraphs or as a Markdown list.
    """

    title: str
    heading: list[str]
    lines: list[list[str]]
    note: str

    def markdown(self) -> str:
        """Heading, aligned table and note."""
        title = f"## {self.title}\n\n" if self.title else ""
        return f"{title}{_markdown(self.heading, self.lines)}\n{self.note}\n"


def short_table(evaluation: Evaluation) -> Table:
    """The headline numbers, one row per explainer, and under it what every column means."""
    columns = [metric for metric in evaluation.measures.metrics if metric.title and _has_value(evaluation, metric)]
    heading = ["explainer", *(metric.title for metric in columns)]
    lines = [[row.name, *(_number(row.measurements[metric.key]) for metric in columns)] for row in evaluation.rows]
    return Table(title="", heading=heading, lines=lines, note=_legend(columns, evaluation))


def full_table(evaluation: Evaluation) -> Table:
    """Every number with interval and n, one row per metric, and the reasons for what is missing."""
    heading = ["metric", "better", "range", *(row.name for row in evaluation.rows)]
    lines = [
        [
            metric.key,
            metric.better,
            metric.value_range,
            *(_with_interval(row.measurements[metric.key]) for row in evaluation.rows),
        ]
        for metric in evaluation.measures.metrics
        if _has_value(evaluation, metric)
    ]
    reasons = {
        (row.name, measurement.reason): None
        for row in evaluation.rows
        for measurement in row.measurements.values()
        if measurement.status != "ok"
    }
    missing = "\n".join(f"- {name}: {reason}" for name, reason in reasons)
    meanings = "\n".join(f"- `{metric.key}`: {metric.meaning}" for metric in evaluation.measures.metrics)
    note = meanings + (f"\n\nNot computed:\n\n{missing}" if missing else "")
    return Table(title="All metrics", heading=heading, lines=lines, note=note)


def save(evaluation: Evaluation, folder: Path, settings: Mapping[str, Any]) -> list[Table]:
    """Writes table, differences and groups as CSV, ``table.md``, ``metrics.json``, ``per_image.csv``, ``curves.npz``.

    Args:
        evaluation: What was measured.
        folder: Created if missing; files of an earlier evaluation are replaced.
        settings: Plain data that say how it was measured; kept in ``metrics.json``.

    Returns:
        What ``table.md`` shows, the short table first and the full one last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    differences, groups = paired_differences(evaluation), group_means(evaluation)
    shown = [short_table(evaluation), *tables(evaluation, differences, groups), full_table(evaluation)]
    text = "\n".join(table.markdown() for table in shown)
    content = {**settings, "n_images": len(evaluation.image_names), "class_names": list(evaluation.class_names)}
    content["rows"] = [
        {
            "name": row.name,
            "notes": row.notes,
            "metrics": {key: asdict(measurement) for key, measurement in row.measurements.items()},
        }
        for row in evaluation.rows
    ]
    content["agreement"] = {
        name: {
            other: None if math.isnan(value) else value for other, value in zip(evaluation.agreeing, row, strict=True)
        }
        for name, row in zip(evaluation.agreeing, evaluation.agreement.tolist(), strict=True)
    }
    files = {
        "table.md": f"# Evaluation\n\n{text}",
        "differences.csv": _lines_csv(
            ["first", "second", "metric"], [([one.first, one.second, one.key], one.measured) for one in differences]
        ),
        "groups.csv": _lines_csv(
            ["explainer", "class", "target", "metric"],
            [([one.explainer, one.source, one.target or "", one.key], one.measured) for one in groups],
        ),
        "table.csv": _csv(evaluation),
        "per_image.csv": _per_image_csv(evaluation),
        # allow_nan=False: a NaN that got this far is our mistake and must not be written.
        "metrics.json": json.dumps(content, indent=2, allow_nan=False) + "\n",
    }
    for name, written in files.items():
        with atomic_write(folder / name) as file:
            file.write(written)
    curves = {f"{row.name}/{name}": curve.numpy() for row in evaluation.rows for name, curve in row.curves.items()}
    with atomic_path(folder / "curves.npz") as temporary, temporary.open("wb") as archive:
        np.savez(archive, allow_pickle=False, **curves)
    return shown


def tables(evaluation: Evaluation, differences: Sequence[Difference], groups: list[GroupMean]) -> list[Table]:
    """What there is to compare: at equal confidence, in pairs, and on the worst pair of classes."""
    found: list[Table | None] = []
    for level in evaluation.measures.iso:
        found += _iso_tables(evaluation, level)
    found += [_agreement_table(evaluation), _difference_table(evaluation, differences)]
    found += [_worst_table(evaluation, groups)]
    return [table for table in found if table is not None]


def _agreement_table(evaluation: Evaluation) -> Table | None:
    """Whether explainers point at the same places; None where there is but one."""
    names = evaluation.agreeing
    if len(names) < 2:
        return None
    lines = [
        [name, *("" if math.isnan(value) else f"{value:.2f}" for value in row)]
        for name, row in zip(names, evaluation.agreement.tolist(), strict=True)
    ]
    return Table(
        title="Do they point at the same places?",
        heading=["explainer", *names],
        lines=lines,
        note="Rank correlation of the changes (beyond a method's own rendering; of the attribution, where nothing is "
        "changed), mean over images: 1 the same places, 0 unrelated ones. Several seeds of one method should agree, or "
        "its pictures say more about the seed than about the classifier.",
    )


def _difference_table(evaluation: Evaluation, differences: Sequence[Difference]) -> Table | None:
    """The short table's per-image metrics of the first explainer minus each other one; None for a single row."""
    first = evaluation.rows[0].name
    found = {(one.second, one.key): one.measured for one in differences if one.first == first}
    columns = [m for m in evaluation.measures.metrics if m.title and any(key == m.key for _, key in found)]
    lines = [
        [row.name, *(_with_interval(found[row.name, m.key]) if (row.name, m.key) in found else "" for m in columns)]
        for row in evaluation.rows[1:]
        if any(name == row.name for name, _ in found)
    ]
    if not lines:
        return None
    return Table(
        title="Paired differences",
        heading=[f"{first} minus", *(metric.title for metric in columns)],
        lines=lines,
        note="On the images on which both are defined, with bootstrap intervals; all pairs are in differences.csv.",
    )


def _iso_tables(evaluation: Evaluation, level: float) -> list[Table]:
    """The smallest edits that are as sure: on the images that everybody can change so far, and on each one's own."""
    count, common = at_equal_strength(evaluation, level)
    own = {
        name: {
            key: row.measurements[iso_key(level, key)]
            for key in ISO_CLOSENESS
            if row.measurements[iso_key(level, key)].status == "ok"
        }
        for name, row in ((row.name, row) for row in evaluation.rows if row.name in common)
    }
    total = len(evaluation.image_names)
    found = []
    if count:
        note = (
            f"The smallest edit on each explainer's way with that probability of the target, on the {count} of {total} "
            "images that all of them can change so far."
        )
        found.append(_iso_table(evaluation, level, f"At equal confidence ({level:g})", common, note))
    if any(own.values()) and count < total:
        note = (
            f"The same on all images that an explainer itself can change so far (`reached`, of {total}), which are "
            "others for each: who does only the easy ones looks closer."
        )
        found.append(
            _iso_table(evaluation, level, f"At equal confidence ({level:g}), each on its own images", own, note)
        )
    return found


def _iso_table(
    evaluation: Evaluation, level: float, title: str, found: Mapping[str, Mapping[str, Measurement]], note: str
) -> Table:
    keys = [key for key in (*ISO_CLOSENESS, *ISO_REALISM) if any(key in one for one in found.values())]
    lines = []
    for row in evaluation.rows:
        if row.name in found:
            one = found[row.name]
            reached = _number(row.measurements[iso_key(level, "reached")])
            lines.append([row.name, reached, *(_with_interval(one[key]) if key in one else "" for key in keys)])
    return Table(title=title, heading=["explainer", "reached", *keys], lines=lines, note=note)


def _worst_table(evaluation: Evaluation, groups: list[GroupMean]) -> Table | None:
    """The pair of classes on which each explainer does worst; None where there is but one pair."""
    if len({(group.source, group.target) for group in groups if group.target is not None}) < 2:
        return None
    columns = [m for m in evaluation.measures.metrics if m.title and any(group.key == m.key for group in groups)]
    lines = []
    for row in evaluation.rows:
        worst = [worst_pair(groups, row.name, metric.key) for metric in columns]
        cells = ["" if one is None else f"{_number(one.measured)} {one.source} > {one.target}" for one in worst]
        if any(cells):
            lines.append([row.name, *cells])
    return Table(
        title="Worst pair of classes",
        heading=["explainer", *(metric.title for metric in columns)],
        lines=lines,
        note="All pairs and true classes are in groups.csv.",
    )


def _lines_csv(heading: Sequence[str], lines: Sequence[tuple[list[str], Measurement]]) -> str:
    """One line per measurement; an empty cell is a number that does not exist."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*heading, "value", "low", "high", "n"])
    for names, one in lines:
        writer.writerow([*names, one.value, one.low, one.high, one.n_used if one.status == "ok" else None])
    return buffer.getvalue()


def _has_value(evaluation: Evaluation, metric: Metric) -> bool:
    return any(row.measurements[metric.key].status == "ok" for row in evaluation.rows)


def _legend(columns: Sequence[Metric], evaluation: Evaluation) -> str:
    lines = [
        f"- {metric.title} (`{metric.key}`, {metric.value_range}, {_ARROWS[metric.better]}): {metric.meaning}"
        for metric in columns
    ]
    lines += [f"- note: {note}" for note in (*_blind_curves(evaluation), *_notes(evaluation))]
    return f"{len(evaluation.image_names)} images; images count as [0, 1].\n\n" + "\n".join(lines)


def _notes(evaluation: Evaluation) -> list[str]:
    return [note for row in evaluation.rows for note in row.notes]


def _blind_curves(evaluation: Evaluation) -> list[str]:
    """A word of warning where blurring everything changes no decision."""
    ends = [float(row.curves["del_auc"][-1]) for row in evaluation.rows if "del_auc" in row.curves]
    if not ends or min(ends) < _BLURRED_AWAY:
        return []
    return [
        f"of the whole image blurred the decision keeps a probability of {min(ends):.2f}, so insertion and deletion "
        "tell little here"
    ]


def _markdown(heading: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Aligned, so that it also reads well in a terminal."""
    cells = [[cell.replace("|", "/") for cell in line] for line in (heading, *lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heading))]
    rule = ["-" * width if column == 0 else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    rows = [cells[0], rule, *cells[1:]]
    padded = (
        [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    )
    return "".join(f"| {' | '.join(row)} |\n" for row in padded)


def _number(measurement: Measurement) -> str:
    if measurement.value is None:
        return ""
    value = measurement.value
    # Three decimals for what lives near 1, three significant digits for what is much smaller or larger.
    if value == 0 or 0.01 <= abs(value) < 10:
        return f"{value:.3f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if abs(value) >= 1e-4 else f"{value:.1e}"


def _with_interval(measurement: Measurement) -> str:
    if measurement.value is None:
        return ""
    ends = "" if measurement.low is None else f" [{measurement.low:.3g}, {measurement.high:.3g}]"
    some = "" if measurement.n_used == measurement.n_total else f" (n {measurement.n_used}/{measurement.n_total})"
    return f"{_number(measurement)}{ends}{some}"


def _csv(evaluation: Evaluation) -> str:
    """One line per explainer; an empty cell is a number that does not exist."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    suffixes = ("", "_low", "_high", "_n")
    keys = [metric.key for metric in evaluation.measures.metrics]
    writer.writerow(["explainer", *(key + suffix for key in keys for suffix in suffixes)])
    for row in evaluation.rows:
        cells: list[object] = [row.name]
        for key in keys:
            found = row.measurements[key]
            cells += [found.value, found.low, found.high, found.n_used if found.status == "ok" else None]
        writer.writerow(cells)
    return buffer.getvalue()


def _per_image_csv(evaluation: Evaluation) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    keys = [
        metric.key
        for metric in evaluation.measures.metrics
        if any(metric.key in row.per_image for row in evaluation.rows)
    ]
    writer.writerow(["explainer", "image", "label", *keys])
    labels = [evaluation.class_names[index] for index in evaluation.labels.tolist()]
    for row in evaluation.rows:
        if not row.per_image:
            continue
        columns = [row.per_image[key].tolist() if key in row.per_image else None for key in keys]
        for index, (image, label) in enumerate(zip(evaluation.image_names, labels, strict=True)):
            writer.writerow([row.name, image, label, *(_cell(column, index) for column in columns)])
    return buffer.getvalue()


def _cell(column: list[float] | list[bool] | None, index: int) -> object:
    if column is None:
        return None
    value = column[index]
    if isinstance(value, bool):
        return int(value)
    return None if math.isnan(value) else f"{value:.6g}"
