"""Command-line options as typed fields of a dataclass, and the types of their values; imports nothing heavy."""

import argparse
import json
from collections.abc import Callable
from dataclasses import field, fields
from pathlib import Path
from typing import Any, TypeVar

Options = TypeVar("Options")


def option(default: Any, text: str, **settings: Any) -> Any:
    """Declares a field of an options class as a command-line option.

    Args:
        default: Value where the option is not given; False makes a switch, a list makes an option that can be repeated.
        text: The option's help.
        settings: Further arguments of ``add_argument``; ``flag`` lists the option's names, separated by blanks, in
            place of its field's, and ``group`` is shared by options that exclude each other.
    """
    metadata = {"help": text, **settings}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def add_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup, kind: Any, without: Any = None) -> None:
    """Adds the fields of an options class to a parser, except those of the base class ``without``."""
    groups: dict[str, argparse._MutuallyExclusiveGroup] = {}
    left_out = set() if without is None else {one.name for one in fields(without)}
    for one in fields(kind):
        if one.name in left_out:
            continue
        settings: dict[str, Any] = dict(one.metadata)
        flags = settings.pop("flag", f"--{one.name.replace('_', '-')}").split()
        group = settings.pop("group", None)
        if one.default is False:
            settings["action"] = "store_true"
        else:
            settings["default"] = one.default_factory() if callable(one.default_factory) else one.default
        # Options that exclude each other.
        if group is not None and group not in groups:
            groups[group] = parser.add_mutually_exclusive_group()
        groups.get(group, parser).add_argument(*flags, dest=one.name, **settings)


def options_of(kind: Callable[..., Options], given: argparse.Namespace) -> Options:
    """Builds the options of a class from a parsed command line, which may hold further ones."""
    return kind(**{one.name: getattr(given, one.name) for one in fields(kind)})  # type: ignore[arg-type]


def count(text: str) -> int:
    """Reads a whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")
    return int(text)


def positive(text: str) -> int:
    """Reads a whole number from 1."""
    value = count(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def shard(text: str) -> tuple[int, int]:
    """Reads i/n, one of n parts counted from 1."""
    index, slash, number = text.partition("/")
    if not (slash and index.isdecimal() and number.isdecimal() and 1 <= int(index) <= int(number)):
        raise argparse.ArgumentTypeError(f"must be one of several parts counted from 1, as 3/8, got {text!r}")
    return int(index), int(number)


def numbers(text: str) -> list[float]:
    """Reads numbers separated by commas."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers separated by commas, got {text!r}") from None


def probabilities(text: str) -> list[float]:
    """Reads numbers between 0 and 1, separated by commas."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < value < 1 for value in found):
        raise argparse.ArgumentTypeError(f"must be probabilities between 0 and 1, as 0.5,0.9, got {text!r}")
    return list(dict.fromkeys(found))


def assignment(text: str) -> tuple[str, Any]:
    """Reads NAME=VALUE; the value is JSON (numbers, true, null, lists), or plain text where it is not JSON."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def file_assignment(text: str) -> tuple[str, Path]:
    """Reads NAME=FILE."""
    name, _, file = text.partition("=")
    if not name or not file:
        raise argparse.ArgumentTypeError(f"must be NAME=FILE, got {text!r}")
    return name, Path(file)
