"""Decoder of Mirror-CFE: from a classifier's feature map and its earlier maps ("levels") back to the image.

Source: Chowdhury et al., ICCV 2025, arXiv 2509.16822, Eq. 12 (spatial pattern editor) and section 4. The paper's layer
tables are not public; widths and norms are ours.

Shapes: B images, T steps per image, D features, h, w cells of the feature map, level i is [B, C_i, H_i, W_i].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from cfe_lightning.compute.precision import full_precision, to_float32

DecoderNorm = Literal["batch", "group"]
#: A level as (channels, height, width).
LevelShape = tuple[int, int, int]


class SpatialPatternEditor(nn.Module):
    """Says what a level would look like if the feature map were that of another class (Eq. 12).

    Args:
        level_shape: The level's channels and size.
        num_features: D.
        width: Channels in between.
        norm: "batch" for batches of 16 and more, "group" below.
        non_negative: Whether the level comes from a ReLU, as its edited version then does.
    """

    def __init__(
        self, level_shape: LevelShape, num_features: int, width: int, norm: DecoderNorm, non_negative: bool
    ) -> None:
        super().__init__()
        channels = level_shape[0]
        self.size = level_shape[1:]
        self.merge = _convolution(width + num_features, width, norm)
        self.expand = _convolution(width, channels, norm)
        self.last = nn.Conv2d(channels, channels, 3, padding=1)
        self.non_negative = non_negative

    def forward(self, summary: Tensor, feature_map: Tensor) -> Tensor:
        """The level's summary [B, width, h, w] and a feature map [B, D, h, w] -> [B, C_i, H_i, W_i]."""
        merged = self.merge(torch.cat([summary, feature_map], dim=1))
        edited = self.last(self.expand(_resized(merged, self.size)))
        return edited.relu() if self.non_negative else edited


