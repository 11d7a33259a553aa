"""Turns the explanations of ``Trainer.predict`` into pictures on the disk and rows of the manifest."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from tqdm import tqdm

from cfe_lightning import images
from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.compute.clock import clock
from cfe_lightning.compute.memory import BackOff
from cfe_lightning.compute.signals import kill_children, silence_trainer
from cfe_lightning.decisions import decides_for
from cfe_lightning.explaining.folder import OutputFolder, Row, image_folder, part_file
from cfe_lightning.explaining.saved_change import measure
from cfe_lightning.explanation import Explanation, draw_part, seed_of
from cfe_lightning.files.text import significant

Batch = dict[str, Any]


class ExplanationWriter(BasePredictionWriter):
    """Saves every explained image, judges it once more as saved, and records it; knows no method.

    Every process writes its own rows; they are merged when all are through. Each batch starts from its own random
    seed, so that an explanation with random numbers does not depend on what was explained before it.

    Args:
        output: Where to, prepared.
        num_images: How many images this process expects, for the progress bar; None or 0 shows no bar.
        animation: Format of an animation of the steps beside the pictures, "gif", "webp" or "mp4"; None writes none.
    """

    def __init__(self, output: OutputFolder, *, num_images: int | None = None, animation: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.output = output
        self.num_images = num_images
        self.animation = animation
        self._started = 0.0
        self._progress: tqdm[Any] | None = None
        self._pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves signals to the command: it drops the batch in flight, of which no row is written."""
        silence_trainer(trainer)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Shows the progress of the first process, which is about that of all."""
        if self.num_images and trainer.is_global_zero:
            pause = 0.2 if sys.stderr.isatty() else 10.0  # a log needs no line per batch
            self._progress = tqdm(
                total=self.num_images, desc="explaining", unit="image", mininterval=pause, dynamic_ncols=True
            )

    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Seeds the batch and starts its clock."""
        torch.manual_seed(seed_of(batch["name"]))
        self._started = clock(pl_module.device)

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Explanation,
        batch_indices: Sequence[int] | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Saves the pictures of one batch, then records its rows."""
        count = len(batch["name"])
        rows: list[Row] = [{**failure, "status": "failed"} for failure in batch["failed"]]
        if count:
            seconds = (clock(pl_module.device) - self._started) / count
            classifier = pl_module.classifier
            assert isinstance(classifier, FrozenClassifier), "every explainer has one"
            num_slices = pl_module.num_slices
            assert isinstance(num_slices, int), "every explainer says how many"
            back_off = pl_module.back_off
            assert isinstance(back_off, BackOff), "every explainer has one"
            rows += self.save(prediction, classifier, batch["name"], batch["source"], seconds, num_slices, back_off)
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
            num_slices: Of images that are montages.
            back_off: Knows how many images fit into memory; judging may need more of it than explaining.
        """

        def judge(rows: slice) -> list[_Seen]:
            return _see(explanation.select(rows), classifier, num_slices)

        def together(parts: list[list[_Seen]]) -> list[_Seen]:
            return [*chain.from_iterable(parts)]

        seen = (back_off or BackOff()).in_parts(len(names), judge, together)
        finite = _finite(explanation).tolist()
        root = self.output.path.resolve()

        def save_one(index: int) -> Row:
            one = seen[index]
            row: Row = {"name": names[index], "source": list(sources[index]), "status": "ok"}
            if not finite[index]:
                return row | {"status": "failed", "error": "The explanation holds values that are not finite."}
            folder = image_folder(names[index])
            if not (self.output.path / folder).resolve().is_relative_to(root):
                raise ValueError(f"{self.output.path / folder} leads out of the output folder: remove that link.")
            # What an interrupted run was just writing here.
            for unfinished in (self.output.path / folder).glob(".*.part"):
                unfinished.unlink()
            digests = {
                file: images.save_image(picture, self.output.path / folder / file)
                for file, picture in one.pictures.items()
            }
            files = {key: file for key, file in _keys(explanation).items() if file in one.pictures}
            if self.animation and explanation.steps is not None:
                steps = explanation.steps[index].float().cpu()
                images.save_animation(steps, self.output.path / folder / f"steps.{self.animation}")
            row |= one.judged.row(one.place, classifier.class_names)
            row |= {key: _number(value) if isinstance(value, float) else value for key, value in one.measured.items()}
            caveats = [clause for clause, holds in explanation.caveats.items() if bool(holds[index])]
            row["note"] = "; ".join(filter(None, [row["note"], *caveats])) or None
            row |= {
                "seconds": _number(seconds),
                "folder": folder,
                "files": files,
                "digests": {key: digests[file] for key, file in files.items()},
                "gains": {name: _number(gain) for name, gain in one.gains.items()},
                "scores": {name: _number(score[index]) for name, score in explanation.scores.items()},
            }
            return row

        return list(self._pool.map(save_one, range(len(names))))

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.close()
            self._progress = None


