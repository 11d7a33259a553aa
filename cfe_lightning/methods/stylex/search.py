"""EigenFind: finds the directions of the generator's latent or style space that move the classifier's logits.

Source: Atad et al., "CheXplaining in Style" (arXiv 2207.07553), Algorithm 1. Networks and tensors are passed in; one
batch of edits holds any mixture of images, directions and signs.

Shapes: n images, R edits of one batch, Q directions, N entries of a change (D of the latent, M of the style space), L
slots, K classes, k kept directions. Signs stand in the order (+, -).
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.compute.precision import full_precision, to_float32
from cfe_lightning.methods.stylex.generator import StyleGenerator
from cfe_lightning.methods.stylex.ranking import Ranking, Scoring, SearchResult

DirectionSpace = Literal["pca_w", "sefa_w", "pca_s"]
StepUnit = Literal["sigma", "abs"]

#: The classifier's logits [R, K] of images ``rows`` [R] after changes [R, N].
LogitsOfEdits = Callable[[Tensor, Tensor], Tensor]

#: Half precision does not decide where the two largest probabilities differ by at most this.
_NEAR = 0.04
#: Latents per pass from latents to styles, to bound memory.
_CHUNK = 128


class Directions(NamedTuple):
    """Orthonormal directions, most important first.

    Attributes:
        vectors: Unit vectors, [Q, N].
        spread: Standard deviation of the reference images along each direction, [Q].
    """

    vectors: Tensor
    spread: Tensor


def principal_directions(points: Tensor, count: int) -> Directions:
    """Returns at most ``count`` principal components of encoded images' latents or styles [n, N] (pca_w, pca_s)."""
    centred = points.double() - points.double().mean(dim=0)
    return _with_spread(torch.linalg.svd(centred, full_matrices=False).Vh[:count], points)


def factor_directions(weight: Tensor, latents: Tensor, count: int, normalise_rows: bool = False) -> Directions:
    """Returns the latent directions that move all styles most: right singular vectors of the affine maps (sefa_w).

    Source: Shen and Zhou, "Closed-Form Factorization of Latent Semantics in GANs" (SeFa, arXiv 2007.06600).

    Args:
        weight: Affine map from the latent to every style, [M, D].
        latents: Latents of encoded images, which give the spread along each direction, [n, D].
        count: Largest number of directions, Q.
        normalise_rows: Scales every row of ``weight`` to unit norm as SeFa's code does; CheXplaining in Style does not.
    """
    weight = weight.double()
    if normalise_rows:
        weight = weight / weight.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return _with_spread(torch.linalg.svd(weight, full_matrices=False).Vh[:count], latents)


def _with_spread(vectors: Tensor, points: Tensor) -> Directions:
    """Fixes the sign of each vector and measures the spread of the points along it."""
    # The largest entry becomes positive, so that the sign does not depend on the solver.
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    vectors = vectors * largest.sign()
    return Directions(vectors.float(), (points.double() @ vectors.T).std(dim=0, unbiased=False).float())


def absolute_steps(directions: Directions, degree: float, unit: StepUnit) -> Tensor:
    """Returns the step along each direction, [Q]: ``degree`` itself ("abs"), or that many standard deviations."""
    return directions.spread * degree if unit == "sigma" else torch.full_like(directions.spread, degree)


