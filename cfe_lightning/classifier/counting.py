"""How often a classifier is asked: every pass of every classifier in a block of code, counted in images.

Copies count too, such as the one that a baseline hooks into.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class Calls:
    """Passes so far, in images.

    Attributes:
        forwards: Images that went in.
        backwards: Images that a gradient came back to.
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
    """Notes that a batch [B, ...] goes in, and listens for its gradient."""
    calls = _counting.get()
    if calls is None:
        return
    calls.forwards += len(prepared)
    if prepared.requires_grad:

        def note(gradient: Tensor) -> None:
            calls.backwards += len(gradient)

        prepared.register_hook(note)
