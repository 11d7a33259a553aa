"""What becomes of the processes that Lightning has started when the one that started them ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import distributed
from toy import toy_trainer

from cfe_lightning.compute.signals import forget_children, kill_children, silence_trainer

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals of POSIX")


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    """Works until a line is sent to it, then fails."""
    code = "import sys; sys.stdin.readline(); sys.exit(2)"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def watched(monkeypatch: pytest.MonkeyPatch, child: subprocess.Popen[str]) -> tuple[Any, Any]:
    """A trainer that has started a process, and the thread of Lightning's that watches it, not yet running."""
    observers: list[Any] = []
    monkeypatch.setattr(_ChildProcessObserver, "start", lambda observer: observers.append(observer))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), 2, 1)
    monkeypatch.setattr(launcher, "_call_children_scripts", lambda: launcher.procs.append(child))
    launcher.launch(lambda: None)
    return SimpleNamespace(strategy=SimpleNamespace(launcher=launcher)), observers[0]


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Whom the watching thread would have killed."""
    found: list[int] = []
    kill = os.kill
    me = os.getpid()
    monkeypatch.setattr(os, "kill", lambda pid, number: found.append(pid) if pid == me else kill(pid, number))
    return found


def test_lightning_kills_the_process_that_a_user_waits_for_when_another_fails(
    monkeypatch: pytest.MonkeyPatch, child: subprocess.Popen[str], killed: list[int]
) -> None:
    _, observer = watched(monkeypatch, child)
    child.communicate("fail\n")
    assert observer._run()
    assert killed == [os.getpid()]


def test_not_for_processes_that_were_ended(
    monkeypatch: pytest.MonkeyPatch, child: subprocess.Popen[str], killed: list[int]
) -> None:
    trainer, observer = watched(monkeypatch, child)
    kill_children(trainer)
    assert child.returncode == -signal.SIGKILL
    assert observer._run()
    assert killed == []


def test_not_for_processes_that_end_with_this_one(
    monkeypatch: pytest.MonkeyPatch, child: subprocess.Popen[str], killed: list[int]
) -> None:
    trainer, observer = watched(monkeypatch, child)
    assert forget_children(trainer) == [child]
    assert child.poll() is None
    child.communicate("fail\n")
    assert child.returncode == 2
    assert observer._run()
    assert killed == []


def test_where_none_was_started_there_is_none_to_end() -> None:
    trainer = SimpleNamespace(strategy=SimpleNamespace(launcher=None))
    assert forget_children(trainer) == []
    kill_children(trainer)


def test_a_silenced_trainer_neither_listens_nor_exchanges_what_it_has_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    exchanged: list[Any] = []
    monkeypatch.setattr(distributed, "broadcast", lambda *arguments, **_: exchanged.append(arguments))
    trainer = toy_trainer(Path())
    loop: Any = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor()
    assert len(exchanged) == 1
    before = signal.getsignal(signal.SIGTERM)
    silence_trainer(trainer)
    trainer._signal_connector.register_signal_handlers()
    loop._broadcast_sigterm_tensor()
    assert len(exchanged) == 1
    assert signal.getsignal(signal.SIGTERM) is before
