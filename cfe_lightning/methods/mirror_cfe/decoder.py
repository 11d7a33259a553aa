"""Decoder of Mirror-CFE: from a classifier's feature map and its earlier maps ("levels") back to the image.

Source: Chowdhury et al., ICCV 2025, arXiv 2509.16822, equation 12 (spatial pattern editor) and section 4. The paper's
layer tables are not public; widths and norms are ours.

Shapes: B images, T steps per image, D features, h, w cells of the feature map, level i is [B, C_i, H_i, W_i].
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from cfe_lightning.compute.precision import full_precision, to_float32

DecoderNorm = Literal["batch", "group"]
#: Channels, height and width of a level.
LevelShape = tuple[int, int, int]
#: Planes beside the image that tell the critic a class.
_CLASS_PLANES = 4


class SpatialPatternEditor(nn.Module):
    """Edits a level to fit the feature map of another class (equation 12); a ReLU keeps a ``non_negative`` level so."""

    def __init__(
        self, level_shape: LevelShape, num_features: int, width: int, norm: DecoderNorm, non_negative: bool
    ) -> None:
        super().__init__()
        channels, self.size = level_shape[0], level_shape[1:]
        self.merge = _convolution(width + num_features, width, norm)
        self.expand = _convolution(width, channels, norm)
        self.last = nn.Conv2d(channels, channels, 3, padding=1)
        self.non_negative = non_negative

    def forward(self, summary: Tensor, feature_map: Tensor) -> Tensor:
        """Edits a level, given its summary [B, width, h, w] and a feature map [B, D, h, w] -> [B, C_i, H_i, W_i]."""
        merged = self.merge(torch.cat([summary, feature_map], dim=1))
        edited = self.last(self.expand(_resized(merged, self.size)))
        return edited.relu() if self.non_negative else edited


class MirrorDecoder(nn.Module):
    """Renders feature maps, with the image's own detail from its levels wherever the mask does not ask for an edit.

    The other arguments are those of ``MirrorCFE``.

    Args:
        map_shape: Shape of the feature map, D, h, w.
        level_shapes: Shapes of the levels, nearest to the feature map first; sizes must not shrink.
        non_negative: Tells of each level whether it comes from a ReLU.
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

        def width_at(side: int) -> int:
            return min(max_width, width * 2 ** max(0, round(math.log2(image_size / side))))

        # Editors.
        num_features, self.map_size = map_shape[0], map_shape[1:]
        self.squeezes = nn.ModuleList(_convolution(shape[0], editor_width, norm) for shape in level_shapes)
        self.editors = nn.ModuleList(
            SpatialPatternEditor(shape, num_features, editor_width, norm, relu)
            for shape, relu in zip(level_shapes, non_negative, strict=True)
        )
        # Sizes: up to every level, then on by doubling until the image's size is reached.
        self.sizes = [shape[1:] for shape in level_shapes]
        last = self.sizes[-1] if self.sizes else self.map_size
        while last[0] < image_size:
            last = (min(2 * last[0], image_size), min(2 * last[1], image_size))
            self.sizes.append(last)
        # Stages.
        current = width_at(map_shape[1])
        self.bottom = _convolution(num_features, current, norm)
        self.stages = nn.ModuleList()
        skips = [shape[0] for shape in level_shapes] + [0] * (len(self.sizes) - len(level_shapes))
        for (side, _), skipped in zip(self.sizes, skips, strict=True):
            following = width_at(side)
            first = _convolution(current + skipped, following, norm)
            self.stages.append(nn.Sequential(first, _convolution(following, following, norm)))
            current = following
        self.head = nn.Conv2d(current, channels, 3, padding=1)

    def blocks(self) -> list[nn.Module]:
        """Lists the building blocks, to be compiled or recomputed one by one."""
        return [self.bottom, *self.editors, *self.stages]

    def summarise(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Shrinks levels [B, C_i, H_i, W_i] to the editors' input [B, width, h, w], once per image."""
        return [_resized(squeeze(level), self.map_size) for squeeze, level in zip(self.squeezes, levels, strict=True)]

    def forward(
        self, feature_map: Tensor, levels: Sequence[Tensor], summaries: Sequence[Tensor], mask: Tensor
    ) -> Tensor:
        """Renders feature maps as images, [B T, C, H, W] in [-1, 1].

        Args:
            feature_map: Feature maps, [B T, D, h, w], the T maps of an image one after the other.
            levels: The images' own levels, each [B, C_i, H_i, W_i].
            summaries: ``summarise`` of the levels.
            mask: Share of the edit at every place, [B T, 1, h, w] in [0, 1].
        """
        hidden = self.bottom(feature_map)
        for index, (size, stage) in enumerate(zip(self.sizes, self.stages, strict=True)):
            hidden = _resized(hidden, size)
            if index < len(self.editors):
                level, summary = levels[index], summaries[index]
                if len(feature_map) > len(level):
                    summary = summary.repeat_interleave(len(feature_map) // len(level), dim=0)
                edited = self.editors[index](summary, feature_map)
                share = F.interpolate(mask, size=size, mode="nearest").to(edited)
                # All steps of an image share its level: a copy would cost memory and the memory layout.
                per_image = (value.unflatten(0, (len(level), -1)) for value in (edited, share))
                mixed = torch.lerp(level.to(edited)[:, None], *per_image).flatten(0, 1)
                hidden = torch.cat([hidden, mixed], dim=1)
            hidden = stage(hidden)
        return to_float32(self.head(hidden)).tanh()


class PatchCritic(nn.Module):
    """Judges patches of an image for the class that it should show (PatchGAN with spectral norm).

    Args:
        channels: Image channels, 1 or 3.
        num_classes: Number of classes, K; 0 judges without a class.
        widths: Channels of the stride-2 layers.
    """

    def __init__(self, *, channels: int = 3, num_classes: int = 0, widths: Sequence[int] = (64, 128, 256, 256)) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, _CLASS_PLANES) if num_classes else None
        current = channels + (_CLASS_PLANES if num_classes else 0)
        layers: list[nn.Module] = []
        for width in widths:
            layers += [spectral_norm(_ExactWeight(current, width, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
            current = width
        layers.append(spectral_norm(_ExactWeight(current, 1, 3, padding=1)))
        self.body = nn.Sequential(*layers)

    def forward(self, image: Tensor, shown: Tensor) -> Tensor:
        """Judges images [B, C, H, W] that should show classes [B]: raw logits of patches, [B, 1, h, w]."""
        if self.embedding is not None:
            planes = self.embedding(shown)[:, :, None, None].expand(-1, -1, *image.shape[2:])
            image = torch.cat([image, planes], dim=1)
        return self.body(image)


class _ExactWeight(nn.Conv2d):
    """A convolution with its weight computed in single precision: half precision would blur the spectral norm."""

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x):
            weight = self.weight
        return self._conv_forward(x, weight, self.bias)


def _convolution(in_channels: int, out_channels: int, norm: DecoderNorm) -> nn.Sequential:
    scale = nn.BatchNorm2d(out_channels) if norm == "batch" else nn.GroupNorm(math.gcd(8, out_channels), out_channels)
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), scale, nn.ReLU())


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(x.shape[2:]) == tuple(size):
        return x
    # On a GPU autocast would widen the map to float32, and the convolution that follows rounds it anyway.
    with full_precision(x):
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
