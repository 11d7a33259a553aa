"""last.ckpt: whole after a kill, up to date after a signal, and continued bit for bit from wherever it was written."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import Mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch.utils.data._utils import signal_handling
from toy import ToyData, ToyDataset, ToyExplainer, toy_classifier, toy_trainer

from cfe_lightning.classifier.training import ClassifierTraining
from cfe_lightning.compute import signals as stop_signals
from cfe_lightning.compute.signals import SIGNALS, StopRequested
from cfe_lightning.images import UnreadableImageError
from cfe_lightning.training import EMA, LastCheckpoint, checkpoints
from cfe_lightning.training.checkpoints import AtomicCheckpointIO, RandomState
from cfe_lightning.training.lightning_inside import iteration

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
    """Copies whatever LastCheckpoint writes, named after the number of events that belong to it."""

    def __init__(self, folder: Path, events: Events) -> None:
        self.folder = folder
        self.events = events
        self.copies: dict[Path, int] = {}
        self.seen = 0

    def setup(self, *_: Any, **__: Any) -> None:
        last = self.folder / "last.ckpt"
        self.seen = last.stat().st_mtime_ns if last.is_file() else 0  # what is resumed

    def _copy(self, name: str, *, begun: int = 0) -> None:
        last = self.folder / "last.ckpt"
        if last.is_file() and last.stat().st_mtime_ns != self.seen:
            self.seen = last.stat().st_mtime_ns
            copy = self.folder / f"{len(self.copies):02d}-{name}.ckpt"
            shutil.copy(last, copy)
            self.copies[copy] = len(self.events.events) - begun

    def on_train_batch_start(self, *_: Any) -> None:
        self._copy("batch", begun=1)

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._copy("before-validation")

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._copy("after-validation")

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._copy("epoch")


def run(
    folder: Path,
    *added: pl.Callback,
    resume: Path | None = None,
    workers: int = 0,
    keep: LastCheckpoint | None = None,
    events: Events | None = None,
    data: ToyData | None = None,
    **arguments: Any,
) -> tuple[dict[str, Any], list[Any]]:
    """Trains the toy method with two optimisers, averaged weights and augmentation; returns last.ckpt and events."""
    pl.seed_everything(0, verbose=False)
    if resume is not None:
        torch.manual_seed(1)
        folder.mkdir()
        resume = Path(shutil.copy(resume, folder / "last.ckpt"))
    events = events or Events()
    trainer = toy_trainer(
        folder,
        [events, EMA(0.9), RandomState(), keep or LastCheckpoint(every_n_batches=1), *added],
        plugins=[AtomicCheckpointIO()],
        max_epochs=2,
        **arguments,
    )
    explainer = ToyExplainer(toy_classifier())
    data = data or ToyData(horizontal_flip=True, num_images=12, num_workers=workers)
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


def unlike(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two checkpoints part."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [where]
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = [(name, one.get(name), other.get(name)) for name in one.keys() | other.keys()]
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = [(place, *pair) for place, pair in enumerate(zip(one, other, strict=True))]
    else:
        return [] if one == other else [f"{where}: {one!r:.80} became {other!r:.80}"]
    return [found for name, old, new in pairs for found in unlike(old, new, f"{where}.{name}")]


@pytest.mark.parametrize(
    ("arguments", "num_images", "validations"),
    [
        ({}, 12, 2),
        ({"val_check_interval": 2, "check_val_every_n_epoch": None}, 12, 3),
        ({"limit_train_batches": 3}, 20, 2),
        ({"limit_train_batches": 3, "val_check_interval": 2, "check_val_every_n_epoch": None}, 20, 3),
        ({"max_steps": 12}, 12, 2),
    ],
    ids=[
        "validation after epochs",
        "validation every 2 batches",
        "epochs of 3 of 5 batches",
        "epochs of 3 of 5 batches, validation every 2",
        "steps are counted",
    ],
)
def test_resuming_from_any_checkpoint_equals_the_straight_run(
    tmp_path: Path, arguments: dict[str, Any], num_images: int, validations: int
) -> None:
    def data() -> ToyData:
        return ToyData(horizontal_flip=True, num_images=num_images)

    known = Events()
    keep = KeepEvery(tmp_path / "straight", known)
    expected, events = run(tmp_path / "straight", keep, events=known, data=data(), **arguments)
    assert events.count("validation") == validations
    assert {copy.stem[3:] for copy in keep.copies} >= {"batch", "before-validation", "epoch"}
    for place, (copy, done) in enumerate(keep.copies.items(), start=1):
        again = Events()
        keep_again = KeepEvery(tmp_path / copy.stem, again)
        resumed, rest = run(tmp_path / copy.stem, keep_again, resume=copy, data=data(), events=again, **arguments)
        assert_same_end(expected, resumed)
        # Nothing is repeated and nothing is left out.
        assert rest == events[done:], copy.stem
        # It writes what the straight run writes: another kill, at any later moment, ends as one does.
        for before, after in zip(list(keep.copies)[place:], keep_again.copies, strict=True):
            assert before.stem[3:] == after.stem[3:]
            pair = [torch.load(path, weights_only=True) for path in (before, after)]
            assert unlike(*pair) == [], (copy.stem, before.stem)


def test_best_ckpt_of_a_limited_epoch_is_resumed_with_the_first_batch_of_the_next(tmp_path: Path) -> None:
    def go_on(name: str, resume: Path | None = None) -> tuple[dict[str, Any], list[Any]]:
        # After the validation, before the end of the epoch.
        when: Any = {"save_top_k": -1, "save_on_train_epoch_end": False}
        best = ModelCheckpoint(tmp_path / name, monitor="val/loss", filename="{epoch}", **when)
        data = ToyData(horizontal_flip=True, num_images=20)
        return run(tmp_path / name, best, resume=resume, data=data, limit_train_batches=3)

    expected, events = go_on("straight")
    resumed, rest = go_on("resumed", tmp_path / "straight" / "epoch=0.ckpt")
    assert_same_end(expected, resumed)
    assert rest == events[-4:]


def test_loader_processes_do_not_change_the_run(tmp_path: Path) -> None:
    expected, events = run(tmp_path / "straight")
    known = Events()
    keep = KeepEvery(tmp_path / "workers", known)
    actual, same_events = run(tmp_path / "workers", keep, workers=1, events=known)
    assert same_events == events
    assert_same_end(expected, actual)
    resumed, _ = run(tmp_path / "resumed", resume=tmp_path / "workers" / "01-batch.ckpt", workers=1)
    assert_same_end(expected, resumed)


class Press(pl.Callback):
    """Sends a signal in the middle of a training batch, or in the validation that follows it."""

    def __init__(self, batch: int, number: int = signal.SIGINT, *, times: int = 1, validating: bool = False) -> None:
        self.batch = batch
        self.number = number
        self.times = times
        self.validating = validating

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if iteration(trainer) == self.batch and not self.validating:
            for _ in range(self.times):
                signal.raise_signal(self.number)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if iteration(trainer) == self.batch and self.validating:
            signal.raise_signal(self.number)
            self.validating = False


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (*SIGNALS, signal.SIGCHLD)]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("batch", [2, 3], ids=["mid-epoch", "last of the epoch"])
def test_a_signal_stops_after_the_batch_and_the_run_continues_bit_for_bit(
    tmp_path: Path, batch: int, number: signal.Signals
) -> None:
    before = handlers()
    expected, events = run(tmp_path / "straight")
    assert handlers() == before
    keep = LastCheckpoint(dirpath=str(tmp_path / "stopped"))
    with pytest.raises(StopRequested, match=f"Training stopped after {batch} batches by") as stop:
        run(tmp_path / "stopped", Press(batch, number), keep=keep)
    assert stop.value.exit_code == 128 + number
    assert handlers() == before
    resumed, rest = run(tmp_path / "resumed", resume=tmp_path / "stopped" / "last.ckpt")
    assert_same_end(expected, resumed)
    # The validation of the epoch that the third batch completes is still to come.
    assert rest == events[batch:]


def test_a_signal_during_a_validation_does_not_wait_for_its_end(tmp_path: Path) -> None:
    expected, events = run(tmp_path / "straight")
    with pytest.raises(StopRequested, match="after 3 batches by SIGTERM"):
        run(tmp_path / "stopped", Press(3, signal.SIGTERM, validating=True))
    resumed, rest = run(tmp_path / "resumed", resume=tmp_path / "stopped" / "last.ckpt")
    assert_same_end(expected, resumed)
    assert rest == events[3:]


class PressBefore(pl.Callback):
    """Sends a signal while a run is prepared."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, lambda *_: signal.raise_signal(signal.SIGUSR1))


