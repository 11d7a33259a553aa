"""Reads the state dictionary of a user's network out of the wrappings that training scripts put around it."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cfe_lightning.files.tensors import load_plain

#: Keys below which training scripts put the weights.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "network", "net", "weights")
#: What DataParallel, Lightning modules and torch.compile put before every name.
_PREFIXES = ("module.", "model.", "net.", "network.", "_orig_mod.")


def load_weights(network: nn.Module, path: str | Path, without: Sequence[str] = ()) -> None:
    """Fills a network from a file, all of it or not at all.

    Args:
        network: The network.
        path: A file of ``torch.save``: a state dictionary, or one inside a dictionary; nothing in it is executed.
        without: Names that start so are left out of the file, as those of heads that only training uses.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds anything but plain data, no state dictionary, or one that does not fit.
    """
    file = Path(path)
    weights = {name: value for name, value in read_weights(file).items() if not name.startswith(tuple(without))}
    expected = network.state_dict()
    candidates = [weights, *_without_prefixes(weights)]
    best = min(candidates, key=lambda candidate: len(_differences(candidate, expected)))
    differences = _differences(best, expected)
    if differences:
        raise ValueError(
            f"The weights in {file} do not fit {type(network).__name__}: {'; '.join(_explain(best, expected))}."
        )
    # Not strict, because batch norm counts its batches only since PyTorch 0.4.1; all else has been compared.
    network.load_state_dict(best, strict=False)


def read_weights(file: Path) -> dict[str, Any]:
    """The dictionary of tensors in a file, out of the dictionaries around it; prefixes stay.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds anything but plain data, or no state dictionary.
    """
    if not file.is_file():
        raise FileNotFoundError(f"There is no file of weights {file}.")
    try:
        content = load_plain(file, any_age=True)
    except ValueError as error:
        if isinstance(error.__cause__, pickle.UnpicklingError):
            raise ValueError(
                f"{file} holds more than tensors, such as a whole pickled model, and opening that could run its code: "
                "write the weights alone, with torch.save(network.state_dict(), ...)."
            ) from error
        raise ValueError(
            f"{file} cannot be read as weights ({error}): write them with torch.save(network.state_dict(), ...)."
        ) from error
    if isinstance(content, dict) and "classifier" in content and "state_dict" in content:
        raise ValueError(f"{file} is a classifier file of cfe_lightning: read it with load_classifier.")
    while isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)), None)
        if inner is None:
            raise ValueError(f"{file} holds no state dictionary; its keys are {list(content)[:10]}.")
        content = inner
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__} and no state dictionary.")
    return content


def _without_prefixes(weights: dict[str, Any], depth: int = 3) -> list[dict[str, Any]]:
    """The weights below each prefix, and below prefixes inside it; what is beside a prefix is no weight of ours."""
    if depth == 0:
        return []
    found = []
    for prefix in _PREFIXES:
        inner = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if inner:
            found += [inner, *_without_prefixes(inner, depth - 1)]
    return found


def _differences(weights: dict[str, Any], expected: dict[str, Any]) -> set[str]:
    names = {name for name in weights.keys() ^ expected.keys() if not name.endswith("num_batches_tracked")}
    return names | {name for name in weights.keys() & expected.keys() if not _same_shape(weights[name], expected[name])}


def _same_shape(value: Any, expected: Any) -> bool:
    return getattr(value, "shape", None) == getattr(expected, "shape", None)


def _explain(weights: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """In words: which names are missing, which are unexpected, which have another shape."""
    differing = _differences(weights, expected)
    missing = [name for name in expected if name in differing and name not in weights]
    unexpected = [name for name in weights if name in differing and name not in expected]
    shapes = [
        f"{name} {list(weights[name].shape)} instead of {list(expected[name].shape)}"
        for name in expected
        if name in differing and name in weights
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    return [f"{len(names)} {kind} ({_first(names)})" for kind, names in kinds if names]


def _first(names: Sequence[str], most: int = 4) -> str:
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])
