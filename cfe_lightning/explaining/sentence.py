"""One sentence about what an explanation changed, made from the numbers of its row; needs no torch."""

from collections.abc import Sequence

from cfe_lightning.explaining.row import Row
from cfe_lightning.explaining.values import short_percent

#: Words for the mild transformations of ``metrics.robustness``.
_TREATMENTS = {"jpeg90": "JPEG", "blur1": "blur", "down_up": "shrinking"}
#: Significant digits of a row's numbers.
_MOST_DIGITS = 6
#: Regions that do not stand after "in the".
_PLACES = {"top": "at the top", "bottom": "at the bottom", "left": "on the left", "right": "on the right"}


def measured_sentence(row: Row) -> str | None:
    """Says how much of the saved pixels an explanation changed, where, and what became of the decision.

    Everything is taken from the row, nothing is judged here. Class names appear unescaped: a page that shows the
    sentence must escape it. The probability before is of the image as explained, the one after of the counterfactual
    as saved.

    Returns None for failed rows, for rows of earlier versions, which lack the measurements, and for attributions
    without measurements.
    """
    if row.status != "ok":
        return None
    if row.p_target_saved is None:
        return _about_attribution(row)
    if row.changed_area is None:
        return None

    # Nothing to flip, or nothing changed.
    target = f"'{row.target}'"
    before, after = _probabilities(row.p_target_before, row.p_target_saved, bool(row.flipped_saved))
    if row.predicted == row.target:
        return f"Taken for {target} already ({before}): nothing to flip."
    if row.where is None:
        if row.flipped_saved:
            moved = f"{target} from {before} to {after}"
            return f"Nothing changed in the saved picture; rounding it to 8 bits moved {moved}."
        return f"Nothing changed in the saved picture: {target} stays at {after}, {_failure(row)}."

    # A change.
    area, share = f"{short_percent(row.changed_area)} of the pixels", row.where_share
    if row.changed_area == 0:
        area = "no pixel by more than 8 of 255 grey levels"
    held = row.where if share is None else f"{short_percent(share)} of the change {place(row.where)}"
    return f"Changing {area}, {held}, {_outcome(row, target, before, after)}."


def _about_attribution(row: Row) -> str | None:
    """Says where an attribution lies, which is all that is known without a counterfactual."""
    where, share = row.attribution_where, row.attribution_share
    if where is None or share is None:
        return where and f"The attribution is {where}."
    return f"{short_percent(share)} of the attribution lies {place(where)}."


def _outcome(row: Row, target: str, before: str, after: str) -> str:
    """Says what became of the target's probability and of the decision."""
    if row.flipped_saved:
        # Transformations that are not known are left out.
        kept, lost = _listed(row.survives or (), "and"), _listed(row.lost_under or (), "or")
        robustness = (f"; survives {kept}" if kept else "") + (f"; does not survive {lost}" if lost else "")
        return f"moved {target} from {before} to {after}{robustness}"
    if before == after:
        return f"left {target} at {before}: {_failure(row)}"
    wrong_way = row.p_target_saved is not None and row.p_target_saved < row.p_target_before
    how = "the wrong way, from" if wrong_way else "only from"
    return f"moved {target} {how} {before} to {after}: {_failure(row)}"


def _failure(row: Row) -> str:
    return "the flip is lost when saved" if row.flipped else "not flipped"


def _listed(names: Sequence[str], word: str) -> str:
    *first, last = [_TREATMENTS.get(name, name) for name in names] or [""]
    return f"{', '.join(first)} {word} {last}" if first else last


def place(where: str) -> str:
    """Puts a preposition before a region of ``saved_change.REGIONS``."""
    return _PLACES.get(where, f"in the {where}")


def _probabilities(p_before: float, p_after: float, flipped: bool) -> tuple[str, str]:
    """Formats the target's probability before and after with two digits, those of a flip until they differ."""
    # Probabilities that agree in all digits of a row are shown with two.
    for digits in (*range(2, _MOST_DIGITS + 1), 2) if flipped else (2,):
        before, after = _probability(p_before, digits), _probability(p_after, digits)
        if before != after:
            break
    return before, after


def _probability(p: float, digits: int) -> str:
    """Formats a probability, neither 0 nor 1 unless it is."""
    smallest = 10.0**-digits
    if 0 < p < smallest / 2:
        return f"<{smallest:.{digits}f}"
    return f">{1 - smallest:.{digits}f}" if 1 - smallest / 2 <= p < 1 else f"{p:.{digits}f}"
