"""One cell of ``benchmarks/run.py`` in a fresh process that may be killed: what it used is gone with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from cells import Cell, Settings, measure_files, measure_memory, measure_search, measure_speed
from fitting import measure_curve, measure_quality, measure_steady

MEASURES: dict[str, Callable[[Cell, Settings], dict[str, Any]]] = {
    "speed": measure_speed,
    "memory": measure_memory,
    "files": measure_files,
    "search": measure_search,
    "quality": measure_quality,
    "curve": measure_curve,
    "steady": measure_steady,
}


def measure(cell: Cell, settings: Settings) -> dict[str, Any]:
    """One cell in this process; a failure becomes one sentence."""
    torch.set_num_threads(settings.threads)
    warnings.filterwarnings("ignore")
    try:
        return MEASURES[cell.measure](cell, settings)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return {"failed": f"{type(error).__name__}: {lines[0][:300]}"}


class Children:
    """Starts processes for cells.

    On the CPU they are forked from one that has imported everything, which takes seconds otherwise. CUDA must not be
    forked.

    Args:
        device: "cpu" or "cuda".
        threads: Of the CPU.
        time_limit: Seconds after which a cell is killed.
    """

    def __init__(self, device: str, threads: int, time_limit: float) -> None:
        self.time_limit = time_limit
        # Read when libraries are loaded.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        # Processes that are killed leave semaphores behind, which Python would tell the user at the end.
        os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker:UserWarning"
        self.context = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
        if device == "cpu":
            os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
            self.context.set_forkserver_preload(["children"])  # type: ignore[attr-defined]

    def measure(self, cell: Cell, settings: Settings) -> dict[str, Any]:
        """One cell; ``failed`` says why there is no result."""
        receiver, sender = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_work, args=(cell, settings, sender))  # type: ignore[attr-defined]
        process.start()
        sender.close()
        try:
            if not receiver.poll(self.time_limit):
                return {"failed": f"took longer than the {self.time_limit:.0f} s of --time-limit"}
            return receiver.recv()
        except EOFError:
            process.join()
            return {"failed": f"the process ended with code {process.exitcode} (-9: killed, as for lack of memory)"}
        finally:
            # With the compilers and loaders that it may have started.
            if process.is_alive() and process.pid is not None:
                _kill_group(process.pid)
            process.join()


def _work(cell: Cell, settings: Settings, sender: Connection) -> None:
    os.setsid()
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    sender.send(measure(cell, settings))


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(pid, signal.SIGKILL)
