"""Types and checks of command line arguments; imports nothing heavy."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


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


def check_writable(output: Path) -> None:
    """Refuses an output folder that takes no files before hours are spent on them; makes nothing yet.

    Raises:
        PermissionError: If the folder, or the nearest one above it that exists, cannot be written to.
    """
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"--output {output} cannot be written to: give another folder.")
