"""Text files that appear whole or not at all; needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """Opens a file to be written in UTF-8; it takes its name once all of it is there.

    Whatever interrupts that leaves an earlier file as it was. Half characters, as names of files hold them, become
    escapes.
    """
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        yield file
    temporary.replace(path)
