"""Multi-branch generator and mapping network of DXAI (arXiv 2401.00320, section 3.2 and appendix B).

All branches live in one network of grouped layers. Convolutions with one group per branch, per-channel norms and
per-branch concatenation never mix groups, so branches share only the image, the styles and the losses.

Deviations: the image is copied once per branch only where that changes the result, and the norm of the first and of
the last layer can be switched off, because with them the output cannot depend on the image's brightness and contrast.

Shapes: B images, C channels, H, W pixels, N branches, K classes, S style-modulated blocks, Z latent numbers.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfe_lightning.compute.precision import full_precision, to_float32
from cfe_lightning.methods.dxai.resampling import convolve_and_pool, upsample_and_convolve

Norm = Literal["instance", "none"]


class ResidualBlock(nn.Module):
    """Residual block with instance norm, grouped by branch, [B, in, H, W] -> [B, out, H, W]; ``down`` halves H, W."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, down: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.InstanceNorm2d(in_channels, affine=True)
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=groups)
        self.norm2 = nn.InstanceNorm2d(in_channels, affine=True)
        self.conv2 = nn.Conv2d(in_channels, out_channels, 3, padding=1, groups=groups)
        self.shortcut = grouped_shortcut(in_channels, out_channels, groups)
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        """Adds residual and shortcut, scaled to keep the variance."""
        residual = F.leaky_relu(self.norm1(x), 0.2)
        if self.down:
            # A 1x1 convolution and average pooling commute: convolve the smaller map.
            residual, shortcut = convolve_and_pool(residual, self.conv1), self.shortcut(F.avg_pool2d(x, 2))
        else:
            residual, shortcut = self.conv1(residual), self.shortcut(x)
        residual = self.conv2(F.leaky_relu(self.norm2(residual), 0.2))
        return (residual + shortcut) * math.sqrt(0.5)


class AdaptiveInstanceNorm(nn.Module):
    """Instance norm with scale and shift computed from the style: (1 + gamma) IN(x) + beta."""

    def __init__(self, style_dim: int, channels: int) -> None:
        super().__init__()
        self.affine = nn.Linear(style_dim, 2 * channels)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """Normalises maps [B, channels, H, W] and modulates them by styles [B, style_dim]."""
        gamma, beta = self.affine(style)[:, :, None, None].chunk(2, dim=1)
        weight = bias = None
        if x.dtype in (torch.bfloat16, torch.float16):
            # PyTorch keeps the statistics in the precision of the weights, and the published layer has no weights.
            weight, bias = torch.ones(x.shape[1], device=x.device), torch.zeros(x.shape[1], device=x.device)
        return torch.addcmul(beta, F.instance_norm(x, weight=weight, bias=bias), 1 + gamma)