@dataclass(kw_only=True, slots=True)
class _Judged:
    """What the classifier says about a batch, on the CPU; None where there is no counterfactual or no path."""

    predicted: Tensor  # [B]
    target: Tensor  # [B]
    before: Tensor  # probabilities, [B, K]
    after: Tensor | None  # [B, K]
    flipped: Tensor | None  # [B] bool
    saved: Tensor | None  # probabilities of the counterfactual as saved, [B, K]
    flipped_saved: Tensor | None  # [B] bool
    distance: Tensor | None  # [B], mean absolute change on [0, 1]
    scale: Tensor | None  # [B], the change in full colour on the difference picture, on [0, 1]
    path: Tensor | None  # probabilities of the saved steps, [B, T, K]
    strengths: Tensor | None  # [B, T]
    intended: Tensor | None  # probabilities that the method meant the steps to have, [B, T, K]
    step_scores: dict[str, Tensor]  # [B, T] each
    motion: Tensor | None  # the longest arrow in pixels, [B]

    def newly_decided(self) -> Tensor | None:
        """Whose saved counterfactual is decided for a target other than its own class, [B] bool."""
        return None if self.flipped_saved is None else self.flipped_saved & (self.predicted != self.target)

    def row(self, index: int, class_names: Sequence[str]) -> Row:
        """The part of the manifest's row that concerns decisions."""
        predicted, target = int(self.predicted[index]), int(self.target[index])
        same = predicted == target
        after = None if self.after is None else self.after[index]
        row: Row = {
            "predicted": class_names[predicted],
            "p_predicted_before": _number(self.before[index, predicted]),
            "p_predicted_after": None if after is None else _number(after[predicted]),
            "target": class_names[target],
            "p_target_before": _number(self.before[index, target]),
            "p_target_after": None if after is None else _number(after[target]),
            "p_predicted_saved": None if self.saved is None else _number(self.saved[index, predicted]),
            "p_target_saved": None if self.saved is None else _number(self.saved[index, target]),
            "flipped": None if self.flipped is None or same else bool(self.flipped[index]),
            "flipped_saved": None if self.flipped_saved is None or same else bool(self.flipped_saved[index]),
            "l1": None if self.distance is None else _number(self.distance[index]),
            "note": "already predicted as the target: nothing to flip" if same else None,
            "difference_scale": None if self.scale is None else _number(self.scale[index]),
            "motion_scale": None if self.motion is None else _number(self.motion[index]),
        }
        if self.path is not None and self.strengths is not None:
            row["curve"] = {
                "strength": [_number(value) for value in self.strengths[index]],
                "predicted": [_number(value) for value in self.path[index, :, predicted]],
                "target": [_number(value) for value in self.path[index, :, target]],
            }
            if self.intended is not None:
                row["curve"] |= {
                    "intended_predicted": [_number(value) for value in self.intended[index, :, predicted]],
                    "intended_target": [_number(value) for value in self.intended[index, :, target]],
                }
            if self.step_scores:
                row["curve"]["scores"] = {
                    name: [_number(value) for value in score[index]] for name, score in self.step_scores.items()
                }
        return row


class _Seen(NamedTuple):
    """What is to be saved of one image, on the CPU.

    Attributes:
        judged: What the classifier says about it and its neighbours.
        place: Its own among them.
        measured: Of the change, see ``measure``.
        pictures: By file name, [C, H, W] in [-1, 1].
        gains: Of the differences among them, [].
    """

    judged: _Judged
    place: int
    measured: Row
    pictures: dict[str, Tensor]
    gains: dict[str, Tensor]


def _see(explanation: Explanation, classifier: FrozenClassifier, num_slices: int) -> list[_Seen]:
    """Everything that needs memory of the device."""
    judged = _judge(explanation, classifier)
    measured = measure(explanation, classifier, judged.newly_decided(), num_slices)
    pictures, gains = _pictures(explanation)
    seen = []
    for place, row in enumerate(measured):
        own = ({name: value[place] for name, value in each.items()} for each in (pictures, gains))
        seen.append(_Seen(judged, place, row, *own))
    return seen


