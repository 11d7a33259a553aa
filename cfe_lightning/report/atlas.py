"""The atlas of directions as the page shows it: texts, places and plots from ``atlas.json``; needs no torch."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cfe_lightning.explaining.folder import ATLAS_SCHEMA
from cfe_lightning.explaining.values import finite, percent, signed, text
from cfe_lightning.files.text import one_line

#: The only files that an atlas may name: what it says becomes an address in the page.
_FILE = re.compile(r"atlas/\d+-\d+\.png")
#: Longest side of a picture as shown, in pixels of the page.
_CELL = 64
#: Images of up to this side are shown pixel by pixel.
_PIXELATED = 64
#: Where the plots have their axes, in the units of their drawing (report.html.j2): left, top, right, bottom.
_AXES = (38.0, 14.0, 292.0, 100.0)


def read_atlas(path: Path) -> dict[str, Any] | None:
    """What the page shows of an atlas that ``write_atlas`` wrote, for the template.

    Args:
        path: The file ``atlas.json``.

    Returns:
        The atlas, or None where there is no such file. Every direction has the ``address`` of its picture.

    Raises:
        ValueError: If the file is no atlas.
    """
    if not path.is_file():
        return None
    try:
        atlas = json.loads(path.read_text(encoding="utf-8"))
        if atlas["schema"] != ATLAS_SCHEMA:
            raise ValueError(f"its schema is {atlas['schema']!r}, this version reads {ATLAS_SCHEMA}")
        pairs = [_pair(pair, f"atlas-{index}") for index, pair in enumerate(atlas["pairs"])]
        num_rows = max((len(direction["rows"]) for pair in pairs for direction in pair["directions"]), default=0)
        return {"title": text(atlas["title"]), "note": text(atlas["note"]), "num_rows": num_rows, "pairs": pairs}
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else one_line(error)
        raise ValueError(
            f"{path} is no atlas of directions that can be shown ({reason}): remove it, or run explain.py again."
        ) from error


def _pair(pair: dict[str, Any], identifier: str) -> dict[str, Any]:
    """One pair of classes."""
    target = text(pair["target"])
    directions = [
        _direction(direction, target, f"{identifier}-{rank}") for rank, direction in enumerate(pair["directions"])
    ]
    kept = finite(pair["num_kept"])
    return {
        "id": identifier,
        "source": text(pair["source"]),
        "target": target,
        "images": f"{finite(pair['num_images']):,.0f}",
        "kept": f"{kept:,.0f}",
        "covered": percent(finite(pair["covered"])) if kept and directions else "–",
        "directions": directions,
        "curve": _curve(pair["curve"], [abs(finite(direction["step"])) for direction in pair["directions"]]),
        "ranks": _ranks([finite(direction["newly"]) for direction in pair["directions"]]),
    }


def _direction(direction: dict[str, Any], target: str, identifier: str) -> dict[str, Any]:
    """One direction."""
    file, (width, height), enlarged = direction["file"], map(int, direction["cell"]), int(direction["enlarged"])
    strengths = [finite(value) for value in direction["strengths"]]
    probabilities = [[finite(p) for p in row] for row in direction["probabilities"]]
    if not _FILE.fullmatch(file):
        raise ValueError(f"it names the picture {file!r}")
    if not probabilities or any(len(row) != len(strengths) for row in probabilities):
        raise ValueError(f"{file} has {len(strengths)} strengths but other numbers of probabilities")
    if min(width, height, enlarged) < 1 or width % enlarged or height % enlarged:
        raise ValueError(f"{file} has cells of {width} x {height} pixels, enlarged {enlarged} times")
    longest, step = max(width, height), finite(direction["step"])
    pixelated = longest // enlarged <= _PIXELATED
    trim = 0.0 if pixelated else 0.01  # a smoothly scaled cell would show its neighbours' edges
    shown = _shown(longest // enlarged)
    cells = [
        [
            _cell(_box(column, row, width, height, trim), strengths[column], probability, target)
            for column, probability in enumerate(row_probabilities)
        ]
        for row, row_probabilities in enumerate(probabilities)
    ]
    return {
        "id": identifier,
        "name": text(direction["name"]),
        "file": file,
        "address": file,
        "table": (len(strengths), len(probabilities)),
        "enlarged": enlarged,
        "size": (width * len(strengths), height * len(probabilities)),
        "shown": (round(shown * width / longest), round(shown * height / longest)),
        "pixelated": pixelated,
        "forwards": step > 0,
        "heads": [_head(value, step) for value in strengths],
        "rows": cells,
        "numbers": _numbers(direction),
    }


def _shown(longest: int) -> int:
    """How long a picture's longest side is on the page: by a whole factor where that comes near enough."""
    whole = longest * (_CELL // longest)
    return whole if whole >= 0.75 * _CELL else _CELL


def _box(column: int, row: int, width: int, height: int, trim: float) -> str:
    """Where a picture is in the table of pictures, as a viewBox."""
    left, top, share = (column + trim) * width, (row + trim) * height, 1 - 2 * trim
    return f"{left:g} {top:g} {share * width:g} {share * height:g}"


def _cell(box: str, strength: float, probability: float, target: str) -> dict[str, Any]:
    return {
        "box": box,
        "value": f"{100 * probability:.1f}",
        "text": percent(probability, 0),
        "likely": probability >= 0.5,
        "label": f"{signed(strength)} standard deviations: {target} {percent(probability)}",
    }


def _head(strength: float, step: float) -> dict[str, Any]:
    kind = "zero" if strength == 0 else "towards" if strength * step > 0 else "away"
    return {"text": signed(strength), "kind": kind, "is_step": math.isclose(strength, step, rel_tol=1e-3)}


def _numbers(direction: dict[str, Any]) -> list[dict[str, str]]:
    """The line of numbers of one direction."""
    step, degree = finite(direction["step"]), finite(direction["degree"])
    texts = [
        (
            "Step",
            f"{signed(step)} SD",
            f"length {degree:.3g}",
            "how far the images were moved to measure what follows",
        ),
        (
            "Mean logit change",
            f"{finite(direction['mean_change']):+.2f}".replace("-", "−"),
            "",
            "of the target's margin",
        ),
        (
            "Flips alone",
            percent(finite(direction["flipped"])),
            "",
            "share of the images that it turns into the target",
        ),
        ("Adds", percent(finite(direction["newly"])), "", "share that it flips and no direction before it does"),
        ("Pixel change", f"{finite(direction['change']):.3g}", "", "mean absolute change of a pixel, range 0 to 1"),
    ]
    if direction["inside"] is not None:
        inside = percent(finite(direction["inside"]))
        texts.append(("In known cause", inside, "", "share of the change within the pixels that are the cause"))
    return [dict(zip(("title", "value", "detail", "note"), words, strict=True)) for words in texts]


def _curve(points: Sequence[Sequence[float]], used: Sequence[float]) -> dict[str, Any] | None:
    """The line of the share that is flipped against the step, and where on it the directions' own steps are."""
    steps = [finite(point[0]) for point in points]
    shares = [finite(point[1]) for point in points]
    if not steps or max(steps) <= 0:
        return None
    left, _, right, _ = _AXES
    spacing = next((unit for unit in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if max(steps) / unit <= 8), max(steps))
    across = [left + (right - left) * step / max(steps) for step in steps]
    dots = [
        {"x": f"{x:.1f}", "y": f"{_up(share):.1f}", "label": f"{step:g} SD: {percent(share)}"}
        for x, step, share in zip(across, steps, shares, strict=True)
    ]
    ticks = [spacing * index for index in range(int(max(steps) / spacing + 1e-6) + 1)]
    usual = statistics.median_low(used) if used else math.inf
    place = f"{left + (right - left) * usual / max(steps):.1f}" if usual <= max(steps) * 1.001 else None
    return {
        "line": " ".join(f"{dot['x']},{dot['y']}" for dot in dots),
        "dots": dots,
        "ticks": [{"x": f"{left + (right - left) * tick / max(steps):.1f}", "text": f"{tick:g}"} for tick in ticks],
        "step": place,
    }


def _ranks(newly: Sequence[float]) -> list[dict[str, str]]:
    """Bars of the share that the first directions flip together: what the ones before did, and what this one adds."""
    left, _, right, bottom = _AXES
    slot = (right - left) / max(len(newly), 1)
    bars, before = [], 0.0
    for rank, share in enumerate(newly):
        together = before + share
        bars.append(
            {
                "x": f"{left + slot * (rank + 0.5) - min(slot * 0.64, 26) / 2:.1f}",
                "middle": f"{left + slot * (rank + 0.5):.1f}",
                "width": f"{min(slot * 0.64, 26):.1f}",
                "top": f"{_up(together):.1f}",
                "added": f"{_up(before) - _up(together):.1f}",
                "between": f"{_up(before):.1f}",
                "below": f"{bottom - _up(before):.1f}",
                "text": percent(together, 0) if len(newly) <= 8 else "",
                "label": f"rank {rank + 1}: {percent(together)} together, {percent(share)} of them added",
            }
        )
        before = together
    return bars


def _up(share: float) -> float:
    _, top, _, bottom = _AXES
    return bottom - (bottom - top) * min(max(share, 0.0), 1.0)