class StyledResidualBlock(nn.Module):
    """Residual block modulated by a style, grouped by branch, [B, in, H, W] -> [B, out, H, W]; ``up`` doubles H, W."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, style_dim: int, up: bool = False) -> None:
        super().__init__()
        self.norm1 = AdaptiveInstanceNorm(style_dim, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, groups=groups)
        self.norm2 = AdaptiveInstanceNorm(style_dim, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, groups=groups)
        self.shortcut = grouped_shortcut(in_channels, out_channels, groups)
        self.up = up

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """Adds residual, modulated by styles [B, style_dim], and shortcut, scaled to keep the variance."""
        residual = F.leaky_relu(self.norm1(x, style), 0.2)
        # A 1x1 convolution and nearest-neighbour upsampling commute: convolve the smaller map.
        shortcut = self.shortcut(x)
        if self.up:
            residual = upsample_and_convolve(residual, self.conv1)
            # On a GPU autocast would widen this map, and all maps after it, to float32; copying needs no digits.
            with full_precision(shortcut):
                shortcut = F.interpolate(shortcut, scale_factor=2.0, mode="nearest")
        else:
            residual = self.conv1(residual)
        residual = self.conv2(F.leaky_relu(self.norm2(residual, style), 0.2))
        return (residual + shortcut) * math.sqrt(0.5)


def grouped_shortcut(in_channels: int, out_channels: int, groups: int) -> nn.Module:
    """Returns the identity, or a 1x1 convolution where the number of channels changes."""
    if in_channels == out_channels:
        return nn.Identity()
    return nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=False)


def concat_per_branch(first: Tensor, second: Tensor, num_branches: int) -> Tensor:
    """Concatenates two grouped maps branch by branch, [B, N a, H, W] and [B, N b, H, W] -> [B, N (a + b), H, W].

    A plain concatenation of channels would feed a branch with the channels of another one.
    """
    batch, _, height, width = first.shape
    shape = (batch, num_branches, -1, height, width)
    return torch.cat([first.view(shape), second.view(shape)], dim=2).view(batch, -1, height, width)


class MultiBranchGenerator(nn.Module):
    """Maps an image and class styles to N branch images whose sum renders the image as that class.

    The arguments are those of ``Dxai``. Inside, sizes that the down-sampling stages do not divide are padded by
    reflection. With ``image_skip`` every branch but branch 0 starts as an equal share of the image.

    Raises:
        ValueError: If the image is smaller than twice ``min_resolution``.
    """

    def __init__(
        self,
        *,
        image_size: int,
        channels: int = 3,
        num_branches: int = 5,
        branch_width: int = 7,
        max_branch_width: int = 64,
        min_resolution: int = 16,
        blocks_per_stage: int = 3,
        style_dim: int = 64,
        stem_norm: Norm = "none",
        head_norm: Norm = "none",
        image_skip: bool = False,
    ) -> None:
        super().__init__()
        self.image_skip = image_skip
        # Sizes between powers of two are padded up to a multiple of the total stride, so they need no extra stage.
        num_stages = math.floor(math.log2(image_size / min_resolution))
        if num_stages < 1:
            raise ValueError(
                f"image_size must be at least {2 * min_resolution} (twice min_resolution {min_resolution}), "
                f"got {image_size}: lower min_resolution or use larger images."
            )
        self.channels = channels
        self.num_branches = num_branches
        self.stride = 2**num_stages
        self.num_styles = num_stages + 2
        widths = [num_branches * min(branch_width * 2**i, max_branch_width) for i in range(num_stages + 1)]
        # Stem.
        self.stem_affine = nn.InstanceNorm2d(num_branches * channels, affine=True) if stem_norm == "instance" else None
        self.stem = nn.Conv2d(num_branches * channels, widths[0], 3, padding=1, groups=num_branches)
        # Encoder.
        self.encoder = nn.ModuleList()
        for stage, (width, following) in enumerate(itertools.pairwise(widths)):
            repeats = blocks_per_stage if stage < 3 else 1
            blocks = [ResidualBlock(width, width, num_branches) for _ in range(repeats)]
            self.encoder.append(nn.Sequential(*blocks, ResidualBlock(width, following, num_branches, down=True)))
        inner = widths[-1]
        self.encoder_bottleneck = nn.Sequential(*(ResidualBlock(inner, inner, num_branches) for _ in range(2)))
        # Decoder.
        decoder = [StyledResidualBlock(inner, inner, num_branches, style_dim) for _ in range(2)]
        for width, following in reversed(list(itertools.pairwise(widths))):
            decoder.append(StyledResidualBlock(2 * following, width, num_branches, style_dim, up=True))
        self.decoder = nn.ModuleList(decoder)
        # Head.
        self.head_norm = nn.InstanceNorm2d(widths[0], affine=True) if head_norm == "instance" else nn.Identity()
        self.head = nn.Conv2d(widths[0], num_branches * channels, 1, groups=num_branches)
        initialise(self)
        if image_skip:
            nn.init.zeros_(self.head.weight)

    def blocks(self) -> list[nn.Module]:
        """Lists the building blocks, to be compiled or recomputed one by one."""
        return [module for module in self.modules() if isinstance(module, ResidualBlock | StyledResidualBlock)]

    def encode(self, image: Tensor) -> list[Tensor]:
        """Runs the style-free half, [B, C, H, W] -> the skip of every stage and, last, the bottleneck."""
        # Pad to a multiple of the stride.
        height, width = image.shape[-2:]
        pad_bottom, pad_right = -height % self.stride, -width % self.stride
        if pad_bottom or pad_right:
            image = F.pad(image, (0, pad_right, 0, pad_bottom), mode="reflect")
        # Stem.
        if self.stem_affine is None:
            # Without a norm every branch sees the same image: a dense convolution with the grouped layer's weights.
            h = F.conv2d(image, self.stem.weight, self.stem.bias, padding=1)
        else:
            h = self.stem(F.leaky_relu(self.stem_affine(image.repeat(1, self.num_branches, 1, 1)), 0.2))
        # Stages and bottleneck.
        maps = []
        for stage in (*self.encoder, self.encoder_bottleneck):
            h = stage(h)
            maps.append(h)
        return maps

    def decode(self, maps: Sequence[Tensor], styles: Tensor, image: Tensor) -> Tensor:
        """Runs the styled half, maps of ``encode`` and styles [B, S, style_dim] -> branches [B, N, C, H, W].

        The batch of ``styles`` may be m times that of ``maps`` and ``image``: every image is then decoded with m
        styles, ordered style-major (all images with their first style, then all with their second).
        """
        # Several styles per image.
        *skips, h = maps
        repeats = styles.shape[0] // h.shape[0]
        if repeats > 1:
            h = h.repeat(repeats, 1, 1, 1)
            skips = [skip.repeat(repeats, 1, 1, 1) for skip in skips]
        # Two blocks at the bottleneck, then one per stage.
        for index, block in enumerate(self.decoder):
            if index >= 2:
                h = concat_per_branch(skips[1 - index], h, self.num_branches)
            h = block(h, styles[:, index])
        # Branch images; in single precision, because they are summed.
        h = to_float32(self.head(torch.tanh(self.head_norm(h))))[..., : image.shape[-2], : image.shape[-1]]
        branches = h.unflatten(1, (self.num_branches, self.channels))
        if self.image_skip:
            share = image.repeat(repeats, 1, 1, 1).unsqueeze(1) / (self.num_branches - 1)
            branches = torch.cat([branches[:, :1], branches[:, 1:] + share], dim=1)
        return branches

    def forward(self, image: Tensor, styles: Tensor) -> Tensor:
        """Renders images [B, C, H, W] in styles [B, S, style_dim]: branch images [B, N, C, H, W], unbounded."""
        return self.decode(self.encode(image), styles, image)


class MappingNetwork(nn.Module):
    """Maps a latent to the styles of one class: ``num_shared`` hidden layers, then ``num_unshared`` for each class."""

    def __init__(
        self,
        *,
        num_classes: int,
        num_styles: int,
        latent_dim: int = 16,
        style_dim: int = 64,
        width: int = 512,
        num_shared: int = 4,
        num_unshared: int = 3,
    ) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.num_styles = num_styles
        widths = [latent_dim] + [width] * num_shared
        self.shared = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        tower = [width] * (num_unshared + 1) + [num_styles * style_dim]
        self.towers = nn.ModuleList(ClasswiseLinear(num_classes, a, b) for a, b in itertools.pairwise(tower))
        initialise(self)

    def forward(self, latent: Tensor, label: Tensor) -> Tensor:
        """Maps latents [B, Z] and classes [B] to styles [B, S, style_dim], in decoder order."""
        h = latent
        for layer in self.shared:
            h = F.relu(layer(h))
        for index, layer in enumerate(self.towers):
            h = layer(h if index == 0 else F.relu(h), label)
        return h.unflatten(1, (self.num_styles, -1))


class ClasswiseLinear(nn.Module):
    """One linear layer per class; every row of a batch passes the layer of its class."""

    def __init__(self, num_classes: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(num_classes, out_features))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        """Applies the layer of each row's class, [B, in] and classes [B] -> [B, out]."""
        every_class = torch.einsum("bi,koi->bko", x, self.weight) + self.bias
        return every_class[torch.arange(len(x), device=x.device), label]


def initialise(network: nn.Module) -> None:
    """Draws Kaiming normal weights (fan-in, ReLU gain) and zeroes biases of convolutions and linear layers."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, ClasswiseLinear):
            nn.init.normal_(module.weight, std=math.sqrt(2 / module.weight.shape[2]))
