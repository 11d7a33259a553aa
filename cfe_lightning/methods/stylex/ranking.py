"""Ranks directions from one class to another: scores, the greedy cover, and the result of a search.

Sources: Atad et al., "CheXplaining in Style" (arXiv 2207.07553), Algorithm 1; Lang et al., "Explaining in Style" (arXiv
2104.13369).

Shapes: n images, Q directions, N entries of a change, K classes, k kept directions. Signs are in the order (+, -).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cfe_lightning.decisions import decides_for, target_margin

Scoring = Literal["strict", "paper_code"]


def effects(table: Tensor, before: Tensor, target: int, scoring: Scoring = "strict") -> tuple[Tensor, Tensor]:
    """Scores every edit by its effect on the target and tells whether it flips the decision.

    Args:
        table: Logits after the edits, [n, Q, 2, K].
        before: Logits before the edits, [n, K]: of the reconstructions ("strict"), or of the images ("paper_code").
        target: Target class.
        scoring: "strict" takes the change of the target's log-odds; a flip is a decision for the target. "paper_code"
            takes the change of the target's sigmoid; a flip is its crossing of one half in either direction.

    Returns:
        Scores and flips, [n, Q, 2] float and bool.
    """
    if scoring == "paper_code":
        after, start = table[..., target].sigmoid(), before[:, target].sigmoid()[:, None, None]
        return after - start, (after > 0.5) != (start > 0.5)
    score = target_margin(table, target) - target_margin(before, target)[:, None, None]
    return score, decides_for(table, target)


class Ranking(NamedTuple):
    """The directions from one class to another, best first, and the images that they explain.

    Attributes:
        direction: Number of each direction among the candidates, [k] int64.
        sign: Sign of each direction, +1 or -1, [k].
        mean_change: Mean score over the images, [k]; over the images not yet explained if scores are averaged again.
        alone: Number of images that the direction flips, [k] int64.
        newly: Number of images that the direction flips and none before it, [k] int64.
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
        """Returns the share of explained images; 0 without images."""
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
    """Covers the images greedily in the order of mean scores (Algorithm 1).

    Args:
        score: Scores of the edits, [n, Q, 2].
        flips: Flips of the edits, [n, Q, 2] bool.
        k: Length of the longest list.
        reaverage: Averages over the images not yet explained before every choice, as Explaining in Style does.
        both_signs: Allows both signs of a direction; otherwise only the better one over all images.
        scoring: "paper_code" allows both signs, but leaves out directions whose mean score is positive for both.

    Returns:
        At most k directions with a positive mean score; ties go to the lower index. The list continues after all images
        are explained, because further directions that move the decision are of interest; with ``reaverage`` it ends.
    """
    # Allowed signs.
    num_images, num_directions, _ = score.shape
    mean = score.double().mean(dim=0) if num_images else score.new_zeros(num_directions, 2).double()
    allowed = torch.ones_like(mean, dtype=torch.bool)
    if scoring == "paper_code":
        allowed &= ~(mean > 0).all(dim=1, keepdim=True)
    elif not both_signs:
        better = mean[:, 1] > mean[:, 0]
        allowed = torch.stack([~better, better], dim=1)

    # Greedy cover.
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

    # Columns.
    columns = list(zip(*picked, strict=True)) or [()] * 5
    whole = [torch.tensor(columns[i], dtype=torch.int64) for i in (0, 1, 3, 4)]
    return Ranking(whole[0], whole[1], torch.tensor(columns[2], dtype=torch.float64), whole[2], whole[3], explained_by)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SearchResult:
    """The result of EigenFind for one classifier and all pairs of classes.

    Attributes:
        index: Places of the n searched images in the reference, [n] int64.
        vectors: Directions, [Q, N].
        spread: Standard deviation of the reference along each direction, [Q].
        steps: Whole step along each direction, [Q].
        table: Logits after the edits, [n, Q, 2, K].
        before: Logits that scores start from, [n, K].
        predicted: Predicted class of each image, [n] int64.
        kept: Images whose reconstruction is decided as the image is (all with "paper_code"), [n] bool.
        forward_passes: Number of pictures rendered and classified.
        seconds: Duration of the search.
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
        """Returns the places of the kept images of class ``source`` among the n images."""
        return (self.kept & (self.predicted == source)).nonzero().squeeze(1)

    def ranking(
        self, source: int, target: int, k: int, *, reaverage: bool = False, scoring: Scoring = "strict"
    ) -> Ranking:
        """Ranks the directions from one class to another by ``rank_directions``."""
        mine = self.images(source)
        score, flips = effects(self.table[mine], self.before[mine], target, scoring)
        return rank_directions(score, flips, k, reaverage=reaverage, scoring=scoring)

    def to_plain(self) -> dict[str, Any]:
        """Returns tensors on the CPU and numbers by field, readable by ``torch.load(weights_only=True)``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in values.items()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], device: torch.device) -> SearchResult:
        """Rebuilds a result from ``to_plain`` on a device."""
        values: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in plain.items()
        }
        return cls(**values)
