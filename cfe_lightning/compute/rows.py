"""Selects and joins the rows of a batch, whatever structure holds its tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch")


def rows_of(batch: Batch, rows: Tensor | slice) -> Batch:
    """Selects rows of every tensor in a batch by the first dimension.

    Args:
        batch: A tensor, or dataclasses, named tuples, lists and dictionaries of tensors; anything else stays as it is.
        rows: Row numbers [R], or a slice, which copies nothing.
    """
    return _each(lambda parts: parts[0][rows], [batch])


def joined(parts: Sequence[Batch]) -> Batch:
    """Concatenates batches of the same structure; a single one is returned as it is."""
    return parts[0] if len(parts) == 1 else _each(torch.cat, parts)


def _each(change: Callable[[Any], Tensor], batches: Sequence[Any]) -> Any:
    """Replaces every tensor of the first batch by ``change`` of the tensors in its place in all batches."""
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
