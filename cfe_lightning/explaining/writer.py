"""Turns the explanations of ``Trainer.predict`` into pictures on the disk and rows of the manifest."""

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from tqdm import tqdm

from cfe_lightning import images
from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.compute.clock import clock
from cfe_lightning.compute.memory import BackOff
from cfe_lightning.explainer import ExplainerModule
from cfe_lightning.explaining.findings import Findings, examine, finite_images
from cfe_lightning.explaining.folder import OutputFolder
from cfe_lightning.explaining.names import image_folder, picture_file
from cfe_lightning.explaining.row import Row
from cfe_lightning.explanation import Explanation, seed_of
from cfe_lightning.training.lightning_inside import kill_children, silence_signals


class ExplanationWriter(BasePredictionWriter):
    """Saves every explained image, judges it once more as saved, and records it; knows no method.

    Every process writes its own rows; they are merged once all processes have finished. Each batch starts from its own
    random seed, so that an explanation with random numbers does not depend on the images explained before it.

    Args:
        output: The prepared output folder.
        num_images: Number of images that this process expects, for the progress bar; None or 0 shows no bar.
        animation: Format of an animation of the steps beside the pictures, "gif", "webp" or "mp4"; None writes none.
    """

    def __init__(self, output: OutputFolder, *, num_images: int | None = None, animation: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.output, self.num_images, self.animation = output, num_images, animation
        self._started = 0.0
        self._progress: tqdm[Any] | None = None
        self._pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves signals to the command, which drops the batch in flight; that batch has no rows yet."""
        silence_signals(trainer)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shows the progress of the first process, which is about that of all."""
        if self.num_images and trainer.is_global_zero:
            pause = 0.2 if sys.stderr.isatty() else 10.0  # a log needs no line per batch
            self._progress = tqdm(
                total=self.num_images, desc="explaining", unit="image", mininterval=pause, dynamic_ncols=True
            )

    def on_predict_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
        """Seeds the batch and starts its clock."""
        torch.manual_seed(seed_of(batch["name"]))
        self._started = clock(pl_module.device)

    def write_on_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, prediction: Any, indices: Any, batch: Any, *_: Any
    ) -> None:
        """Saves the pictures of one batch, then records its rows."""
        rows = [Row({**failure, "status": "failed"}) for failure in batch["failed"]]
        if names := batch["name"]:
            assert isinstance(pl_module, ExplainerModule), "explain.py loads nothing else"
            seconds = (clock(pl_module.device) - self._started) / len(names)
            model = (pl_module.num_slices, pl_module.back_off)
            rows += self.save(prediction, pl_module.classifier, names, batch["source"], seconds, *model)
        # The record counts, so it comes last.
        self.output.append(trainer.global_rank, rows)
        if self._progress is not None:
            self._progress.update(len(rows))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Waits until every process has written its last row."""
        self._close()
        trainer.strategy.barrier("explanations written")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves the terminal tidy after an interruption, and no process that waits for this one."""
        self._close()
        kill_children(trainer)

    def save(
        self,
        explanation: Explanation,
        classifier: FrozenClassifier,
        names: Sequence[str],
        sources: Sequence[Sequence[int]],
        seconds: float,
        num_slices: int = 1,
        back_off: BackOff | None = None,
    ) -> list[Row]:
        """Saves the pictures of a batch and returns its rows.

        Args:
            explanation: The batch's explanation.
            classifier: Judges the saved pixels.
            names: The B names.
            sources: The B files' sizes and modification times.
            seconds: Time per image.
            num_slices: Number of slices in an image that is a montage, otherwise 1.
            back_off: Knows how many images fit into memory; judging may need more of it than explaining.

        Raises:
            ValueError: If a folder of pictures is a link that leads out of the output folder.
        """
        found: list[Findings] = (back_off or BackOff()).in_parts(
            len(names),
            lambda rows: examine(explanation.select(rows), classifier, num_slices),
            lambda parts: [*chain.from_iterable(parts)],
        )
        finite = finite_images(explanation).tolist()
        animated = repeat(None) if explanation.steps is None or not self.animation else explanation.steps
        save_one = partial(self._save_one, self.output.path.resolve(), seconds)
        return list(self._pool.map(save_one, names, sources, found, finite, animated))

    def _save_one(
        self, root: Path, seconds: float, name: str, source: Any, found: Findings, finite: bool, steps: Tensor | None
    ) -> Row:
        """Saves the pictures of one image, and its steps [T, C, H, W] as an animation, and returns its row."""
        # Refuse what cannot be saved.
        given: dict[str, Any] = {"name": name, "source": list(source)}
        if not finite:
            return Row(given | {"status": "failed", "error": "The explanation holds values that are not finite."})
        folder = self.output.path / image_folder(name)
        if not folder.resolve().is_relative_to(root):
            raise ValueError(f"{folder} leads out of the output folder: remove that link.")

        # Save, in place of files that an interrupted run left unfinished.
        for unfinished in folder.glob(".*.part"):
            unfinished.unlink()
        files = {key: picture_file(key) for key in found.pictures}
        digests = {key: images.save_image(found.pictures[key], folder / file) for key, file in files.items()}
        if steps is not None:
            images.save_animation(steps.float().cpu(), folder / f"steps.{self.animation}")
        given |= {"status": "ok", "seconds": seconds, "folder": image_folder(name)}
        return Row.of(found, **given, files=files, digests=digests)

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.close()
            self._progress = None
