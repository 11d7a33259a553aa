"""The atlas of directions as the page shows it: texts, places and plots from ``atlas.json``; needs no torch."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cfe_lightning.explaining.names import ATLAS
from cfe_lightning.explaining.values import finite, percent, read_described, signed, text

#: Longest side of a picture as shown, in pixels of the page.
_CELL = 64
#: Images of up to this side are shown pixel by pixel.
_PIXELATED = 64
#: Ends of the plots' axes, in the units of their drawing (report.html.j2).
_LEFT, _TOP, _RIGHT, _BOTTOM = 38.0, 14.0, 292.0, 100.0


def read_atlas(path: Path) -> dict[str, Any] | None:
    """Returns what the template shows of an atlas that ``write_atlas`` wrote; None where there is no such file.

    Every direction has the ``address`` of its picture.

    Args:
        path: The file ``atlas.json``.

    Raises:
        ValueError: If the file is no atlas.
    """
    return read_described(path, ATLAS.schema, "atlas of directions", _atlas)


def _atlas(atlas: dict[str, Any]) -> dict[str, Any]:
    pairs = [_pair(pair, f"atlas-{index}") for index, pair in enumerate(atlas["pairs"])]
    num_rows = max((len(direction["rows"]) for pair in pairs for direction in pair["directions"]), default=0)
    return {"title": text(atlas["title"]), "note": text(atlas["note"]), "num_rows": num_rows, "pairs": pairs}


def _pair(pair: dict[str, Any], identifier: str) -> dict[str, Any]:
    target, given, kept = text(pair["target"]), pair["directions"], finite(pair["num_kept"])
    directions = [_direction(direction, target, f"{identifier}-{rank}") for rank, direction in enumerate(given)]
    return {
        "id": identifier,
        "source": text(pair["source"]),
        "target": target,
        "images": f"{finite(pair['num_images']):,.0f}",
        "kept": f"{kept:,.0f}",
        "covered": percent(finite(pair["covered"])) if kept and directions else "–",
        "directions": directions,
        "curve": _curve(pair["curve"], [abs(finite(direction["step"])) for direction in given]),
        "ranks": _ranks([finite(direction["newly"]) for direction in given]),
    }


def _direction(direction: dict[str, Any], target: str, identifier: str) -> dict[str, Any]:
    # Check.
    file, (width, height), enlarged = direction["file"], map(int, direction["cell"]), int(direction["enlarged"])
    strengths = [finite(value) for value in direction["strengths"]]
    probabilities = [[finite(p) for p in row] for row in direction["probabilities"]]
    ATLAS.checked(file)
    if not probabilities or any(len(row) != len(strengths) for row in probabilities):
        raise ValueError(f"{file} has {len(strengths)} strengths but other numbers of probabilities")
    if min(width, height, enlarged) < 1 or width % enlarged or height % enlarged:
        raise ValueError(f"{file} has cells of {width} x {height} pixels, enlarged {enlarged} times")

    # Texts and places.
    longest, step = max(width, height), finite(direction["step"])
    pixelated = longest // enlarged <= _PIXELATED
    # The longest side on the page: a whole multiple of the image's where that comes near enough.
    whole = longest // enlarged * (_CELL // (longest // enlarged))
    shown = whole if whole >= 0.75 * _CELL else _CELL
    # A smoothly scaled cell would show its neighbours' edges.
    trim = 0.0 if pixelated else 0.01
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
        "rows": [
            [
                _cell(_box(column, row, width, height, trim), strengths[column], probability, target)
                for column, probability in enumerate(shares)
            ]
            for row, shares in enumerate(probabilities)
        ],
        "numbers": _numbers(direction),
    }


def _box(column: int, row: int, width: int, height: int, trim: float) -> str:
    """Returns the place of a cell in the table of pictures as a viewBox."""
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
    """Returns the line of numbers of one direction."""
    flipped, newly = (percent(finite(direction[key])) for key in ("flipped", "newly"))
    mean_change = f"{finite(direction['mean_change']):+.2f}".replace("-", "−")
    step, length = f"{signed(finite(direction['step']))} SD", f"length {finite(direction['degree']):.3g}"
    texts = [
        ("Step", step, length, "how far the images were moved to measure what follows"),
        ("Mean logit change", mean_change, "", "of the target's margin"),
        ("Flips alone", flipped, "", "share of the images that it turns into the target"),
        ("Adds", newly, "", "share that it flips and no direction before it does"),
        ("Pixel change", f"{finite(direction['change']):.3g}", "", "mean absolute change of a pixel, range 0 to 1"),
    ]
    if direction["inside"] is not None:
        inside = percent(finite(direction["inside"]))
        texts.append(("In known cause", inside, "", "share of the change within the pixels that are the cause"))
    return [dict(zip(("title", "value", "detail", "note"), words, strict=True)) for words in texts]


def _curve(points: Sequence[Sequence[float]], used: Sequence[float]) -> dict[str, Any] | None:
    """Draws the share that is flipped against the step, and marks the usual one of the directions' own steps."""
    steps, shares = ([finite(point[axis]) for point in points] for axis in (0, 1))
    if not steps or max(steps) <= 0:
        return None

    # Line.
    def across(step: float) -> str:
        return f"{_LEFT + (_RIGHT - _LEFT) * step / max(steps):.1f}"

    dots = [
        {"x": across(step), "y": f"{_up(share):.1f}", "label": f"{step:g} SD: {percent(share)}"}
        for step, share in zip(steps, shares, strict=True)
    ]

    # Axis, with at most eight intervals.
    spacing = next((unit for unit in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if max(steps) / unit <= 8), max(steps))
    ticks = [spacing * index for index in range(int(max(steps) / spacing + 1e-6) + 1)]
    usual = statistics.median_low(used) if used else math.inf
    return {
        "line": " ".join(f"{dot['x']},{dot['y']}" for dot in dots),
        "dots": dots,
        "ticks": [{"x": across(tick), "text": f"{tick:g}"} for tick in ticks],
        "step": across(usual) if usual <= max(steps) * 1.001 else None,
    }


def _ranks(newly: Sequence[float]) -> list[dict[str, str]]:
    """Draws bars of the share that the first directions flip together: the earlier ones' part, and the added part."""
    # Widths.
    slot = (_RIGHT - _LEFT) / max(len(newly), 1)
    width = min(slot * 0.64, 26)

    # Bars.
    bars, before = [], 0.0
    for rank, share in enumerate(newly):
        middle, together = _LEFT + slot * (rank + 0.5), before + share
        bar = {"x": middle - width / 2, "middle": middle, "width": width, "top": _up(together)}
        bar |= {"added": _up(before) - _up(together), "between": _up(before), "below": _BOTTOM - _up(before)}
        label = f"rank {rank + 1}: {percent(together)} together, {percent(share)} of them added"
        texts = {"text": percent(together, 0) if len(newly) <= 8 else "", "label": label}
        bars.append({name: f"{place:.1f}" for name, place in bar.items()} | texts)
        before = together
    return bars


def _up(share: float) -> float:
    return _BOTTOM - (_BOTTOM - _TOP) * min(max(share, 0.0), 1.0)
