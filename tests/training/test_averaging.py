"""EMA, sample grids, throughput, the guard against losses that are no number, W&B without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fitted import History, fit, random_classifier
from toy import ToyExplainer

from cfe_lightning.training import (
    EMA,
    LastCheckpoint,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*in eval mode at the start.*", "ignore:.*LeafSpec.*")


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
