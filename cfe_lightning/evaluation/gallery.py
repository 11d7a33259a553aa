"""The gallery of an evaluation: the same images explained by all explainers, side by side on one page.

Shapes: B images, C channels, H, W pixels, K classes.
"""

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

#: Side to which smaller pictures are enlarged, in screen pixels; by a whole factor, so that pixels remain squares.
_SHOWN = 144
#: Change that rounding to 8 bits removes: half a grey level, where 1 is black to white.
_INVISIBLE = 0.5 / 255
#: Largest difference between probabilities of the same classifier.
_SAME = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class _Picture:
    """A small copy of a picture.

    Attributes:
        title: Caption.
        pixels: Grey or RGB levels, [1 or 3, h, w] uint8.
        peak: Difference that is drawn in full colour, where 1 is black to white; None for pictures of other kinds.
    """

    title: str
    pixels: Tensor
    peak: float | None = None

    @property
    def address(self) -> str:
        """Returns the picture as a data URL, without loss."""
        array = self.pixels.numpy()
        picture = Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))
        buffer = io.BytesIO()
        # In lossless files quality is the effort of the compression.
        picture.save(buffer, format="WEBP", lossless=True, quality=50, method=3)
        return data_address(buffer.getvalue(), "webp")

    @property
    def strength(self) -> str | None:
        """Returns the peak in words; None for pictures that show no difference."""
        if not self.peak:
            return None if self.peak is None else "nothing"
        faint = ", less than a grey level" if self.peak < _INVISIBLE else ""
        return f"full colour = {self.peak:.2g}{faint}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cell:
    """One explainer's answer to one image.

    Attributes:
        predicted: The judge's decision and its probability.
        target: Target class and its probability on the original.
        after: Probability of the target on the counterfactual as saved; None without a counterfactual.
        flipped: True if the saved counterfactual is decided as the target; None if there is nothing to flip.
        pictures: Pictures of the upper row.
        differences: Difference of each picture from its origin, for the lower row; None for attributions.
    """

    predicted: tuple[int, float]
    target: tuple[int, float]
    after: float | None
    flipped: bool | None
    pictures: list[_Picture]
    differences: list[_Picture | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Original:
    """An explained image with the index of its true class."""

    name: str
    label: int
    picture: _Picture


class Gallery:
    """Collects small copies of a few images and of their explanations, and writes them as a page.

    All explainers answer for the same images in the same order, batch by batch in turn or one after the other. The
    copies are 8-bit pictures on the CPU, one to four per image and explainer.

    Args:
        size: Longest side of a copy in pixels; larger pictures are shrunk.

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
        """Adds an explainer's answers for further images.

        Args:
            explainer: Name of the explainer; the page shows explainers in the order of their first call.
            names: Names of the B images.
            labels: True classes, [B].
            explanation: The explainer's answer for these images.
            before: The judge's probabilities on the images, [B, K].
            after: The judge's probabilities on the counterfactuals as saved, [B, K]; None without counterfactuals.

        Raises:
            ValueError: If the lengths disagree, or other explainers were given other images.
        """
        # Agreement of the arguments.
        if not len(names) == len(labels) == len(explanation) == len(before):
            raise ValueError(
                f"A gallery needs one name, label and decision per explanation, got {len(names)}, {len(labels)} and "
                f"{len(before)} for {len(explanation)}."
            )
        if (after is None) != (explanation.counterfactual is None):
            raise ValueError(f"Counterfactuals and their probabilities go together: {explainer!r} has but one.")

        # Agreement with earlier explainers, which may have fewer images.
        cells = self._cells.setdefault(explainer, [])
        found = [one.name for one in self._originals[len(cells) : len(cells) + len(names)]]
        if found != list(names)[: len(found)]:
            raise ValueError(f"{explainer!r} explains {names[0]!r} and so on where the others explain {found[0]!r}.")

        # Copies.
        new = slice(len(found), None)
        originals = zip(names[new], labels[new].tolist(), self._kept("original", explanation.image[new]), strict=True)
        self._originals += [_Original(name=name, label=label, picture=kept) for name, label, kept in originals]
        cells += self._answers(explanation, before.float().cpu(), None if after is None else after.float().cpu())

    def fail(self, explainer: str, reason: str) -> None:
        """Notes the reason why an explainer has no (further) answers."""
        self._cells.setdefault(explainer, [])
        self._failures[explainer] = reason

    def state(self) -> dict[str, Any]:
        """Returns the whole collection as plain data that ``torch.load(weights_only=True)`` can read."""
        return {
            "originals": [asdict(one) for one in self._originals],
            "cells": {name: [asdict(cell) for cell in cells] for name, cells in self._cells.items()},
            "failures": dict(self._failures),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Replaces the collection by a result of ``state``."""

        def pictures(given: list[dict[str, Any] | None]) -> list[Any]:
            return [None if one is None else _Picture(**one) for one in given]

        rows = ("pictures", "differences")
        self._originals = [_Original(**one | {"picture": _Picture(**one["picture"])}) for one in state["originals"]]
        self._cells = {
            name: [_Cell(**cell | {row: pictures(cell[row]) for row in rows}) for cell in cells]
            for name, cells in state["cells"].items()
        }
        self._failures = dict(state["failures"])

    def write(self, folder: Path, class_names: Sequence[str]) -> Path | None:
        """Writes ``gallery.html`` and returns its path; without images deletes an older page and returns None."""
        path = folder / "gallery.html"
        if not self._originals:
            path.unlink(missing_ok=True)
            return None
        longest = max(side for one in self._originals for side in one.picture.pixels.shape[1:])
        factor = max(1, round(_SHOWN / longest))
        titles = {picture.title for cells in self._cells.values() for cell in cells for picture in cell.pictures}
        return write_page(
            path,
            "evaluation/gallery.html.j2",
            styles=["evaluation/gallery.css"],
            # The content security policy allows no style attributes, so the width is a rule of the style sheet.
            more_style=f":root {{ --base: {longest * factor}px; }}\n",
            originals=len(self._originals),
            explainers=list(self._cells),
            sections=self._sections(class_names),
            enlarged=factor > 1,
            percent=percent,
            renders="rendering alone" in titles,
            splits="without this part" in titles,
            points="attribution" in titles,
        )

    def _sections(self, class_names: Sequence[str]) -> Iterator[dict[str, Any]]:
        # Explainers by their kind of answer.
        groups: dict[str, list[str]] = {"What would have to change": [], "Where it looks": [], "Not shown": []}
        changes, looks, not_shown = groups.values()
        for name, cells in self._cells.items():
            differs = any(difference for cell in cells for difference in cell.differences)
            (changes if differs else looks if cells else not_shown).append(name)

        # Images.
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

    def _column(self, name: str, cell: _Cell | None, decides: bool, class_names: Sequence[str]) -> dict[str, Any]:
        """Returns the values of one explainer on one image, with its classifier's decision if ``decides``."""
        if cell is None:
            return {"name": name, "reason": self._failures.get(name, "shows nothing for this image")}
        predicted, probability = cell.predicted
        return {
            "name": name,
            "reason": None,
            "cell": cell,
            "decision": (class_names[predicted], probability) if decides else None,
            "target": class_names[cell.target[0]],
        }

    def _answers(self, explanation: Explanation, before: Tensor, after: Tensor | None) -> list[_Cell]:
        columns = self._columns(explanation)
        predicted, target = before.argmax(dim=1), explanation.target.cpu()
        # An original that is decided as the target has nothing to flip.
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
        """Returns the kinds of pictures to show, each for a whole batch and with the differences from its origin."""
        image, parts, edited = explanation.image, explanation.parts, explanation.counterfactual
        columns: list[tuple[list[_Picture], list[_Picture] | None]] = []

        # The edit.
        if edited is not None:
            change = self._coloured("change", images.visible_change(image, edited))
            columns.append((self._kept("counterfactual", edited), change))

        # The parts of the image, or the rendering that the edit starts from.
        if "distinct" in parts and (edited is not None or _is_attribution(parts["distinct"], explanation.attribution)):
            distinct = parts["distinct"].float()
            without = self._kept("without this part", image - distinct)
            columns.append((without, self._coloured("distinct part", distinct / 2)))
        elif edited is not None and (rendering := parts.get("reconstruction")) is not None:
            change = self._coloured("changed beyond it", images.visible_change(rendering, edited))
            columns.append((self._kept("rendering alone", rendering), change))

        # The attribution, without anything better.
        if not columns:
            columns.append((self._kept("attribution", images.heat_map(explanation.attribution.float())), None))
        return columns

    def _coloured(self, title: str, change: Tensor) -> list[_Picture]:
        """Draws differences [B, C, H, W] in colours; 1 is black to white."""
        return self._kept(title, images.signed_difference(change), change.abs().amax(dim=(1, 2, 3)).tolist())

    def _kept(self, title: str, batch: Tensor, peaks: Sequence[float | None] | None = None) -> list[_Picture]:
        """Returns small copies of images [B, C, H, W] in [-1, 1]."""
        shown, shrink = batch.detach().float(), self.size / max(batch.shape[-2:])
        # Averages over areas, so that shrinking skips no pixel.
        if shrink < 1:
            sides = [max(1, round(side * shrink)) for side in batch.shape[-2:]]
            shown = torch.nn.functional.interpolate(shown.clamp(-1, 1), size=sides, mode="area")
        return [
            _Picture(title=title, pixels=pixels.clone(), peak=peak)
            for pixels, peak in zip(images.to_uint8(shown).cpu(), peaks or [None] * len(batch), strict=True)
        ]


def _is_attribution(distinct: Tensor, attribution: Tensor) -> bool:
    """Tells whether a distinct part [B, C, H, W] is the attribution [B, 1, H, W] with signs and colours.

    The distinct part of most baselines is only their heat map times the image, which is not worth a picture.
    """
    magnitude = distinct.abs().mean(dim=1, keepdim=True)
    return torch.allclose(magnitude.float(), attribution.float(), rtol=1e-3, atol=1e-6)


def _common_decision(cells: Sequence[_Cell]) -> tuple[int, float] | None:
    """Returns decision and probability on an image; None if the explainers' classifiers differ."""
    decided, surely = {cell.predicted[0] for cell in cells}, [cell.predicted[1] for cell in cells]
    return cells[0].predicted if len(decided) == 1 and max(surely) - min(surely) <= _SAME else None
