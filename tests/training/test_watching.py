"""Throughput, metrics of each batch, and losses that are not finite."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fitted import fit
from toy import ToyData, ToyExplainer, toy_classifier, toy_trainer

from cfe_lightning.data.base import Sample
from cfe_lightning.training import (
    LastCheckpoint,
    NonFiniteGuard,
    Throughput,
    watching,
)
from cfe_lightning.training.csv_log import CsvLog
from cfe_lightning.training.watching import FreshMetrics, NonFiniteLossError

pytestmark = pytest.mark.filterwarnings("ignore:.*in eval mode at the start.*", "ignore:.*LeafSpec.*")


def test_throughput_leaves_validation_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    class Clock(pl.Callback):
        """Every batch takes 2 seconds, every validation 100."""

        def on_train_batch_start(self, *_: Any) -> None:
            nonlocal now
            now += 2

        def on_validation_epoch_start(self, *_: Any) -> None:
            nonlocal now
            now += 100

    class Rates(pl.Callback):
        values: list[float] = []  # noqa: RUF012

        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if "images_per_second" in trainer.callback_metrics:
                self.values.append(float(trainer.callback_metrics["images_per_second"]))

    monkeypatch.setattr(watching.time, "perf_counter", lambda: now)
    fit(tmp_path, Clock(), Throughput(every_n_batches=2), Rates(), max_epochs=2, val_check_interval=3)
    # Batches of 4 images in 2 seconds.
    assert set(Rates.values) == {2.0}


class Rare(ToyExplainer):
    """Measures something in every second batch, and a mean over the epoch in all of them."""

    def training_step(self, batch: Sample, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        self.log("train/mean", float(batch_idx), on_step=False, on_epoch=True, batch_size=1)
        if batch_idx % 2 == 0:
            self.log("train/rare", float(batch_idx))


def test_what_was_not_measured_in_a_batch_is_not_logged_for_it(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "metrics.csv")
    trainer = toy_trainer(tmp_path, [FreshMetrics()], logger=log, log_every_n_steps=1)
    trainer.fit(Rare(toy_classifier()), ToyData())
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [row["train/rare"] for row in rows] == ["0.0", "", "2.0", ""]
    assert all(row["train/class"] for row in rows)
    assert [row["train/mean"] for row in rows] == ["", "", "", "1.5"]


class Breaks(ToyExplainer):
    """Its proximity term is infinite in one iteration and poisons everything after."""

    def __init__(self, classifier: Any, *, iteration: int) -> None:
        super().__init__(classifier)
        self.iteration = iteration

    def _generator_loss(self, image: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        terms = super()._generator_loss(image, target)
        self.iteration -= 1
        return terms | {"proximity": terms["proximity"] * (torch.inf if self.iteration == 0 else 1)}


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_good_checkpoint(tmp_path: Path) -> None:
    guard = NonFiniteGuard(every_n_batches=100)
    explainer = Breaks(toy_classifier(), iteration=6)
    with pytest.raises(NonFiniteLossError) as caught:
        # Epochs of 4 batches: the guard would look after 100, but the second epoch's checkpoint makes it look at 8.
        fit(tmp_path, guard, LastCheckpoint(), build=lambda: explainer, max_epochs=9)
    assert str(caught.value).startswith("train/proximity is not finite at iteration 6: training stopped")
    assert str(tmp_path / "nonfinite.ckpt") in str(caught.value)
    good, broken = (torch.load(tmp_path / name, weights_only=True) for name in ("last.ckpt", "nonfinite.ckpt"))
    assert good["state_dict"]["class_images"].isfinite().all()
    assert not broken["state_dict"]["class_images"].isfinite().all()
    assert (good["epoch"], broken["epoch"]) == (0, 1)


def test_the_guard_looks_in_between_and_at_the_end(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match="at iteration 2"):
        fit(tmp_path, NonFiniteGuard(every_n_batches=3), build=lambda: Breaks(toy_classifier(), iteration=2))
    with pytest.raises(NonFiniteLossError, match="at iteration 4"):
        fit(tmp_path, NonFiniteGuard(every_n_batches=3), build=lambda: Breaks(toy_classifier(), iteration=4))
