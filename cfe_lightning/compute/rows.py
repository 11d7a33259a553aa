"""Selection and concatenation of rows in nested batches of tensors."""

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch")


def rows_of(batch: Batch, rows: Tensor | slice) -> Batch:
    """Selects rows of every tensor in a batch by their numbers, [R], or by a slice, which makes views.

    A batch is a tensor, or nested dataclasses, named tuples, lists and dictionaries of tensors; other values stay.
    """
    return _each(lambda parts: parts[0][rows], [batch])


def joined(parts: Sequence[Batch]) -> Batch:
    """Concatenates batches of the same structure along the first dimension; a single one is returned unchanged."""
    return parts[0] if len(parts) == 1 else _each(torch.cat, parts)


def _each(change: Callable[[Any], Tensor], batches: Sequence[Any]) -> Any:
    """Applies ``change`` to the corresponding tensors of all batches and returns the results in the same structure."""
    first = batches[0]
    if isinstance(first, Tensor):
        return change(batches)
    if isinstance(first, dict):
        return {name: _each(change, [batch[name] for batch in batches]) for name in first}
    if isinstance(first, list | tuple):
        parts = [_each(change, each) for each in zip(*batches, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    if is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in fields(first)]
        return replace(first, **{name: _each(change, [getattr(batch, name) for batch in batches]) for name in names})
    return first
