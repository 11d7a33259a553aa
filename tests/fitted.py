"""Short training runs of the toy, and a record of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from toy import ToyData, ToyExplainer, toy_classifier, toy_trainer


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
