"""Short texts for files and messages: the version, one-line reasons, rounded numbers, digests, data addresses."""

import base64
import hashlib
import importlib.metadata
import json

#: Version of this package, written into files.
VERSION = importlib.metadata.version("cfe-lightning")
#: Longest reason of an exception, in characters.
_LONGEST_REASON = 300


def one_line(error: object) -> str:
    """Returns an exception's message as one line without a final period, or its type where the message is empty."""
    return " ".join(str(error).split())[:_LONGEST_REASON].rstrip(".") or type(error).__name__


def significant(value: float) -> float:
    """Rounds a measurement to six significant digits."""
    return float(f"{value:.6g}")


def digest(content: object) -> str:
    """Returns the SHA-256 of plain data in hexadecimal; values that JSON cannot hold count as their text."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def data_address(payload: bytes, kind: str) -> str:
    """Returns a data URL with the bytes of a whole picture file of a format, for example ``png`` or ``webp``."""
    return f"data:image/{kind};base64,{base64.b64encode(payload).decode()}"
