"""The critic of StylEx: StyleGAN2's, told which class an image should show.

Shapes: B images, C channels, H, W pixels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from cfe_lightning.compute.precision import to_float32
from cfe_lightning.methods.stylex.layers import (
    EqualConv,
    EqualLinear,
    ResidualTrunk,
    activate,
    encode_bits,
    stddev_map,
)

LabelEntry = Literal["planes", "projection"]


class StyleCritic(nn.Module):
    """StyleGAN2's critic, told which class an image should show (CheXplaining in Style).

    Args:
        channels: 1 or 3.
        num_classes: K.
        widths: Channels at every resolution, see ``equalised.channel_table``.
        label_entry: Where the label enters: as K more "planes" of the image (published), or by "projection" on the last
            features (Miyato and Koyama 2018), which is cheaper.
    """

    def __init__(
        self, *, channels: int, num_classes: int, widths: Mapping[int, int], label_entry: LabelEntry = "projection"
    ) -> None:
        super().__init__()
        size, width = max(widths), widths[4]
        planes = label_entry == "planes"
        self.planes = nn.Parameter(torch.randn(2, size * size)) if planes else None
        self.projection = None if planes else EqualLinear(num_classes, width)
        self.trunk = ResidualTrunk(channels + (num_classes if planes else 0), widths)
        self.conv = EqualConv(width + 1, width, 3, padding=1)
        self.linear = EqualLinear(width * 16, width)
        self.head = EqualLinear(width, 1)

    def blocks(self) -> list[nn.Module]:
        """What the network is built of, to be compiled or recomputed one by one."""
        return [*self.trunk.blocks]

    def forward(self, image: Tensor, label: Tensor, kinds: int = 1) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] and labels or probabilities [B, K] -> one raw logit per image, [B].

        Images of one kind are compared with each other, never real with generated ones.

        Args:
            image: Of one kind after the other, equally many of each.
            label: What they should show.
            kinds: How many kinds.
        """
        if self.planes is not None:
            drawn = encode_bits(self.planes, label.to(image)).unflatten(2, image.shape[2:])
            image = torch.cat([image, drawn], dim=1)
        features = torch.cat([stddev_map(kind) for kind in self.trunk(image).chunk(kinds)])
        features = activate(self.linear(activate(self.conv(features)).flatten(1)))
        logit = to_float32(self.head(features)).squeeze(1)
        if self.projection is not None:
            agreement = to_float32(features) * to_float32(self.projection(label.to(features)))
            logit = logit + agreement.sum(dim=1) / math.sqrt(features.shape[1])
        return logit
