"""EigenFind and AttFind: which few directions of a generator's latent or style space carry a classifier's decision.

Sources: Atad et al., "CheXplaining in Style" (2022), Algorithm 1, for EigenFind; Lang et al., "Explaining in Style"
(ICCV 2021), for AttFind. Everything here is a pure function of what a judge (synthesis and classifier together) says
about moved latents; large batches hold any mixture of images, directions and signs.

Shapes: n images, Q directions, N entries of what is moved (D of the latent, M of the style space), K classes, k kept
directions, R edits of one batch. Signs stand in the order (+, -), for AttFind (towards the maximum, the minimum).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.explanation import decides_for
from cfe_lightning.networks.stylegan2 import Entering, Styles, Synthesis

DirectionSpace = Literal["pca_w", "sefa_w", "pca_s"]
StepUnit = Literal["sigma", "abs"]
Scoring = Literal["strict", "paper_code"]

#: Says what the classifier thinks of images ``rows`` [R] after changes [R, N]: logits [R, K].
Judge = Callable[[Tensor, Tensor], Tensor]

#: Half precision may not decide what lies as near to the boundary as this.
_NEAR = 0.02


# Directions


class Directions(NamedTuple):
    """Orthonormal directions, most important first.

    Attributes:
        vectors: [Q, N].
        spread: Standard deviation of the reference along each, [Q].
    """

    vectors: Tensor
    spread: Tensor


def principal_directions(points: Tensor, count: int) -> Directions:
    """Principal components of latents or styles of encoded images [n, N] (``pca_w``, ``pca_s``); at most ``count``."""
    centred = points.double() - points.double().mean(dim=0)
    return _measured(torch.linalg.svd(centred, full_matrices=False).Vh[:count], points)


def factor_directions(weight: Tensor, latents: Tensor, count: int, normalise_rows: bool = False) -> Directions:
    """What moves all styles the most: right singular vectors of the affine maps (``sefa_w``, Shen and Zhou 2021).

    Args:
        weight: How the latent moves every style, [M, D].
        latents: Encoded images, whose spread along each direction is measured, [n, D].
        count: Q.
        normalise_rows: Every style counts alike, as in SeFa's own code; CheXplaining in Style takes them as they are.
    """
    weight = weight.double()
    if normalise_rows:
        weight = weight / weight.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return _measured(torch.linalg.svd(weight, full_matrices=False).Vh[:count], latents)


def _measured(vectors: Tensor, points: Tensor) -> Directions:
    """With a sign that does not depend on the solver: each vector's largest entry is positive."""
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    vectors = vectors * largest.sign()
    return Directions(vectors.float(), (points.double() @ vectors.T).std(dim=0, unbiased=False).float())


def absolute_steps(directions: Directions, degree: float, unit: StepUnit) -> Tensor:
    """How far each direction is followed, [Q]: ``degree`` as it is, or in standard deviations along the direction."""
    return directions.spread * degree if unit == "sigma" else torch.full_like(directions.spread, degree)


# Tables of logits


