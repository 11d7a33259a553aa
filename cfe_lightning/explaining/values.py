"""Values of files that a page is made from: written as plain data, checked, and formatted for readers."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cfe_lightning.files.text import one_line, significant


def read_described(
    path: Path, schema: int, kind: str, shown: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any] | None:
    """Reads a JSON file that ``explain.py`` wrote; returns None where there is no such file.

    Args:
        path: The file.
        schema: Version of its content that this package reads.
        kind: Noun for the content, for the message.
        shown: Turns the content into values for a page; may fail in any way on malformed content.

    Raises:
        ValueError: If the content is malformed; one sentence says why.
    """
    if not path.is_file():
        return None
    # Malformed content shows in many types of errors.
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != schema:
            raise ValueError(f"its schema is {content['schema']!r}, this version reads {schema}")
        return shown(content)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else one_line(error)
        raise ValueError(
            f"{path} is no {kind} that can be shown ({reason}): remove it, or run explain.py again."
        ) from error


def plain(value: Any) -> Any:
    """Turns tensors into plain data, at any depth, and rounds numbers to six significant digits."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float):
        assert math.isfinite(value), "only finite numbers are written"
        return significant(value)
    return value


def finite(value: Any) -> float:
    """Returns a number of a file.

    Raises:
        ValueError: If it is not a number, or not finite.
    """
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} stands where a number should")
    return float(value)


def text(value: Any) -> str:
    """Returns a string that a page in UTF-8 can hold: half characters become escapes."""
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def signed(value: float) -> str:
    """Formats three significant digits with their sign."""
    return f"{value:+.3g}".replace("-", "−") if value else "0"


def percent(share: float, digits: int = 1) -> str:
    """Formats a share in percent, neither 0 nor 100 % unless it is."""
    shown = f"{100 * share:.{digits}f}"
    smallest = 10.0**-digits
    if share > 0 and float(shown) == 0:
        return f"<{smallest:g}%"
    if share < 1 and float(shown) == 100:
        return f">{100 - smallest:g}%"
    return f"{shown}%"


def short_percent(share: float) -> str:
    """Formats a share in percent for a sentence, with one digit after the point below 10 % and none above."""
    return percent(share, 1 if share < 0.0995 else 0)
