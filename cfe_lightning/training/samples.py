"""Pictures of a few validation images while a run goes on.

Shapes: B images, C channels, H, W pixels, K classes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.data import default_collate

from cfe_lightning import images
from cfe_lightning.explanation import DIFFERENCES, Explanation
from cfe_lightning.files.atomic import atomic_path
from cfe_lightning.training.averaging import EMA
from cfe_lightning.training.lightning_inside import iteration

#: Pixels of the row labels, of the column names and around every image.
_MARGIN, _HEADER, _PADDING = 150, 18, 2


class SampleGrid(pl.Callback):
    """Draws the same validation images at the start and every ``every_n_batches``.

    A row holds the image, its parts, the counterfactual, the steps and the attribution, with the predicted class and
    the probabilities of prediction and target before and after. A module that explains nothing returns the columns and
    row labels of ``draw_table`` from a method ``samples(image)``. Pictures go to ``<folder>/samples/<iteration>.png``
    and to W&B, if that is a logger. The averaged weights are used if ``EMA`` is listed before this callback. Random
    state, training mode and gradients stay as they were, so a run is the same with and without pictures.

    Args:
        every_n_batches: Training batches between two grids.
        num_images: Number of rows, taken evenly over the validation split.
        folder: Folder of the pictures; None takes the trainer's ``default_root_dir``, the run folder of ``train.py``.
    """

    def __init__(self, every_n_batches: int = 1000, num_images: int = 8, folder: str | None = None) -> None:
        if every_n_batches < 1 or num_images < 1:
            raise ValueError(
                f"every_n_batches and num_images must be positive, got {every_n_batches} and {num_images}."
            )
        self.every_n_batches, self.num_images, self.folder = every_n_batches, num_images, folder
        self._image: Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws with the untrained weights, unless the run is resumed."""
        if trainer.is_global_zero and iteration(trainer) == 0:
            self._draw(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Draws on schedule."""
        if trainer.is_global_zero and iteration(trainer) % self.every_n_batches == 0:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Picture.
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

        # File and loggers.
        step = iteration(trainer)
        path = Path(self.folder or trainer.default_root_dir) / "samples" / f"{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            picture.save(temporary, format="PNG")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image(key="samples", images=[picture], step=step, caption=[f"after {step} batches"])

    def _fixed_images(self, trainer: pl.Trainer) -> Tensor:
        """Takes images evenly over the split, because folders are often sorted by class."""
        dataset = trainer.datamodule.val_dataloader().dataset  # type: ignore[attr-defined]
        count = min(self.num_images, len(dataset))
        indices = [position * len(dataset) // count for position in range(count)]
        return default_collate([dataset[index]["image"] for index in indices])


@contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Evaluates inside the context, and restores the mode of every layer: some stay in eval mode during training."""
    modes = [(layer, layer.training) for layer in module.modules()]
    module.eval()
    try:
        yield
    finally:
        # Changing the mode lets a module drop what it has cached for explaining.
        module.train(modes[0][1])
        for layer, mode in modes:
            layer.training = mode


def draw_samples(explanation: Explanation, class_names: Sequence[str], tile: int = 96) -> Image.Image:
    """Draws explanations as ``draw_table`` does, with labels of decisions; fields that are None have no column.

    Args:
        explanation: Explanation to draw.
        class_names: K names in logit order.
        tile: Smallest side of an image in pixels; smaller images are enlarged, so that the labels fit.
    """
    return draw_table(_columns(explanation), _row_labels(explanation, class_names), tile)


def draw_table(columns: Mapping[str, Tensor], labels: Sequence[str], tile: int = 96) -> Image.Image:
    """Draws batches of images side by side, one row per image.

    Args:
        columns: Images [B, C, H, W] in [-1, 1] by column name.
        labels: Label of each row; lines that do not fit are cut.
        tile: Smallest side of an image in pixels; smaller images are enlarged, so that the labels fit.
    """
    # Table.
    enlarge = max(1, -(-tile // next(iter(columns.values())).shape[-1]))
    enlarged = [c.repeat_interleave(enlarge, dim=2).repeat_interleave(enlarge, dim=3) for c in columns.values()]
    table = images.to_pil(images.grid(enlarged, _PADDING))
    height, width = (side + 2 * _PADDING for side in enlarged[0].shape[-2:])

    # Labels.
    picture = Image.new("RGB", (table.width + _MARGIN, table.height + _HEADER), "white")
    picture.paste(table, (_MARGIN, _HEADER))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=11)
    for index, name in enumerate(columns):
        draw.text((_MARGIN + index * width + 2, 2), name[: width // 6], fill="black", font=font)
    for index, text in enumerate(labels):
        draw.multiline_text((4, _HEADER + index * height + 4), text, fill="black", font=font)
    return picture


def _columns(explanation: Explanation) -> dict[str, Tensor]:
    columns = {"image": explanation.image}
    for name, part in explanation.parts.items():
        # Differences are often too faint to be seen as an image.
        columns[name] = images.signed_difference(part) if name in DIFFERENCES else part
    if explanation.counterfactual is not None:
        columns["counterfactual"] = explanation.counterfactual
    if explanation.steps is not None and explanation.strengths is not None:
        for index in range(explanation.steps.shape[1]):
            columns[f"step {float(explanation.strengths[0, index]):.2g}"] = explanation.steps[:, index]
    columns["attribution"] = images.heat_map(explanation.attribution)
    return columns


def _row_labels(explanation: Explanation, class_names: Sequence[str]) -> list[str]:
    before, logits = explanation.logits.softmax(dim=1), explanation.counterfactual_logits
    after = None if logits is None else logits.softmax(dim=1)
    labels = []
    for row, classes in enumerate(zip(explanation.predicted.tolist(), explanation.target.tolist(), strict=True)):
        predicted, target = classes
        lines = [f"{class_names[predicted][:20]}", f"  {before[row, predicted]:.2f}", f"to {class_names[target][:20]}"]
        change = f"  {before[row, target]:.2f}"
        lines.append(change if after is None else f"{change} -> {after[row, target]:.2f}")
        lines += [f"{name[:14]} {float(score[row]):.3g}" for name, score in list(explanation.scores.items())[:2]]
        labels.append("\n".join(lines))
    return labels
