"""What every explainer answers: an ``Explanation``. Reports, metrics and callbacks know this file and no method.

Shapes: B images, C channels, H, W pixels, K classes, T steps.
"""

from __future__ import annotations

import hashlib
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.compute.rows import joined, rows_of
from cfe_lightning.files.text import data_address

if TYPE_CHECKING:
    from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.decisions import decides_for

#: Parts of a decomposition: together they are the image.
SUMMANDS = ("agnostic", "distinct", "residual")
#: Parts that are differences: 0 is no change.
DIFFERENCES = frozenset({*SUMMANDS[1:], "redrawn"})


def draw_part(name: str, part: Tensor) -> tuple[Tensor, Tensor | None]:
    """A part as a picture, and by how much it is amplified.

    Summands that are differences stay what they are, around mid grey; what was redrawn is blue where it became darker
    and red where it became brighter.

    Args:
        name: Of the part.
        part: [B, C, H, W].

    Returns:
        [B, C or 3, H, W] in [-1, 1]; gains [B], None for images, which are shown as they are.
    """
    part = part.float()
    if name in SUMMANDS[1:]:
        return images.amplify(part)
    if name in DIFFERENCES:
        return images.signed_difference(part), 1 / part.abs().amax(dim=(1, 2, 3)).clamp_min(1e-6)
    return part, None


