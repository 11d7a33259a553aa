"""The global view of a folder as the page shows it: texts and places from ``global.json``; needs no torch."""

import math
from pathlib import Path
from typing import Any

from cfe_lightning.explaining.names import MAX_PICTURED, OVERVIEW
from cfe_lightning.explaining.sentence import place
from cfe_lightning.explaining.values import finite, read_described, short_percent, text


def read_overview(path: Path) -> dict[str, Any] | None:
    """Returns what the template shows of a global view that ``write_overview`` wrote; None where there is no such file.

    Names of examples are as in the manifest.

    Args:
        path: The file ``global.json``.

    Raises:
        ValueError: If the file is no global view.
    """
    return read_described(path, OVERVIEW.schema, "global view", _view)


def _view(view: dict[str, Any]) -> dict[str, Any]:
    ratio = finite(view["frame_ratio"])
    pairs = [_pair(pair, ratio) for pair in view["pairs"]]
    return {
        "ratio": f"{ratio:g}",
        "images": f"{sum(finite(pair['num_flipped']) for pair in view['pairs']):,.0f}",
        "num_pairs": len(pairs),
        "more_alarms": max(0, sum(pair["alarm"] for pair in pairs) - MAX_PICTURED),
        "pairs": [pair for pair in pairs if pair["pictures"]][:MAX_PICTURED],
        # Pairs without a card, too: an alarm is not to be missed.
        "alarms": [pair for pair in pairs if pair["alarm"]][:MAX_PICTURED],
    }


def _pair(pair: dict[str, Any], ratio: float) -> dict[str, Any]:
    # Numbers; the frame has none where nothing was measured.
    used, flipped, framed = (finite(pair[key]) for key in ("num_used", "num_flipped", "num_framed"))
    share, area = (None if pair[key] is None else finite(pair[key]) for key in ("frame_share", "frame_area"))
    numbers, alarm = [_place(pair)], ""
    if share is not None and area is not None:
        numbers.append(_border(share, area))
        alarm = _alarm(share, area, f"{framed:,.0f} of {used:,.0f}", ratio)

    # Texts.
    typical = [(str(one["name"]), text(one["name"]), f"{finite(one['similarity']):.2f}") for one in pair["typical"]]
    return {
        "predicted": text(pair["predicted"]),
        "target": text(pair["target"]),
        "flipped": f"{flipped:,.0f}",
        "counted": _counted(used, flipped, finite(pair["num_left_out"])),
        "pictures": [_picture(kind, pair["pictures"][kind]) for kind in ("change", "strength") if pair["pictures"]],
        "numbers": [number for number in numbers if number],
        "typical": [dict(zip(("name", "shown", "similarity"), one, strict=True)) for one in typical],
        "alarm": bool(pair["alarm"]) and share is not None,
        "alarm_text": alarm,
    }


def _alarm(share: float, area: float, framed: str, ratio: float) -> str:
    return (
        f"{short_percent(share)} of the change lies near the border ({short_percent(area)} of the area; in {framed} "
        f"images more than {ratio:g} times as strong as inside), where usually nothing of the subject is: look for "
        "marks, frames or text."
    )


def _counted(used: float, flipped: float, left_out: float) -> str:
    """Says over how many images the means are."""
    unread = f", {left_out:,.0f} could not be read" if left_out else ""
    if used + left_out < flipped:
        return f"means over {used:,.0f} of {flipped:,.0f} flipped images, drawn evenly{unread}"
    return f"{flipped:,.0f} flipped {'image' if flipped == 1 else 'images'}{unread}"


def _picture(kind: str, picture: dict[str, Any]) -> dict[str, str]:
    file, scale = picture["file"], finite(picture["scale"])
    title = {"change": "Mean change", "strength": "Mean strength"}[kind]
    detail = f"±{scale:.3g}" if kind == "change" else f"white is {scale:.3g}"
    return {"title": title, "detail": detail, "file": file, "address": OVERVIEW.checked(file)}


def _place(pair: dict[str, Any]) -> dict[str, str] | None:
    where, share = pair["where"], pair["where_share"]
    if where is None:
        return None
    value = text(where) if share is None else f"{short_percent(finite(share))} {place(text(where))}"
    note = "the ninth of the picture, or of the slices of a montage, that holds most of the change"
    return {"title": "Where", "value": value, "detail": "", "note": note}


def _border(share: float, area: float) -> dict[str, str]:
    inside = (1 - share) / (1 - area)
    ratio = share / area / inside if inside > 0 else math.inf
    times = "no change inside" if inside <= 0 else f"{_times(ratio)}× as strong as inside"
    detail = f"of the change, on {short_percent(area)} of the area: {times}"
    note = "within an eighth of the edge"
    return {"title": "Near the border", "value": short_percent(share), "detail": detail, "note": note}


def _times(ratio: float) -> str:
    """Formats two significant digits, and never a power of ten."""
    if 0 < ratio < 0.01:
        return "<0.01"
    return f"{ratio:.2g}" if ratio < 9.95 else f"{ratio:,.0f}"
