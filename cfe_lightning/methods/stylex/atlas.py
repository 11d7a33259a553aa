"""The atlas of StylEx' directions: the same few pictures along each of them, and what the decisions do.

Shapes: N images of the atlas, T strengths, Q directions, K classes, m images of a pair that the search counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from cfe_lightning.atlas import Atlas, AtlasDirection, AtlasPair
from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.decisions import decides_for
from cfe_lightning.methods.stylex.ranking import Scoring, SearchResult

#: Images that every direction is shown on.
_SHOWN = 5
#: Strengths from one whole step backwards to one forwards.
_STRENGTHS = 9
#: Shares of a step at which coverage is measured, besides none and all of it.
_SHARES = (0.25, 0.5, 0.75)
#: Images at most that the coverage curve is measured on.
_MEASURED = 100
#: Pairs of classes at most.
_PAIRS = 12

_NOTE = (
    "Directions of the generator's latent that were found once, on validation images, and ranked by how much they move "
    "the classifier's logits (EigenFind). A huge step 'explains' everything, because its pictures are none of the "
    "data's any more: read steps in standard deviations of the data."
)


class Renderer(Protocol):
    """What is needed of the explainer."""

    classifier: FrozenClassifier
    kept_directions: int
    reaverage: bool
    scoring: Scoring

    def render(self, latent: Tensor, label: Tensor, change: Tensor) -> Tensor:
        """Pictures of latents moved by changes [B, T, N], [B, T, C, H, W]."""
        ...

    def label(self, logits: Tensor) -> Tensor:
        """What the generator is told of images with these logits, [B, K] -> [B, K]."""
        ...


@torch.no_grad()
def draw_atlas(model: Renderer, result: SearchResult, latent: Tensor, logits: Tensor, masks: Tensor) -> Atlas:
    """Draws the directions of every pair of classes; of many classes, the pairs that are most often confused.

    Args:
        model: Renders and judges.
        result: What the search found.
        latent: Of the reference, [n, D] or [n, L, D].
        logits: Of its images, [n, K].
        masks: The known cause in the first images, [m, H, W] bool; empty where none is known.
    """
    names, label = model.classifier.class_names, model.label(logits)
    pairs = []
    for source, target in _pairs(logits):
        sheet = _Sheet(model, result, latent, label, masks, source, target)
        if sheet.num_directions:
            pairs.append(
                AtlasPair(
                    source=names[source],
                    target=names[target],
                    num_images=int((result.predicted == source).sum()),
                    num_kept=len(sheet.kept),
                    covered=sheet.ranking.covered,
                    directions=[sheet.direction(place) for place in range(sheet.num_directions)],
                    curve=sheet.curve(),
                )
            )
    return Atlas(title="Direction atlas", note=_NOTE, pairs=pairs)


def _pairs(logits: Tensor) -> Iterator[tuple[int, int]]:
    """All ordered pairs of classes if they are few, else each class with the one that it is most often nearest to."""
    num_classes = logits.shape[1]
    every = [(s, t) for s in range(num_classes) for t in range(num_classes) if s != t]
    if len(every) <= _PAIRS:
        yield from every
        return
    first, second = logits.topk(2, dim=1).indices.unbind(dim=1)
    for source in range(num_classes):
        nearest = second[first == source]
        if len(nearest) and source < _PAIRS:
            yield source, int(nearest.bincount(minlength=num_classes).argmax())


class _Sheet:
    """The drawings of one pair of classes."""

    def __init__(
        self,
        model: Renderer,
        result: SearchResult,
        latent: Tensor,
        label: Tensor,
        masks: Tensor,
        source: int,
        target: int,
    ) -> None:
        self.model = model
        self.result = result
        self.target = target
        self.ranking = result.ranking(
            source, target, model.kept_directions, reaverage=model.reaverage, scoring=model.scoring
        )
        self.num_directions = len(self.ranking.direction)
        #: Rows of the search's table, and the same images in the reference.
        self.kept = result.images(source)
        mine = result.index[self.kept]
        self.latent, self.label = latent[mine], label[mine]
        known = mine[mine < len(masks)]
        self.masks = masks[known] if bool(masks.any()) else masks[:0]
        # Evenly over the class: neighbours in a data set are often alike.
        places = torch.linspace(0, len(mine) - 1, min(_SHOWN, len(mine)))
        self.shown = places.round().long().tolist()

    def way(self, place: int) -> Tensor:
        """The whole step of the direction at a place of the ranking, towards the target, [N]."""
        direction, sign = int(self.ranking.direction[place]), int(self.ranking.sign[place])
        return sign * self.result.steps[direction] * self.result.vectors[direction]

    def pictures(self, rows: list[int], shares: Tensor, place: int) -> Tensor:
        """Pictures of some images along a direction, [N, T, C, H, W]."""
        change = shares[None, :, None] * self.way(place)
        return self.model.render(self.latent[rows], self.label[rows], change.expand(len(rows), -1, -1))

    def probabilities(self, pictures: Tensor) -> Tensor:
        """Of the target, [N, T, C, H, W] -> [N, T]."""
        return self.model.classifier.along(pictures).softmax(dim=2)[:, :, self.target]

    def direction(self, place: int) -> AtlasDirection:
        """One direction of the ranking."""
        ranking = self.ranking
        direction, sign = int(ranking.direction[place]), int(ranking.sign[place])
        degree = float(self.result.steps[direction])
        sigma = degree / max(float(self.result.spread[direction]), 1e-12)
        shares = torch.linspace(-1, 1, _STRENGTHS, device=self.latent.device)
        # Strengths count along the direction as it is; the way to the target may be backwards.
        pictures = self.pictures(self.shown, sign * shares, place)
        change, inside = self.changes(place)
        kept = max(1, len(ranking.explained_by))
        return AtlasDirection(
            name=f"direction {direction}" + (", backwards" if sign < 0 else ""),
            strengths=(shares * sigma).cpu(),
            images=pictures.float().cpu(),
            probabilities=self.probabilities(pictures).float().cpu(),
            step=sign * sigma,
            degree=degree,
            mean_change=float(ranking.mean_change[place]),
            flipped=int(ranking.alone[place]) / kept,
            newly=int(ranking.newly[place]) / kept,
            change=change,
            inside=inside,
        )

    def changes(self, place: int) -> tuple[float, float | None]:
        """Mean change of a pixel at the whole step on [0, 1], and its share within the known cause."""
        rows = list(range(min(len(self.latent), max(_SHOWN, len(self.masks)))))
        start, end = self.pictures(rows, torch.tensor([0.0, 1.0], device=self.latent.device), place).unbind(dim=1)
        change = (end - start).abs().mean(dim=1) / 2
        inside = None
        if len(self.masks):
            known = change[: len(self.masks)]
            inside = float((known * self.masks).sum() / known.sum().clamp_min(1e-12))
        return float(change.mean()), inside

    def curve(self) -> list[tuple[float, float]]:
        """Share of images that some direction of the ranking flips, against the step in standard deviations."""
        rows = list(range(min(_MEASURED, len(self.kept))))
        shares = torch.tensor(_SHARES, device=self.latent.device)
        hits = []
        for place in range(self.num_directions):
            said = self.model.classifier.along(self.pictures(rows, shares, place))
            asked = torch.full((said.shape[:2].numel(),), self.target, device=said.device)
            hits.append(decides_for(said.flatten(0, 1), asked).unflatten(0, said.shape[:2]))
        between = torch.stack(hits).any(dim=0).float().mean(dim=0).tolist()
        explained = self.ranking.explained_by[: len(rows)] >= 0
        flipped = [0.0, *between, float(explained.float().mean())]
        steps, spread = self.result.steps, self.result.spread.clamp_min(1e-12)
        sigma = float((steps / spread)[self.ranking.direction.to(steps.device)].median())
        return [(share * sigma, p) for share, p in zip((0.0, *_SHARES, 1.0), flipped, strict=True)]