@dataclass(kw_only=True, slots=True)
class Explanation:
    """The answer to "what would have to change for this image to be the target?" for a batch of images.

    Attributes:
        image: The explained images as given, [B, C, H, W] in [-1, 1].
        logits: The classifier's logits of ``image``, [B, K].
        target: The class asked for, [B] int64.
        attribution: How much each pixel matters for predicted versus target, non-negative, [B, 1, H, W].
        counterfactual: Images meant to be classified as ``target``, [B, C, H, W]; None for attribution-only methods.
        counterfactual_logits: Logits of ``counterfactual``, measured and never assumed, [B, K].
        steps: Images along the method's path, [B, T, C, H, W]; the first one is nearest to ``image``.
        strengths: How far along the path each step is, [B, T]; given together with ``steps``.
        intended: Logits that the method meant the steps to have, [B, T, K]; given only together with ``steps``. Their
            distance from what the classifier says of the steps is the method's own error.
        step_scores: Named numbers of every step, each [B, T]; given only together with ``steps``.
        parts: Named images or image differences, each [B, C, H, W]. Reserved names: ``reconstruction`` (the method's
            own rendering of ``image`` before any edit), and for decompositions ``agnostic``, ``distinct`` and
            ``residual``, which sum to ``image``; ``distinct`` and ``residual`` are differences (0 is no change).
        motion: Where the counterfactual moves structure, in pixels (row, column), [B, 2, H, W]; None where nothing is
            said about it.
        scores: Named numbers per image, each [B].
        caveats: What a reader has to know of some images, as a clause; and of which, each [B] bool.

    Raises:
        ValueError: If a field's shape disagrees with ``image`` and ``logits``; the message names the field.
    """

    image: Tensor
    logits: Tensor
    target: Tensor
    attribution: Tensor
    counterfactual: Tensor | None = None
    counterfactual_logits: Tensor | None = None
    steps: Tensor | None = None
    strengths: Tensor | None = None
    intended: Tensor | None = None
    step_scores: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, Tensor] = field(default_factory=dict)
    motion: Tensor | None = None
    scores: dict[str, Tensor] = field(default_factory=dict)
    caveats: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.image.ndim != 4:
            raise ValueError(f"Explanation.image must be [B, C, H, W], got {list(self.image.shape)}.")
        batch, channels, height, width = self.image.shape
        if self.logits.ndim != 2 or self.logits.shape[0] != batch:
            raise ValueError(f"Explanation.logits must be [{batch}, K], got {list(self.logits.shape)}.")
        num_classes = self.logits.shape[1]
        expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
            "target": (self.target, (batch,)),
            "attribution": (self.attribution, (batch, 1, height, width)),
            "counterfactual": (self.counterfactual, (batch, channels, height, width)),
            "counterfactual_logits": (self.counterfactual_logits, (batch, num_classes)),
            "motion": (self.motion, (batch, 2, height, width)),
        }
        expected |= {f"parts[{name!r}]": (part, (batch, channels, height, width)) for name, part in self.parts.items()}
        expected |= {f"scores[{name!r}]": (score, (batch,)) for name, score in self.scores.items()}
        expected |= {f"caveats[{name!r}]": (holds, (batch,)) for name, holds in self.caveats.items()}
        if (self.steps is None) != (self.strengths is None):
            raise ValueError("Explanation.steps and Explanation.strengths must be given together.")
        if self.steps is not None and self.strengths is not None:
            num_steps = self.steps.shape[1] if self.steps.ndim == 5 else 0
            expected["steps"] = (self.steps, (batch, num_steps, channels, height, width))
            expected["strengths"] = (self.strengths, (batch, num_steps))
            expected["intended"] = (self.intended, (batch, num_steps, num_classes))
            for name, score in self.step_scores.items():
                expected[f"step_scores[{name!r}]"] = (score, (batch, num_steps))
        elif self.intended is not None or self.step_scores:
            named = "intended" if self.intended is not None else "step_scores"
            raise ValueError(f"Explanation.{named} is about steps and needs Explanation.steps.")
        if (self.counterfactual is None) != (self.counterfactual_logits is None):
            raise ValueError("Explanation.counterfactual and Explanation.counterfactual_logits must be given together.")
        for name, (value, shape) in expected.items():
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"Explanation.{name} must be {list(shape)}, got {list(value.shape)}.")

    def __len__(self) -> int:
        return self.image.shape[0]

    def select(self, index: Tensor | slice) -> Explanation:
        """Selects the explanations of some images of the batch, by their numbers [b] or, without a copy, by a slice."""
        return rows_of(self, index)

    @staticmethod
    def joined(explanations: Sequence[Explanation]) -> Explanation:
        """Joins explanations of one method; a caveat that one of them lacks does not hold for its images."""
        caveats = dict.fromkeys(clause for one in explanations for clause in one.caveats)
        none = [torch.zeros_like(one.target, dtype=torch.bool) for one in explanations]
        return joined(
            [
                replace(one, caveats={clause: one.caveats.get(clause, no) for clause in caveats})
                for one, no in zip(explanations, none, strict=True)
            ]
        )

    @property
    def predicted(self) -> Tensor:
        """The classifier's class of ``image``, [B] int64."""
        return self.logits.argmax(dim=1)

    @property
    def flipped(self) -> Tensor | None:
        """Whether the counterfactual is classified as ``target``, [B] bool; a tie counts as not flipped."""
        if self.counterfactual_logits is None:
            return None
        return decides_for(self.counterfactual_logits, self.target)

    def _repr_html_(self) -> str:
        """Shows up to eight images of the batch with counterfactual, parts, attribution and decisions in a notebook."""
        shown = slice(0, 8)
        columns: dict[str, Tensor] = {"image": self.image[shown]}
        if self.counterfactual is not None:
            columns["counterfactual"] = self.counterfactual[shown]
        for name, part in self.parts.items():
            columns[name], _ = draw_part(name, part[shown])
        columns["attribution"] = images.heat_map(self.attribution[shown].float())
        head = "".join(f"<th>{html.escape(name)}</th>" for name in ("decision", *columns))
        lines = [
            f'<td style="white-space:nowrap">{self._decision(index)}</td>'
            + "".join(_cell(name, batch[index]) for name, batch in columns.items())
            for index in range(len(columns["image"]))
        ]
        rows = "".join(f"<tr>{line}</tr>" for line in lines)
        rest = f"<caption>{len(lines)} of {len(self)} images</caption>" if len(self) > len(lines) else ""
        return f"<table>{rest}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"

    def _decision(self, index: int) -> str:
        """Predicted and target class of one image with their probabilities, classes as numbers."""
        predicted, target = int(self.predicted[index]), int(self.target[index])
        before = self.logits[index].float().softmax(dim=0)
        text = f"class {predicted}: {before[predicted]:.1%}<br>class {target}: {before[target]:.1%}"
        if self.counterfactual_logits is None or self.flipped is None:
            return text
        after = self.counterfactual_logits[index].float().softmax(dim=0)
        outcome = "flipped" if self.flipped[index] else "not flipped"
        return (
            f"class {predicted}: {before[predicted]:.1%} &rarr; {after[predicted]:.1%}<br>"
            f"class {target}: {before[target]:.1%} &rarr; {after[target]:.1%}<br>{outcome}"
        )


def _cell(name: str, image: Tensor) -> str:
    """A table cell with one image [C, H, W], small ones enlarged."""
    buffer = io.BytesIO()
    images.to_pil(image).save(buffer, format="PNG")
    address = data_address(buffer.getvalue(), "png")
    width = max(96, image.shape[-1])
    style = "image-rendering:pixelated" if width > image.shape[-1] else ""
    title = html.escape(name, quote=True)
    return f'<td><img alt="{title}" width="{width}" style="{style}" src="{address}"></td>'


class Explainer(Protocol):
    """All that metrics, reports, baselines and benchmarks may assume of an explainer."""

    classifier: FrozenClassifier

    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        """Explains images [B, C, H, W] in [-1, 1] for target classes [B]; None asks for the runner-up class."""
        ...


class Decomposer(Explainer, Protocol):
    """An explainer that splits an image into a class-agnostic and a class-distinct part."""

    def distinct(self, image: Tensor, source: Tensor) -> Tensor:
        """The part of images [B, C, H, W] that makes them class ``source`` [B]; subtract it to remove the class."""
        ...


def seed_of(names: Sequence[str]) -> int:
    """A random seed that depends on the images of a batch alone, by their names: whoever goes on finds the same."""
    digest = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:4], "big")
