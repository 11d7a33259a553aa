"""Draws the atlas of StylEx: the same images along each direction, and the classifier's decisions about them.

Shapes: n reference images, B images that are drawn, T strengths, N entries of a change, C channels, H, W pixels, K
classes.
"""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfe_lightning.atlas import Atlas, AtlasDirection, AtlasPair
from cfe_lightning.decisions import decides_for
from cfe_lightning.methods.stylex.ranking import SearchResult

if TYPE_CHECKING:
    from cfe_lightning.methods.stylex.method import StylEx

#: Number of images that show a direction.
_SHOWN = 5
#: Number of strengths from one whole step backwards to one forwards.
_STRENGTHS = 9
#: Shares of the whole step at which coverage is measured, besides 0 and 1.
_SHARES = (0.25, 0.5, 0.75)
#: Largest number of images behind the coverage curve.
_MEASURED = 100
#: Largest number of pairs of classes.
_PAIRS = 12

_NOTE = (
    "Directions of the generator's latent that were found once, on validation images, and ranked by how much they move "
    "the classifier's logits (EigenFind). A huge step 'explains' everything, because its pictures are none of the "
    "data's any more: read steps in standard deviations of the data."
)


@torch.no_grad()
def draw_atlas(model: "StylEx", result: SearchResult, latent: Tensor, logits: Tensor, masks: Tensor) -> Atlas:
    """Draws the directions of every pair of classes; with many classes, of the pairs most often confused.

    Args:
        model: Explainer that renders and classifies.
        result: Result of the search.
        latent: Latents of the reference images, [n, D] or [n, L, D].
        logits: The classifier's logits of the reference images, [n, K].
        masks: Known cause of the decision in the first m reference images, [m, H, W] bool; all False without any.
    """
    label = model.label(logits)
    sheets = (_Sheet(model, result, latent, label, masks, pair) for pair in _pairs(logits))
    return Atlas(title="Direction atlas", note=_NOTE, pairs=[sheet.pair() for sheet in sheets if sheet.num_directions])


def _pairs(logits: Tensor) -> Iterator[tuple[int, int]]:
    """Returns all ordered pairs of classes if they are few, else each class with its most frequent runner-up."""
    num_classes = logits.shape[1]
    every = list(itertools.permutations(range(num_classes), 2))
    if len(every) <= _PAIRS:
        yield from every
        return
    first, second = logits.topk(2, dim=1).indices.unbind(dim=1)
    for source in range(num_classes):
        nearest = second[first == source]
        if len(nearest) and source < _PAIRS:
            yield source, int(nearest.bincount(minlength=num_classes).argmax())


class _Sheet:
    """The drawings for one pair of classes."""

    def __init__(
        self, model: "StylEx", result: SearchResult, latent: Tensor, label: Tensor, masks: Tensor, pair: tuple[int, int]
    ) -> None:
        self.model, self.result = model, result
        self.source, self.target = pair
        self.ranking = model.latent_search.rank(result, *pair)
        self.num_directions = len(self.ranking.direction)

        # The images of the class: their rows in the search's table, and their places in the reference.
        self.kept = result.images(self.source)
        mine = result.index[self.kept]
        self.latent, self.label = latent[mine], label[mine]
        known = mine[mine < len(masks)]
        self.masks = masks[known] if bool(masks.any()) else masks[:0]

        # Spread evenly over the class: neighbours in a data set are often alike.
        self.shown = torch.linspace(0, len(mine) - 1, min(_SHOWN, len(mine))).round().long().tolist()

    def pair(self) -> AtlasPair:
        """Draws all directions of the pair."""
        names = self.model.classifier.class_names
        return AtlasPair(
            source=names[self.source],
            target=names[self.target],
            num_images=int((self.result.predicted == self.source).sum()),
            num_kept=len(self.kept),
            covered=self.ranking.covered,
            directions=[self.direction(place) for place in range(self.num_directions)],
            curve=self.curve(),
        )

    def pictures(self, rows: list[int], shares: Tensor, place: int) -> Tensor:
        """Renders some images at shares [T] of the whole step towards the target, [B, T, C, H, W]."""
        direction, sign = int(self.ranking.direction[place]), int(self.ranking.sign[place])
        step = sign * self.result.steps[direction] * self.result.vectors[direction]
        change = (shares[None, :, None] * step).expand(len(rows), -1, -1)
        return self.model.render(self.latent[rows], self.label[rows], change)

    def direction(self, place: int) -> AtlasDirection:
        """Draws the direction at a place of the ranking."""
        # Size of the step.
        ranking, kept = self.ranking, max(1, len(self.kept))
        direction, sign = int(ranking.direction[place]), int(ranking.sign[place])
        degree = float(self.result.steps[direction])
        sigma = degree / max(float(self.result.spread[direction]), 1e-12)

        # Strengths count along the direction itself, which may lead away from the target.
        shares = torch.linspace(-1, 1, _STRENGTHS, device=self.latent.device)
        pictures = self.pictures(self.shown, sign * shares, place)
        probabilities = self.model.classifier.along(pictures).softmax(dim=2)[:, :, self.target]

        # Effects at the whole step.
        change, inside = self.changes(place)
        return AtlasDirection(
            name=f"direction {direction}" + (", backwards" if sign < 0 else ""),
            strengths=(shares * sigma).cpu(),
            images=pictures.float().cpu(),
            probabilities=probabilities.float().cpu(),
            step=sign * sigma,
            degree=degree,
            mean_change=float(ranking.mean_change[place]),
            flipped=int(ranking.alone[place]) / kept,
            newly=int(ranking.newly[place]) / kept,
            change=change,
            inside=inside,
        )

    def changes(self, place: int) -> tuple[float, float | None]:
        """Measures the mean change of a pixel at the whole step on [0, 1], and its share within the known cause."""
        rows = list(range(min(len(self.latent), max(_SHOWN, len(self.masks)))))
        start, end = self.pictures(rows, torch.tensor([0.0, 1.0], device=self.latent.device), place).unbind(dim=1)
        change = (end - start).abs().mean(dim=1) / 2

        # Share within the known cause.
        inside = None
        if len(self.masks):
            known = change[: len(self.masks)]
            inside = float((known * self.masks).sum() / known.sum().clamp_min(1e-12))
        return float(change.mean()), inside

    def curve(self) -> list[tuple[float, float]]:
        """Measures the share of images that some direction flips, against the step in standard deviations."""
        # Flips at shares of the step.
        rows = list(range(min(_MEASURED, len(self.kept))))
        shares = torch.tensor(_SHARES, device=self.latent.device)
        pictures = (self.pictures(rows, shares, place) for place in range(self.num_directions))
        hits = [decides_for(self.model.classifier.along(moved), self.target) for moved in pictures]
        between = torch.stack(hits).any(dim=0).float().mean(dim=0).tolist()

        # The search has measured the whole step.
        explained = self.ranking.explained_by[: len(rows)] >= 0
        flipped = [0.0, *between, float(explained.float().mean())]
        steps, spread = self.result.steps, self.result.spread.clamp_min(1e-12)
        sigma = float((steps / spread)[self.ranking.direction.to(steps.device)].median())
        return [(share * sigma, p) for share, p in zip((0.0, *_SHARES, 1.0), flipped, strict=True)]
