"""Networks of a diffusion autoencoder: an encoder to one semantic code, and a noise predictor that reads it.

Source: Preechakul et al., "Diffusion Autoencoders", CVPR 2022, arXiv 2111.15640, with the layer sizes of the authors'
code. The U-Net is diffusers' ``UNet2DModel`` with three kinds of sub-modules replaced.

Shapes: B images, C channels, H, W pixels, D entries of the code.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F

from cfe_lightning.compute.precision import full_precision, to_float32

#: How the code enters the U-Net: "adagn" scales every block, "sum" adds the code to the time embedding.
CodeMode = Literal["adagn", "sum"]
#: How the encoder's last map becomes one code: by its "mean", or by "mean_max", mean and maximum.
CodePool = Literal["mean", "mean_max"]
#: Layers from the encoder's last map to the code; they run in full precision.
_POOLED = 3


class SemanticEncoder(nn.Module):
    """The encoder: the down-sampling half of a U-Net without time, from an image to its semantic code.

    ``DiffusionAutoencoder`` explains the arguments. The resolution is halved once per multiplier after the first. Pool
    "mean_max" does not average away small structures. Narrow blocks have fewer normalisation groups than ``groups``.
    """

    def __init__(
        self,
        *,
        image_size: int,
        channels: int = 3,
        code_dim: int = 512,
        width: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4, 4, 4),
        blocks: int = 2,
        attention_sizes: Sequence[int] = (16,),
        groups: int = 32,
        pool: CodePool = "mean",
    ) -> None:
        super().__init__()
        _check_size(image_size, multipliers)
        # Resolutions.
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
        current, size = width, image_size
        for level, multiplier in enumerate(multipliers):
            if level:
                layers.append(_EncoderBlock(current, current, groups, pool=True))
                size //= 2
            for _ in range(blocks):
                layers.append(_EncoderBlock(current, multiplier * width, groups))
                current = multiplier * width
                if size in attention_sizes:
                    layers.append(_attention(current, groups))

        # Bottom and code.
        layers += [
            _EncoderBlock(current, current, groups),
            _attention(current, groups),
            _EncoderBlock(current, current, groups),
            nn.GroupNorm(min(groups, current), current),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1) if pool == "mean" else _MeanAndMax(),
            nn.Conv2d(current if pool == "mean" else 2 * current, code_dim, 1),
            nn.Flatten(),
        ]
        self.body = nn.Sequential(*layers)

    def blocks(self) -> list[nn.Module]:
        """Returns the building blocks, to be compiled or recomputed one by one."""
        return [module for module in self.body if isinstance(module, _EncoderBlock | Attention)]

    def forward(self, image: Tensor) -> Tensor:
        """Encodes images [B, C, H, W] in [-1, 1] as codes [B, D]."""
        features = self.body[:-_POOLED](image)
        with full_precision(features):
            return self.body[-_POOLED:](to_float32(features))


class SemanticUnet(nn.Module):
    """Predicts the noise in an image, given the diffusion step and the semantic code of the clean image.

    ``DiffusionAutoencoder`` explains the arguments. The step's sinusoid is ``width`` entries long. The way up has one
    block more per resolution, and the lowest resolution always has attention. Dropout stands before the second
    convolution of a block. ``groups`` must divide the channels at every resolution.
    """

    def __init__(
        self,
        *,
        image_size: int,
        channels: int = 3,
        code_dim: int = 512,
        width: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4, 4),
        blocks: int = 2,
        attention_sizes: Sequence[int] = (16,),
        time_dim: int = 512,
        dropout: float = 0.1,
        groups: int = 32,
        code_mode: CodeMode = "adagn",
    ) -> None:
        super().__init__()
        _check_size(image_size, multipliers)
        widths = [multiplier * width for multiplier in multipliers]
        if any(size % groups for size in widths):
            raise ValueError(f"groups must divide the channels of every resolution, got {groups} for {widths}.")

        # The library's network.
        with_attention = [image_size >> level in attention_sizes for level in range(len(widths))]
        unet: Any = UNet2DModel(  # Any: the library's types end at its lazy imports
            sample_size=image_size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=tuple(widths),
            layers_per_block=blocks,
            dropout=dropout,
            down_block_types=tuple("AttnDownBlock2D" if here else "ResnetDownsampleBlock2D" for here in with_attention),
            up_block_types=tuple("AttnUpBlock2D" if here else "ResnetUpsampleBlock2D" for here in with_attention[::-1]),
            downsample_type="resnet",
            upsample_type="resnet",
            time_embedding_dim=time_dim,
            attention_head_dim=None,  # one head
            norm_num_groups=groups,
            attn_norm_num_groups=groups,  # otherwise the lowest attention silently has no norm
            norm_eps=1e-5,
            resnet_time_scale_shift="scale_shift",
            class_embed_type="identity",
        )

        # Where the code enters.
        if code_mode == "sum":
            unet.class_embedding = nn.Linear(code_dim, time_dim)
        else:
            # The library adds both embeddings; padded with zeros, their sum is their concatenation.
            unet.time_embedding = _Padded(unet.time_embedding, after=code_dim)
            unet.class_embedding = _Padded(nn.Identity(), before=time_dim)
            for module in unet.modules():
                if isinstance(module, ResnetBlock2D):
                    module.time_emb_proj = _Modulation(time_dim, code_dim, module.out_channels)  # type: ignore[assignment]

        # Blocks start as identities, and the prediction as zero.
        for module in unet.modules():
            if isinstance(module, ResnetBlock2D):
                _zero(module.conv2)
            elif isinstance(module, Attention):
                _zero(module.to_out[0])
        _zero(unet.conv_out)
        self.unet: nn.Module = unet

    def blocks(self) -> list[nn.Module]:
        """Returns the building blocks, to be compiled or recomputed one by one."""
        return [module for module in self.unet.modules() if isinstance(module, ResnetBlock2D | Attention)]

    def forward(self, noisy: Tensor, step: Tensor, code: Tensor) -> Tensor:
        """Predicts the noise [B, C, H, W] in images [B, C, H, W] at diffusion steps [B] int64 with codes [B, D]."""
        return self.unet(noisy, step, class_labels=code).sample


class _Modulation(nn.Module):
    """Scale and shift of a block by step and code, (1 + z) ((1 + t) norm + b), in the form that diffusers applies."""

    def __init__(self, time_dim: int, code_dim: int, channels: int) -> None:
        super().__init__()
        self.split = (time_dim, code_dim)
        self.of_time = nn.Linear(time_dim, 2 * channels)
        self.of_code = nn.Linear(code_dim, channels)

    def forward(self, embedding: Tensor) -> Tensor:
        """Turns embeddings [B, time_dim + D] into scale and shift, [B, 2 channels]."""
        time, code = embedding.split(self.split, dim=1)
        scale, shift = self.of_time(time).chunk(2, dim=1)
        gain = 1 + self.of_code(code)
        return torch.cat([(1 + scale) * gain - 1, shift * gain], dim=1)


class _Padded(nn.Module):
    """A module with zeros padded before and after its output [B, N]."""

    def __init__(self, module: nn.Module, before: int = 0, after: int = 0) -> None:
        super().__init__()
        self.module = module
        self.padding = (before, after)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the padded output, [B, before + N + after]."""
        return F.pad(self.module(x), self.padding)


class _EncoderBlock(nn.Module):
    """An encoder block: norm, SiLU, optional average pooling of both branches, and one convolution."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, pool: bool = False) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(min(groups, in_channels), in_channels)
        self.convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.pool = nn.AvgPool2d(2) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(self.pool(x)) + self.convolution(self.pool(F.silu(self.norm(x))))


class _MeanAndMax(nn.Module):
    """Concatenates mean and maximum over all positions, [B, C, H, W] -> [B, 2 C, 1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)], dim=1)


def _attention(channels: int, groups: int) -> Attention:
    """Builds self-attention with one head between the positions of a map; it starts as the identity."""
    # fmt: off
    attention = Attention(
        channels, heads=1, dim_head=channels, norm_num_groups=min(groups, channels), eps=1e-5, bias=True,
        residual_connection=True, _from_deprecated_attn_block=True,
    )
    # fmt: on
    _zero(attention.to_out[0])
    return attention


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _check_size(image_size: int, multipliers: Sequence[int]) -> None:
    halvings = len(multipliers) - 1
    if image_size % 2**halvings:
        raise ValueError(
            f"image_size must be a multiple of {2**halvings} for {len(multipliers)} multipliers, got {image_size}."
        )
