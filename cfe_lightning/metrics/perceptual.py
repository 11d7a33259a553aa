"""Closeness as a network sees it, with the features of the explained classifier: no weights to be had first.

Source: evaluation, section 4.2. Not comparable with published LPIPS, hence its name ``lpips_f``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def feature_distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Squared distance of unit-length features, summed over channels, mean over places and then over stages, [B].

    Args:
        one: Outputs of the stages for some images, each [B, C_i, H_i, W_i].
        other: The same for others.
    """
    stages = [
        (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(dim=1).flatten(1).mean(dim=1)
        for a, b in zip(one, other, strict=True)
    ]
    return torch.stack(stages).mean(dim=0)
