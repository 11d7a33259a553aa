"""Finds the weights of a user's network in what training tools write around them: dictionaries, prefixes, EMA."""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cfe_lightning.files.formats import foreign_format, is_safetensors
from cfe_lightning.files.tensors import load_plain
from cfe_lightning.files.text import one_line

_log = logging.getLogger(__name__)
#: Dictionaries inside one another that are searched, and parts of a prefix.
_DEEPEST = 3
_LONGEST_PREFIX = 8
#: Batch norm has this counter only since PyTorch 0.4.1, so a file may lack it.
_COUNTER = "num_batches_tracked"
#: The word EMA, an exponential moving average of the weights, in a key or prefix.
_EMA = re.compile(r"(?<![a-z])ema(?![a-z])", re.IGNORECASE)


@dataclass
class _Candidate:
    """Values of a file below one key and prefix, and how they fit the network."""

    label: str  # keys and prefix, joined by dots; empty for the file itself
    weights: dict[str, Any]
    matching: int
    mismatches: dict[str, list[str]]

    @property
    def num_mismatches(self) -> int:
        """Returns the number of names by which the weights do not fit."""
        return sum(map(len, self.mismatches.values()))


def load_weights(network: nn.Module, path: str | Path, without: Sequence[str] = (), key: str | None = None) -> None:
    """Fills a network from a file, completely or not at all.

    Args:
        network: Network to fill.
        path: File of ``torch.save`` or safetensors: a state dictionary, or one inside dictionaries, with any prefix
            before its names; nothing in it is executed.
        without: Prefixes of the network's names to leave out, such as those of heads that only training uses.
        key: Entry or prefix in the file to take; None takes the one that fits, and EMA weights where there are both.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds anything but plain data, no state dictionary, none that fits or several.
    """
    file, expected = Path(path), network.state_dict()
    tables = _tables_of(_read(file), file)
    candidates = [found for name, table in tables for found in _candidates(name, table, expected, tuple(without))]
    named = _named(candidates, key, file)
    fitting = [candidate for candidate in named if not candidate.num_mismatches]
    if not fitting:
        best = max(named, key=lambda candidate: (candidate.matching, -candidate.num_mismatches))
        raise ValueError(f"The weights in {file} do not fit {type(network).__name__}: {_difference(best, expected)}.")
    chosen = _chosen(fitting, file)

    # What was left aside is said.
    if chosen.label:
        _log.info("The weights are those below %r in %s.", chosen.label, file)
    if key is None and not _EMA.search(chosen.label) and (ema := _unused_ema(tables, chosen)):
        _log.warning("%s also holds EMA weights (%s, ...), which do not fit and are not used.", file, ema)
    # Not strict, because of the counters; everything else has been compared.
    network.load_state_dict({name: chosen.weights[name] for name in expected if name in chosen.weights}, strict=False)


def read_weights(file: Path) -> dict[str, Any]:
    """Returns the largest dictionary of tensors in a file, out of the dictionaries around it; prefixes stay.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds anything but plain data, or no state dictionary.
    """
    return max((table for _, table in _tables_of(_read(file), file)), key=len)


def _read(file: Path) -> Any:
    """Returns the plain data in a file of safetensors or ``torch.save``."""
    # Files that are none.
    if not file.is_file():
        what = foreign_format(file)
        raise FileNotFoundError(f"{file} is {what}." if what else f"There is no file of weights {file}.")
    if is_safetensors(file):
        try:
            return safetensors.torch.load_file(file)
        except SafetensorError as error:
            raise ValueError(
                f"{file} is a safetensors file, but truncated or damaged ({one_line(error)}): copy it again."
            ) from error

    # Files of torch.save.
    try:
        content = load_plain(file, any_age=True)
    except ValueError as error:
        if what := foreign_format(file, error):
            raise ValueError(f"{file} cannot be read as weights, because it is {what}.") from error
        raise ValueError(
            f"{file} cannot be read as weights ({error}): write them with torch.save(network.state_dict(), ...)."
        ) from error
    if isinstance(content, dict) and "classifier" in content and "state_dict" in content:
        raise ValueError(f"{file} is a classifier file of cfe_lightning: read it with load_classifier.")
    return content


