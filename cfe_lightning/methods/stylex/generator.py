"""StyleGAN2 in plain PyTorch with an accessible style space, and the encoder that StylEx trains with it.

Sources: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" (arXiv 1912.04958); Wu et al.,
"StyleSpace Analysis" (arXiv 2011.12799); Lang et al., "Explaining in Style" (arXiv 2104.13369); Atad et al.,
"CheXplaining in Style" (arXiv 2207.07553).

Shapes: B images, C channels, R side of the image, Z entries of the noise z, D entries of the latent w, L slots (copies
of w), K classes, M styles. Inside a layer: "in" and "out" channels, h, w pixels.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfe_lightning.compute.precision import full_precision, to_float32
from cfe_lightning.methods.stylex import layers
from cfe_lightning.methods.stylex.layers import EqualConv, EqualLinear, activate

Conditioning = Literal["none", "const_concat", "w_concat"]
LatentSpace = Literal["w", "w+"]
#: Noise map of every convolution, each [B, 1, h, w]; None uses the stored ones.
Noise = Sequence[Tensor] | None

#: Entries per class of a label's embedding beside the learned constant.
_EMBEDDED = 10


class Styles(NamedTuple):
    """The inputs of the synthesis except noise.

    Attributes:
        conv: Styles of every 3x3 convolution in forward order, each [B, in]: the style space that is searched.
        rgb: Styles of every ``ToImage`` layer, each [B, in]; they mostly shift colours and are not searched.
        start: Input of the first convolution, [B, in, 4, 4].
    """

    conv: Sequence[Tensor]
    rgb: Sequence[Tensor]
    start: Tensor


class MappingNetwork(nn.Module):
    """Maps normal noise to latents, [B, Z] -> [B, D]."""

    def __init__(self, z_dim: int, w_dim: int, num_layers: int) -> None:
        super().__init__()
        sizes = itertools.pairwise([z_dim] + [w_dim] * num_layers)
        self.layers = nn.ModuleList(EqualLinear(before, after, lr_mul=0.01) for before, after in sizes)

    def forward(self, z: Tensor) -> Tensor:
        """Normalises z to unit second moment and maps it in single precision."""
        z = to_float32(z)
        w = z * (z.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()
        with full_precision(w):
            for layer in self.layers:
                w = activate(layer(w))
        return w


class StyledConv(nn.Module):
    """A 3x3 convolution that scales its input channels by styles and its output back to unit variance.

    Scaling the kernel for every image is the same as scaling input and output of one ordinary convolution, so images of
    any styles share one kernel.

    Args:
        in_channels: Channels of the input; also the number of styles.
        out_channels: Channels of the output.
        style_dim: Entries of the latent (with "w_concat" also of the label) that the affine map to the styles reads.
        size: Side of the output in pixels.
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
        """Convolves [B, in, h, w] with styles [B, in] to [B, out, size, size]; uses stored noise unless given some."""
        # Styles scale the input.
        weight = self.weight * self.gain
        x = x * style[:, :, None, None].to(x.dtype)
        if self.up:
            x = layers.low_pass(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), 1, 4.0)
        else:
            x = F.conv2d(x, weight, padding=1)
        # Demodulation scales the output; one kernel adds noise and bias.
        shift = self.noise_strength * (self.noise if noise is None else noise) + self.bias[:, None, None]
        return activate(torch.addcmul(shift.to(x.dtype), x, self.demodulation(style).to(x.dtype)))

    def demodulation(self, style: Tensor) -> Tensor:
        """Returns factors that bring the output channels to unit variance, [B, in] -> [B, out, 1, 1]."""
        # Half precision would lose the squares of small numbers.
        with full_precision(style):
            style = to_float32(style)
            power = (self.weight.to(style) * self.gain).square().sum(dim=(2, 3))
            return (style.square() @ power.T + 1e-8).rsqrt()[:, :, None, None]


