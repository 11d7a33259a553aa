"""The answer of every explainer, an ``Explanation``: reports, metrics and callbacks depend on it and on no method.

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
from cfe_lightning.decisions import decides_for
from cfe_lightning.files.text import data_address

if TYPE_CHECKING:
    from cfe_lightning.classifier import FrozenClassifier

#: Names of the parts of a decomposition, which sum to the image.
SUMMANDS = ("agnostic", "distinct", "residual")
#: Names of the parts that are differences, where 0 is no change.
DIFFERENCES = frozenset({*SUMMANDS[1:], "redrawn"})


def draw_part(name: str, part: Tensor) -> tuple[Tensor, Tensor | None]:
    """Draws a part [B, C, H, W] as pictures [B, C or 3, H, W] in [-1, 1], and returns their gains, [B].

    Differences among the summands are amplified around mid grey. The part "redrawn" is blue where it became darker and
    red where it became brighter. Images are shown unchanged, with None instead of gains.
    """
    part = part.float()
    if name in SUMMANDS[1:]:
        return images.amplify(part)
    if name in DIFFERENCES:
        return images.signed_difference(part), 1 / part.abs().amax(dim=(1, 2, 3)).clamp_min(1e-6)
    return part, None


@dataclass(kw_only=True, slots=True)
class Explanation:
    """The answer to "what would have to change for these images to be of the target class?", for a batch.

    Attributes:
        image: The explained images, [B, C, H, W] in [-1, 1].
        logits: The classifier's logits of ``image``, [B, K].
        target: Target classes, [B] int64.
        attribution: Importance of each pixel for predicted versus target class, non-negative, [B, 1, H, W].
        counterfactual: Images meant to be classified as ``target``, [B, C, H, W]; None for attribution-only methods.
        counterfactual_logits: Logits of ``counterfactual``, measured and never assumed, [B, K].
        steps: Images along the method's path, [B, T, C, H, W]; the first one is nearest to ``image``.
        strengths: Position of each step along the path, [B, T]; given together with ``steps``.
        intended: Logits that the method intended for the steps, [B, T, K]; given only together with ``steps``. Their
            distance from the classifier's logits of the steps is the method's own error.
        step_scores: Named numbers of every step, each [B, T]; given only together with ``steps``.
        parts: Named images or image differences, each [B, C, H, W]. Reserved names: ``reconstruction`` (the method's
            own rendering of ``image`` before any edit), and for decompositions ``agnostic``, ``distinct`` and
            ``residual``, which sum to ``image``; ``distinct`` and ``residual`` are differences (0 is no change).
        motion: Displacement of structure in the counterfactual, (row, column) in pixels, [B, 2, H, W]; None where the
            method does not measure it.
        scores: Named numbers per image, each [B].
        caveats: Warnings for readers, as clauses, with the images that they apply to, each [B] bool.

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
        # Sizes.
        if self.image.ndim != 4:
            raise ValueError(f"Explanation.image must be [B, C, H, W], got {list(self.image.shape)}.")
        batch, channels, height, width = self.image.shape
        if self.logits.ndim != 2 or self.logits.shape[0] != batch:
            raise ValueError(f"Explanation.logits must be [{batch}, K], got {list(self.logits.shape)}.")
        num_classes = self.logits.shape[1]
        # Expected shapes.
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
        # Fields about steps.
        if (self.steps is None) != (self.strengths is None):
            raise ValueError("Explanation.steps and Explanation.strengths must be given together.")
        if self.steps is not None and self.strengths is not None:
            num_steps = self.steps.shape[1] if self.steps.ndim == 5 else 0
            expected["steps"] = (self.steps, (batch, num_steps, channels, height, width))
            expected["strengths"] = (self.strengths, (batch, num_steps))
            expected["intended"] = (self.intended, (batch, num_steps, num_classes))
            expected |= {f"step_scores[{name!r}]": (s, (batch, num_steps)) for name, s in self.step_scores.items()}
        elif self.intended is not None or self.step_scores:
            named = "intended" if self.intended is not None else "step_scores"
            raise ValueError(f"Explanation.{named} is about steps and needs Explanation.steps.")
        # Verdict.
        if (self.counterfactual is None) != (self.counterfactual_logits is None):
            raise ValueError("Explanation.counterfactual and Explanation.counterfactual_logits must be given together.")
        for name, (value, shape) in expected.items():
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"Explanation.{name} must be {list(shape)}, got {list(value.shape)}.")

    def __len__(self) -> int:
        return self.image.shape[0]

    def select(self, index: Tensor | slice) -> Explanation:
        """Selects the explanations of some images by their numbers, [b], or by a slice, which makes views."""
        return rows_of(self, index)

    @staticmethod
    def joined(explanations: Sequence[Explanation]) -> Explanation:
        """Joins explanations of one method; a caveat that is missing in one of them does not apply to its images."""
        clauses = dict.fromkeys(clause for one in explanations for clause in one.caveats)
        alike = []
        for one in explanations:
            no_image = torch.zeros_like(one.target, dtype=torch.bool)
            alike.append(replace(one, caveats={clause: one.caveats.get(clause, no_image) for clause in clauses}))
        return joined(alike)

    @property
    def predicted(self) -> Tensor:
        """Returns the classifier's class of ``image``, [B] int64."""
        return self.logits.argmax(dim=1)

    @property
    def flipped(self) -> Tensor | None:
        """Tells whether the counterfactual is classified as ``target``, [B] bool; a tie counts as not flipped."""
        return None if self.counterfactual_logits is None else decides_for(self.counterfactual_logits, self.target)

    def _repr_html_(self) -> str:
        """Shows up to eight images of the batch with counterfactual, parts, attribution and decisions in a notebook."""
        # Columns.
        shown = self.select(slice(0, 8))
        columns: dict[str, Tensor] = {"image": shown.image}
        if shown.counterfactual is not None:
            columns["counterfactual"] = shown.counterfactual
        columns |= {name: draw_part(name, part)[0] for name, part in shown.parts.items()}
        columns["attribution"] = images.heat_map(shown.attribution.float())
        # Table.
        head = "".join(f"<th>{html.escape(name)}</th>" for name in ("decision", *columns))
        rows = ""
        for index in range(len(shown)):
            cells = "".join(_cell(name, batch[index]) for name, batch in columns.items())
            rows += f'<tr><td style="white-space:nowrap">{shown._decision(index)}</td>{cells}</tr>'
        rest = f"<caption>{len(shown)} of {len(self)} images</caption>" if len(self) > len(shown) else ""
        return f"<table>{rest}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"

    def _decision(self, index: int) -> str:
        """Describes predicted and target class of one image, by number, with their probabilities before and after."""
        before, after = self.logits, self.counterfactual_logits
        lines = []
        for name in (int(self.predicted[index]), int(self.target[index])):
            given = [logits[index].float().softmax(dim=0)[name] for logits in (before, after) if logits is not None]
            lines.append(f"class {name}: " + " &rarr; ".join(f"{p:.1%}" for p in given))
        if self.flipped is not None:
            lines.append("flipped" if self.flipped[index] else "not flipped")
        return "<br>".join(lines)


def _cell(name: str, image: Tensor) -> str:
    """Returns a table cell with one image [C, H, W]; small images are enlarged."""
    buffer = io.BytesIO()
    images.to_pil(image).save(buffer, format="PNG")
    width = max(96, image.shape[-1])
    style = "image-rendering:pixelated" if width > image.shape[-1] else ""
    source = data_address(buffer.getvalue(), "png")
    return f'<td><img alt="{html.escape(name)}" width="{width}" style="{style}" src="{source}"></td>'


class Explainer(Protocol):
    """The interface of an explainer for metrics, reports, baselines and benchmarks."""

    classifier: FrozenClassifier

    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        """Explains images [B, C, H, W] in [-1, 1] for target classes [B]; None asks for the runner-up class."""


class Decomposer(Explainer, Protocol):
    """An explainer that splits an image into a class-agnostic and a class-distinct part."""

    def distinct(self, image: Tensor, source: Tensor) -> Tensor:
        """Returns the part of images [B, C, H, W] that shows class ``source`` [B]; subtracting it removes the class."""


def seed_of(names: Sequence[str]) -> int:
    """Derives a random seed from the names of a batch's images, so that a resumed run draws the same numbers."""
    digest = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:4], "big")
