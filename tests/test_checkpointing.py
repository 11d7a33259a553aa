"""last.ckpt: whole after a kill, up to date after Ctrl-C, and continued bit for bit from wherever it was written."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from toy import ToyData, ToyExplainer, toy_classifier, toy_trainer

from cfe_lightning import checkpointing
from cfe_lightning.callbacks import EMA, iteration
from cfe_lightning.checkpointing import AtomicCheckpointIO, LastCheckpoint, RandomState, TrainingStoppedError

pytestmark = pytest.mark.filterwarnings("ignore:.*in eval mode at the start.*", "ignore:.*LeafSpec.*")


class Events(pl.Callback):
    """What happened, in order: batches with their images, validations."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
        self.events.append((trainer.current_epoch, *batch["name"], batch["image"].sum().item()))

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.events.append("validation")


class KeepEvery(Checkpoint):
    """Copies what LastCheckpoint has written at every chance it has."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.copies: list[Path] = []

    def _copy(self, trainer: pl.Trainer, name: str) -> None:
        copy = self.folder / f"{iteration(trainer):02d}-{name}.ckpt"
        shutil.copy(self.folder / "last.ckpt", copy)
        self.copies.append(copy)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._copy(trainer, "batch")

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._copy(trainer, "validation")

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._copy(trainer, "epoch")


def run(
    folder: Path,
    *added: pl.Callback,
    resume: Path | None = None,
    workers: int = 0,
    keep: LastCheckpoint | None = None,
    **arguments: Any,
) -> tuple[dict[str, Any], list[Any]]:
    """Trains the toy method with two optimisers, averaged weights and augmentation; returns last.ckpt and events."""
    pl.seed_everything(0, verbose=False)
    if resume is not None:
        torch.manual_seed(1)
        folder.mkdir()
        shutil.copy(resume, folder / "last.ckpt")
    events = Events()
    trainer = toy_trainer(
        folder,
        [events, EMA(0.9), RandomState(), keep or LastCheckpoint(every_n_batches=1), *added],
        plugins=[AtomicCheckpointIO()],
        max_epochs=2,
        **arguments,
    )
    explainer = ToyExplainer(toy_classifier())
    data = ToyData(horizontal_flip=True, num_images=12, num_workers=workers)
    trainer.fit(explainer, data, ckpt_path=resume, weights_only=True)
    return torch.load(folder / "last.ckpt", weights_only=True), events.events


def assert_same_end(one: dict[str, Any], other: dict[str, Any]) -> None:
    for part in ("state_dict", "current_model_state"):
        for name, value in one[part].items():
            assert torch.equal(value, other[part][name]), (part, name)
    for before, after in zip(one["optimizer_states"], other["optimizer_states"], strict=True):
        assert str(before) == str(after)
    assert one["global_step"] == other["global_step"] == 12
    assert str(one["callbacks"]["RandomState"]) == str(other["callbacks"]["RandomState"])


@pytest.mark.parametrize(
    "validation",
    [{}, {"val_check_interval": 2, "check_val_every_n_epoch": None}],
    ids=["validation after epochs", "validation every 2 batches"],
)
def test_resuming_from_any_checkpoint_equals_the_straight_run(tmp_path: Path, validation: dict[str, Any]) -> None:
    keep = KeepEvery(tmp_path / "straight")
    expected, events = run(tmp_path / "straight", keep, **validation)
    assert len([event for event in events if event == "validation"]) == (3 if validation else 2)
    for copy in keep.copies:
        resumed, rest = run(tmp_path / copy.stem, resume=copy, **validation)
        assert_same_end(expected, resumed)
        # Nothing is repeated and nothing left out, but for a validation between a batch and the kill right after it.
        followed_by_validation = (
            copy.name.endswith("batch.ckpt") and copy.with_name(copy.name.replace("batch", "validation")) in keep.copies
        )
        done = len(events) - len(rest)
        assert rest == events[done:]
        assert events[done - 1] == "validation" if followed_by_validation else done > 0


def test_loader_processes_do_not_change_the_run(tmp_path: Path) -> None:
    expected, events = run(tmp_path / "straight")
    keep = KeepEvery(tmp_path / "workers")
    actual, same_events = run(tmp_path / "workers", keep, workers=1)
    assert same_events == events
    assert_same_end(expected, actual)
    resumed, _ = run(tmp_path / "resumed", resume=tmp_path / "workers" / "02-batch.ckpt", workers=1)
    assert_same_end(expected, resumed)


class Press(pl.Callback):
    """Presses Ctrl-C during a batch."""

    def __init__(self, batch: int, times: int = 1, key: signal.Signals = signal.SIGINT) -> None:
        self.batch = batch
        self.times = times
        self.key = key

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if iteration(trainer) == self.batch:
            for _ in range(self.times):
                signal.raise_signal(self.key)


@pytest.mark.parametrize("batch", [2, 3], ids=["mid-epoch", "last of the epoch"])
def test_ctrl_c_finishes_the_batch_saves_and_continues_bit_for_bit(tmp_path: Path, batch: int) -> None:
    handler = signal.getsignal(signal.SIGINT)
    expected, events = run(tmp_path / "straight")
    assert signal.getsignal(signal.SIGINT) is handler
    with pytest.raises(TrainingStoppedError, match=f"Training stopped after {batch} batches"):
        run(tmp_path / "stopped", Press(batch))
    assert signal.getsignal(signal.SIGINT) is handler
    resumed, rest = run(tmp_path / "resumed", resume=tmp_path / "stopped" / "last.ckpt")
    assert_same_end(expected, resumed)
    # Events before: the batches, and the validation of the epoch that the last one completes.
    assert rest == events[batch + (batch == 3) :]


def test_a_validation_after_the_last_batch_is_part_of_the_checkpoint(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val/loss", filename="best")
    keep = LastCheckpoint()
    trainer = toy_trainer(tmp_path, [Press(2), best, keep], val_check_interval=2, num_sanity_val_steps=0)
    with pytest.raises(TrainingStoppedError):
        trainer.fit(ToyExplainer(toy_classifier()), ToyData())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["callbacks"][best.state_key]["best_model_score"] == best.best_model_score
    assert best.best_model_score is not None


@pytest.mark.parametrize("batch", [2, 3], ids=["mid-epoch", "last of the epoch"])
def test_a_terminated_run_continues_bit_for_bit(tmp_path: Path, batch: int) -> None:
    expected, events = run(tmp_path / "straight")
    keep = LastCheckpoint(dirpath=str(tmp_path / "stopped"))
    with pytest.raises(SystemExit):
        run(tmp_path / "stopped", Press(batch, key=signal.SIGTERM), keep=keep)
    resumed, rest = run(tmp_path / "resumed", resume=tmp_path / "stopped" / "last.ckpt")
    assert_same_end(expected, resumed)
    assert rest == events[batch + (batch == 3) :]


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, Press(2, times=2))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores further presses and leaves it at that
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


def test_a_kill_while_writing_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def dies(checkpoint: Any, file: Any) -> None:
        file.write(b"half of a")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpointing.torch, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    monkeypatch.undo()
    assert torch.load(path, weights_only=True) == {"step": 1}
    AtomicCheckpointIO().save_checkpoint({"step": 3}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_all_random_states_come_back() -> None:
    torch.manual_seed(3), np.random.seed(4), random.seed(5)

    def draw() -> tuple[Any, ...]:
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), np.random.randn(), random.gauss()

    draw()
    state = checkpointing._random_state()
    expected = draw()
    draw()
    checkpointing._set_random_state(state)
    assert draw() == expected


def test_last_checkpoint_without_interval_writes_after_epochs(tmp_path: Path) -> None:
    saved = []

    class Count(AtomicCheckpointIO):
        def save_checkpoint(self, checkpoint: dict[str, Any], *arguments: Any, **options: Any) -> None:
            saved.append(checkpoint["global_step"])

    trainer = toy_trainer(tmp_path, [LastCheckpoint()], plugins=[Count()], max_epochs=2, val_check_interval=1)
    trainer.fit(ToyExplainer(toy_classifier()), ToyData(num_images=8))
    assert saved == [4, 8]


def test_an_interval_must_be_positive() -> None:
    with pytest.raises(ValueError, match="every_n_batches must be positive or null, got 0"):
        LastCheckpoint(0)
