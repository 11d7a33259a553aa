"""Batches of images and explanations as one labelled picture, to be looked at while a method trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.explanation import DIFFERENCES, Explanation

#: Pixels of the row labels, of the column names and around every image.
_MARGIN, _HEADER, _PADDING = 150, 18, 2


def draw_samples(explanation: Explanation, class_names: Sequence[str], tile: int = 96) -> Image.Image:
    """Draws explanations as a labelled table, one row per image.

    Args:
        explanation: What to draw; columns are left out where it has none.
        class_names: K names in logit order.
        tile: Small images are enlarged to at least this many pixels, so that the labels fit.
    """
    return draw_table(_columns(explanation), _row_labels(explanation, class_names), tile)


def draw_table(columns: Mapping[str, Tensor], labels: Sequence[str], tile: int = 96) -> Image.Image:
    """Draws batches of images side by side, one row per image.

    Args:
        columns: Names and batches, [B, C, H, W] in [-1, 1].
        labels: One for each row, of as many lines as fit.
        tile: Small images are enlarged to at least this many pixels, so that the labels fit.
    """
    enlarge = max(1, -(-tile // next(iter(columns.values())).shape[-1]))
    enlarged = [c.repeat_interleave(enlarge, dim=2).repeat_interleave(enlarge, dim=3) for c in columns.values()]
    table = images.to_pil(images.grid(enlarged, _PADDING))
    width = enlarged[0].shape[-1] + 2 * _PADDING
    height = enlarged[0].shape[-2] + 2 * _PADDING
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
    before = explanation.logits.softmax(dim=1)
    logits = explanation.counterfactual_logits
    after = None if logits is None else logits.softmax(dim=1)
    labels = []
    for row, (predicted, target) in enumerate(
        zip(explanation.predicted.tolist(), explanation.target.tolist(), strict=True)
    ):
        lines = [f"{class_names[predicted][:20]}", f"  {before[row, predicted]:.2f}", f"to {class_names[target][:20]}"]
        change = f"  {before[row, target]:.2f}"
        lines.append(change if after is None else f"{change} -> {after[row, target]:.2f}")
        lines += [f"{name[:14]} {float(score[row]):.3g}" for name, score in list(explanation.scores.items())[:2]]
        labels.append("\n".join(lines))
    return labels
