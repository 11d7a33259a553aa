"""The residual critic of DXAI (arXiv 2401.00320, appendix B, table 8), which follows StarGAN v2.

Shapes: B images, C channels, H, W pixels, K classes.
"""

import math

from torch import Tensor, nn
from torch.nn import functional as F

from cfe_lightning.methods.dxai.generator import grouped_shortcut, initialise
from cfe_lightning.methods.dxai.resampling import convolve_and_pool


class CriticBlock(nn.Module):
    """Residual block without norm that halves the resolution, [B, in, H, W] -> [B, out, H / 2, W / 2]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.shortcut = grouped_shortcut(in_channels, out_channels, groups=1)

    def forward(self, x: Tensor) -> Tensor:
        """Adds residual and shortcut, scaled to keep the variance."""
        residual = convolve_and_pool(F.leaky_relu(x, 0.2), self.conv1)
        residual = self.conv2(F.leaky_relu(residual, 0.2))
        # A 1x1 convolution and average pooling commute: convolve the smaller map.
        return (residual + self.shortcut(F.avg_pool2d(x, 2))) * math.sqrt(0.5)


class ResidualCritic(nn.Module):
    """Judges how real an image is, with one head in all or one per class.

    Args:
        image_size: Side of the images, at least 8.
        channels: Image channels, 1 or 3.
        num_heads: 1 judges plain real/fake; K judges "real as a member of class k".
        base_width: Channels at full resolution; None takes the published 2^14 / image_size.
        max_width: Upper limit of the channels, which double at every stage.

    Raises:
        ValueError: If the images are too small.
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
        # Paper: 1x1 stem in the table; here 3x3, as in its code and in StarGAN v2.
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
        # Halve down to a side of 4 to 7.
        num_stages = int(math.log2(image_size)) - 2
        for _ in range(num_stages):
            following = min(2 * width, max_width)
            layers.append(CriticBlock(width, following))
            width = following
        # Reduce to one place.
        layers += [nn.LeakyReLU(0.2), nn.Conv2d(width, width, 4), nn.LeakyReLU(0.2)]
        remaining = image_size // 2**num_stages - 3
        if remaining > 1:
            layers += [nn.Conv2d(width, width, remaining), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers)
        self.heads = nn.Linear(width, num_heads)
        initialise(self)

    def blocks(self) -> list[nn.Module]:
        """Lists the building blocks, to be compiled or recomputed one by one."""
        return [module for module in self.body if isinstance(module, CriticBlock)]

    def forward(self, image: Tensor) -> Tensor:
        """Returns one raw logit per head, images [B, C, H, W] in [-1, 1] -> [B, num_heads]."""
        return self.heads(self.body(image).flatten(1))
