"""Files that appear whole or not at all; needs no torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

#: Bytes of a name that any file system takes.
_LONGEST_NAME = 255


@contextmanager
def atomic_write(path: Path, owner: str = "") -> Iterator[TextIO]:
    """Opens a file to be written in UTF-8; it takes its name once all of it is there.

    Whatever interrupts that leaves an earlier file as it was. Half characters, as names of files hold them, become
    escapes.

    Args:
        path: The file.
        owner: Who writes, where several may write the same file at the same time: the last one counts.
    """
    with (
        atomic_path(path, owner) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        yield file


def write_json(path: Path, content: object, indent: int = 2) -> None:
    """Writes plain data as JSON; the file appears whole or not at all.

    Raises:
        ValueError: If a number is not finite, which JSON cannot hold.
    """
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=indent, allow_nan=False) + "\n")


def check_writable(output: Path) -> None:
    """Refuses an output folder that takes no files before hours are spent on them; makes nothing yet.

    Raises:
        PermissionError: If the folder, or the nearest one above it that exists, cannot be written to.
    """
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"--output {output} cannot be written to: give another folder.")


@contextmanager
def atomic_path(path: Path, owner: str = "") -> Iterator[Path]:
    """A path beside ``path`` for any kind of file, which takes its name once all of it is there.

    Whatever goes wrong leaves an earlier file as it was, and nothing that fills a disk; a complaint of the system
    names the file.

    Args:
        path: The file.
        owner: See ``atomic_write``.
    """
    temporary = path.with_name(_unfinished(path.name, owner and f".{owner}"))
    with naming(path):
        temporary.unlink(missing_ok=True)  # it may be a link, which opening it would follow
    try:
        with naming(path):
            yield temporary
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _unfinished(name: str, owner: str) -> str:
    """What a file is called until it is whole; a name that would get too long with that is replaced by a digest."""
    whole = f".{name}{owner}.part"
    if len(os.fsencode(whole)) <= _LONGEST_NAME:
        return whole
    return f".{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}{owner}.part"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets a complaint of the system name the file: a disk that is full does not say for whom."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise


def refuse_links(folder: Path) -> None:
    """Refuses an output folder in which somebody has left links: what is written to them is written elsewhere.

    Raises:
        ValueError: If an entry is a link; one sentence names it.
    """
    if not folder.is_dir():
        return
    for entry in os.scandir(folder):
        if entry.is_symlink():
            raise ValueError(
                f"{entry.path} is a link, so results would be written elsewhere: remove it, or give another --output."
            )
