"""The critic of StylEx.

Shapes: B images, C channels, H, W pixels, K classes.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from cfe_lightning.compute.precision import to_float32
from cfe_lightning.methods.stylex.layers import EqualConv, EqualLinear, ResidualTrunk, activate, encode_bits, stddev_map

LabelEntry = Literal["planes", "projection"]


class StyleCritic(nn.Module):
    """StyleGAN2's critic with a label of the class that an image should show (CheXplaining in Style, arXiv 2207.07553).

    Args:
        channels: Channels of the images, 1 or 3.
        num_classes: Number of classes, K.
        widths: Channels of the feature maps at every resolution, from ``layers.channel_table``.
        label_entry: Entry of the label: as K more "planes" of the image (published), or by "projection" on the last
            features (Miyato and Koyama, arXiv 1802.05637), which is cheaper.
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
        """Returns the blocks that can be compiled or recomputed one by one."""
        return [*self.trunk.blocks]

    def forward(self, image: Tensor, label: Tensor, kinds: int = 1) -> Tensor:
        """Judges how real images are as members of a class, with raw logits [B].

        Minibatch statistics compare images of one kind only, so real and generated images do not mix.

        Args:
            image: Images of one kind after the other, equally many of each, [B, C, H, W] in [-1, 1].
            label: Labels or class probabilities that the images should show, [B, K].
            kinds: Number of kinds.
        """
        # Label planes.
        if self.planes is not None:
            drawn = encode_bits(self.planes, label.to(image)).unflatten(2, image.shape[2:])
            image = torch.cat([image, drawn], dim=1)

        # Features and logit.
        features = torch.cat([stddev_map(kind) for kind in self.trunk(image).chunk(kinds)])
        features = activate(self.linear(activate(self.conv(features)).flatten(1)))
        logit = to_float32(self.head(features)).squeeze(1)

        # Projected label.
        if self.projection is not None:
            agreement = to_float32(features) * to_float32(self.projection(label.to(features)))
            logit = logit + agreement.sum(dim=1) / math.sqrt(features.shape[1])
        return logit