@torch.no_grad()
def direction_table(logits_of: LogitsOfEdits, num_images: int, changes: Tensor, batch_size: int = 256) -> Tensor:
    """Measures the classifier's logits of every image moved both ways along every direction, [n, Q, 2, K].

    Args:
        logits_of: Synthesis and classifier.
        num_images: Number of images, n.
        changes: Whole steps in the direction of the sign +, [Q, N].
        batch_size: Edits per pass; the result does not depend on it.
    """
    num_directions = len(changes)
    edits = torch.arange(num_images * num_directions * 2, device=changes.device)
    logits = []
    for part in edits.split(batch_size):
        # Edits are ordered by image, direction and sign.
        change = changes[part // 2 % num_directions] * (1 - 2 * (part % 2))[:, None]
        logits.append(logits_of(part // (2 * num_directions), change))
    return torch.cat(logits).unflatten(0, (num_images, num_directions, 2))


def rechecked(rough: LogitsOfEdits, exact: LogitsOfEdits) -> LogitsOfEdits:
    """Replaces the logits of ``rough`` (half precision) by those of ``exact`` where the two best classes nearly tie."""

    def logits_of(rows: Tensor, change: Tensor) -> Tensor:
        logits = rough(rows, change).float()
        first, second = logits.softmax(dim=1).topk(2, dim=1).values.unbind(dim=1)
        near = (first - second <= _NEAR).nonzero().squeeze(1)
        if len(near):
            # ``rough`` may keep its own tensor.
            logits = logits.clone()
            logits[near] = exact(rows[near], change[near])
        return logits

    return logits_of


@dataclass(kw_only=True)
class LatentSearch:
    """The search with the options of ``StylEx`` of the same names; networks are passed in, as training changes them.

    Raises:
        ValueError: If an option is out of range, or contradicts another.
    """

    search_images: int
    search_space: DirectionSpace
    search_directions: int
    kept_directions: int
    degree: float
    degree_unit: StepUnit
    reaverage: bool
    normalise_rows: bool
    edited_layers: list[int] | None
    scoring: Scoring

    def __post_init__(self) -> None:
        for name, known in (("search_space", DirectionSpace), ("degree_unit", StepUnit)):
            if (value := getattr(self, name)) not in get_args(known):
                raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, got {value!r}.")
        if self.degree <= 0:
            raise ValueError(f"degree must be positive, got {self.degree}.")
        if self.edited_layers is not None and self.search_space == "pca_s":
            raise ValueError(
                "edited_layers chooses slots of the latent: set search_space to pca_w or sefa_w, or leave it out."
            )

    def directions(self, generator: StyleGenerator, latent: Tensor, label: Tensor) -> Directions:
        """Finds the candidates in ``search_space`` from latents [n, D] or [n, L, D] and labels [n, K] of images."""
        if self.search_space == "pca_s":
            parts = zip(latent.split(_CHUNK), label.split(_CHUNK), strict=True)
            styles = [generator.synthesis.flatten_styles(generator.styles(*part)) for part in parts]
            return principal_directions(torch.cat(styles), self.search_directions)
        # A latent per slot ("w+") counts by its mean.
        points = latent if latent.ndim == 2 else latent.mean(dim=1)
        if self.search_space == "pca_w":
            return principal_directions(points, self.search_directions)
        weight = generator.affine_weights(self.edited_layers)
        return factor_directions(weight, points, self.search_directions, self.normalise_rows)

    def render(self, generator: StyleGenerator, latent: Tensor, label: Tensor, change: Tensor) -> Tensor:
        """Renders one edit per row: latents [R, D] or [R, L, D], labels [R, K], changes [R, N] -> [R, C, H, W].

        Changes are added to the latents, or to the styles if ``search_space`` is "pca_s"; pictures are in [-1, 1].
        """
        # Moved styles.
        if self.search_space == "pca_s":
            styles = generator.styles(latent, label)
            moved = generator.synthesis.flatten_styles(styles) + change.to(latent)
            styles = generator.synthesis.replace_styles(styles, moved)
        else:
            moved = change.to(latent)[:, None]
            if self.edited_layers is not None:
                slots = torch.arange(generator.num_slots, device=latent.device)
                moved = moved * torch.isin(slots, slots.new_tensor(self.edited_layers))[:, None]
            styles = generator.styles(generator.spread(latent) + moved, label)

        # The released code draws new noise maps for every picture; here they are stored, so that results repeat.
        fresh = generator.synthesis.draw_noise(len(latent), latent) if self.scoring == "paper_code" else None
        picture = generator.synthesis(styles, fresh).clamp(-1, 1)
        # In this layout a classifier's pooling is several times faster on a CPU, and half precision on a GPU.
        return picture.contiguous(memory_format=torch.channels_last)

    def logits_of_edits(
        self, generator: StyleGenerator, classifier: FrozenClassifier, latent: Tensor, label: Tensor
    ) -> LogitsOfEdits:
        """Prepares the logits of images after changes; a GPU computes in half precision and rechecks near ties."""
        latent, label = to_float32(latent), to_float32(label)

        def logits_of(rows: Tensor, change: Tensor) -> Tensor:
            return classifier(self.render(generator, latent[rows], label[rows], change))

        def exact(rows: Tensor, change: Tensor) -> Tensor:
            # Overrides the precision of a surrounding training or explanation.
            with full_precision(latent):
                return logits_of(rows, change)

        def rough(rows: Tensor, change: Tensor) -> Tensor:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                return logits_of(rows, change)

        return rechecked(rough, exact) if latent.device.type == "cuda" else exact

    @torch.no_grad()
    def measure(
        self, logits_of: LogitsOfEdits, directions: Directions, logits: Tensor, batch_size: int
    ) -> SearchResult:
        """Moves images with logits [n, K] both ways along directions and records the classifier's logits.

        ``batch_size`` pictures are rendered at a time; the result does not depend on it.
        """
        # Reconstructions.
        start = time.perf_counter()
        steps = absolute_steps(directions, self.degree, self.degree_unit)
        rows = torch.arange(len(logits), device=logits.device)
        still = torch.zeros(len(logits), directions.vectors.shape[1], device=logits.device)
        parts = zip(rows.split(batch_size), still.split(batch_size), strict=True)
        rendered = torch.cat([logits_of(row, change) for row, change in parts])

        # Edits.
        table = direction_table(logits_of, len(logits), steps[:, None] * directions.vectors, batch_size)
        predicted = logits.argmax(dim=1)
        strict = self.scoring == "strict"
        agreed = rendered.argmax(dim=1) == predicted
        return SearchResult(
            index=rows,
            vectors=directions.vectors,
            spread=directions.spread,
            steps=steps,
            table=table.float(),
            before=(rendered if strict else logits).float(),
            predicted=predicted,
            kept=agreed if strict else torch.ones_like(agreed),
            forward_passes=len(logits) + table.shape[:3].numel(),
            seconds=time.perf_counter() - start,
        )

    def rank(self, result: SearchResult, source: int, target: int) -> Ranking:
        """Ranks the directions from one class to another."""
        return result.ranking(source, target, self.kept_directions, reaverage=self.reaverage, scoring=self.scoring)

    def candidates(self, result: SearchResult, num_classes: int) -> Tensor:
        """Lists k directions for every pair of classes; unranked ones fill the list where fewer were ranked.

        Returns:
            Direction, sign and 1 if ranked, int64 [K, K, k, 3]; zeros where source and target are the same class.
        """
        k = self.kept_directions
        table = torch.zeros(num_classes, num_classes, k, 3, dtype=torch.int64)
        # The most important directions fill up first, forwards before backwards.
        every = list(itertools.product(range(len(result.vectors)), (1, -1)))
        for source, target in itertools.permutations(range(num_classes), 2):
            ranking = self.rank(result, source, target)
            found = list(zip(ranking.direction.tolist(), ranking.sign.tolist(), strict=True))
            filled = [(*pair, 1) for pair in found] + [(*pair, 0) for pair in every if pair not in found]
            # A small latent may have fewer directions than are kept.
            table[source, target] = torch.tensor((filled * k)[:k])
        return table
