"""Types and checks of command line arguments; imports nothing heavy."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def count(text: str) -> int:
    """A whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")
    return int(text)


def positive(text: str) -> int:
    """A whole number from 1."""
    value = count(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def shard(text: str) -> tuple[int, int]:
    """i/n, one of n parts, counted from 1."""
    index, slash, number = text.partition("/")
    if not (slash and index.isdecimal() and number.isdecimal() and 1 <= int(index) <= int(number)):
        raise argparse.ArgumentTypeError(f"must be one of several parts counted from 1, as 3/8, got {text!r}")
    return int(index), int(number)


def probabilities(text: str) -> list[float]:
    """Numbers between 0 and 1, separated by commas."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < value < 1 for value in found):
        raise argparse.ArgumentTypeError(f"must be probabilities between 0 and 1, as 0.5,0.9, got {text!r}")
    return list(dict.fromkeys(found))


def assignment(text: str) -> tuple[str, Any]:
    """NAME=VALUE; the value is read as JSON (numbers, true, null, lists), and as text where it is none."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def file_assignment(text: str) -> tuple[str, Path]:
    """NAME=FILE."""
    name, _, file = text.partition("=")
    if not name or not file:
        raise argparse.ArgumentTypeError(f"must be NAME=FILE, got {text!r}")
    return name, Path(file)
