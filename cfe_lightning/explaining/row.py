"""One row of the manifest, declared once: the order, the kind, the value and the column of everything a row holds.

A new column is one line in ``Row``, and one line in ``report/assets/report.js`` if the page shows it. Needs no torch.
"""

# ruff: noqa: RUF009  (the calls declare fields)

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any

from cfe_lightning.explaining.names import PICTURES
from cfe_lightning.explaining.values import plain

if TYPE_CHECKING:
    from cfe_lightning.explaining.findings import Findings

Curve = dict[str, Any]


def detail(value: Callable[[Findings], Any] | None = None, *, null: bool = True, column: bool = False) -> Any:
    """Declares a value that manifest.jsonl holds.

    Args:
        value: Takes the value from the findings about the image; None where ``Row.of`` is given the value.
        null: Writes null where there is no value; False leaves the key out.
        column: Makes the value a column of manifest.csv, too.
    """
    return field(default=None, metadata={"value": value, "null": null, "column": column})


column = partial(detail, column=True)


def _at(values: Any, index: Any) -> Any:
    return None if values is None else values[index]


@dataclass(init=False)
class Row:
    """The row of one image; ``vars(row)`` is the line of manifest.jsonl as it stands.

    The type of a field is the kind of value that a line may hold. Fields that a line lacks read as None: failed images
    have ``name``, ``source``, ``status`` and ``error`` only, and earlier versions measured less.

    Args:
        line: The row as plain data.
    """

    name: str = column()
    source: list[int] = detail()
    status: str = column()
    error: str = column(null=False)
    # Decisions: for the image (before), the counterfactual as computed (after) and as saved in 8 bits (saved).
    predicted: str = column(lambda found: found.class_names[int(found.predicted)])
    p_predicted_before: float = column(lambda found: found.before[found.predicted])
    p_predicted_after: float | None = column(lambda found: _at(found.after, found.predicted))
    target: str = column(lambda found: found.class_names[int(found.target)])
    p_target_before: float = column(lambda found: found.before[found.target])
    p_target_after: float | None = column(lambda found: _at(found.after, found.target))
    p_predicted_saved: float | None = column(lambda found: _at(found.saved, found.predicted))
    p_target_saved: float | None = column(lambda found: _at(found.saved, found.target))
    flipped: bool | None = column(lambda found: None if found.is_target else found.flipped)
    flipped_saved: bool | None = column(lambda found: None if found.is_target else found.flipped_saved)
    # Sizes, steps and caveats.
    l1: float | None = column(lambda found: found.distance)
    note: str | None = column(lambda found: found.note)
    difference_scale: float | None = detail(lambda found: found.scale)
    motion_scale: float | None = detail(lambda found: found.motion)
    curve: Curve | None = detail(lambda found: found.curve, null=False)
    # Measurements on the saved pixels.
    changed_area: float | None = column(lambda found: found.change.area)
    where: str | None = column(lambda found: found.change.place[0])
    where_share: float | None = column(lambda found: found.change.place[1])
    survives: list[str] | None = column(lambda found: found.change.survives)
    lost_under: list[str] | None = column(lambda found: found.change.lost_under)
    attribution_where: str | None = column(lambda found: found.change.attribution[0])
    attribution_share: float | None = column(lambda found: found.change.attribution[1])
    # Time and files; gains and scores by name.
    seconds: float = column()
    folder: str = detail()
    files: dict[str, str] = detail()
    digests: dict[str, str] = detail()
    gains: dict[str, float] = detail(lambda found: found.gains)
    scores: dict[str, float] = detail(lambda found: found.scores)

    def __init__(self, line: Mapping[str, Any]) -> None:
        vars(self).update(line)

    @classmethod
    def of(cls, found: Findings, **given: Any) -> Row:
        """Makes the row of an explained image.

        Args:
            found: Findings about the image.
            given: Values of the fields that are declared without one.
        """
        takes = {one.name: one.metadata["value"] for one in fields(cls)}
        line = {name: plain(take(found) if take else given.get(name)) for name, take in takes.items()}
        return cls({name: value for name, value in line.items() if value is not None or name in _NULLABLE})


_NULLABLE = {one.name for one in fields(Row) if one.metadata["null"]}
_LAST = ("sentence", "seconds", "note", "error", *PICTURES)
#: Columns of manifest.csv that every run has; parts, gains and scores follow with prefixes.
COLUMNS = (*(one.name for one in fields(Row) if one.metadata["column"] and one.name not in _LAST), *_LAST)


def is_row(line: Any) -> bool:
    """Tells whether a line is a row: every value that it holds must be of the kind that ``Row`` declares."""
    if not (isinstance(line, dict) and isinstance(line.get("name"), str)):
        return False
    if line.get("status") == "failed":
        return isinstance(line.get("error"), str)
    fitting = (line.get(name) is None or fits(line[name]) for name, fits in _FITS.items())
    return line.get("status") == "ok" and all(fitting)


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _holds(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(kind, value.values()))


def _is_curve(value: Any) -> bool:
    """Tells whether a value holds one number per step under each of its names; ``scores`` holds such names again."""
    if not (isinstance(value, dict) and isinstance(value.get("strength"), list)):
        return False
    scores = value.get("scores")
    lists = [part for key, part in value.items() if key != "scores"]
    lists += scores.values() if isinstance(scores, dict) else []
    return all(isinstance(part, list) and all(map(_is_number, part)) for part in lists)


_KINDS = {"str": _is(str), "float": _is_number, "bool": _is(bool), "list[int]": _is(list), "list[str]": _is(list)}
_KINDS |= {"dict[str, str]": _holds(_is(str)), "dict[str, float]": _holds(_is_number), "Curve": _is_curve}
_FITS = {one.name: _KINDS[str(one.type).removesuffix(" | None")] for one in fields(Row)}
