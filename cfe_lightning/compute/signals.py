"""Signals that ask a program to end: Ctrl-C, SIGTERM, SIGUSR1, SIGUSR2. Needs neither torch nor Lightning."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any, Self

#: Signals that users and schedulers send; Windows knows fewer of them.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))
#: Launchers repeat a Ctrl-C to processes that received it from the terminal: within these seconds it is the same one.
_SAME_PRESS = 1.0


class StopRequested(BaseException):
    """Raised by a signal; not an ``Exception``, so that no code takes it for a failure of its own.

    Args:
        number: Number of the signal.
        message: Sentence about the stopped work.
        agreed: All processes of the run end after the same batch.

    Attributes:
        exit_code: 128 + the signal, as in a shell: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, number: int, message: str | None = None, *, agreed: bool = False) -> None:
        super().__init__(message or f"Stopped by {name_of(number)}.")
        self.number = number
        self.agreed = agreed
        self.exit_code = 128 + number


def name_of(number: int) -> str:
    """Returns the name by which a user knows a signal."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class StopSignals:
    """Turns signals into ``StopRequested`` inside a context, at once or only noted.

    Attributes:
        patient: True only notes a signal in ``received``; a second Ctrl-C raises all the same.
        received: Number of the first signal received, 0 for none.
        promise: Message to the user about a signal that is only noted.
    """

    def __init__(self, promise: str = "") -> None:
        self.patient = False
        self.received = 0
        self.promise = promise
        self._when = 0.0
        self._process = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Starts listening; only the main thread can, in others this does nothing."""
        if threading.current_thread() is threading.main_thread() and not self._before:
            self.patient, self.received, self._process = False, 0, os.getpid()
            self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *raised: object) -> None:
        """Restores the former handlers, once."""
        before, self._before = self._before, {}
        for number, handler in before.items():
            # None stands for a handler that was not set from Python and cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked loader process works until its parent has ended
        now = time.monotonic()
        again = number == signal.SIGINT == self.received and now - self._when > _SAME_PRESS
        if not self.patient or again:
            self.received = number
            raise StopRequested(number)
        if not self.received:
            self.received, self._when = number, now
            # Not through sys.stderr, which may be in the middle of a line.
            os.write(2, f"\n{name_of(number)}: {self.promise}\n".encode())
