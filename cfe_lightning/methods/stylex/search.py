"""EigenFind and AttFind: what a classifier says of latents moved along directions, or of styles changed one by one.

Sources: Atad et al., "CheXplaining in Style" (2022), Algorithm 1, for EigenFind; Lang et al., "Explaining in Style"
(ICCV 2021), for AttFind. Everything here is a pure function of what a judge (synthesis and classifier together) says
about moved latents; large batches hold any mixture of images, directions and signs.

Shapes: n images, Q directions, N entries of what is moved (D of the latent, M of the style space), K classes, k kept
directions, R edits of one batch. Signs stand in the order (+, -), for AttFind (towards the maximum, the minimum).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.compute.memory import pictures_at_once
from cfe_lightning.decisions import decides_for
from cfe_lightning.methods.stylex.generator import Entering, Styles, Synthesis

DirectionSpace = Literal["pca_w", "sefa_w", "pca_s"]
StepUnit = Literal["sigma", "abs"]

#: Says what the classifier thinks of images ``rows`` [R] after changes [R, N]: logits [R, K].
LogitsOfEdits = Callable[[Tensor, Tensor], Tensor]

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
def direction_table(judge: LogitsOfEdits, num_images: int, changes: Tensor, batch_size: int = 256) -> Tensor:
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
    batch_size: int | None = None,
    images_at_once: int = 8,
) -> Tensor:
    """The classifier's logits of every image with one style changed, for all styles and both signs, [n, 2, M, K].

    Only what a style changes is synthesised again: features are kept per image at the input of every convolution.

    Args:
        synthesis: The generator's.
        classifier: What is explained.
        styles: Of n images.
        shifts: ``coordinate_shifts``, [n, 2, M].
        batch_size: Edits at a time; None takes ``pictures_at_once``.
        images_at_once: Whose features are held at a time.
    """
    # Two slots for every doubling of the sides, from 4 x 4 pixels on.
    batch_size = batch_size or pictures_at_once(2 ** (synthesis.num_slots + 2), shifts.device)
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
        said.append(classifier(pictures.clamp(-1, 1).contiguous(memory_format=torch.channels_last)))
    return torch.cat(said).unflatten(0, shift.shape)


def rechecked(rough: LogitsOfEdits, exact: LogitsOfEdits) -> LogitsOfEdits:
    """A judge that asks the exact one again where the rough one (half precision) is within 0.02 of a tie."""

    def judge(rows: Tensor, change: Tensor) -> Tensor:
        logits = rough(rows, change).float()
        top = logits.softmax(dim=1).topk(2, dim=1).values
        near = ((top[:, 0] - top[:, 1]) <= 2 * _NEAR).nonzero().squeeze(1)
        if len(near):
            logits = logits.clone()  # the rough judge may keep its own
            logits[near] = exact(rows[near], change[near])
        return logits

    return judge


@torch.no_grad()
def smallest_subset(
    judge: LogitsOfEdits, changes: Tensor, score: Tensor, target: Tensor, most: int = 10
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
        ``most`` are not enough. Edits that do not speak for the target are left out.
    """
    order = score.argsort(dim=1, descending=True, stable=True)[:, :most]
    helpful = changes * (score > 0)[:, :, None]
    together = helpful.gather(1, order[:, :, None].expand(-1, -1, changes.shape[2])).cumsum(dim=1)
    num_images, length = order.shape
    rows = torch.arange(num_images, device=order.device).repeat_interleave(length)
    logits = judge(rows, together.flatten(0, 1))
    flips = decides_for(logits, target.repeat_interleave(length)).unflatten(0, (num_images, length))
    first = flips.to(torch.int8).argmax(dim=1) + 1
    return order, torch.where(flips.any(dim=1), first, 0)
