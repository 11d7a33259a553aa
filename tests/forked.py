"""The commands in processes of their own, forked from a server that has imported torch: seconds instead of minutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]

# What Lightning's launcher sets for the processes that it starts is set here.
_SERVER = """
import importlib, json, os, signal, socket, sys
import torch, lpips, toy, witness
import cfe_lightning.training.run, cfe_lightning.methods.stylex.method, cfe_lightning.report.page
from lightning.pytorch.utilities.rank_zero import rank_zero_only

def start(command, run, rank, port):
    child = os.fork()
    if child:
        return child
    os.chdir(run["folder"])
    log = os.open(f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1), os.dup2(log, 2)
    if run["devices"] > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        rank_zero_only.rank = rank
    code = 1
    try:
        # Makes PyTorch's pool of threads anew, which a fork has lost: two threads that did so at once would fail.
        torch.set_num_threads(1)
        code = command.main(run["arguments"])
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)

def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

command = importlib.import_module(sys.argv[1])
for runs in json.loads(sys.stdin.read()):
    children = {}
    for run in runs:
        port = free_port()
        mine = [start(command, run, rank, port) for rank in range(run["devices"])]
        children |= {child: mine for child in mine}
    while children:
        child, status = os.wait()
        # One that fails leaves the other waiting.
        for other in children.pop(child):
            if status and other in children:
                os.kill(other, signal.SIGKILL)
"""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A command as one or more processes.

    Attributes:
        folder: Where it runs, and where every process leaves what it says, in ``<rank>.log``.
        devices: Processes.
        arguments: The command's.
    """

    folder: str
    devices: int
    arguments: Sequence[str]


def environment() -> dict[str, str]:
    """For a process of its own with one thread, which finds ``toy``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PL_")}
    return kept | {"PYTHONPATH": os.pathsep.join([str(CHECKOUT), str(CHECKOUT / "tests")]), "OMP_NUM_THREADS": "1"}


def execute(command: str, groups: Sequence[Sequence[Run]]) -> None:
    """Does all runs of a group at the same time, and one group after the other.

    Args:
        command: A module with ``main``, such as ``cfe_lightning.cli.train``.
        groups: What is to be done; whether a run has failed is to be seen from what it leaves.
    """
    told = json.dumps([[asdict(run) for run in group] for group in groups])
    server = subprocess.run(
        [sys.executable, "-c", _SERVER, command],
        input=told,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert server.returncode == 0, server.stderr[-3000:]
