"""Rows of numbers that arrive batch by batch: kept in one piece each, and handed over batch by batch again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_FIRST_ROWS = 1024


class Columns:
    """Named columns of rows [N, ...] that grow batch by batch.

    Thousands of small tensors between large ones that come and go would keep the memory of those from being used again,
    so every column is one tensor with room at its end.
    """

    def __init__(self) -> None:
        self._rows: dict[str, Tensor] = {}
        self._length: dict[str, int] = {}
        self._handed_over: dict[str, int] = {}

    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Appends rows [B, ...] by column name."""
        for name, new in rows.items():
            start = self._length.get(name, 0)
            end = start + len(new)
            kept = self._rows.get(name)
            if kept is None or end > len(kept):
                grown = torch.empty((max(_FIRST_ROWS, 2 * end), *new.shape[1:]), dtype=new.dtype)
                if kept is not None:
                    grown[:start] = kept[:start]
                self._rows[name] = grown
            self._rows[name][start:end] = new.detach()
            self._length[name] = end

    def joined(self) -> dict[str, Tensor]:
        """All rows so far, [N, ...] by column name."""
        return {name: rows[: self._length[name]] for name, rows in self._rows.items()}

    def take_new(self) -> dict[str, Tensor]:
        """Copies of the rows that came since this was last asked for: ``add`` of these makes the same columns again."""
        found = {
            name: rows[self._handed_over.get(name, 0) : self._length[name]].clone()
            for name, rows in self._rows.items()
            if self._handed_over.get(name, 0) < self._length[name]
        }
        self._handed_over = dict(self._length)
        return found
