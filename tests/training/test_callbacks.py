"""EMA, sample grids, throughput, the guard against losses that are no number, W&B without a network."""

from __future__ import annotations

import csv
import logging
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image
from toy import FixedToyExplainer, ToyData, ToyExplainer, toy_classifier, toy_images, toy_trainer

from cfe_lightning.data.base import Sample
from cfe_lightning.explanation import Explanation
from cfe_lightning.training import (
    EMA,
    LastCheckpoint,
    NonFiniteGuard,
    SampleGrid,
    Throughput,
    callbacks,
)
from cfe_lightning.training.csv_log import CsvLog
from cfe_lightning.training.samples import draw_samples
from cfe_lightning.training.watching import FreshMetrics, NonFiniteLossError

pytestmark = pytest.mark.filterwarnings("ignore:.*in eval mode at the start.*", "ignore:.*LeafSpec.*")


class History(pl.Callback):
    """Keeps the weights after every batch."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.weights.append({name: value.clone() for name, value in pl_module.state_dict().items()})


def plain_toy() -> ToyExplainer:
    return ToyExplainer(toy_classifier())


def fit(
    folder: Path, *added: pl.Callback, build: Callable[[], ToyExplainer] = plain_toy, **arguments: Any
) -> ToyExplainer:
    pl.seed_everything(0, verbose=False)
    explainer = build()
    toy_trainer(folder, added, **arguments).fit(explainer, ToyData(horizontal_flip=True))
    return explainer


def random_classifier():
    classifier = toy_classifier()
    torch.manual_seed(5)
    for value in classifier.network.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.1, 1.1)  # numbers that a careless average would move by a rounding error
    return classifier


def test_ema_is_the_formula_once_per_batch_and_leaves_the_classifier_alone(tmp_path: Path) -> None:
    history, ema = History(), EMA(0.6)
    explainer = ToyExplainer(random_classifier())
    fingerprint = explainer.classifier.fingerprint()
    # max_epochs 3 of 4 batches, two optimisers: an update per optimiser step would give another average.
    fit(tmp_path, history, ema, LastCheckpoint(), build=lambda: explainer, max_epochs=3)
    expected = history.weights[0]["class_images"]
    for count, weights in enumerate(history.weights[1:], start=1):
        expected = expected.lerp(weights["class_images"], 1 - min(0.6, (1 + count) / (10 + count)))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["class_images"], expected)
    assert torch.equal(saved["current_model_state"]["class_images"], history.weights[-1]["class_images"])
    assert saved["averaging_state"]["n_averaged"] == 12
    # Buffers are copied, not averaged; the trained module ends as the average.
    assert saved["state_dict"]["seen"] == 48
    assert torch.equal(explainer.class_images, expected)
    assert explainer.classifier.fingerprint() == fingerprint
    assert all(torch.equal(v, explainer.state_dict()[k]) for k, v in saved["state_dict"].items())


def test_validation_sees_the_average_and_training_goes_on_without_it(tmp_path: Path) -> None:
    class Validated(pl.Callback):
        seen: torch.Tensor

        def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            self.seen = pl_module.class_images.detach().clone()

    plain, averaged, validated = History(), History(), Validated()
    fit(tmp_path, plain, max_epochs=2)
    explainer = fit(tmp_path, averaged, EMA(0.9), validated, max_epochs=2)
    assert torch.equal(validated.seen, explainer.class_images)
    for one, other in zip(plain.weights, averaged.weights, strict=True):
        assert torch.equal(one["class_images"], other["class_images"])


def test_ema_refuses_a_decay_of_one() -> None:
    with pytest.raises(ValueError, match=r"decay of EMA must be in \[0, 1\), got 1"):
        EMA(1.0)


class Restless(ToyExplainer):
    """Draws random numbers and looks at its mode whenever it explains."""

    def explain(self, image: torch.Tensor, target: torch.Tensor | None = None) -> Explanation:
        torch.rand(3)
        self.modes = {*getattr(self, "modes", ()), self.training}
        return super().explain(image, target)


def test_a_run_with_sample_grids_is_the_same_run_bit_for_bit(tmp_path: Path) -> None:
    def run(*added: pl.Callback) -> tuple[Restless, History]:
        history = History()
        explainer = fit(tmp_path, *added, history, build=lambda: Restless(toy_classifier()), max_epochs=2)
        assert isinstance(explainer, Restless)
        return explainer, history

    _, plain = run(EMA(0.9))
    explainer, drawn = run(EMA(0.9), SampleGrid(every_n_batches=3, num_images=2))
    for one, other in zip(plain.weights, drawn.weights, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert explainer.modes == {True, False}
    # Before the first batch and after every third of 8.
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "00000000.png",
        "00000003.png",
        "00000006.png",
    ]


def test_layers_keep_their_own_mode(tmp_path: Path) -> None:
    explainer = ToyExplainer(toy_classifier())
    frozen_part = torch.nn.Dropout().eval()
    explainer.extra = frozen_part

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            assert pl_module.training
            assert not frozen_part.training
            assert not pl_module.classifier.training

    fit(tmp_path, SampleGrid(every_n_batches=1, num_images=1), Look(), build=lambda: explainer)


def test_sample_grids_explain_with_the_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def spy(explanation: Explanation, class_names: Any) -> Image.Image:
        seen.append(explanation.parts["distinct"])
        return draw_samples(explanation, class_names)

    monkeypatch.setattr(callbacks, "draw_samples", spy)
    explainer = fit(tmp_path, EMA(0.9), SampleGrid(every_n_batches=4, num_images=2))
    # The trained module ends as the average, so it must explain as the last grid did.
    image = torch.stack([toy_images(16)[index] for index in (0, 8)])
    assert len(seen) == 2
    assert torch.equal(seen[-1], explainer.explain(image).parts["distinct"])


def test_the_grid_shows_every_column_and_goes_to_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Logged(DummyLogger):
        calls: list[dict[str, Any]] = []  # noqa: RUF012

        def log_image(self, **arguments: Any) -> None:
            self.calls.append(arguments)

    monkeypatch.setattr(callbacks, "WandbLogger", Logged)
    fit(tmp_path, SampleGrid(every_n_batches=4, num_images=2), logger=Logged())
    picture = Image.open(tmp_path / "samples" / "00000004.png")
    # image, four parts, counterfactual, three steps, attribution; 16 pixels are enlarged to 96, two rows.
    assert picture.size == (150 + 10 * (96 + 4), 18 + 2 * (96 + 4))
    assert [call["step"] for call in Logged.calls] == [0, 4]
    assert Logged.calls[1]["caption"] == ["after 4 batches"]


def test_attribution_alone_can_be_drawn() -> None:
    explanation = FixedToyExplainer(toy_classifier()).explain(toy_images(3))
    bare = Explanation(
        image=explanation.image,
        logits=explanation.logits,
        target=explanation.target,
        attribution=explanation.attribution,
    )
    assert draw_samples(bare, ("a", "b"), tile=16).size == (150 + 2 * (16 + 4), 18 + 3 * (16 + 4))


@pytest.mark.parametrize(("every_n_batches", "num_images"), [(0, 8), (10, 0)])
def test_sample_grid_refuses_nothing(every_n_batches: int, num_images: int) -> None:
    with pytest.raises(ValueError, match="every_n_batches and num_images must be positive"):
        SampleGrid(every_n_batches, num_images)


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

    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now)
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


@pytest.mark.parametrize("mode", [None, "online"])
@pytest.mark.parametrize(
    ("has_key", "reachable", "reason"),
    [(False, True, "no API key is configured"), (True, False, "cannot be reached"), (True, True, None)],
)
def test_wandb_without_key_or_network_is_offline_and_says_so_once(
    has_key: bool,
    reachable: bool,
    reason: str | None,
    mode: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE")
    if mode is not None:
        monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_SILENT", "false")
    monkeypatch.delenv("WANDB_SILENT")
    settings = types.SimpleNamespace(base_url="https://wandb.invalid")
    monkeypatch.setattr(wandb, "setup", lambda: types.SimpleNamespace(settings=settings))
    monkeypatch.setattr(wandb, "teardown", lambda: None)
    monkeypatch.setattr(wandb, "login", lambda **_: has_key)
    monkeypatch.setattr(callbacks, "_reachable", lambda host: reachable)
    with caplog.at_level(logging.WARNING, logger="cfe_lightning"):
        assert callbacks.wandb_must_be_offline() == (reason is not None)
    assert len(caplog.messages) == (reason is not None)
    # W&B itself would say the same again.
    assert ("WANDB_SILENT" in os.environ) == (reason is not None)
    assert reason is None or reason in caplog.messages[0]


@pytest.mark.parametrize("mode", ["offline", "disabled", "shared"])
def test_the_users_wandb_mode_is_respected(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    assert not callbacks.wandb_must_be_offline()


def test_a_host_that_does_not_exist_is_not_reachable() -> None:
    assert not callbacks._reachable("http://127.0.0.1:9")