@pytest.mark.parametrize("hook", ["on_fit_start", "on_sanity_check_start", "on_validation_start", "on_train_start"])
def test_a_signal_before_the_first_batch_ends_at_once(tmp_path: Path, hook: str) -> None:
    before = handlers()
    with pytest.raises(StopRequested, match=r"^Stopped by SIGUSR1\.$"):
        toy_trainer(tmp_path, [PressBefore(hook), LastCheckpoint()]).fit(ToyExplainer(toy_classifier()), ToyData())
    assert handlers() == before
    assert not (tmp_path / "last.ckpt").exists()


def test_only_a_second_ctrl_c_ends_the_batch_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # At the same moment it is a launcher that hands it on.
    for number, folder in ((signal.SIGINT, "once"), (signal.SIGTERM, "told twice")):
        with pytest.raises(StopRequested, match="after 2 batches"):
            run(tmp_path / folder, Press(2, number, times=2))
        assert torch.load(tmp_path / folder / "last.ckpt", weights_only=True)["global_step"] == 4
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        assert capfd.readouterr().err.count(f"{name}: stopping after this batch and saving last.ckpt") == 1
    monkeypatch.setattr(stop_signals, "_SAME_PRESS", -1.0)
    with pytest.raises(StopRequested, match=r"^Stopped by Ctrl-C\.$"):
        run(tmp_path / "twice", Press(2, times=2))
    assert torch.load(tmp_path / "twice" / "last.ckpt", weights_only=True)["global_step"] == 2


