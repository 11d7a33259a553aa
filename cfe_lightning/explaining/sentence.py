"""One sentence that says what was measured of an explanation, made from its row of the manifest; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cfe_lightning.explaining.values import short_percent

#: How the mild transformations of ``metrics.robustness`` are called in a sentence.
_TREATMENTS = {"jpeg90": "JPEG", "blur1": "blur", "down_up": "shrinking"}
#: Rows hold no more.
_MOST_DIGITS = 6
#: Regions that do not stand after "in the".
_PLACES = {"top": "at the top", "bottom": "at the bottom", "left": "on the left", "right": "on the right"}


def measured_sentence(row: Mapping[str, Any]) -> str | None:
    """What an explanation changed of the saved pixels, where, and what that did to the decision.

    Everything is taken from the row (see ``saved_change.measure``), nothing is judged here. Class names appear as they
    are: whoever shows the sentence escapes it.

    Args:
        row: A row of the manifest. ``p_target_before`` is of the image as explained, ``p_target_saved`` of the
            counterfactual as saved.

    Returns:
        The sentence with its full stop. None for failed rows, for rows of earlier versions, which lack what was
        measured, and for attributions of which nothing was measured.
    """
    if row.get("status") != "ok":
        return None
    if row.get("p_target_saved") is None:
        return _about_attribution(row)
    if row.get("changed_area") is None:
        return None
    target = f"'{row['target']}'"
    before, after = _probabilities(row)
    if row["predicted"] == row["target"]:
        return f"Taken for {target} already ({before}): nothing to flip."
    if row.get("where") is None:
        if row.get("flipped_saved"):
            return (
                f"Nothing changed in the saved picture; rounding it to 8 bits moved {target} from {before} to {after}."
            )
        return f"Nothing changed in the saved picture: {target} stays at {after}, {_failure(row)}."
    return f"{_change(row)} {_outcome(row, target, before, after)}."


def _about_attribution(row: Mapping[str, Any]) -> str | None:
    """Where an attribution lies: all that a method without counterfactuals says."""
    where, share = row.get("attribution_where"), row.get("attribution_share")
    if where is None:
        return None
    return (
        f"The attribution is {where}."
        if share is None
        else f"{short_percent(share)} of the attribution lies {place(where)}."
    )


def _change(row: Mapping[str, Any]) -> str:
    """How much changed, and where."""
    share, where = row.get("where_share"), row["where"]
    area = f"Changing {short_percent(row['changed_area'])} of the pixels"
    if row["changed_area"] == 0:
        area = "Changing no pixel by more than 8 of 255 grey levels"
    held = where if share is None else f"{short_percent(share)} of the change {place(where)}"
    return f"{area}, {held},"


def _outcome(row: Mapping[str, Any], target: str, before: str, after: str) -> str:
    """What that did to the target's probability and to the decision."""
    if row.get("flipped_saved"):
        return f"moved {target} from {before} to {after}{_robustness(row)}"
    if before == after:
        return f"left {target} at {before}: {_failure(row)}"
    if row["p_target_saved"] < row["p_target_before"]:
        return f"moved {target} the wrong way, from {before} to {after}: {_failure(row)}"
    return f"moved {target} only from {before} to {after}: {_failure(row)}"


def _failure(row: Mapping[str, Any]) -> str:
    return "the flip is lost when saved" if row.get("flipped") else "not flipped"


def _robustness(row: Mapping[str, Any]) -> str:
    """Under what the flip survives and under what not; what cannot be said is left out."""
    kept, lost = (_listed(row.get(key) or (), word) for key, word in (("survives", "and"), ("lost_under", "or")))
    said = [f"survives {kept}"] if kept else []
    said += [f"does not survive {lost}"] if lost else []
    return "".join(f"; {clause}" for clause in said)


def _listed(names: Sequence[str], word: str) -> str:
    called = [_TREATMENTS.get(name, name) for name in names]
    return f" {word} ".join(filter(None, [", ".join(called[:-1]), *called[-1:]]))


def place(where: str) -> str:
    """A region of ``saved_change.REGIONS`` with its preposition."""
    return _PLACES.get(where, f"in the {where}")


def _probabilities(row: Mapping[str, Any]) -> tuple[str, str]:
    """The target's probability before and after, with two digits; of a flip with as many as tell the two apart."""
    for digits in range(2, _MOST_DIGITS + 1):
        before, after = (_probability(row[key], digits) for key in ("p_target_before", "p_target_saved"))
        if before != after:
            return before, after
        if not row.get("flipped_saved"):
            break
    return _probability(row["p_target_before"]), _probability(row["p_target_saved"])


def _probability(p: float, digits: int = 2) -> str:
    """Neither 0 nor 1 unless it is."""
    smallest = 10.0**-digits
    if 0 < p < smallest / 2:
        return f"<{smallest:.{digits}f}"
    return f">{1 - smallest:.{digits}f}" if 1 - smallest / 2 <= p < 1 else f"{p:.{digits}f}"
