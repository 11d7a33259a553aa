"""Signals that ask a program to end: Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2, as users and schedulers send them.

One mechanism for all of them and for every command. Needs neither torch nor Lightning.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from types import FrameType, TracebackType
from typing import Any

#: What a scheduler sends before it takes a machine away; Windows knows fewer of them.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))
#: Launchers hand a Ctrl-C on to processes that have had it from the terminal: within so many seconds it is the same.
_SAME_PRESS = 1.0


class StopRequested(BaseException):
    """A signal asks for the end; no ``Exception``, so that nothing takes it for a failure of what it interrupts.

    Args:
        number: The signal.
        message: What has been stopped, a sentence.
        agreed: All processes of the run end, after the same batch.

    Attributes:
        number: As given.
        agreed: As given.
        exit_code: 128 + the signal, as a shell has it: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, number: int, message: str | None = None, *, agreed: bool = False) -> None:
        super().__init__(message or f"Stopped by {name_of(number)}.")
        self.number = number
        self.agreed = agreed
        self.exit_code = 128 + number


def name_of(number: int) -> str:
    """How a user knows a signal."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class StopSignals:
    """Turns the signals into ``StopRequested`` while it is entered, at once or when the program asks for it.

    Attributes:
        patient: Only note a signal in ``received``; a second Ctrl-C ends the patience.
        received: The first signal that came, 0 for none.
        promise: What a user is told about a signal that is only noted.
    """

    def __init__(self, promise: str = "") -> None:
        self.patient = False
        self.received = 0
        self.promise = promise
        self._when = 0.0
        self._process = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        """Listens; only the main thread can, another one changes nothing."""
        if threading.current_thread() is threading.main_thread() and not self._before:
            self.patient, self.received, self._process = False, 0, os.getpid()
            self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        """Puts the handlers back as they were; nothing where they are back already."""
        before, self._before = self._before, {}
        for number, handler in before.items():
            # None is a handler that was not set from Python, which cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a loader process that was forked: it works until the process it works for has ended
        now = time.monotonic()
        again = number == signal.SIGINT == self.received and now - self._when > _SAME_PRESS
        if not self.patient or again:
            self.received = number
            raise StopRequested(number)
        if not self.received:
            self.received, self._when = number, now
            # Not through sys.stderr, which may be in the middle of a line of its own.
            os.write(2, f"\n{name_of(number)}: {self.promise}\n".encode())


def silence_trainer(trainer: Any) -> None:
    """Keeps Lightning from handling signals itself.

    Its handler of SIGTERM calls a collective wherever a process happens to be and ends processes after different
    batches; that of SLURM requeues the job with a checkpoint that ``--resume`` does not know. Before every batch, all
    processes would ask for that handler's news and wait for the device.

    Args:
        trainer: A ``Trainer``, before it runs.
    """
    connector = trainer._signal_connector
    assert callable(connector.register_signal_handlers), "Lightning has moved its signal handlers"
    connector.register_signal_handlers = lambda: None
    loop = trainer.fit_loop.epoch_loop
    assert callable(loop._broadcast_sigterm_tensor), "Lightning has moved its exchange of SIGTERM"
    loop._broadcast_sigterm_tensor = lambda: None


def kill_children(trainer: Any) -> None:
    """Ends the processes that the trainer has started: they may wait for ever for one that stops without them.

    Args:
        trainer: A ``Trainer`` that is about to fail.
    """
    children = forget_children(trainer)
    for child in children:
        child.kill()
    for child in children:
        if isinstance(child, subprocess.Popen):
            child.wait()


def forget_children(trainer: Any) -> list[Any]:
    """Keeps Lightning from watching the processes that the trainer has started.

    As soon as one of them has failed, it would kill this one, too, which has not yet said what has happened.

    Args:
        trainer: A ``Trainer`` that is about to end, as are these processes.

    Returns:
        The processes; none where the trainer has started none.
    """
    launcher = trainer.strategy.launcher
    if launcher is None:
        return []
    children = [*launcher.procs]
    launcher.procs.clear()  # the watching thread holds this very list, and ends where it is empty
    return children
