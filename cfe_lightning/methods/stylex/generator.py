"""StyleGAN2 in plain PyTorch, with its style space in the open, and the encoder that StylEx trains with it.

Sources: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", CVPR 2020; Wu et al., "StyleSpace
Analysis", CVPR 2021; Lang et al., "Explaining in Style", ICCV 2021; Atad et al., "CheXplaining in Style", 2022.

Shapes: B images, C channels, R side of the image, D entries of the latent w, L slots (copies of w), K classes, M
styles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfe_lightning.compute.precision import full_precision, to_float32
from cfe_lightning.methods.stylex.layers import (
    EqualConv,
    EqualLinear,
    ResidualTrunk,
    activate,
    encode_bits,
    low_pass,
    upsample,
)

Conditioning = Literal["none", "const_concat", "w_concat"]
LatentSpace = Literal["w", "w+"]

#: Entries of a label's embedding per class, beside the learned constant.
_EMBEDDED = 10


class Styles(NamedTuple):
    """What one picture is synthesised from, noise apart.

    Attributes:
        conv: Of every 3x3 convolution in forward order, each [B, C_in]: the style space that is searched.
        rgb: Of every layer that paints, each [B, C_in]; they mostly shift colours and are not searched.
        start: Input of the first convolution, [B, C_in, 4, 4].
    """

    conv: Sequence[Tensor]
    rgb: Sequence[Tensor]
    start: Tensor

    def rows(self, index: Tensor) -> Styles:
        """Those of some images, index [N] into the batch."""
        return Styles([s[index] for s in self.conv], [s[index] for s in self.rgb], self.start[index])


class MappingNetwork(nn.Module):
    """Normal noise to latents, [B, Z] -> [B, D]."""

    def __init__(self, z_dim: int, w_dim: int, num_layers: int) -> None:
        super().__init__()
        sizes = [z_dim] + [w_dim] * num_layers
        self.layers = nn.ModuleList(EqualLinear(sizes[i], sizes[i + 1], lr_mul=0.01) for i in range(num_layers))

    def forward(self, z: Tensor) -> Tensor:
        """z is normalised to unit second moment first."""
        z = to_float32(z)
        w = z * (z.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()
        with full_precision(w):
            for layer in self.layers:
                w = activate(layer(w))
        return w


class StyledConv(nn.Module):
    """A 3x3 convolution whose input channels are scaled by styles and whose output is scaled back to unit variance.

    Scaling input and output of one ordinary convolution equals scaling its kernel for every image, so images of any
    styles share one kernel.

    Args:
        in_channels: Also the number of styles.
        out_channels: Of the output.
        style_dim: Entries of the latent (and label) that the styles are an affine map of.
        size: Side of the output.
        up: Doubles the resolution.
    """

    noise: Tensor

    def __init__(self, in_channels: int, out_channels: int, style_dim: int, size: int, *, up: bool) -> None:
        super().__init__()
        self.affine = EqualLinear(style_dim, in_channels, bias=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.register_buffer("noise", torch.randn(1, 1, size, size))
        self.gain = 1 / math.sqrt(in_channels * 9)
        self.up = up

    def forward(self, x: Tensor, style: Tensor, noise: Tensor | None = None) -> Tensor:
        """[B, in, h, w], styles [B, in] -> [B, out, size, size]; the stored noise map unless one is given."""
        weight = self.weight * self.gain
        x = x * style[:, :, None, None].to(x.dtype)
        if self.up:
            x = low_pass(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), 1, 4.0)
        else:
            x = F.conv2d(x, weight, padding=1)
        noise = self.noise if noise is None else noise
        shift = self.noise_strength * noise + self.bias[:, None, None]
        return activate(torch.addcmul(shift.to(x.dtype), x, self.demodulation(style).to(x.dtype)))

    def demodulation(self, style: Tensor) -> Tensor:
        """What brings every output channel back to unit variance, [B, in] -> [B, out, 1, 1]."""
        # Small numbers squared: half precision would lose them.
        with full_precision(style):
            style = to_float32(style)
            power = (self.weight.to(style) * self.gain).square().sum(dim=(2, 3))
            return (style.square() @ power.T + 1e-8).rsqrt()[:, :, None, None]


class ToImage(nn.Module):
    """A 1x1 convolution with styles that paints, without demodulation."""

    def __init__(self, in_channels: int, channels: int, style_dim: int) -> None:
        super().__init__()
        self.affine = EqualLinear(style_dim, in_channels, bias=1.0)
        self.weight = nn.Parameter(torch.randn(channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.gain = 1 / math.sqrt(in_channels)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """[B, in, h, w], styles [B, in] -> [B, C, h, w]."""
        return F.conv2d(x * style[:, :, None, None].to(x.dtype), self.weight * self.gain, self.bias)


class Entering(NamedTuple):
    """What enters one convolution: its features [B, C_in, h, w] and the picture painted so far (None at first)."""

    features: Tensor
    picture: Tensor | None


class Synthesis(nn.Module):
    """From styles to pictures, each layer addressable.

    Convolution ``l`` reads slot ``l``; the layer that paints at block ``b`` reads slot ``2 b + 1``, which it shares
    with the first convolution of the next block.

    Args:
        channels: 1 or 3.
        widths: Channels at every resolution, see ``equalised.channel_table``.
        style_dim: Entries of what the styles are an affine map of.
        start_extra: Input channels of the first convolution beside the learned constant.
    """

    def __init__(self, *, channels: int, widths: Mapping[int, int], style_dim: int, start_extra: int = 0) -> None:
        super().__init__()
        sizes = sorted(widths)
        self.constant = nn.Parameter(torch.randn(1, widths[4], 4, 4))
        self.convs = nn.ModuleList()
        self.to_image = nn.ModuleList()
        for size in sizes:
            if size == 4:
                self.convs.append(StyledConv(widths[4] + start_extra, widths[4], style_dim, 4, up=False))
            else:
                self.convs.append(StyledConv(widths[size // 2], widths[size], style_dim, size, up=True))
                self.convs.append(StyledConv(widths[size], widths[size], style_dim, size, up=False))
            self.to_image.append(ToImage(widths[size], channels, style_dim))
        self.num_slots = 2 * len(sizes)

    def layers(self) -> Iterator[StyledConv]:
        """The convolutions in forward order."""
        for layer in self.convs:
            assert isinstance(layer, StyledConv), "built so"
            yield layer

    @property
    def layer_sizes(self) -> list[int]:
        """Styles of every convolution; their sum is M, the size of the style space."""
        return [layer.weight.shape[1] for layer in self.layers()]

    def address(self, index: int) -> tuple[int, int]:
        """A coordinate of the style space as (convolution, channel).

        Raises:
            IndexError: If there is no such coordinate.
        """
        rest = index
        for layer, size in enumerate(self.layer_sizes):
            if 0 <= rest < size:
                return layer, rest
            rest -= size
        raise IndexError(f"The style space has {sum(self.layer_sizes)} coordinates, there is no {index}.")

    def styles(self, u: Tensor, start: Tensor) -> Styles:
        """All styles of latents with their labels [B, L, style_dim]; they are affine in them."""
        with full_precision(u):
            u = to_float32(u)
            conv = [layer.affine(u[:, slot]) for slot, layer in enumerate(self.layers())]
            rgb = [layer.affine(u[:, 2 * block + 1]) for block, layer in enumerate(self.to_image)]  # type: ignore[union-attr, operator]
        return Styles(conv, rgb, start)

    def flatten_styles(self, styles: Styles) -> Tensor:
        """The styles of all convolutions in forward order, [B, M]."""
        return torch.cat(list(styles.conv), dim=1)

    def replace_styles(self, styles: Styles, flat: Tensor) -> Styles:
        """Other styles of the convolutions [B, M], the rest as it is."""
        return styles._replace(conv=flat.split(self.layer_sizes, dim=1))

    def draw_noise(self, batch: int, like: Tensor) -> list[Tensor]:
        """Fresh noise maps for every convolution, each [B, 1, h, w]."""
        return [
            torch.randn(batch, *layer.noise.shape[1:], device=like.device, dtype=like.dtype) for layer in self.layers()
        ]

    def forward(self, styles: Styles, noise: Sequence[Tensor] | None = None) -> Tensor:
        """Pictures [B, C, R, R], about in [-1, 1] but not clamped; stored noise unless some is given."""
        return self.synthesize_from(0, Entering(styles.start, None), styles, noise)

    def synthesize_from(
        self, layer: int, entering: Entering, styles: Styles, noise: Sequence[Tensor] | None = None
    ) -> Tensor:
        """The same from the input of convolution ``layer`` on; only styles from there on are read."""
        return self._run(layer, entering, styles, noise, None)

    def trace(self, styles: Styles, noise: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Entering]]:
        """The pictures, and what entered every convolution on the way."""
        seen: list[Entering] = []
        return self._run(0, Entering(styles.start, None), styles, noise, seen), seen

    def _run(
        self,
        first: int,
        entering: Entering,
        styles: Styles,
        noise: Sequence[Tensor] | None,
        seen: list[Entering] | None,
    ) -> Tensor:
        x, picture = entering
        for index, layer in enumerate(self.layers()):
            if index < first:
                continue
            if seen is not None:
                seen.append(Entering(x, picture))
            x = layer(x, styles.conv[index], None if noise is None else noise[index])
            if not layer.up:
                block = (index + 1) // 2
                painted = self.to_image[block](x, styles.rgb[block])
                # Added up over all resolutions.
                with full_precision(painted):
                    picture = to_float32(painted) if picture is None else upsample(picture) + to_float32(painted)
        assert picture is not None, "the last convolution paints"
        return picture


class StyleGenerator(nn.Module):
    """Mapping network and synthesis with the class entering in one of three ways, or not at all.

    Args:
        channels: 1 or 3.
        num_classes: K.
        conditioning: "none"; "const_concat", a label's embedding beside the learned constant (the paper's text);
            "w_concat", the label beside the latent in front of every affine map (StylEx).
        widths: Channels at every resolution.
        z_dim: Entries of the noise.
        w_dim: D.
        mapping_layers: Of the mapping network.
    """

    def __init__(
        self,
        *,
        channels: int,
        num_classes: int,
        conditioning: Conditioning,
        widths: Mapping[int, int],
        z_dim: int = 512,
        w_dim: int = 512,
        mapping_layers: int = 8,
    ) -> None:
        super().__init__()
        self.conditioning = conditioning
        self.z_dim = z_dim
        self.w_dim = w_dim
        self.mapping = MappingNetwork(z_dim, w_dim, mapping_layers)
        in_constant = conditioning == "const_concat"
        self.embedding = nn.Parameter(torch.randn(2, _EMBEDDED)) if in_constant else None
        self.synthesis = Synthesis(
            channels=channels,
            widths=widths,
            style_dim=w_dim + (num_classes if conditioning == "w_concat" else 0),
            start_extra=num_classes * _EMBEDDED if in_constant else 0,
        )

    def blocks(self) -> list[nn.Module]:
        """What the network is built of, to be compiled or recomputed one by one."""
        return [*self.synthesis.convs]

    @property
    def num_slots(self) -> int:
        """L."""
        return self.synthesis.num_slots

    def mixed(self, z: Tensor, other: Tensor, cut: Tensor) -> Tensor:
        """Latents in every slot, those of ``other`` from slot ``cut`` [B] on: [B, Z] twice -> [B, L, D]."""
        first, second = self.mapping(torch.cat([z, other])).chunk(2)
        below = torch.arange(self.num_slots, device=z.device) < cut[:, None]
        return torch.where(below[:, :, None], first[:, None], second[:, None])

    def styles(self, w: Tensor, condition: Tensor) -> Styles:
        """Styles of latents [B, D] (for all slots) or [B, L, D] and labels [B, K]."""
        w = self.spread(w)
        start = self.synthesis.constant.expand(len(w), -1, -1, -1)
        if self.conditioning == "w_concat":
            w = torch.cat([w, condition[:, None].expand(-1, self.num_slots, -1).to(w)], dim=2)
        elif self.embedding is not None:
            label = encode_bits(self.embedding, condition.to(w)).flatten(1)
            start = torch.cat([start, label[:, :, None, None].expand(-1, -1, 4, 4)], dim=1)
        return self.synthesis.styles(w, start)

    def spread(self, w: Tensor) -> Tensor:
        """One latent for all slots, [B, D] -> [B, L, D]; latents for every slot stay as they are."""
        # Copies, not a view: a matrix product of a view may run in another kernel, and its last bits differ.
        return w[:, None].repeat(1, self.num_slots, 1) if w.ndim == 2 else w

    def forward(self, w: Tensor, condition: Tensor, noise: Sequence[Tensor] | None = None) -> Tensor:
        """Latents [B, D] or [B, L, D] and labels [B, K] to pictures [B, C, R, R]."""
        return self.synthesis(self.styles(w, condition), noise)

    def affine_weights(self, layers: Sequence[int] | None = None) -> Tensor:
        """How the latent moves every style of the convolutions (or of some), [M, D]; labels' columns are left out."""
        chosen = [layer for index, layer in enumerate(self.synthesis.layers()) if layers is None or index in layers]
        return torch.cat([layer.affine.weight[:, : self.w_dim] for layer in chosen])


