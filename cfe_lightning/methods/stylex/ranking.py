"""Which directions lead from one class to another: scores, the greedy cover, and the result of a search.

Sources: Atad et al., "CheXplaining in Style" (2022), Algorithm 1; Lang et al., "Explaining in Style" (ICCV 2021).

Shapes: n images, Q directions, N entries of what is moved, K classes, k kept directions. Signs are in the order (+, -).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cfe_lightning.decisions import decides_for

Scoring = Literal["strict", "paper_code"]


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
        both_signs: A direction may be chosen once for either sign; otherwise for the better one over all images.
        scoring: In "paper_code" directions that help both ways are inconsistent and left out; signs are free.

    Returns:
        At most k directions with a positive mean effect; ties go to the lower index. The list goes on when all images
        are explained, because what else moves the decision is worth knowing; not where averages are of what remains.
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
        if reaverage:
            if not bool(remaining.any()):
                break
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
    """Images that no more than ``entries`` edits move by more than ``limit`` logits, [n, Q, 2] -> [n] bool (StylEx).

    StylEx counts the entries of all classes together, here those of one score: half as many for two classes.
    """
    return (score.abs() > limit).sum(dim=(1, 2)) <= entries


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


def candidate_table(
    rankings: Mapping[tuple[int, int], Ranking], num_classes: int, num_directions: int, k: int
) -> Tensor:
    """The lists of all pairs of classes as one table, filled up where a search found fewer than k.

    Args:
        rankings: By (source, target), for every pair of different classes.
        num_classes: K.
        num_directions: Q; the widest come first and fill up, forwards before backwards.
        k: Length of every list.

    Returns:
        Direction, sign and whether the search ranked it, int64 [K, K, k, 3]; zeros for a class and itself.
    """
    table = torch.zeros(num_classes, num_classes, k, 3, dtype=torch.int64)
    every = [(index, sign) for index in range(num_directions) for sign in (1, -1)]
    for (source, target), ranking in rankings.items():
        found = list(zip(ranking.direction.tolist(), ranking.sign.tolist(), strict=True))
        filled = [(*pair, 1) for pair in found] + [(*pair, 0) for pair in every if pair not in found]
        # A small latent may have fewer directions than are kept.
        table[source, target] = torch.tensor((filled * k)[:k])
    return table