class ToImage(nn.Module):
    """A 1x1 convolution with styles and without demodulation, from features to a picture."""

    def __init__(self, in_channels: int, channels: int, style_dim: int) -> None:
        super().__init__()
        self.affine = EqualLinear(style_dim, in_channels, bias=1.0)
        self.weight = nn.Parameter(torch.randn(channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.gain = 1 / math.sqrt(in_channels)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """Paints features [B, in, h, w] with styles [B, in], -> [B, C, h, w]."""
        return F.conv2d(x * style[:, :, None, None].to(x.dtype), self.weight * self.gain, self.bias)


class Entering(NamedTuple):
    """The inputs of one convolution: features [B, in, h, w] and the picture painted so far (None before the first)."""

    features: Tensor
    picture: Tensor | None


class Synthesis(nn.Module):
    """Renders styles to pictures; synthesis can start at any layer.

    Convolution ``l`` reads slot ``l``. ``ToImage`` of block ``b`` reads slot ``2 b + 1``, as does the first convolution
    of the next block.

    Args:
        channels: Channels of the pictures, 1 or 3.
        widths: Channels of the feature maps at every resolution, from ``layers.channel_table``.
        style_dim: Entries of the latent (with "w_concat" also of the label) that the affine maps to the styles read.
        start_extra: Input channels of the first convolution beside the learned constant.
    """

    def __init__(self, *, channels: int, widths: Mapping[int, int], style_dim: int, start_extra: int = 0) -> None:
        super().__init__()
        # Blocks: one convolution at 4 x 4 pixels, two at every other resolution, and one layer that paints.
        sizes = sorted(widths)
        self.constant = nn.Parameter(torch.randn(1, widths[4], 4, 4))
        self.convs = nn.ModuleList()
        self.to_image = nn.ModuleList()
        for size in sizes:
            if size > 4:
                self.convs.append(StyledConv(widths[size // 2], widths[size], style_dim, size, up=True))
            extra = start_extra if size == 4 else 0
            self.convs.append(StyledConv(widths[size] + extra, widths[size], style_dim, size, up=False))
            self.to_image.append(ToImage(widths[size], channels, style_dim))
        self.num_slots = 2 * len(sizes)

    def layers(self) -> Iterator[StyledConv]:
        """Yields the convolutions in forward order."""
        for layer in self.convs:
            assert isinstance(layer, StyledConv), "built so"
            yield layer

    @property
    def layer_sizes(self) -> list[int]:
        """Returns the number of styles of every convolution; the sum is M, the size of the style space."""
        return [layer.weight.shape[1] for layer in self.layers()]

    def styles(self, u: Tensor, start: Tensor) -> Styles:
        """Returns all styles, which are affine in the latents with their labels ``u`` [B, L, style_dim]."""
        with full_precision(u):
            u = to_float32(u)
            conv = [layer.affine(u[:, slot]) for slot, layer in enumerate(self.layers())]
            rgb = [layer.affine(u[:, 2 * block + 1]) for block, layer in enumerate(self.to_image)]  # type: ignore[union-attr, operator]
        return Styles(conv, rgb, start)

    def flatten_styles(self, styles: Styles) -> Tensor:
        """Joins the styles of all convolutions in forward order, [B, M]."""
        return torch.cat(list(styles.conv), dim=1)

    def replace_styles(self, styles: Styles, flat: Tensor) -> Styles:
        """Replaces the styles of the convolutions by others, [B, M]."""
        return styles._replace(conv=flat.split(self.layer_sizes, dim=1))

    def draw_noise(self, batch: int, like: Tensor) -> list[Tensor]:
        """Draws a noise map for every convolution, each [B, 1, h, w]."""
        shapes = [layer.noise.shape[1:] for layer in self.layers()]
        return [torch.randn(batch, *shape, device=like.device, dtype=like.dtype) for shape in shapes]

    def forward(self, styles: Styles, noise: Noise = None) -> Tensor:
        """Renders pictures [B, C, R, R], about in [-1, 1] but not clamped."""
        return self.synthesize_from(0, Entering(styles.start, None), styles, noise)

    def synthesize_from(
        self, first: int, entering: Entering, styles: Styles, noise: Noise = None, seen: list[Entering] | None = None
    ) -> Tensor:
        """Renders from the inputs of convolution ``first`` on; earlier styles are not read.

        The inputs of every convolution are appended to ``seen``.
        """
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
                # The picture is a sum over all resolutions, in single precision.
                with full_precision(painted):
                    picture = to_float32(painted) if picture is None else layers.upsample(picture) + to_float32(painted)
        assert picture is not None, "the last convolution paints"
        return picture

    def trace(self, styles: Styles, noise: Noise = None) -> tuple[Tensor, list[Entering]]:
        """Renders pictures and records the inputs of every convolution."""
        seen: list[Entering] = []
        return self.synthesize_from(0, Entering(styles.start, None), styles, noise, seen), seen


class StyleGenerator(nn.Module):
    """Mapping network and synthesis, with or without the class as an input.

    Args:
        channels: Channels of the pictures, 1 or 3.
        num_classes: Number of classes, K.
        conditioning: Entry of the label: "none"; "const_concat", an embedding beside the learned constant (CheXplaining
            in Style); "w_concat", the label beside the latent in front of every affine map (Explaining in Style).
        widths: Channels of the feature maps at every resolution, from ``layers.channel_table``.
        z_dim: Entries of the noise, Z.
        w_dim: Entries of the latent, D.
        mapping_layers: Number of layers of the mapping network.
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
        self.conditioning, self.z_dim, self.w_dim = conditioning, z_dim, w_dim
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
        """Returns the blocks that can be compiled or recomputed one by one."""
        return [*self.synthesis.convs]

    @property
    def num_slots(self) -> int:
        """Returns the number of slots, L."""
        return self.synthesis.num_slots

    def mixed(self, z: Tensor, other: Tensor, cut: Tensor) -> Tensor:
        """Maps two batches of noise [B, Z] to latents [B, L, D]; slots from ``cut`` [B] on are those of ``other``."""
        first, second = self.mapping(torch.cat([z, other])).chunk(2)
        below = torch.arange(self.num_slots, device=z.device) < cut[:, None]
        return torch.where(below[:, :, None], first[:, None], second[:, None])

    def styles(self, w: Tensor, condition: Tensor) -> Styles:
        """Returns the styles of latents [B, D] (for all slots) or [B, L, D] with labels [B, K]."""
        # The label enters beside the latent or beside the learned constant.
        w = self.spread(w)
        start = self.synthesis.constant.expand(len(w), -1, -1, -1)
        if self.conditioning == "w_concat":
            w = torch.cat([w, condition[:, None].expand(-1, self.num_slots, -1).to(w)], dim=2)
        elif self.embedding is not None:
            label = layers.encode_bits(self.embedding, condition.to(w)).flatten(1)
            start = torch.cat([start, label[:, :, None, None].expand(-1, -1, 4, 4)], dim=1)
        return self.synthesis.styles(w, start)

    def spread(self, w: Tensor) -> Tensor:
        """Copies one latent to all slots, [B, D] -> [B, L, D]; returns latents of every slot unchanged."""
        # No view: its matrix product may run in another kernel, whose last bits differ.
        return w[:, None].repeat(1, self.num_slots, 1) if w.ndim == 2 else w

    def forward(self, w: Tensor, condition: Tensor, noise: Noise = None) -> Tensor:
        """Renders latents [B, D] or [B, L, D] with labels [B, K] to pictures [B, C, R, R]."""
        return self.synthesis(self.styles(w, condition), noise)

    def affine_weights(self, chosen: Sequence[int] | None = None) -> Tensor:
        """Returns the affine map from the latent to the styles of all or some convolutions, without labels, [M, D]."""
        maps = [layer.affine.weight[:, : self.w_dim] for layer in self.synthesis.layers()]
        return torch.cat(maps if chosen is None else [maps[index] for index in sorted({*chosen})])


class StyleEncoder(nn.Module):
    """Encodes images as latents: the critic's trunk without minibatch statistics, so every image is encoded alone.

    Args:
        channels: Channels of the images, 1 or 3.
        widths: Channels of the feature maps at every resolution, from ``layers.channel_table``.
        w_dim: Entries of the latent, D.
        space: "w" for one latent for all slots; "w+" for one per slot: sharper pictures, harder to edit.
    """

    def __init__(self, *, channels: int, widths: Mapping[int, int], w_dim: int, space: LatentSpace = "w") -> None:
        super().__init__()
        self.num_slots = 1 if space == "w" else 2 * len(widths)
        self.trunk = layers.ResidualTrunk(channels, widths)
        self.conv = EqualConv(widths[4], widths[4], 3, padding=1)
        self.linear = EqualLinear(widths[4] * 16, w_dim * self.num_slots)

    def blocks(self) -> list[nn.Module]:
        """Returns the blocks that can be compiled or recomputed one by one."""
        return [*self.trunk.blocks]

    def forward(self, image: Tensor) -> Tensor:
        """Encodes images [B, C, R, R] in [-1, 1] as latents [B, D], or [B, L, D] in the space "w+"."""
        features = activate(self.conv(self.trunk(image))).flatten(1)
        with full_precision(features):
            w = self.linear(to_float32(features))
        return w if self.num_slots == 1 else w.unflatten(1, (self.num_slots, -1))