class Launched(pl.Callback):
    """Puts a process in place that the trainer seems to have started."""

    def __init__(self) -> None:
        self.killed: list[str] = []
        self.procs = [SimpleNamespace(kill=lambda: self.killed.append("child"))]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.strategy._launcher = self


@pytest.mark.parametrize("stop", ["planned", "again, while it is saved", "a full disk", "reading fails", "both"])
def test_a_process_that_waits_is_ended_and_one_that_stops_as_well_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    launched, added = Launched(), [Press(2)]
    raised: tuple[Any, ...] = (StopRequested, "after 2 batches by Ctrl-C")
    arguments: dict[str, Any] = {"keep": LastCheckpoint(dirpath=str(tmp_path)), "num_sanity_val_steps": 0}
    if stop in ("reading fails", "both"):
        monkeypatch.setattr(Fragile, "gone", str(tmp_path / "gone"))
        arguments["data"] = FragileData(num_images=28)  # that image is met in the first epoch, not in its first batch
        added, raised = [Lose("train")], (UnreadableImageError, "5.png")
    error: BaseException | None = None
    if stop in ("again, while it is saved", "both"):
        error, raised = StopRequested(signal.SIGINT), (StopRequested, r"^Stopped by Ctrl-C\.$")
    elif stop == "a full disk":
        error, raised = OSError(errno.ENOSPC, "full"), (OSError, "full")
    if error is not None:
        monkeypatch.setattr(checkpoints, "save_plain", Mock(side_effect=error))
    with pytest.raises(raised[0], match=raised[1]):
        run(tmp_path, launched, *added, **arguments)
    assert launched.procs == []
    assert launched.killed == ([] if error is None else ["child"])


def test_accumulated_gradients_are_stepped_with_before_a_run_stops(tmp_path: Path) -> None:
    def fit(folder: str, *added: pl.Callback, resume: Path | None = None) -> dict[str, torch.Tensor]:
        pl.seed_everything(0, verbose=False)
        callbacks = [*added, LastCheckpoint(dirpath=str(tmp_path / folder))]
        trainer = toy_trainer(tmp_path / folder, callbacks, accumulate_grad_batches=2, max_epochs=1)
        training = ClassifierTraining(output=str(tmp_path / "classifier.pt"), architecture="pooled")
        trainer.fit(training, ToyData(num_images=24), ckpt_path=resume, weights_only=True)
        return training.state_dict()

    expected = fit("straight")
    with pytest.raises(StopRequested, match="after 4 batches"):
        fit("stopped", Press(3, signal.SIGTERM))
    resumed = fit("resumed", resume=tmp_path / "stopped" / "last.ckpt")
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())


class Fragile(ToyDataset):
    """Images that are gone once a file says so, in whatever process they are read."""

    gone: ClassVar[str] = ""

    def __getitem__(self, index: int) -> Any:
        if self.gone and index == 5 and Path(self.gone).exists() and self.split in Path(self.gone).read_text():
            raise UnreadableImageError("The image 5.png cannot be used (it is gone).")
        return super().__getitem__(index)


class FragileData(ToyData):
    def dataset(self, split: Any) -> Fragile:
        return Fragile(split, self.num_images, self.image_size, self.channels, len(self.class_names))


class Lose(pl.Callback):
    """Loses an image of a split after the first batch."""

    def __init__(self, split: str) -> None:
        self.split = split

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if iteration(trainer) == 1:
            Path(Fragile.gone).write_text(self.split)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("split", ["train", "val"])
def test_an_image_that_is_gone_costs_no_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str, workers: int
) -> None:
    monkeypatch.setattr(Fragile, "gone", str(tmp_path / "gone"))

    def data() -> FragileData:
        return FragileData(horizontal_flip=True, num_images=12, num_workers=workers)

    expected, events = run(tmp_path / "straight", data=data())
    known = Events()
    keep = LastCheckpoint(dirpath=str(tmp_path / "stopped"))
    with pytest.raises(UnreadableImageError, match=r"The image 5\.png cannot be used"):
        run(tmp_path / "stopped", Lose(split), keep=keep, events=known, data=data())
    assert 0 < len(known.events) < len(events)
    (tmp_path / "gone").unlink()
    resumed, rest = run(tmp_path / "resumed", resume=tmp_path / "stopped" / "last.ckpt", data=data())
    assert_same_end(expected, resumed)
    assert rest == events[len(known.events) :]


