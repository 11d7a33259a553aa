"""The pictures of an evaluation: the same images explained by every explainer, side by side on one page.

Shapes: B images, C channels, H, W pixels, K classes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.decisions import decides_for
from cfe_lightning.explaining.values import percent
from cfe_lightning.explanation import Explanation
from cfe_lightning.files.text import data_address
from cfe_lightning.report.html import write_page

#: Smaller pictures are enlarged by a whole factor to about this side: every pixel is then seen as the square it is.
_SHOWN = 144
#: A change below half a grey level, in units of black to white.
_INVISIBLE = 0.5 / 255
#: Probabilities that differ by more come from different classifiers.
_SAME = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class _Picture:
    """A kept picture.

    Attributes:
        title: What is shown.
        pixels: Bytes, [1 or 3, h, w].
        peak: Of differences, what is drawn in full colour, where 1 is black to white.
    """

    title: str
    pixels: Tensor
    peak: float | None = None

    @property
    def address(self) -> str:
        """All pixels as a data address."""
        array = self.pixels.numpy()
        picture = Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))
        buffer = io.BytesIO()
        # The quality of lossless files is the effort.
        picture.save(buffer, format="WEBP", lossless=True, quality=50, method=3)
        return data_address(buffer.getvalue(), "webp")

    @property
    def strength(self) -> str | None:
        """How strong the strongest colour is, in words."""
        if self.peak is None:
            return None
        if self.peak == 0:
            return "nothing"
        faint = ", less than a grey level" if self.peak < _INVISIBLE else ""
        return f"full colour = {self.peak:.2g}{faint}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cell:
    """One explainer's answer to one image.

    Attributes:
        predicted: Class that the judge decides for, and its probability.
        target: Class asked for, and its probability before.
        after: Its probability of the counterfactual as saved; None where there is none.
        flipped: Whether the judge decides the saved counterfactual for the target; None where there is nothing to flip.
        pictures: What is seen.
        differences: Below each picture how it differs from what it was made of; None where that says nothing.
    """

    predicted: tuple[int, float]
    target: tuple[int, float]
    after: float | None
    flipped: bool | None
    pictures: list[_Picture]
    differences: list[_Picture | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Original:
    """An explained image and its true class."""

    name: str
    label: int
    picture: _Picture


class Gallery:
    """Keeps small copies of a few images and of what explainers make of them, and draws the page.

    Explainers are given the same images in the same order; they may take turns batch by batch or come one after the
    other. What is kept is bytes on the CPU, one to four pictures per image and explainer.

    Args:
        size: Longest side of a kept picture in pixels; larger ones are shrunk.

    Raises:
        ValueError: If ``size`` is not positive.
    """

    def __init__(self, size: int = 160) -> None:
        if size < 1:
            raise ValueError(f"The pictures of a gallery need at least 1 pixel, got size {size}.")
        self.size = size
        self._originals: list[_Original] = []
        self._cells: dict[str, list[_Cell]] = {}
        self._failures: dict[str, str] = {}

    @torch.no_grad()
    def add(
        self,
        explainer: str,
        names: Sequence[str],
        labels: Tensor,
        explanation: Explanation,
        before: Tensor,
        after: Tensor | None,
    ) -> None:
        """Keeps what an explainer says of further images.

        Args:
            explainer: Its name; explainers are shown in the order in which they first come.
            names: Of the images, B.
            labels: Their true classes, [B].
            explanation: Of these images.
            before: What the judge says of the images, probabilities [B, K].
            after: What it says of the counterfactuals as saved, probabilities [B, K]; None where there are none.

        Raises:
            ValueError: If the lengths disagree, or another explainer was given other images.
        """
        if not len(names) == len(labels) == len(explanation) == len(before):
            raise ValueError(
                f"A gallery needs one name, label and decision per explanation, got {len(names)}, {len(labels)} and "
                f"{len(before)} for {len(explanation)}."
            )
        if (after is None) != (explanation.counterfactual is None):
            raise ValueError(f"Counterfactuals and what the judge says of them go together: {explainer!r} has but one.")
        cells = self._cells.setdefault(explainer, [])
        found = [one.name for one in self._originals[len(cells) : len(cells) + len(names)]]
        if found != list(names)[: len(found)]:
            raise ValueError(f"{explainer!r} explains {names[0]!r} and so on where the others explain {found[0]!r}.")
        new = slice(len(found), None)
        originals = zip(names[new], labels[new].tolist(), self._kept("original", explanation.image[new]), strict=True)
        self._originals += [_Original(name=name, label=label, picture=kept) for name, label, kept in originals]
        cells += self._answers(explanation, before.float().cpu(), None if after is None else after.float().cpu())

    def fail(self, explainer: str, reason: str) -> None:
        """Notes why an explainer shows no (further) images."""
        self._cells.setdefault(explainer, [])
        self._failures[explainer] = reason

    def state(self) -> dict[str, Any]:
        """All that is kept as dictionaries, lists, tensors, texts and numbers; ``torch.save`` takes it."""
        return {
            "originals": [asdict(one) for one in self._originals],
            "cells": {name: [asdict(cell) for cell in cells] for name, cells in self._cells.items()},
            "failures": dict(self._failures),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Replaces what is kept by what ``state`` gave."""

        def pictures(given: list[dict[str, Any] | None]) -> list[Any]:
            return [None if one is None else _Picture(**one) for one in given]

        self._originals = [
            _Original(name=one["name"], label=one["label"], picture=_Picture(**one["picture"]))
            for one in state["originals"]
        ]
        self._cells = {
            name: [
                _Cell(**(cell | {key: pictures(cell[key]) for key in ("pictures", "differences")})) for cell in cells
            ]
            for name, cells in state["cells"].items()
        }
        self._failures = dict(state["failures"])

    def write(self, folder: Path, class_names: Sequence[str]) -> Path | None:
        """Writes ``gallery.html``, which needs no network; where nothing is to be shown, an older one goes away.

        Args:
            folder: Exists.
            class_names: K names.

        Returns:
            The page; None where no image was added.
        """
        path = folder / "gallery.html"
        if not self._originals:
            path.unlink(missing_ok=True)
            return None
        longest = max(max(one.picture.pixels.shape[1:]) for one in self._originals)
        factor = max(1, round(_SHOWN / longest))
        return write_page(
            path,
            "evaluation/gallery.html.j2",
            styles=["evaluation/gallery.css"],
            # A policy that knows the style by its hash allows no other place for a width.
            more_style=f":root {{ --base: {longest * factor}px; }}\n",
            originals=len(self._originals),
            explainers=list(self._cells),
            sections=self._sections(class_names),
            enlarged=factor > 1,
            percent=percent,
            renders=self._has("rendering alone"),
            splits=self._has("without this part"),
            points=self._has("attribution"),
        )

    def _sections(self, class_names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """What the page says of every image."""
        groups: dict[str, list[str]] = {"What would have to change": [], "Where it looks": [], "Not shown": []}
        for name, cells in self._cells.items():
            differs = any(difference for cell in cells for difference in cell.differences)
            title = "What would have to change" if differs else "Where it looks" if cells else "Not shown"
            groups[title].append(name)
        for index, original in enumerate(self._originals):
            here = {name: found[index] for name, found in self._cells.items() if index < len(found)}
            decision = _common_decision(list(here.values()))
            folder, slash, name = original.name.rpartition("/")
            yield {
                "folder": folder + slash,
                "name": name,
                "label": class_names[original.label],
                "picture": original.picture,
                "decision": None if decision is None else (class_names[decision[0]], decision[1]),
                "wrong": decision is not None and decision[0] != original.label,
                "groups": [
                    (title, [self._column(name, here.get(name), decision is None, class_names) for name in names])
                    for title, names in groups.items()
                    if names
                ],
            }

    def _column(self, name: str, cell: _Cell | None, tell: bool, class_names: Sequence[str]) -> dict[str, Any]:
        """What the page says of one explainer on one image; ``tell``: also what its classifier decides."""
        if cell is None:
            return {"name": name, "reason": self._failures.get(name, "shows nothing for this image")}
        predicted, target = cell.predicted, cell.target
        return {
            "name": name,
            "reason": None,
            "decision": (class_names[predicted[0]], predicted[1]) if tell else None,
            "target": class_names[target[0]],
            "before": target[1],
            "after": cell.after,
            "flipped": cell.flipped,
            "pictures": cell.pictures,
            "differences": cell.differences,
        }

    def _has(self, title: str) -> bool:
        return any(
            picture.title == title for cells in self._cells.values() for cell in cells for picture in cell.pictures
        )

    def _answers(self, explanation: Explanation, before: Tensor, after: Tensor | None) -> list[_Cell]:
        """One cell per image."""
        columns = self._columns(explanation)
        predicted, target = before.argmax(dim=1), explanation.target.cpu()
        flipped = None if after is None else decides_for(after, target)
        return [
            _Cell(
                predicted=(int(predicted[index]), float(before[index, predicted[index]])),
                target=(int(target[index]), float(before[index, target[index]])),
                after=None if after is None else float(after[index, target[index]]),
                flipped=None if flipped is None or predicted[index] == target[index] else bool(flipped[index]),
                pictures=[pictures[index] for pictures, _ in columns],
                differences=[None if differences is None else differences[index] for _, differences in columns],
            )
            for index in range(len(explanation))
        ]

    def _columns(self, explanation: Explanation) -> list[tuple[list[_Picture], list[_Picture] | None]]:
        """Pictures of a batch, and below each its difference from what it was made of."""
        image, parts, edited = explanation.image, explanation.parts, explanation.counterfactual
        columns: list[tuple[list[_Picture], list[_Picture] | None]] = []
        if edited is not None:
            columns.append(
                (self._kept("counterfactual", edited), self._coloured("change", images.visible_change(image, edited)))
            )
        if "distinct" in parts and (edited is not None or _is_attribution(parts["distinct"], explanation.attribution)):
            distinct = parts["distinct"].float()
            without = self._kept("without this part", image - distinct)
            columns.append((without, self._coloured("distinct part", distinct / 2)))
        elif "reconstruction" in parts and edited is not None:
            rendering = parts["reconstruction"]
            change = self._coloured("changed beyond it", images.visible_change(rendering, edited))
            columns.append((self._kept("rendering alone", rendering), change))
        if not columns:
            columns.append((self._kept("attribution", images.heat_map(explanation.attribution.float())), None))
        return columns

    def _coloured(self, title: str, change: Tensor) -> list[_Picture]:
        """Differences [B, C, H, W], of which 1 is black to white."""
        return self._kept(title, images.signed_difference(change), change.abs().amax(dim=(1, 2, 3)).tolist())

    def _kept(self, title: str, batch: Tensor, peaks: Sequence[float | None] | None = None) -> list[_Picture]:
        """Small copies of images [B, C, H, W] in [-1, 1]."""
        height, width = batch.shape[-2:]
        shrink = min(1.0, self.size / max(height, width))
        shown = batch.detach().float()
        if shrink < 1:
            sides = [max(1, round(side * shrink)) for side in (height, width)]
            shown = torch.nn.functional.interpolate(shown.clamp(-1, 1), size=sides, mode="area")
        return [
            _Picture(title=title, pixels=pixels.clone(), peak=peak)
            for pixels, peak in zip(images.to_uint8(shown).cpu(), peaks or [None] * len(batch), strict=True)
        ]


def _is_attribution(distinct: Tensor, attribution: Tensor) -> bool:
    """Whether a distinct part [B, C, H, W] is what its attribution shows, with signs.

    Of most baselines it is but their heat map times the image.
    """
    magnitude = distinct.abs().mean(dim=1, keepdim=True)
    return torch.allclose(magnitude.float(), attribution.float(), rtol=1e-3, atol=1e-6)


def _common_decision(cells: Sequence[_Cell]) -> tuple[int, float] | None:
    """What the judge decides, and its probability; None where explainers are judged by classifiers that differ."""
    decided = {cell.predicted[0] for cell in cells}
    surely = [cell.predicted[1] for cell in cells]
    if len(decided) != 1 or max(surely) - min(surely) > _SAME:
        return None
    return cells[0].predicted