@torch.no_grad()
def direction_table(judge: Judge, num_images: int, changes: Tensor, batch_size: int = 256) -> Tensor:
    """The classifier's logits of every image moved along every direction both ways, [n, Q, 2, K].

    Args:
        judge: Synthesis and classifier.
        num_images: n.
        changes: What is added for the sign +, [Q, N].
        batch_size: Edits at a time; no result depends on it.
    """
    num_directions = len(changes)
    edits = torch.arange(num_images * num_directions * 2, device=changes.device)
    said = []
    for part in edits.split(batch_size):
        change = changes[part // 2 % num_directions] * (1 - 2 * (part % 2))[:, None]
        said.append(judge(part // (2 * num_directions), change))
    return torch.cat(said).unflatten(0, (num_images, num_directions, 2))


def coordinate_shifts(flat: Tensor, low: Tensor, high: Tensor, share: float = 1.0) -> Tensor:
    """What AttFind adds to each style: the way to the largest and to the smallest value seen, [n, M] -> [n, 2, M].

    Args:
        flat: Styles of the images.
        low: Smallest value of each style over the reference, [M].
        high: Largest one, [M].
        share: 1 ends exactly at the extreme; the authors of CheXplaining in Style extrapolate with 2.5.
    """
    return torch.stack([high - flat, low - flat], dim=1) * share


@torch.no_grad()
def coordinate_table(
    synthesis: Synthesis,
    classifier: FrozenClassifier,
    styles: Styles,
    shifts: Tensor,
    batch_size: int = 256,
    images_at_once: int = 8,
) -> Tensor:
    """The classifier's logits of every image with one style changed, for all styles and both signs, [n, 2, M, K].

    Only what a style changes is synthesised again: features are kept per image at the input of every convolution.

    Args:
        synthesis: The generator's.
        classifier: What is explained.
        styles: Of n images.
        shifts: ``coordinate_shifts``, [n, 2, M].
        batch_size: Edits at a time.
        images_at_once: Whose features are held at a time.
    """
    said = []
    for index in torch.arange(len(shifts), device=shifts.device).split(images_at_once):
        mine, shift = styles.rows(index), shifts[index]
        _, entering = synthesis.trace(mine)
        layers = zip(entering, shift.split(synthesis.layer_sizes, dim=2), strict=True)
        tables = [
            _layer_table(synthesis, classifier, mine, layer, entered, amount, batch_size)
            for layer, (entered, amount) in enumerate(layers)
        ]
        said.append(torch.cat(tables, dim=2))
    return torch.cat(said)


def _layer_table(
    synthesis: Synthesis,
    classifier: FrozenClassifier,
    styles: Styles,
    layer: int,
    entering: Entering,
    shift: Tensor,
    batch_size: int,
) -> Tensor:
    """The part of ``coordinate_table`` about the styles of one convolution, shifts [n, 2, c] -> [n, 2, c, K]."""
    width = shift.shape[2]
    amounts = shift.flatten()
    said = []
    for part in torch.arange(len(amounts), device=shift.device).split(batch_size):
        rows, channel = part // (2 * width), part % width
        changed = styles.rows(rows)
        conv = list(changed.conv)
        # Indexing has made a copy, so the image's own styles stay as they are.
        conv[layer][torch.arange(len(part), device=part.device), channel] += amounts[part]
        picture = None if entering.picture is None else entering.picture[rows]
        start = Entering(entering.features[rows], picture)
        pictures = synthesis.synthesize_from(layer, start, changed._replace(conv=conv))
        said.append(classifier(pictures.clamp(-1, 1)))
    return torch.cat(said).unflatten(0, shift.shape)


def rechecked(rough: Judge, exact: Judge) -> Judge:
    """A judge that asks the exact one again where the rough one (half precision) is within 0.02 of a tie."""

    def judge(rows: Tensor, change: Tensor) -> Tensor:
        logits = rough(rows, change).float()
        top = logits.softmax(dim=1).topk(2, dim=1).values
        near = ((top[:, 0] - top[:, 1]) <= 2 * _NEAR).nonzero().squeeze(1)
        if len(near):
            logits[near] = exact(rows[near], change[near])
        return logits

    return judge


# Choosing


def target_margin(logits: Tensor, target: int) -> Tensor:
    """The target's logit minus the log-sum-exp of the others, [..., K] -> [...]; with two classes their difference."""
    others = torch.cat([logits[..., :target], logits[..., target + 1 :]], dim=-1)
    return logits[..., target] - others.logsumexp(dim=-1)


def effects(table: Tensor, before: Tensor, target: int, scoring: Scoring = "strict") -> tuple[Tensor, Tensor]:
    """How much every edit speaks for the target, and whether it flips the decision.

    Args:
        table: Logits after edits, [n, Q, 2, K].
        before: Logits before, [n, K]: of the reconstructions ("strict"), or of the images ("paper_code").
        target: The class asked for.
        scoring: "strict" is the change of ``target_margin``, and a flip where the target is decided for. "paper_code"
            is the change of the target's sigmoid, and a flip where that crosses one half in either direction.

    Returns:
        Two tables [n, Q, 2], float and bool.
    """
    if scoring == "paper_code":
        after, start = table[..., target].sigmoid(), before[:, target].sigmoid()[:, None, None]
        return after - start, (after > 0.5) != (start > 0.5)
    score = target_margin(table, target) - target_margin(before, target)[:, None, None]
    flat = table.flatten(0, -2)
    flips = decides_for(flat, torch.full((len(flat),), target, device=flat.device)).unflatten(0, table.shape[:-1])
    return score, flips


class Ranking(NamedTuple):
    """The directions that lead from one class to another, best first, and what they explain.

    Attributes:
        direction: [k] int64.
        sign: +1 or -1, [k].
        mean_change: Mean score over the images, [k]; over the remaining ones where these are averaged again.
        alone: Images that it flips, [k] int64.
        newly: Of these, those that none before it flips, [k] int64.
        explained_by: Place in this list of the direction that explains each image, -1 for none, [n].
    """

    direction: Tensor
    sign: Tensor
    mean_change: Tensor
    alone: Tensor
    newly: Tensor
    explained_by: Tensor

    @property
    def covered(self) -> float:
        """Share of the images that are explained; 0 of none."""
        return float((self.explained_by >= 0).double().mean()) if len(self.explained_by) else 0.0


def rank_directions(
    score: Tensor,
    flips: Tensor,
    k: int = 8,
    *,
    reaverage: bool = False,
    both_signs: bool = False,
    scoring: Scoring = "strict",
) -> Ranking:
    """Greedy cover in the order of mean effects (Algorithm 1).

    Args:
        score: See ``effects``, [n, Q, 2].
        flips: See ``effects``, [n, Q, 2].
        k: Longest list.
        reaverage: Average over the images that are still unexplained before every choice, as StylEx does.
        both_signs: A direction may be chosen once for either sign; otherwise for its better one.
        scoring: In "paper_code" directions that help both ways are inconsistent and left out; signs are free.

    Returns:
        At most k directions with a positive mean effect; ties go to the lower index.
    """
    num_images, num_directions, _ = score.shape
    mean = score.double().mean(dim=0) if num_images else score.new_zeros(num_directions, 2).double()
    allowed = torch.ones_like(mean, dtype=torch.bool)
    if scoring == "paper_code":
        allowed &= ~(mean > 0).all(dim=1, keepdim=True)
    elif not both_signs:
        better = mean[:, 1] > mean[:, 0]
        allowed = torch.stack([~better, better], dim=1)
    remaining = torch.ones(num_images, dtype=torch.bool, device=score.device)
    explained_by = torch.full((num_images,), -1, device=score.device)
    picked: list[tuple[int, int, float, int, int]] = []
    while len(picked) < k and num_images:
        if reaverage and bool(remaining.any()):
            mean = score[remaining].double().mean(dim=0)
        best = torch.where(allowed, mean, -torch.inf).flatten()
        place = int(best.argmax())
        if best[place] <= 0:
            break
        direction, backwards = divmod(place, 2)
        hits = flips[:, direction, backwards]
        new = hits & remaining
        explained_by[new] = len(picked)
        remaining = remaining & ~hits
        picked.append((direction, 1 - 2 * backwards, float(best[place]), int(hits.sum()), int(new.sum())))
        allowed[direction, backwards] = False
    columns = list(zip(*picked, strict=True)) or [()] * 5
    whole = [torch.tensor(columns[i], dtype=torch.int64) for i in (0, 1, 3, 4)]
    return Ranking(whole[0], whole[1], torch.tensor(columns[2], dtype=torch.float64), whole[2], whole[3], explained_by)


def accumulated_choice(score: Tensor, k: int = 8, enough: float = 1.0) -> list[tuple[int, int]]:
    """StylEx' own choice of coordinates: best mean effect over images whose accumulated effect is not yet enough.

    Args:
        score: Change of the target's logit, [n, Q, 2].
        k: Number of choices.
        enough: Accumulated effect from which an image counts as explained.

    Returns:
        (coordinate, sign) in the order chosen.
    """
    score = score.double().clamp_min(0)
    accumulated = score.new_zeros(len(score))
    chosen: list[tuple[int, int]] = []
    for _ in range(k):
        open_images = accumulated < enough
        if not bool(open_images.any()):
            break
        mean = score[open_images].mean(dim=0)
        place = int(mean.flatten().argmax())
        direction, backwards = divmod(place, 2)
        if mean[direction, backwards] <= 0:
            break
        accumulated = accumulated + score[:, direction, backwards]
        score[:, direction, backwards] = 0
        chosen.append((direction, 1 - 2 * backwards))
    return chosen


def stable_images(score: Tensor, limit: float = 2.0, entries: int = 750) -> Tensor:
    """Images that no more than ``entries`` edits move by more than ``limit`` logits, [n, Q, 2] -> [n] bool (StylEx)."""
    return (score.abs() > limit).sum(dim=(1, 2)) <= entries


@torch.no_grad()
def smallest_subset(
    judge: Judge, changes: Tensor, score: Tensor, target: Tensor, most: int = 10
) -> tuple[Tensor, Tensor]:
    """Per image, how many of its own best edits together flip it ("subset" of StylEx).

    Args:
        judge: Synthesis and classifier.
        changes: What each edit adds to each image, [n, E, N].
        score: Effect of each edit by itself, [n, E].
        target: Classes asked for, [n].
        most: Longest subset.

    Returns:
        Edits in the order of their effects [n, most], and the number of the first ones that are needed [n]; 0 where
        ``most`` are not enough.
    """
    order = score.argsort(dim=1, descending=True, stable=True)[:, :most]
    together = changes.gather(1, order[:, :, None].expand(-1, -1, changes.shape[2])).cumsum(dim=1)
    num_images, length = order.shape
    rows = torch.arange(num_images, device=order.device).repeat_interleave(length)
    logits = judge(rows, together.flatten(0, 1))
    flips = decides_for(logits, target.repeat_interleave(length)).unflatten(0, (num_images, length))
    first = flips.to(torch.int8).argmax(dim=1) + 1
    return order, torch.where(flips.any(dim=1), first, 0)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SearchResult:
    """What EigenFind has found out about one classifier, for all pairs of classes at once.

    Attributes:
        index: Places of the n images in the reference, [n] int64.
        vectors: The directions, [Q, N].
        spread: Standard deviation of the reference along each, [Q].
        steps: How far each was followed, [Q].
        table: Logits after the edits, [n, Q, 2, K].
        before: Logits that scores start from, [n, K].
        predicted: What the classifier takes each image for, [n] int64.
        kept: Whether its reconstruction is taken for the same, [n] bool.
        forward_passes: Pictures synthesised and judged.
        seconds: Of the search.
    """

    index: Tensor
    vectors: Tensor
    spread: Tensor
    steps: Tensor
    table: Tensor
    before: Tensor
    predicted: Tensor
    kept: Tensor
    forward_passes: int
    seconds: float

    def images(self, source: int) -> Tensor:
        """Places of the images that a search from class ``source`` counts."""
        return (self.kept & (self.predicted == source)).nonzero().squeeze(1)

    def ranking(
        self, source: int, target: int, k: int, *, reaverage: bool = False, scoring: Scoring = "strict"
    ) -> Ranking:
        """The directions from one class to another, see ``rank_directions``."""
        mine = self.images(source)
        score, flips = effects(self.table[mine], self.before[mine], target, scoring)
        return rank_directions(score, flips, k, reaverage=reaverage, scoring=scoring)

    def to_plain(self) -> dict[str, Any]:
        """Tensors on the CPU and numbers, by field: what ``torch.load(weights_only=True)`` reads back."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in values.items()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], device: torch.device) -> SearchResult:
        """The inverse of ``to_plain``, on a device."""
        values: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in plain.items()
        }
        return cls(**values)
