"""Reads the state dictionary of a user's network out of the dictionaries that training scripts put around it."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cfe_lightning.files.tensors import load_plain

#: Keys below which training scripts put the weights.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "network", "net", "weights")
#: Prefixes that DataParallel, Lightning modules and torch.compile put before every name.
_PREFIXES = ("module.", "model.", "net.", "network.", "_orig_mod.")
#: Batch norm has this counter only since PyTorch 0.4.1, so a file may lack it.
_COUNTER = "num_batches_tracked"


def load_weights(network: nn.Module, path: str | Path, without: Sequence[str] = ()) -> None:
    """Fills a network from a file, completely or not at all.

    Args:
        network: Network to fill.
        path: File of ``torch.save``: a state dictionary, or one inside a dictionary; nothing in it is executed.
        without: Prefixes of names in the file to leave out, such as those of heads that only training uses.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds anything but plain data, no state dictionary, or one that does not fit.
    """
    file = Path(path)
    weights = {name: value for name, value in read_weights(file).items() if not name.startswith(tuple(without))}
    expected = network.state_dict()
    candidates = [(_mismatches(inner, expected), inner) for inner in (weights, *_without_prefixes(weights))]
    mismatches, best = min(candidates, key=lambda candidate: sum(map(len, candidate[0].values())))
    if any(mismatches.values()):
        reasons = [
            f"{len(names)} {kind} ({', '.join(names[:4] + ['...'] * (len(names) > 4))})"
            for kind, names in mismatches.items()
            if names
        ]
        raise ValueError(f"The weights in {file} do not fit {type(network).__name__}: {'; '.join(reasons)}.")
    # Not strict, because of the counters; everything else has been compared.
    network.load_state_dict(best, strict=False)


def read_weights(file: Path) -> dict[str, Any]:
    """Returns the dictionary of tensors in a file, out of the dictionaries around it; prefixes stay.

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

    # Dictionaries around the weights.
    while isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)), None)
        if inner is None:
            raise ValueError(f"{file} holds no state dictionary; its keys are {list(content)[:10]}.")
        content = inner
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__} and no state dictionary.")
    return content


def _without_prefixes(weights: dict[str, Any], depth: int = 3) -> list[dict[str, Any]]:
    """Returns the weights below each prefix, and below prefixes inside it, without the names beside the prefix."""
    if depth == 0:
        return []
    # What is beside a prefix, such as the weights of a loss, is no weight of the network.
    found = []
    for prefix in _PREFIXES:
        if inner := {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}:
            found += [inner, *_without_prefixes(inner, depth - 1)]
    return found


def _mismatches(weights: dict[str, Any], expected: dict[str, Any]) -> dict[str, list[str]]:
    """Lists the names by which weights do not fit, per kind of mismatch."""
    shapes = [(name, _shape(weights[name]), _shape(value)) for name, value in expected.items() if name in weights]
    return {
        "missing": [name for name in expected if name not in weights and not name.endswith(_COUNTER)],
        "unexpected": [name for name in weights if name not in expected and not name.endswith(_COUNTER)],
        "of another shape": [f"{name} {got} instead of {wanted}" for name, got, wanted in shapes if got != wanted],
    }


def _shape(value: Any) -> list[int] | None:
    # A user's file may hold values without a shape.
    return list(value.shape) if hasattr(value, "shape") else None