class KillWorker(pl.Callback):
    """Kills the process that reads images in the middle of a batch, as the system does where memory is short.

    Args:
        number: Of the signal that ends the run, too, as a scheduler sends it to all processes of a job.
    """

    def __init__(self, number: int | None = None) -> None:
        self.number = number

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if iteration(trainer) == 3:
            for process in multiprocessing.active_children():
                process.kill()
                # Until it is dead, and without taking the news from PyTorch.
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            if self.number is not None:
                signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [None, signal.SIGTERM])
def test_a_loader_process_that_dies_costs_no_batch(tmp_path: Path, number: int | None) -> None:
    expected, events = run(tmp_path / "straight")
    known = Events()
    keep = LastCheckpoint(dirpath=str(tmp_path / "stopped"))
    raised: Any = (RuntimeError, "DataLoader worker") if number is None else (StopRequested, "by SIGTERM")
    with pytest.raises(raised[0], match=raised[1]):
        run(tmp_path / "stopped", KillWorker(number), keep=keep, events=known, workers=1)
    resumed, rest = run(tmp_path / "resumed", resume=tmp_path / "stopped" / "last.ckpt")
    assert_same_end(expected, resumed)
    assert rest == events[len(known.events) :]


def test_a_loader_process_that_dies_costs_no_batch_where_training_has_the_first_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # As in a new process: PyTorch sets its handler once, with the first loader processes.
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    keep = LastCheckpoint(dirpath=str(tmp_path))
    try:
        with pytest.raises(RuntimeError, match="DataLoader worker"):
            run(tmp_path, KillWorker(), keep=keep, workers=1, num_sanity_val_steps=0)
        assert signal_handling._SIGCHLD_handler_set
    finally:
        signal.signal(signal.SIGCHLD, before)
    # Two optimiser steps for each of the three batches.
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 6


def test_a_validation_after_the_last_batch_is_part_of_the_checkpoint(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val/loss", filename="best")
    trainer = toy_trainer(tmp_path, [best, LastCheckpoint()], val_check_interval=2, num_sanity_val_steps=0)
    trainer.fit(ToyExplainer(toy_classifier()), ToyData())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["callbacks"][best.state_key]["best_model_score"] == best.best_model_score
    assert best.best_model_score is not None


def test_the_best_of_a_run_is_known_where_its_folder_was_moved_to(tmp_path: Path) -> None:
    def train(name: str, epochs: int, resume: Path | None = None) -> tuple[ModelCheckpoint, dict[str, Any]]:
        pl.seed_everything(0, verbose=False)
        # The loss falls, so that the first epoch is the best.
        largest: Any = {"monitor": "val/loss", "mode": "max", "enable_version_counter": False}
        best = ModelCheckpoint(tmp_path / name, filename="best", **largest)
        added: list[pl.Callback] = [best, LastCheckpoint()]
        trainer = toy_trainer(tmp_path / name, added, max_epochs=epochs, plugins=[AtomicCheckpointIO()])
        trainer.fit(ToyExplainer(toy_classifier()), ToyData(), ckpt_path=resume, weights_only=True)
        return best, torch.load(tmp_path / name / "best.ckpt", weights_only=True)

    before, kept = train("here", 1)
    (tmp_path / "here").rename(tmp_path / "there")
    after, still_kept = train("there", 2, tmp_path / "there" / "last.ckpt")
    assert after.best_model_score == before.best_model_score
    assert still_kept["global_step"] == kept["global_step"]
    assert {after.best_model_path, *after.best_k_models} == {str(tmp_path / "there" / "best.ckpt")}


def test_last_checkpoint_without_interval_writes_after_epochs(tmp_path: Path) -> None:
    saved = []

    class Count(AtomicCheckpointIO):
        def save_checkpoint(self, checkpoint: dict[str, Any], *arguments: Any, **options: Any) -> None:
            saved.append(checkpoint["global_step"])

    trainer = toy_trainer(tmp_path, [LastCheckpoint()], plugins=[Count()], max_epochs=2)
    trainer.fit(ToyExplainer(toy_classifier()), ToyData(num_images=8))
    # Before the validation and at the end of each epoch.
    assert saved == [4, 4, 8, 8]


def test_an_interval_must_be_positive() -> None:
    with pytest.raises(ValueError, match="every_n_batches must be positive or null, got 0"):
        LastCheckpoint(0)


def test_a_better_checkpoint_still_replaces_the_one_before(tmp_path: Path) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path / "run", monitor="val/loss", filename="best-{epoch}", mode="max")
    run(tmp_path, keep)
    assert len(list((tmp_path / "run").glob("*.ckpt"))) == 1
