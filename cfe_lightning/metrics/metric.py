"""A metric as a reader sees it, and the tables in which the modules of this folder declare theirs."""

import re
from dataclasses import dataclass
from typing import Literal, cast

Better = Literal["higher", "lower", "neither"]
#: The images that a metric is about.
Population = Literal["all", "flipped", "correct"]
_NOTHING = "this explainer gives nothing to measure it on"


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One row of the catalogue.

    Attributes:
        key: Name in tables, JSON and logs. Adding a key is allowed, renaming one is a breaking change.
        better: Direction of improvement; ``neither`` for context.
        value_range: Range or unit as text.
        needs: Keys of ``case.NEEDS``; the first unmet one gives the reason why the metric is skipped.
        meaning: Explanation in one line under the table.
        title: Heading in the short table; empty if only the full table shows the metric.
        published: Population of the published protocol (DiME, ACE), which ``--protocol ace`` takes; ours is ``all``.
        absent: Reason why the metric is skipped if all needs are met and still no image has a value.
    """

    key: str
    better: Better
    value_range: str
    needs: tuple[str, ...]
    meaning: str
    title: str = ""
    published: Population = "all"
    absent: str = _NOTHING


def rows(table: str) -> tuple[Metric, ...]:
    """Reads metrics from a text table.

    Two blanks or more separate cells, a dash is an empty cell, and an indented line continues the one above. Above the
    heading, ``needs:`` may name needs that come first for all metrics, and ``absent:`` their ``Metric.absent``.

    Args:
        table: One line per metric below a heading of ``key``, ``better``, ``range`` and last ``meaning``; optional are
            ``title``, ``needs`` (in order, one blank between two) and ``published``.
    """
    # Settings of the table.
    lines = re.sub(r"\n +", "  ", table.strip()).splitlines()
    common: dict[str, str] = {}
    while (setting := re.fullmatch(r"(needs|absent): (.*)", lines[0])) is not None:
        common[setting[1]] = setting[2]
        del lines[0]

    # One metric per line.
    names, found = lines[0].split(), []
    for line in lines[1:]:
        cells = zip(names, re.split(r"\s{2,}", line, maxsplit=len(names) - 1), strict=True)
        cell = {name: text for name, text in cells if text != "-"}
        metric = Metric(
            key=cell["key"],
            better=cast(Better, cell["better"]),
            value_range=cell["range"],
            needs=(*common.get("needs", "").split(), *cell.get("needs", "").split()),
            meaning=re.sub(" +", " ", cell["meaning"]),
            title=cell.get("title", ""),
            published=cast(Population, cell.get("published", "all")),
            absent=common.get("absent", _NOTHING),
        )
        found.append(metric)
    return tuple(found)
