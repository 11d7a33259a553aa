"""The residual critic of DXAI.

Shapes: B images, C channels, H, W pixels, K classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfe_lightning.methods.dxai.resampling import convolve_and_pool


class CriticBlock(nn.Module):
    """Residual block without norm that halves the resolution, [B, in, H, W] -> [B, out, H / 2, W / 2]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Residual plus shortcut, scaled to keep the variance."""
        residual = convolve_and_pool(F.leaky_relu(x, 0.2), self.conv1)
        residual = self.conv2(F.leaky_relu(residual, 0.2))
        # A 1x1 convolution and average pooling commute: convolve the smaller map.
        return (residual + self.shortcut(F.avg_pool2d(x, 2))) * math.sqrt(0.5)


class ResidualCritic(nn.Module):
    """Judges how real an image is; one head in all, or one per class (DXAI, appendix B, table 8; StarGAN v2).

    Args:
        image_size: Side of the images, at least 8.
        channels: 1 or 3.
        num_heads: 1 for plain real/fake; K for "real as a member of class k".
        base_width: Channels at full resolution; None takes the published 2^14 / image_size.
        max_width: Upper limit of the channels, doubled at every stage.
    """

    def __init__(
        self,
        *,
        image_size: int,
        channels: int = 3,
        num_heads: int = 1,
        base_width: int | None = None,
        max_width: int = 512,
    ) -> None:
        super().__init__()
        if image_size < 8:
            raise ValueError(f"image_size must be at least 8, got {image_size}.")
        width = min(2**14 // image_size if base_width is None else base_width, max_width)
        # The paper's table writes a 1x1 stem; here 3x3 as in the code, which follows StarGAN v2.
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
        for _ in range(int(math.log2(image_size)) - 2):
            following = min(2 * width, max_width)
            layers.append(CriticBlock(width, following))
            width = following
        remaining = image_size // 2 ** (int(math.log2(image_size)) - 2) - 3
        layers += [nn.LeakyReLU(0.2), nn.Conv2d(width, width, 4), nn.LeakyReLU(0.2)]
        if remaining > 1:
            layers += [nn.Conv2d(width, width, remaining), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers)
        self.heads = nn.Linear(width, num_heads)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def blocks(self) -> list[nn.Module]:
        """What the network is built of, to be compiled or recomputed one by one."""
        return [module for module in self.body if isinstance(module, CriticBlock)]

    def features(self, image: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] -> input of the heads [B, D]."""
        return torch.flatten(self.body(image), 1)

    def forward(self, image: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] -> one raw logit per head, [B, num_heads]."""
        return self.heads(self.features(image))