@torch.no_grad()
def _judge(explanation: Explanation, classifier: FrozenClassifier) -> _Judged:
    counterfactual, logits_after, steps = (
        explanation.counterfactual,
        explanation.counterfactual_logits,
        explanation.steps,
    )
    saved = flipped_saved = distance = scale = path = None
    if counterfactual is not None:
        # The image that is judged is the image that is saved (evaluation, rule R4).
        judged_saved = classifier(images.saved(counterfactual.float())).float()
        saved = judged_saved.softmax(dim=1).cpu()
        flipped_saved = decides_for(judged_saved, explanation.target).cpu()
        change = images.visible_change(explanation.image, counterfactual)
        distance = change.abs().mean(dim=(1, 2, 3)).cpu()
        scale = change.abs().amax(dim=(1, 2, 3)).cpu()
    if steps is not None:
        # One step of all images at a time: the classifier then needs no more memory than for the images.
        judged = [classifier(images.saved(step.float())).softmax(dim=1) for step in steps.unbind(dim=1)]
        path = torch.stack(judged, dim=1).cpu()
    return _Judged(
        predicted=explanation.predicted.cpu(),
        target=explanation.target.cpu(),
        before=explanation.logits.float().softmax(dim=1).cpu(),
        after=None if logits_after is None else logits_after.float().softmax(dim=1).cpu(),
        flipped=None if explanation.flipped is None else explanation.flipped.cpu(),
        saved=saved,
        flipped_saved=flipped_saved,
        distance=distance,
        scale=scale,
        path=path,
        strengths=None if explanation.strengths is None else explanation.strengths.cpu(),
        intended=None if explanation.intended is None else explanation.intended.float().softmax(dim=2).cpu(),
        step_scores={name: score.cpu() for name, score in explanation.step_scores.items()},
        motion=None
        if explanation.motion is None
        else images.arrows(explanation.motion).norm(dim=1).amax(dim=(1, 2)).cpu(),
    )


def _pictures(explanation: Explanation) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every picture to be saved by file name, [B, C, H, W] in [-1, 1], and the gains of the differences, [B]."""
    pictures = {"image.png": explanation.image, "attribution.png": images.heat_map(explanation.attribution.float())}
    gains: dict[str, Tensor] = {}
    if explanation.counterfactual is not None:
        pictures["counterfactual.png"] = explanation.counterfactual
        pictures["difference.png"] = images.signed_difference(
            images.visible_change(explanation.image, explanation.counterfactual)
        )
    if explanation.steps is not None:
        # One strip, first step on the left: a file per step would make folders of a million files.
        pictures["steps.png"] = torch.cat(explanation.steps.unbind(dim=1), dim=3)
    if explanation.motion is not None:
        pictures["motion.png"] = images.draw_motion(explanation.image, explanation.motion)
    for name, part in explanation.parts.items():
        pictures[part_file(name)], gain = draw_part(name, part)
        if gain is not None:
            gains[name] = gain
    return {file: picture.float().cpu() for file, picture in pictures.items()}, gains


def _keys(explanation: Explanation) -> dict[str, str]:
    """The manifest's key of every picture's file."""
    fixed = ("image", "counterfactual", "difference", "attribution", "steps", "motion")
    return {key: f"{key}.png" for key in fixed} | {f"part_{name}": part_file(name) for name in explanation.parts}


def _finite(explanation: Explanation) -> Tensor:
    """Which images' explanations are numbers throughout, [B] bool."""
    given = [explanation.logits, explanation.attribution, explanation.counterfactual, explanation.steps]
    given += [explanation.counterfactual_logits, explanation.strengths, explanation.intended, explanation.motion]
    given += [*explanation.parts.values(), *explanation.scores.values(), *explanation.step_scores.values()]
    checks = [
        value.isfinite().flatten(1).all(dim=1) if value.ndim > 1 else value.isfinite()
        for value in given
        if value is not None
    ]
    return torch.stack([check.cpu() for check in checks]).all(dim=0)


def _number(value: Tensor | float) -> float:
    """Six significant digits: what the measurement is good for, and short rows."""
    number = float(value)
    assert math.isfinite(number), "only finite explanations become rows"
    return significant(number)
