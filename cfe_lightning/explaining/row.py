"""Which lines of a manifest are rows: whoever reads an output folder need not check every field again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _holds(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(kind, value.values()))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_curve(value: Any) -> bool:
    """Numbers for each step, by what they say."""
    if not (isinstance(value, dict) and isinstance(value.get("strength"), list)):
        return False
    lists = [part for key, part in value.items() if key != "scores"]
    lists += value["scores"].values() if isinstance(value.get("scores"), dict) else []
    return all(isinstance(part, list) and all(map(_is_number, part)) for part in lists)


#: What a row holds, where it holds it; rows of earlier versions hold less.
_KINDS: dict[tuple[str, ...], Callable[[Any], bool]] = {
    ("folder", "predicted", "target", "note", "where", "attribution_where"): _is_text,
    (
        *("p_predicted_before", "p_predicted_after", "p_predicted_saved", "p_target_before", "p_target_after"),
        *("p_target_saved", "l1", "seconds", "changed_area", "where_share", "attribution_share"),
        *("difference_scale", "motion_scale"),
    ): _is_number,
    ("flipped", "flipped_saved"): lambda value: isinstance(value, bool),
    ("files", "digests"): _holds(_is_text),
    ("gains", "scores"): _holds(_is_number),
    ("curve",): _is_curve,
    ("survives", "lost_under", "source"): lambda value: isinstance(value, list),
}


def is_row(content: Any) -> bool:
    """Whether a line is a row: what others read of it has the kinds that they expect, where it is there."""
    if not (isinstance(content, dict) and isinstance(content.get("name"), str)):
        return False
    if content.get("status") == "failed":
        return isinstance(content.get("error"), str)
    return content.get("status") == "ok" and all(
        content.get(key) is None or fits(content[key]) for keys, fits in _KINDS.items() for key in keys
    )
