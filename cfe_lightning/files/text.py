"""Short texts that many files and messages need: our version, one-line reasons, digests, numbers, data addresses."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json

#: The version of this package, which files carry.
VERSION = importlib.metadata.version("cfe-lightning")
_LONGEST_REASON = 300


def one_line(error: object) -> str:
    """Returns the reason that an exception gives as one line without a final period; its type where it gives none."""
    return " ".join(str(error).split())[:_LONGEST_REASON].rstrip(".") or type(error).__name__


def significant(value: float) -> float:
    """Rounds to six significant digits, which is what a measurement in a file is good for."""
    return float(f"{value:.6g}")


def digest(content: object) -> str:
    """Returns the SHA-256 of plain data in hexadecimal; what JSON cannot hold counts as its text."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def data_address(payload: bytes, kind: str) -> str:
    """Returns a picture as an address that holds all of it, for a page that opens without its files.

    Args:
        payload: The bytes of the picture's file.
        kind: Its format, for example ``png`` or ``webp``.
    """
    return f"data:image/{kind};base64,{base64.b64encode(payload).decode()}"