class StyleEncoder(nn.Module):
    """Images to latents: the critic's trunk without minibatch statistics, so every image is encoded by itself.

    Args:
        channels: 1 or 3.
        widths: Channels at every resolution.
        w_dim: D.
        space: "w" makes one latent for all slots; "w+" one for each, sharper and harder to edit.
    """

    def __init__(self, *, channels: int, widths: Mapping[int, int], w_dim: int, space: LatentSpace = "w") -> None:
        super().__init__()
        self.num_slots = 1 if space == "w" else 2 * len(widths)
        self.trunk = ResidualTrunk(channels, widths)
        self.conv = EqualConv(widths[4], widths[4], 3, padding=1)
        self.linear = EqualLinear(widths[4] * 16, w_dim * self.num_slots)

    def blocks(self) -> list[nn.Module]:
        """What the network is built of, to be compiled or recomputed one by one."""
        return [*self.trunk.blocks]

    def forward(self, image: Tensor) -> Tensor:
        """[B, C, R, R] in [-1, 1] -> [B, D], or [B, L, D] in the space "w+"."""
        features = activate(self.conv(self.trunk(image))).flatten(1)
        with full_precision(features):
            w = self.linear(to_float32(features))
        return w if self.num_slots == 1 else w.unflatten(1, (self.num_slots, -1))
