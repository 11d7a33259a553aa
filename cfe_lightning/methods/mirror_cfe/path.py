"""The path of Mirror-CFE from the predicted class to the target: all of it that needs no decoder.

Source: Chowdhury et al., ICCV 2025, arXiv 2509.16822.

Shapes: B images, K classes, D features, h, w cells of the feature map, T steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cfe_lightning.classifier import Activations, FrozenClassifier
from cfe_lightning.compute.precision import full_precision, to_float32
from cfe_lightning.methods.mirror_cfe.geometry import (
    Reflection,
    Swap,
    bisect_step,
    first_flip,
    reflect,
    reflect_nonlinear,
    swap_matrix,
)
from cfe_lightning.methods.mirror_cfe.spread import Spread, spread_change


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """The classifier's head in float64.

    Attributes:
        logits: Function from features [B, D] to logits [B, K].
        linear: Weight [K, D], bias [K] and ``swap_matrix`` [K, D] of a linear head; None for any other.
    """

    logits: Callable[[Tensor], Tensor]
    linear: tuple[Tensor, Tensor, Tensor] | None = None

    @classmethod
    def of(cls, classifier: FrozenClassifier, swap: Swap) -> Head:
        """Reads the head of a classifier."""
        linear = classifier.linear_head()
        if linear is None:
            return cls(logits=classifier.exact_head())
        weight, bias = linear
        matrix = swap_matrix(weight, "logits" if swap == "logits" else "softmax")
        return cls(logits=lambda features: features @ weight.T + bias, linear=(weight, bias, matrix))


@dataclass(frozen=True, kw_only=True, slots=True)
class Mirrored:
    """The path of a batch through the mirror.

    Attributes:
        source: Class at the start of each path, [B].
        target: Class at the end of each path, [B].
        logits: The classifier's logits of the images, [B, K].
        feature_map: Feature maps of the images, [B, D, h, w].
        change: Difference of the reflected map and the image's own, [B, D, h, w].
        features: Features of the images, [B, D] float64.
        reflection: End of the path in feature space.
        rows: Rows of the head for source and target, [B, 2, D].
        levels: The classifier's earlier maps, nearest to the feature map first, each [B, C_i, H_i, W_i].
    """

    source: Tensor
    target: Tensor
    logits: Tensor
    feature_map: Tensor
    change: Tensor
    features: Tensor
    reflection: Reflection
    rows: Tensor
    levels: list[Tensor]

    def features_at(self, step: Tensor) -> Tensor:
        """Returns the features intended at steps [B, T] in [0, 1], [B, T, D] float64."""
        change = self.reflection.features - self.features
        return self.features[:, None] + step.double()[:, :, None] * change[:, None]

    def intended(self, head: Head, step: Tensor) -> Tensor:
        """Returns the logits intended at steps [B, T] in [0, 1], [B, T, K] float64."""
        with full_precision(step):
            return head.logits(self.features_at(step).flatten(0, 1)).unflatten(0, step.shape)

    def crossings(self, head: Head) -> tuple[Tensor, Tensor]:
        """Finds the steps at which the path meets the boundary and from which the target is intended, [B] each.

        The second is 2 if the target is not intended even at the end.
        """
        ends = torch.tensor([0.0, 1.0], device=self.target.device).expand(len(self.target), -1)
        start, end = self.intended(head, ends).unbind(dim=1)
        if head.linear is not None:
            return torch.full_like(start[:, 0], 0.5), first_flip(start, end, self.target)
        # The logits of a head that is not linear do not change linearly either.
        source, target = self.source[:, None, None], self.target[:, None, None]

        def reached(step: Tensor) -> Tensor:
            logits = self.intended(head, step)
            to_target = logits.gather(2, target.expand(-1, 2, 1)).squeeze(2)
            to_source = logits[:, :1].gather(2, source).squeeze(2)
            return torch.cat([to_target[:, :1] >= to_source, to_target[:, 1:] >= logits[:, 1:].amax(dim=2)], dim=1)

        low = torch.zeros_like(ends, dtype=torch.float64)
        step = bisect_step(reached, low, low + 1)
        arrives = end.argmax(dim=1) == self.target
        return step[:, 0], torch.where(arrives, step[:, 1], 2.0)


def mirror(
    seen: Activations, target: Tensor, head: Head, *, swap: Swap, bounds: tuple[float, float] | None, spread: Spread
) -> Mirrored:
    """Computes the paths from the predicted classes to targets [B], each other than the predicted class.

    The arguments ``swap``, ``bounds`` and ``spread`` are those of ``MirrorCFE``.
    """
    # float64 throughout: steps are short and the swap is exact only to rounding.
    own_map = to_float32(seen.feature_map)
    feature_map = own_map.double()
    features = feature_map.mean(dim=(2, 3))
    # Reflect the features.
    source = seen.logits.argmax(dim=1)
    pair = torch.stack([source, target], dim=1)
    if head.linear is None:
        reflection, weight, bias = reflect_nonlinear(features, head.logits, source, target)
        rows = weight.gather(1, pair[:, :, None].expand(-1, -1, weight.shape[2]))
        offset = bias.gather(1, pair)
    else:
        weight, bias, matrix = head.linear
        reflection = reflect(features, weight, bias, source, target, swap=swap, matrix=matrix, bounds=bounds)
        rows, offset = weight[pair], bias[pair]
    # Spread the change over the map.
    return Mirrored(
        source=source,
        target=target,
        logits=seen.logits,
        feature_map=own_map,
        change=spread_change(feature_map, reflection.features, rows, offset, spread).to(own_map.dtype),
        features=features,
        reflection=reflection,
        rows=rows,
        levels=seen.levels,
    )
