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
    smallest = 10.0**-digits
    value = 100 * share
    if 0 < value < smallest / 2:
        return f"<{smallest:g}%"
    if 100 - smallest / 2 < value < 100:
        return f">{100 - smallest:g}%"
    return f"{value:.{digits}f}%"
