"""Every touch of Lightning's inner parts: signals, launched processes, counters of its loops."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import distributed
from toy import ToyData, ToyDataset, ToyExplainer, toy_classifier, toy_trainer

from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.training import lightning_inside as inside
from cfe_lightning.training.lightning_inside import forget_children, kill_children, silence_signals

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
    silence_signals(trainer)
    trainer._signal_connector.register_signal_handlers()
    loop._broadcast_sigterm_tensor()
    assert len(exchanged) == 1
    assert signal.getsignal(signal.SIGTERM) is before


class Counts(pl.Callback):
    """Asks every question about a run after each batch and before each validation."""

    def __init__(self) -> None:
        self.after_batches: list[tuple[int, int, bool, bool]] = []
        self.checkpoints: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        counted = (inside.iteration(trainer), inside.finished_batches(trainer))
        self.after_batches.append((*counted, inside.is_last_batch(trainer), inside.accumulates(trainer)))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.checkpoints.append(copy.deepcopy(checkpoint))


class Summed(ToyExplainer):
    """Lets Lightning step its optimiser, so that gradients of batches can be accumulated."""

    def __init__(self, classifier: FrozenClassifier) -> None:
        super().__init__(classifier)
        self.automatic_optimization = True

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:  # type: ignore[override]
        return sum(self._generator_loss(batch["image"], batch["label"]).values())  # type: ignore[return-value]

    def configure_optimizers(self) -> torch.optim.Optimizer:  # type: ignore[override]
        return torch.optim.Adam([self.class_images])


def test_batches_are_counted_and_accumulated_gradients_are_noticed(tmp_path: Path) -> None:
    counts = Counts()
    trainer = toy_trainer(tmp_path, [counts], max_epochs=2, limit_train_batches=3, accumulate_grad_batches=2)
    assert (inside.iteration(trainer), inside.finished_batches(trainer)) == (0, 0)
    trainer.fit(Summed(toy_classifier()), datamodule=ToyData())
    assert [(done, last) for done, _, last, _ in counts.after_batches] == [
        *((1, False), (2, False), (3, True)),
        *((4, False), (5, False), (6, True)),
    ]
    assert [finished for _, finished, _, _ in counts.after_batches] == [1, 2, 3, 4, 5, 6]
    assert [waiting for *_, waiting in counts.after_batches] == [True, False, True] * 2


def test_a_checkpoint_counts_what_is_finished(tmp_path: Path) -> None:
    counts = Counts()
    trainer = toy_trainer(tmp_path, [counts], limit_train_batches=3, enable_checkpointing=False)
    trainer.fit(ToyExplainer(toy_classifier()), datamodule=ToyData())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    checkpoint = counts.checkpoints[-1]
    batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    # As if one more batch had been read.
    batches["total"] |= {"ready": 4, "started": 4}
    batches["current"] |= {"ready": 4, "started": 4}
    inside.count_finished_only(checkpoint, between=True, validating=False)
    assert set(batches["total"].values()) == set(batches["current"].values()) == {3}
    assert not inside.is_to_validate(checkpoint)
    inside.count_finished_only(checkpoint, between=True, validating=True)
    assert inside.is_to_validate(checkpoint)


def test_only_failures_of_reading_are_failures_of_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise ValueError("broken")

    for owner, name, reading in ((ToyDataset, "__getitem__", True), (ToyExplainer, "training_step", False)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            trainer = toy_trainer(tmp_path, num_sanity_val_steps=0, limit_val_batches=0)
            with pytest.raises(ValueError, match="broken") as raised:
                trainer.fit(ToyExplainer(toy_classifier()), datamodule=ToyData())
        assert inside.failed_in_fetching(raised.value) == reading


def test_the_limits_of_a_training_can_be_moved() -> None:
    trainer = toy_trainer(Path(), max_steps=7, min_steps=5, min_epochs=3)
    assert inside.step_limit(trainer) == 7
    inside.set_step_limit(trainer, 9)
    assert inside.step_limit(trainer) == 9
    inside.drop_minimum_length(trainer)
    assert (trainer.min_steps, trainer.min_epochs) == (None, None)
