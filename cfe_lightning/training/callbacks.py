"""What a training run does besides training: averaged weights, sample grids, throughput, the guard, the W&B run.

Iterations are counted in training batches: Lightning's ``global_step`` counts optimiser steps, two per batch for a GAN.
"""

from __future__ import annotations

import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import default_collate

from cfe_lightning.explanation import Explanation
from cfe_lightning.files.atomic import whole_path
from cfe_lightning.training.drawing import draw_samples, draw_table

log = logging.getLogger(__name__)

_WANDB_MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")


def iteration(trainer: pl.Trainer) -> int:
    """Training batches finished so far, over all epochs; call it after a batch or before the first."""
    return trainer.fit_loop.total_batch_idx + 1


class EMA(WeightAveraging):
    """Exponential moving average of the weights; checkpoints and validation hold the average, buffers are copied.

    The first average is the model after one batch; from then on the decay grows as (1 + n) / (10 + n), so a short run
    is not dominated by its random start. Frozen weights stay bit-identical: ``lerp`` between equal numbers is exact,
    which Lightning's own average is not.

    Args:
        decay: The largest share of the old average that is kept per training batch.
    """

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__(use_buffers=False, multi_avg_fn=self._blend)
        if not 0 <= decay < 1:
            raise ValueError(f"The decay of EMA must be in [0, 1), got {decay}.")
        self.decay = decay

    def _blend(self, averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor) -> None:
        del num_averaged  # the copy on the accelerator: reading it would wait for the device
        assert self._average_model is not None, "EMA averages only during fit"
        count = int(self._average_model.n_averaged)
        weight = 1 - min(self.decay, (1 + count) / (10 + count))
        torch._foreach_lerp_(averaged, current, weight)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Keeps the counter on the CPU: it is read after every batch."""
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            self._average_model.n_averaged = self._average_model.n_averaged.cpu()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps what a validation has stored in buffers: it belongs to the average and to the model that goes on."""
        super().on_validation_epoch_end(trainer, pl_module)
        # Before the first batch the average may know less than the model, which a method can have fitted already.
        if self._average_model is not None and not trainer.sanity_checking:
            for current, averaged in zip(pl_module.buffers(), self._average_model.module.buffers(), strict=True):
                current.data.copy_(averaged.data)

    @contextmanager
    def averaged(self, pl_module: pl.LightningModule) -> Iterator[None]:
        """The module holds the averaged weights inside, and exactly its own again after."""
        self._swap_models(pl_module)
        try:
            yield
        finally:
            self._swap_models(pl_module)


