"""Counts the passes of every classifier in a block of code, in images; passes of copies count too."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class Calls:
    """The passes so far, in images.

    Attributes:
        forwards: Number of images that went in.
        backwards: Number of images that a gradient came back to.
    """

    forwards: int = 0
    backwards: int = 0


_counting: ContextVar[Calls | None] = ContextVar("calls", default=None)


@contextmanager
def counted() -> Iterator[Calls]:
    """Counts the passes within a ``with`` block."""
    calls = Calls()
    token = _counting.set(calls)
    try:
        yield calls
    finally:
        _counting.reset(token)


def count(prepared: Tensor) -> None:
    """Adds a network's input [B, ...] to the running count, and its gradient when that is computed."""
    calls = _counting.get()
    if calls is None:
        return
    calls.forwards += len(prepared)
    if prepared.requires_grad:

        def note(gradient: Tensor) -> None:
            calls.backwards += len(gradient)

        prepared.register_hook(note)