def _tables_of(content: Any, file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Lists the dictionaries of tensors in a file's content, each with the keys that lead to it."""
    if tables := list(_tables(content)):
        return tables
    if isinstance(content, dict):
        raise ValueError(f"{file} holds no state dictionary; its keys are {list(content)[:10]}.")
    raise ValueError(f"{file} holds a {type(content).__name__} and no state dictionary.")


def _tables(value: Any, label: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    # Some tools keep the weights of several networks, or of EMA, in lists.
    entries = dict(enumerate(value)) if isinstance(value, list | tuple) else value
    if not isinstance(entries, dict) or depth > _DEEPEST:
        return
    if any(isinstance(entry, Tensor) for entry in entries.values()):
        yield label, {str(name): entry for name, entry in entries.items()}
    for name, entry in entries.items():
        yield from _tables(entry, _join(label, str(name)), depth + 1)


def _candidates(
    label: str, table: dict[str, Any], expected: dict[str, Any], without: tuple[str, ...]
) -> Iterator[_Candidate]:
    """Yields the values of a dictionary below each prefix that leads to a name of the network, and all of them."""
    # What is beside a prefix, such as the weights of a loss, is no weight of the network.
    groups: dict[str, dict[str, Any]] = {"": table}
    for name, value in table.items():
        parts = name.split(".", _LONGEST_PREFIX)
        for length in range(1, len(parts)):
            groups.setdefault(".".join(parts[:length]), {})[".".join(parts[length:])] = value

    # How each fits.
    needed = [name for name in expected if not name.endswith(_COUNTER)]
    for prefix, group in groups.items():
        if prefix and group.keys().isdisjoint(needed):
            continue
        weights = {name: value for name, value in group.items() if not name.startswith(without)}
        matching = sum(name in weights for name in needed)
        yield _Candidate(_join(label, prefix), weights, matching, _mismatches(weights, expected))


def _named(candidates: list[_Candidate], key: str | None, file: Path) -> list[_Candidate]:
    """Returns the candidates that a key names: it is a part of their label, and the outermost such part counts."""
    if key is None:
        return candidates
    places = [f".{candidate.label}.".find(f".{key.strip('.')}.") for candidate in candidates]
    found = [place for place in places if place >= 0]
    if not found:
        labels = list(dict.fromkeys(candidate.label for candidate in candidates if candidate.label))
        raise ValueError(f"{file} holds no weights below the weights_key {key!r}; there are {labels[:10]}.")
    return [candidate for candidate, place in zip(candidates, places, strict=True) if place == min(found)]


def _chosen(fitting: list[_Candidate], file: Path) -> _Candidate:
    """Returns the one candidate, or the one of EMA, among those that fit."""
    averaged = [candidate for candidate in fitting if _EMA.search(candidate.label)]
    first, *others = averaged or fitting
    # The same weights may be saved under two names.
    other = next((candidate for candidate in others if not _are_equal(candidate.weights, first.weights)), None)
    if other is not None:
        raise ValueError(
            f"{file} holds two sets of weights that fit, {first.label!r} and {other.label!r}: "
            "name one of them as weights_key, or write it alone to a file."
        )
    raw = next((candidate.label for candidate in fitting if candidate not in averaged), None)
    if averaged and raw is not None:
        _log.warning(
            "%s holds EMA weights beside others: %r is taken, as authors evaluate it; weights_key %r takes the others.",
            file, first.label, raw,
        )  # fmt: skip
    return first


def _are_equal(some: dict[str, Any], others: dict[str, Any]) -> bool:
    return all(
        not isinstance(value, Tensor) or (value.dtype == others[name].dtype and torch.equal(value, others[name]))
        for name, value in some.items()
        if name in others
    )


def _unused_ema(tables: list[tuple[str, dict[str, Any]]], chosen: _Candidate) -> str | None:
    """Returns the place of the first tensor of EMA that is not among the chosen weights."""
    places = (_join(label, name) for label, table in tables for name in table if isinstance(table[name], Tensor))
    return next(
        (
            place
            for place in places
            if _EMA.search(place) and place.removeprefix(chosen.label).lstrip(".") not in chosen.weights
        ),
        None,
    )


def _difference(candidate: _Candidate, expected: dict[str, Any]) -> str:
    """Describes how the nearest candidate differs from the network, and what to do."""
    kinds = [
        f"{len(names)} {kind} ({', '.join([name[:100] for name in names[:4]] + ['...'] * (len(names) > 4))})"
        for kind, names in candidate.mismatches.items()
        if names
    ]
    number = sum(not name.endswith(_COUNTER) for name in expected)
    where = f"below {candidate.label!r}, " if candidate.label else ""
    remedy = "give the class and the arguments of the network that was trained"
    # Rows of the last layer, and of the heads for training, are classes.
    if not candidate.mismatches["missing"] and not candidate.mismatches["unexpected"]:
        shapes = [(_shape(candidate.weights[name]), _shape(value)) for name, value in expected.items()
                  if name in candidate.weights]  # fmt: skip
        rows = {(got[0], wanted[0]) if got and wanted and got[1:] == wanted[1:] else None
                for got, wanted in shapes if got != wanted}  # fmt: skip
        if len(rows) == 1 and (pair := rows.pop()):
            remedy = f"the number of classes differs, so build the network for {pair[0]} outputs instead of {pair[1]}"
    return f"{where}{candidate.matching} of {number} names are there; {'; '.join(kinds)}; {remedy}"


def _mismatches(weights: dict[str, Any], expected: dict[str, Any]) -> dict[str, list[str]]:
    """Lists the names by which weights do not fit, per kind of mismatch."""
    shapes = [(name, _shape(weights[name]), _shape(value)) for name, value in expected.items() if name in weights]
    return {
        "missing": [name for name in expected if name not in weights and not name.endswith(_COUNTER)],
        # Dictionaries and lists beside the weights are searched on their own.
        "unexpected": [
            name
            for name, value in weights.items()
            if name not in expected and not name.endswith(_COUNTER) and not isinstance(value, dict | list | tuple)
        ],
        "of another shape": [f"{name} {got} instead of {wanted}" for name, got, wanted in shapes if got != wanted],
    }


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _shape(value: Any) -> list[int] | None:
    # A user's file may hold values without a shape.
    return list(value.shape) if hasattr(value, "shape") else None
