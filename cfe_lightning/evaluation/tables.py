"""An evaluation as files: tables with their legends, differences, groups, JSON, curves and one line per image."""

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cfe_lightning.evaluation import comparison
from cfe_lightning.evaluation.comparison import Difference, GroupMean
from cfe_lightning.evaluation.evaluate import Evaluation
from cfe_lightning.files.atomic import atomic_path, atomic_write, write_json
from cfe_lightning.metrics.equal_strength import ISO_CLOSENESS, ISO_REALISM, iso_key
from cfe_lightning.metrics.metric import Metric
from cfe_lightning.metrics.statistics import Measurement

#: Smallest probability of the decision on a wholly blurred image from which deletion cannot tell maps apart.
_BLURRED_AWAY = 0.8
_ARROWS = {"higher": "higher is better", "lower": "lower is better", "neither": "for context"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table before it becomes Markdown or HTML.

    Attributes:
        title: Title above the table; empty for none.
        heading: Names of the columns.
        lines: Cells as text, one list per line.
        note: Text below the table, as paragraphs or a Markdown list.
    """

    title: str
    heading: list[str]
    lines: list[list[str]]
    note: str

    def markdown(self) -> str:
        """Returns title, table and note as Markdown, aligned so that it also reads well in a terminal."""
        # Widths.
        cells = [[cell.replace("|", "/") for cell in line] for line in (self.heading, *self.lines)]
        widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]

        # Text to the left, numbers to the right.
        rule = ["-" * width if column == 0 else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
        rows = ""
        for line in (cells[0], rule, *cells[1:]):
            first, *rest = zip(line, widths, strict=True)
            rows += f"| {' | '.join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)])} |\n"
        title = f"## {self.title}\n\n" if self.title else ""
        return f"{title}{rows}\n{self.note}\n"


def short_table(evaluation: Evaluation) -> Table:
    """Returns the headline numbers, one row per explainer, with the meaning of every column in the note."""
    columns = [metric for metric in evaluation.metrics if metric.title and _has_value(evaluation, metric)]
    heading = ["explainer", *(metric.title for metric in columns)]
    lines = [[row.name, *(_number(row.measurements[metric.key]) for metric in columns)] for row in evaluation.rows]
    return Table(title="", heading=heading, lines=lines, note=_legend(columns, evaluation))


def full_table(evaluation: Evaluation) -> Table:
    """Returns every number with interval and n, one row per metric, and the reasons for missing numbers."""
    # Numbers.
    rows = evaluation.rows
    lines = [
        [metric.key, metric.better, metric.value_range, *(_with_interval(row.measurements[metric.key]) for row in rows)]
        for metric in evaluation.metrics
        if _has_value(evaluation, metric)
    ]

    # Meanings and reasons, each once.
    note = "\n".join(f"- `{metric.key}`: {metric.meaning}" for metric in evaluation.metrics)
    reasons = {f"- {row.name}: {m.reason}": None for row in rows for m in row.measurements.values() if m.status != "ok"}
    if reasons:
        note += "\n\nNot computed:\n\n" + "\n".join(reasons)
    heading = ["metric", "better", "range", *(row.name for row in rows)]
    return Table(title="All metrics", heading=heading, lines=lines, note=note)


def save(evaluation: Evaluation, folder: Path, settings: Mapping[str, Any]) -> list[Table]:
    """Writes all results to a folder, in place of an earlier evaluation's.

    ``metrics.json`` also keeps ``settings``, plain data that say how the results were measured.

    Returns:
        The tables of ``table.md``, the short one first and the full one last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    differences, groups = comparison.paired_differences(evaluation), comparison.group_means(evaluation)

    # Numbers.
    write_json(folder / "metrics.json", _content(evaluation, settings))
    write_csv(folder / "table.csv", _explainer_lines(evaluation))
    write_csv(folder / "per_image.csv", _image_lines(evaluation))
    numbers = ["value", "low", "high", "n"]
    pairs = ([one.first, one.second, one.key, *_cells(one.measured)] for one in differences)
    write_csv(folder / "differences.csv", [["first", "second", "metric", *numbers], *pairs])
    means = ([one.explainer, one.source, one.target, one.key, *_cells(one.measured)] for one in groups)
    write_csv(folder / "groups.csv", [["explainer", "class", "target", "metric", *numbers], *means])

    # Text.
    shown = [short_table(evaluation), *tables(evaluation, differences, groups), full_table(evaluation)]
    with atomic_write(folder / "table.md") as file:
        file.write("# Evaluation\n\n" + "\n".join(table.markdown() for table in shown))

    # Curves.
    curves = {f"{row.name}/{name}": curve.numpy() for row in evaluation.rows for name, curve in row.curves.items()}
    with atomic_path(folder / "curves.npz") as temporary, temporary.open("wb") as archive:
        np.savez(archive, allow_pickle=False, **curves)
    return shown


def write_csv(path: Path, lines: Iterable[Sequence[object]]) -> None:
    """Writes a table atomically, its heading first; None becomes an empty cell: a number that does not exist."""
    with atomic_write(path) as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


def tables(evaluation: Evaluation, differences: Sequence[Difference], groups: list[GroupMean]) -> list[Table]:
    """Returns the comparisons: at equal confidence, of maps, in pairs, and on the worst pair of classes."""
    iso = [table for level in evaluation.measures.iso for table in _iso_tables(evaluation, level)]
    others = _agreement_table(evaluation), _difference_table(evaluation, differences), _worst_table(evaluation, groups)
    return [*iso, *(table for table in others if table is not None)]


def _agreement_table(evaluation: Evaluation) -> Table | None:
    """Tabulates whether explainers point at the same places; None with fewer than two explainers."""
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
    """Tabulates the short table's metrics of the first explainer minus every other one; None for a single row."""
    # The first explainer's differences.
    first = evaluation.rows[0].name
    found = {(one.second, one.key): one.measured for one in differences if one.first == first}
    columns = [m for m in evaluation.metrics if m.title and any(key == m.key for _, key in found)]

    # One line per other explainer.
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
    """Tabulates the smallest edits at equal confidence: on the images that all can change so far, and on each's own."""
    # Measurements.
    count, common = comparison.at_equal_strength(evaluation, level)
    own = {}
    for row in evaluation.rows:
        if row.name in common:
            every = {key: row.measurements[iso_key(level, key)] for key in ISO_CLOSENESS}
            own[row.name] = {key: one for key, one in every.items() if one.status == "ok"}

    # Tables.
    total, title = len(evaluation.image_names), f"At equal confidence ({level:g})"
    found = []
    if count:
        note = (
            f"The smallest edit on each explainer's way with that probability of the target, on the {count} of {total} "
            "images that all of them can change so far."
        )
        found.append(_iso_table(evaluation, level, title, common, note))
    if any(own.values()) and count < total:
        note = (
            f"The same on all images that an explainer itself can change so far (`reached`, of {total}). These differ "
            "between explainers: one that changes only the easy images looks closer."
        )
        found.append(_iso_table(evaluation, level, f"{title}, each on its own images", own, note))
    return found


def _iso_table(
    evaluation: Evaluation, level: float, title: str, found: Mapping[str, Mapping[str, Measurement]], note: str
) -> Table:
    keys = [key for key in (*ISO_CLOSENESS, *ISO_REALISM) if any(key in one for one in found.values())]
    key_reached, rows = iso_key(level, "reached"), {row.name: row.measurements for row in evaluation.rows}
    lines = [
        [name, _number(rows[name][key_reached]), *(_with_interval(one[key]) if key in one else "" for key in keys)]
        for name, one in found.items()
    ]
    return Table(title=title, heading=["explainer", "reached", *keys], lines=lines, note=note)


def _worst_table(evaluation: Evaluation, groups: list[GroupMean]) -> Table | None:
    """Tabulates the pair of classes on which each explainer does worst; None with fewer than two pairs."""
    if len({(group.source, group.target) for group in groups if group.target is not None}) < 2:
        return None
    columns = [m for m in evaluation.metrics if m.title and any(group.key == m.key for group in groups)]
    lines = []
    for row in evaluation.rows:
        worst = [comparison.worst_pair(groups, row.name, metric.key) for metric in columns]
        cells = ["" if one is None else f"{_number(one.measured)} {one.source} > {one.target}" for one in worst]
        if any(cells):
            lines.append([row.name, *cells])
    heading = ["explainer", *(metric.title for metric in columns)]
    note = "All pairs and true classes are in groups.csv."
    return Table(title="Worst pair of classes", heading=heading, lines=lines, note=note)


def _has_value(evaluation: Evaluation, metric: Metric) -> bool:
    return any(row.measurements[metric.key].status == "ok" for row in evaluation.rows)


def _legend(columns: Sequence[Metric], evaluation: Evaluation) -> str:
    """Explains the columns, and warns of what a reader must know."""
    lines = [
        f"- {metric.title} (`{metric.key}`, {metric.value_range}, {_ARROWS[metric.better]}): {metric.meaning}"
        for metric in columns
    ]
    notes = [note for row in evaluation.rows for note in row.notes]
    lines += [f"- note: {note}" for note in (*_blind_curves(evaluation), *notes)]
    return f"{len(evaluation.image_names)} images; images count as [0, 1].\n\n" + "\n".join(lines)


def _blind_curves(evaluation: Evaluation) -> list[str]:
    """Warns if the classifier keeps its decision on wholly blurred images."""
    ends = [float(row.curves["del_auc"][-1]) for row in evaluation.rows if "del_auc" in row.curves]
    if not ends or min(ends) < _BLURRED_AWAY:
        return []
    return [
        f"with the whole image blurred, the decision keeps a probability of {min(ends):.2f}, so insertion and deletion "
        "tell little here"
    ]


def _number(measurement: Measurement) -> str:
    if (value := measurement.value) is None:
        return ""
    # Three decimals near 1, three significant digits for much smaller or larger numbers.
    if value == 0 or 0.01 <= abs(value) < 10:
        return f"{value:.3f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if abs(value) >= 1e-4 else f"{value:.1e}"


def _with_interval(measurement: Measurement) -> str:
    if measurement.value is None:
        return ""
    ends = "" if measurement.low is None else f" [{measurement.low:.3g}, {measurement.high:.3g}]"
    some = "" if measurement.n_used == measurement.n_total else f" (n {measurement.n_used}/{measurement.n_total})"
    return f"{_number(measurement)}{ends}{some}"


def _content(evaluation: Evaluation, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all results as plain data; ``write_json`` refuses a NaN, which would be our mistake."""
    rows = [
        {"name": row.name, "notes": row.notes, "metrics": {key: asdict(one) for key, one in row.measurements.items()}}
        for row in evaluation.rows
    ]

    # Agreement of every two explainers.
    names = evaluation.agreeing
    agreement = {
        name: {other: None if math.isnan(value) else value for other, value in zip(names, values, strict=True)}
        for name, values in zip(names, evaluation.agreement.tolist(), strict=True)
    }
    counts = {"n_images": len(evaluation.image_names), "class_names": list(evaluation.class_names)}
    return {**settings, **counts, "rows": rows, "agreement": agreement}


def _cells(found: Measurement) -> list[object]:
    return [found.value, found.low, found.high, found.n_used if found.status == "ok" else None]


def _explainer_lines(evaluation: Evaluation) -> Iterator[list[object]]:
    """Yields the heading of ``table.csv`` and one line per explainer."""
    keys = [metric.key for metric in evaluation.metrics]
    yield ["explainer", *(key + suffix for key in keys for suffix in ("", "_low", "_high", "_n"))]
    for row in evaluation.rows:
        yield [row.name, *(cell for key in keys for cell in _cells(row.measurements[key]))]


def _image_lines(evaluation: Evaluation) -> Iterator[list[object]]:
    """Yields the heading of ``per_image.csv`` and one line per explainer and image."""
    # Metrics with values.
    rows = [row for row in evaluation.rows if row.per_image]
    keys = [metric.key for metric in evaluation.metrics if any(metric.key in row.per_image for row in rows)]
    yield ["explainer", "image", "label", *keys]

    # Lines.
    labels = [evaluation.class_names[index] for index in evaluation.labels.tolist()]
    for row in rows:
        columns = [row.per_image[key].tolist() if key in row.per_image else None for key in keys]
        for index, (image, label) in enumerate(zip(evaluation.image_names, labels, strict=True)):
            yield [row.name, image, label, *(_cell(column, index) for column in columns)]


def _cell(column: list[float] | list[bool] | None, index: int) -> object:
    """Formats a value of one image; None is undefined."""
    value = math.nan if column is None else column[index]
    if isinstance(value, bool):
        return int(value)
    return None if math.isnan(value) else f"{value:.6g}"
