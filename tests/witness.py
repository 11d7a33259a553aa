"""A callback that records the training in every process, for tests that compare processes.

A steady witness also makes the training independent of the division of images among processes: functions that draw
random numbers then give every image the same numbers.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfe_lightning.data.base import Sample
from cfe_lightning.methods.stylex import critic as style_critic
from cfe_lightning.training import EMA


class Witness(pl.Callback):
    """Writes the images, gradients, weights and logged values of every process.

    ``<rank>.json`` at the end of the training holds names of images, states of the generator and sums of weights.
    ``<rank>.pt`` holds:

    ``gradients``: for each of the first steps the optimiser's ``parameters``, and by parameter the gradient that the
    optimiser saw (``seen``) and the one that this process had computed (``local``); ``state`` and ``averaged``: all
    weights after the last batch and those of ``EMA``; ``measured``: the weights of the last validation; ``train`` and
    ``val``: the logged values, per batch and per validation; ``written``: files opened for writing, by name and number.

    Args:
        folder: Folder of the written files.
        steady: Makes nothing depend on the division of images among processes: random numbers are the same for every
            image, critics do not compare the images of a batch, and Adam forgives rounding.
        num_steps: Optimiser steps with recorded gradients.
    """

    def __init__(self, folder: str, *, steady: bool = False, num_steps: int = 24) -> None:
        self.folder = Path(folder).absolute()
        self.steady = steady
        self.num_steps = num_steps
        self.names: list[str] = []
        self.draws: list[float] = []
        self.local: dict[str, Tensor] = {}
        self.record: dict[str, Any] = {"gradients": [], "train": [], "val": [], "written": {}}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sys.addaudithook(self._note_file)
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(functools.partial(self._note_gradient, name, parameter))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.steady:
            # The sign of a gradient of pure rounding would move a weight by the whole learning rate.
            for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
                group["eps"] = 1e-3

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Sample, *_: Any) -> None:
        self.names += batch["name"]
        self.draws.append(torch.get_rng_state().sum().item())
        self._hold(self.steady)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        named = {name: value for name, value in pl_module.named_parameters() if id(value) in mine}
        if len(self.record["gradients"]) < self.num_steps:
            seen = {name: value.grad.clone() for name, value in named.items() if value.grad is not None}
            local = {name: self.local[name] for name in seen if name in self.local}
            self.record["gradients"].append({"parameters": sorted(named), "seen": seen, "local": local})

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._hold(False)
        self.record["train"].append(_logged(trainer, "train/"))
        self.record["state"] = {name: value.detach().clone() for name, value in _weights(pl_module)}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EMA) and callback._average_model is not None:
                averaged = _weights(callback._average_model.module)
                self.record["averaged"] = {name: value.detach().clone() for name, value in averaged}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._hold(self.steady)

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.record["measured"] = {name: value.detach().clone() for name, value in _weights(pl_module)}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._hold(False)
        if not trainer.sanity_checking:
            self.record["val"].append(_logged(trainer, "val/"))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Magnitudes, because the images of two classes may be each other's negative.
        weights = {name: value.double().abs().sum().item() for name, value in pl_module.named_parameters()}
        seen = {"names": self.names, "draws": self.draws, "weights": weights}
        if hasattr(pl_module, "classifier") and hasattr(pl_module.classifier, "fingerprint"):
            seen["classifier"] = pl_module.classifier.fingerprint()  # type: ignore[operator]
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(seen))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        written, self.record["written"] = dict(self.record["written"]), {}
        torch.save(self.record | {"written": written}, self.folder / f"{trainer.global_rank}.pt")

    def _note_gradient(self, name: str, parameter: Tensor, gradient: Tensor) -> None:
        before = self.local.get(name) if parameter.grad is not None else None
        self.local[name] = gradient.detach().clone() if before is None else before + gradient.detach()

    def _note_file(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open":
            return
        path, mode, flags = arguments
        writes = set(mode or "") & set("wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR)
        if writes and isinstance(path, str | os.PathLike):
            path = Path(path).absolute()
            if path.is_relative_to(Path.cwd()) and not path.is_relative_to(self.folder):
                name = str(path.relative_to(Path.cwd()))
                self.record["written"][name] = self.record["written"].get(name, 0) + 1

    def _hold(self, steady: bool) -> None:
        for module, name, stand_in in _STEADY:
            true = _TRUE.setdefault((module, name), getattr(module, name))
            setattr(module, name, stand_in if steady else true)


def _logged(trainer: pl.Trainer, prefix: str) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}


def _weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _wave(size: Sequence[int], **options: Any) -> Tensor:
    """Returns numbers between -1 and 1 that differ along the last dimension only; constant if there is no other."""
    chosen = {name: value for name, value in options.items() if name in ("device", "dtype")}
    along = torch.arange(size[-1] if len(size) > 1 else 1, **chosen) * 1.7 + 0.4
    return along.sin().expand(*size).clone()


def _sizes(size: tuple[Any, ...]) -> Sequence[int]:
    return size if all(isinstance(one, int) for one in size) else size[0]


def _steady_randint(*arguments: Any, **options: Any) -> Tensor:
    *limits, size = arguments
    low, high = (0, *limits)[-2:]
    return torch.full(size, (low + high) // 2, device=options.get("device"))


#: Functions that draw numbers in a training step, each with its replacement in a steady training.
_STEADY: tuple[tuple[Any, str, Callable[..., Tensor]], ...] = (
    (torch, "randn", lambda *size, **options: _wave(_sizes(size), **options)),
    (torch, "rand", lambda *size, **options: _wave(_sizes(size), **options).abs()),
    (torch, "randn_like", lambda x: _wave(x.shape, device=x.device, dtype=x.dtype)),
    (torch, "randint", _steady_randint),
    (torch, "randperm", lambda count, **options: torch.arange(count, device=options.get("device"))),
    (style_critic, "stddev_map", lambda x, *_: F.pad(x, (0, 0, 0, 0, 0, 1))),
)
_TRUE: dict[tuple[Any, str], Any] = {}
