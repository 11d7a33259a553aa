"""Atomic writes: a file appears whole or not at all. Needs no torch."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

#: Longest file name, in bytes, that every common file system accepts.
_LONGEST_NAME = 255


@contextmanager
def atomic_write(path: Path, owner: str = "") -> Iterator[TextIO]:
    """Opens a UTF-8 text file for writing, as ``atomic_path``; lone surrogates, as in file names, become escapes."""
    with (
        atomic_path(path, owner) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        yield file


def write_json(path: Path, content: object, indent: int = 2) -> None:
    """Writes plain data as JSON, atomically.

    Raises:
        ValueError: If a number is not finite, which JSON cannot hold.
    """
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=indent, allow_nan=False) + "\n")


def check_writable(output: Path) -> None:
    """Refuses an output folder that takes no files, before hours are spent on them; creates nothing.

    Raises:
        PermissionError: If the folder, or its nearest existing parent, cannot be written to.
    """
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"--output {output} cannot be written to: give another folder.")


@contextmanager
def atomic_path(path: Path, owner: str = "") -> Iterator[Path]:
    """Yields a temporary path for a file of any kind; it replaces ``path`` when the block ends without an error.

    A failure leaves an earlier file unchanged and removes the temporary one. An ``OSError`` names ``path``. ``owner``
    names the writer where several may write the same file at the same time; the last one wins.
    """
    ending = f".{owner}.part" if owner else ".part"
    temporary = path.with_name(f".{path.name}{ending}")
    if len(os.fsencode(temporary.name)) > _LONGEST_NAME:
        # A digest stands for a name that leaves no room for the ending.
        temporary = path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}{ending}")
    with naming(path):
        # A link left in this place would be followed when the file is opened.
        temporary.unlink(missing_ok=True)
    try:
        with naming(path):
            yield temporary
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the file's name into an ``OSError``: the system does not say which file met a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise


def refuse_links(folder: Path) -> None:
    """Refuses an output folder that contains links, through which results would be written elsewhere.

    Raises:
        ValueError: If an entry is a link; the message names it.
    """
    for entry in os.scandir(folder) if folder.is_dir() else ():
        if entry.is_symlink():
            raise ValueError(
                f"{entry.path} is a link, so results would be written elsewhere: remove it, or give another --output."
            )
