"""Columns of numbers that grow batch by batch and can be read back batch by batch."""

from collections.abc import Mapping

from torch import Tensor

_FIRST_ROWS = 1024


class Columns:
    """Named columns of rows [N, ...] that grow batch by batch.

    Every column is one tensor with room at its end: thousands of small tensors would fragment the memory that large
    temporary tensors need.
    """

    def __init__(self) -> None:
        self._rows: dict[str, Tensor] = {}
        self._length: dict[str, int] = {}
        self._handed_over: dict[str, int] = {}

    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Appends rows [B, ...] by column name."""
        for name, new in rows.items():
            start = self._length.get(name, 0)
            end = self._length[name] = start + len(new)
            kept = self._rows.setdefault(name, new.new_empty((0, *new.shape[1:]), device="cpu"))
            # The room doubles, so that a column is copied rarely.
            if end > len(kept):
                self._rows[name] = kept.new_empty((max(_FIRST_ROWS, 2 * end), *kept.shape[1:]))
                self._rows[name][:start] = kept[:start]
            self._rows[name][start:end] = new.detach()

    def joined(self) -> dict[str, Tensor]:
        """Returns all rows so far, [N, ...] by column name."""
        return {name: rows[: self._length[name]] for name, rows in self._rows.items()}

    def take_new(self) -> dict[str, Tensor]:
        """Copies the rows added since the last call; passing all copies to ``add`` rebuilds the columns."""
        found = {name: rows[self._handed_over.get(name, 0) :].clone() for name, rows in self.joined().items()}
        self._handed_over = dict(self._length)
        return {name: rows for name, rows in found.items() if len(rows)}