class SampleGrid(pl.Callback):
    """Draws the same validation images at the start and every ``every_n_batches`` and keeps the pictures.

    One row per image: the image, its parts, the counterfactual, the steps, the attribution; the predicted class with
    its probability and that of the target before and after. A module that explains nothing says in ``samples`` what is
    shown: images [B, C, H, W] to named columns and row labels, as ``draw_table`` takes them. Written to
    ``<folder>/samples/<iteration>.png`` and to W&B where that is a logger. Uses the averaged weights when ``EMA`` is a
    callback too (list ``EMA`` first). Random state, training mode and gradients are left as they were, so a run is the
    same with and without.

    Args:
        every_n_batches: Training batches between two grids.
        num_images: Rows, taken evenly over the validation split.
        folder: Where the pictures go; None takes the trainer's ``default_root_dir``, the run folder of ``train.py``.
    """

    def __init__(self, every_n_batches: int = 1000, num_images: int = 8, folder: str | None = None) -> None:
        if every_n_batches < 1 or num_images < 1:
            raise ValueError(
                f"every_n_batches and num_images must be positive, got {every_n_batches} and {num_images}."
            )
        self.every_n_batches = every_n_batches
        self.num_images = num_images
        self.folder = folder
        self._image: Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws with the untrained weights; not again when a run is resumed."""
        if trainer.is_global_zero and iteration(trainer) == 0:
            self._draw(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draws every ``every_n_batches``."""
        if trainer.is_global_zero and iteration(trainer) % self.every_n_batches == 0:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        averaging = next((callback for callback in trainer.callbacks if isinstance(callback, EMA)), None)  # type: ignore[attr-defined]
        with isolate_rng(), _evaluating(pl_module), torch.no_grad():
            if self._image is None:
                self._image = self._fixed_images(trainer)
            image = self._image.to(pl_module.device)
            with averaging.averaged(pl_module) if averaging else nullcontext():
                if hasattr(pl_module, "samples"):
                    picture = draw_table(*pl_module.samples(image))  # type: ignore[operator]
                else:
                    explanation: Explanation = pl_module.explain(image)  # type: ignore[operator]
                    names = pl_module.classifier.class_names  # type: ignore[union-attr]
                    picture = draw_samples(explanation, names)  # type: ignore[arg-type]
        step = iteration(trainer)
        path = Path(self.folder or trainer.default_root_dir) / "samples" / f"{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_path(path) as temporary:
            picture.save(temporary, format="PNG")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image(key="samples", images=[picture], step=step, caption=[f"after {step} batches"])

    def _fixed_images(self, trainer: pl.Trainer) -> Tensor:
        """Evenly spaced over the split: folders are often sorted by class."""
        dataset = trainer.datamodule.val_dataloader().dataset  # type: ignore[attr-defined]
        count = min(self.num_images, len(dataset))
        indices = [position * len(dataset) // count for position in range(count)]
        return default_collate([dataset[index]["image"] for index in indices])


@contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside, and every layer's own mode again after: some layers stay in eval mode during training."""
    modes = [(layer, layer.training) for layer in module.modules()]
    module.eval()
    try:
        yield
    finally:
        # A module may forget what it has cached for explaining when its mode is changed.
        module.train(modes[0][1])
        for layer, mode in modes:
            layer.training = mode


class Throughput(pl.Callback):
    """Logs ``images_per_second`` of training, over all processes and without validation.

    Args:
        every_n_batches: Training batches per measurement; a window hides that accelerators run behind.
    """

    def __init__(self, every_n_batches: int = 50) -> None:
        self.every_n_batches = every_n_batches
        self._images = 0
        self._start: float | None = None
        self._paused = 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Starts a window after the first batch, which is slower than all others, and logs at its end."""
        now = time.perf_counter()
        if self._start is None:
            self._images, self._start, self._paused = 0, now, 0.0
            return
        self._images += len(batch["image"]) * trainer.world_size
        if iteration(trainer) % self.every_n_batches == 0:
            elapsed = now - self._start - self._paused
            pl_module.log("images_per_second", self._images / max(elapsed, 1e-9), batch_size=1)
            self._images, self._start, self._paused = 0, now, 0.0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock."""
        self._paused -= time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock again."""
        self._paused += time.perf_counter()


class FreshMetrics(pl.Callback):
    """Logs of every training batch only what was measured in it.

    Lightning repeats the last value of what is not measured in every batch until the epoch ends: a penalty that is due
    now and then, the throughput. A resumed run cannot know it, so its log would differ.
    """

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Forgets the batch before; means over an epoch go on."""
        assert trainer._results is not None, "there are results while batches are trained on"
        for metric in trainer._results.values():
            if not metric.meta.on_epoch:
                metric.reset()


class NonFiniteLossError(RuntimeError):
    """A loss became infinite or not a number; the message names iteration and term."""


class NonFiniteGuard(pl.Callback):
    """Stops a run whose loss is no number, and never lets such weights replace a good checkpoint.

    The first bad iteration of every ``train/<term>`` is noted on the device and read only every ``every_n_batches`` and
    before a checkpoint is written, so the device is not waited for after every batch. The broken state is saved as
    ``nonfinite.ckpt`` for inspection; ``last.ckpt`` stays from before.

    Args:
        every_n_batches: Training batches between two looks.
    """

    def __init__(self, every_n_batches: int = 50) -> None:
        self.every_n_batches = every_n_batches
        self._first_bad: dict[tuple[str, ...], Tensor] = {}
        self._saving = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes this batch's terms, looks at what was noted when it is time."""
        step = iteration(trainer)
        terms = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
        if terms:
            values = torch.stack([value.float() for value in terms.values()])
            now = torch.where(values.isfinite(), torch.inf, float(step))
            names = tuple(terms)
            self._first_bad[names] = torch.minimum(self._first_bad.get(names, now), now)
        if step % self.every_n_batches == 0:
            self._look(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Looks before anything is written."""
        if not self._saving:
            self._look(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks at the last batches."""
        self._look(trainer)

    def _look(self, trainer: pl.Trainer) -> None:
        first = [
            (step, name)
            for names, steps in self._first_bad.items()
            for step, name in zip(steps.tolist(), names, strict=True)
        ]
        bad = [(step, name) for step, name in first if step < float("inf")]
        if not trainer.strategy.reduce_boolean_decision(bool(bad), all=False):
            return
        path = Path(trainer.default_root_dir) / "nonfinite.ckpt"
        self._saving = True
        trainer.save_checkpoint(path)
        # Of terms that break in the same iteration the one that is logged first: the others follow from it.
        step, name = min(bad, key=lambda item: item[0], default=(float("nan"), "a loss of another process"))
        raise NonFiniteLossError(
            f"{name} is not finite at iteration {step:.0f}: training stopped and its state was saved as {path}; the "
            "checkpoints before are untouched. Lower the learning rate or use 32-bit precision, then --resume."
        )


class WandbRun(pl.Callback):
    """Keeps the id of the W&B run in the checkpoint, so that a resumed training continues the same curves."""

    def __init__(self) -> None:
        self._id: str | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Takes the id of the run that the logger has started."""
        ids = [logger.version for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        self._id = ids[0] if ids else None

    def state_dict(self) -> dict[str, Any]:
        """The id; None without W&B."""
        return {"id": self._id}

    @staticmethod
    def run_id(checkpoint: dict[str, Any]) -> str | None:
        """The id that a checkpoint holds."""
        return checkpoint.get("callbacks", {}).get("WandbRun", {}).get("id")


def wandb_is_installed() -> bool:
    """Whether there is W&B to log to; a run goes on without it, and that is said in one line."""
    try:
        # The name is asked for, too: without the package, a folder wandb/ that runs have left is imported.
        from wandb import init  # noqa: F401
    except ImportError as error:
        log.warning("W&B cannot be used (%s): metrics.csv and samples/ hold all there is to log.", error)
        return False
    return True


def wandb_must_be_offline() -> bool:
    """Whether W&B could only ask for a key or wait for a network, which is said in one line.

    A ``WANDB_MODE`` of the user is respected, but ``online`` is W&B's default anyway and helps no run without a key.

    Raises:
        ValueError: If a setting of W&B in the environment cannot be used.
    """
    mode = os.environ.get("WANDB_MODE", "online")
    if mode not in _WANDB_MODES:
        raise ValueError(f"WANDB_MODE={mode!r} is no mode of W&B: choose from {', '.join(_WANDB_MODES)}, or unset it.")
    if mode != "online":
        return False
    import wandb

    try:
        host = str(wandb.setup().settings.base_url)
    except ValueError as error:
        # A report of pydantic's: a headline, then setting, reason and technical remarks.
        why = " ".join(str(error).partition("\n")[2].partition("[type=")[0].split()) or str(error)
        raise ValueError(
            f"W&B refuses one of its environment variables WANDB_... ({why}): correct or unset it, or train with "
            "--trainer.logger false."
        ) from error
    reason = None
    try:
        if not wandb.login(prompt=False, verify=False):
            reason = "no API key is configured (WANDB_API_KEY or `wandb login`)"
        elif not _reachable(host):
            reason = f"{host} cannot be reached"
        else:
            wandb.login(prompt=False, verify=True)
    except wandb.Error as error:
        reason = " ".join(str(error).split())
    if reason is None:
        return False
    log.warning("W&B logs offline: %s; upload later with `wandb sync`.", reason)
    # It would say the same again in more words; it reads the environment when it is set up anew.
    os.environ.setdefault("WANDB_SILENT", "true")
    wandb.teardown()
    wandb.setup()
    return True


def _reachable(host: str, seconds: float = 5.0) -> bool:
    try:
        with urllib.request.urlopen(host, timeout=seconds):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