class MirrorDecoder(nn.Module):
    """Renders feature maps, with the image's own detail from its levels wherever the mask does not ask for an edit.

    Args:
        map_shape: D, h, w.
        level_shapes: The levels, nearest to the feature map first; sizes must not shrink.
        image_size: Side of the images.
        channels: 1 or 3.
        width: Channels at full resolution, doubled where the resolution halves.
        max_width: Upper limit of the channels.
        editor_width: Channels inside the spatial pattern editors.
        norm: "batch" for batches of 16 and more, "group" below.
        non_negative: Whether each level comes from a ReLU.
    """

    def __init__(
        self,
        *,
        map_shape: LevelShape,
        level_shapes: Sequence[LevelShape],
        image_size: int,
        channels: int = 3,
        width: int = 16,
        max_width: int = 256,
        editor_width: int = 128,
        norm: DecoderNorm = "batch",
        non_negative: Sequence[bool] = (),
    ) -> None:
        super().__init__()
        num_features = map_shape[0]

        def width_at(side: int) -> int:
            return min(max_width, width * 2 ** max(0, round(math.log2(image_size / side))))

        self.map_size = map_shape[1:]
        self.squeezes = nn.ModuleList(_convolution(shape[0], editor_width, norm) for shape in level_shapes)
        self.editors = nn.ModuleList(
            SpatialPatternEditor(shape, num_features, editor_width, norm, relu)
            for shape, relu in zip(level_shapes, non_negative, strict=True)
        )
        current = width_at(map_shape[1])
        self.bottom = _convolution(num_features, current, norm)
        stages = []
        # Up to every level, then on by doubling until the image's size is reached.
        sizes = [shape[1:] for shape in level_shapes]
        last = sizes[-1] if sizes else map_shape[1:]
        while last[0] < image_size:
            last = (min(2 * last[0], image_size), min(2 * last[1], image_size))
            sizes.append(last)
        self.sizes = sizes
        for index, size in enumerate(sizes):
            skipped = level_shapes[index][0] if index < len(level_shapes) else 0
            following = width_at(size[0])
            stages.append(
                nn.Sequential(
                    _convolution(current + skipped, following, norm), _convolution(following, following, norm)
                )
            )
            current = following
        self.stages = nn.ModuleList(stages)
        self.head = nn.Conv2d(current, channels, 3, padding=1)

    def blocks(self) -> list[nn.Module]:
        """What the network is built of, to be compiled or recomputed one by one."""
        return [self.bottom, *self.editors, *self.stages]

    def summarise(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """What the editors need of the levels [B, C_i, H_i, W_i], once per image."""
        return [_resized(squeeze(level), self.map_size) for squeeze, level in zip(self.squeezes, levels, strict=True)]

    def forward(
        self, feature_map: Tensor, levels: Sequence[Tensor], summaries: Sequence[Tensor], mask: Tensor
    ) -> Tensor:
        """Renders feature maps.

        Args:
            feature_map: [B T, D, h, w], the T maps of an image one after the other.
            levels: The image's own levels, each [B, C_i, H_i, W_i].
            summaries: ``summarise`` of them.
            mask: Where to edit, [B T, 1, h, w] in [0, 1].

        Returns:
            Images [B T, C, H, W] in [-1, 1].
        """
        hidden = self.bottom(feature_map)
        for index, (size, stage) in enumerate(zip(self.sizes, self.stages, strict=True)):
            hidden = _resized(hidden, size)
            if index < len(self.editors):
                level = levels[index]
                edited = self.editors[index](_repeated(summaries[index], len(feature_map)), feature_map)
                share = F.interpolate(mask, size=size, mode="nearest").to(edited)
                # A level is shared by all steps of its image and not copied, which would cost its layout, too.
                per_image = (value.unflatten(0, (len(level), -1)) for value in (edited, share))
                mixed = torch.lerp(level.to(edited)[:, None], *per_image).flatten(0, 1)
                hidden = torch.cat([hidden, mixed], dim=1)
            hidden = stage(hidden)
        return to_float32(self.head(hidden)).tanh()


class PatchCritic(nn.Module):
    """Judges patches of an image, told which class it should show (PatchGAN with spectral norm).

    Args:
        channels: 1 or 3.
        num_classes: K; 0 judges without being told the class.
        widths: Channels of the stride-2 layers.
        class_dim: Planes that carry the class.
    """

    def __init__(
        self,
        *,
        channels: int = 3,
        num_classes: int = 0,
        widths: Sequence[int] = (64, 128, 256, 256),
        class_dim: int = 4,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, class_dim) if num_classes else None
        current = channels + (class_dim if num_classes else 0)
        layers: list[nn.Module] = []
        for width in widths:
            layers += [spectral_norm(_ExactWeight(current, width, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
            current = width
        layers.append(spectral_norm(_ExactWeight(current, 1, 3, padding=1)))
        self.body = nn.Sequential(*layers)

    def forward(self, image: Tensor, shown: Tensor) -> Tensor:
        """Images [B, C, H, W] that should show classes [B] -> raw logits of patches, [B, 1, h, w]."""
        if self.embedding is not None:
            planes = self.embedding(shown)[:, :, None, None].expand(-1, -1, *image.shape[2:])
            image = torch.cat([image, planes], dim=1)
        return self.body(image)


class _ExactWeight(nn.Conv2d):
    """A convolution whose weight is computed in single precision: half of it would blur the spectral norm."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, h, w]."""
        with full_precision(x):
            weight = self.weight
        return self._conv_forward(x, weight, self.bias)


def _convolution(in_channels: int, out_channels: int, norm: DecoderNorm) -> nn.Sequential:
    groups = math.gcd(8, out_channels)
    scale = nn.BatchNorm2d(out_channels) if norm == "batch" else nn.GroupNorm(groups, out_channels)
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), scale, nn.ReLU())


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(x.shape[2:]) == tuple(size):
        return x
    # Autocast would make float32 of it on a GPU; what follows is a convolution, which rounds it in any case.
    with full_precision(x):
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _repeated(x: Tensor, batch: int) -> Tensor:
    """Every sample as often as it takes to fill a batch, [B, ...] -> [B T, ...]."""
    repeats = batch // len(x)
    return x if repeats == 1 else x.repeat_interleave(repeats, dim=0)
