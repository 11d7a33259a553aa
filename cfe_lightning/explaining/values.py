"""Values of files that a page is made from: checked, and as a reader wants them."""

from __future__ import annotations

import math
from typing import Any


def finite(value: Any) -> float:
    """A number of a file.

    Raises:
        ValueError: If it is none, or not finite.
    """
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} stands where a number should")
    return float(value)


def text(value: Any) -> str:
    """A string that a page in UTF-8 can hold: half characters become escapes."""
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def signed(value: float) -> str:
    """Three significant digits with their sign."""
    return f"{value:+.3g}".replace("-", "−") if value else "0"


def percent(share: float, digits: int = 1) -> str:
    """A share in percent, neither 0 nor 100 % unless it is."""
    shown = f"{100 * share:.{digits}f}"
    smallest = 10.0**-digits
    if share > 0 and float(shown) == 0:
        return f"<{smallest:g}%"
    if share < 1 and float(shown) == 100:
        return f">{100 - smallest:g}%"
    return f"{shown}%"


def short_percent(share: float) -> str:
    """``percent`` for a sentence: one digit after the point below 10 % and none from there on."""
    return percent(share, 1 if share < 0.0995 else 0)
