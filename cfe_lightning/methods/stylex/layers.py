"""Layers of StyleGAN2: equalised learning rates, resampling without aliasing, and the trunk of critic and encoder.

Source: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" (arXiv 1912.04958). Everything is plain
PyTorch and can be differentiated twice, as the gradient penalties of StyleGAN2 need.

Shapes: B images, C channels, H, W pixels, R side of the image, F features, K classes.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfe_lightning.compute.precision import to_float32


def activate(x: Tensor) -> Tensor:
    """Applies a leaky ReLU (slope 0.2) times the square root of 2, which keeps the second moment."""
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


def channel_table(image_size: int, base: int = 32768, maximum: int = 512) -> dict[int, int]:
    """Returns the channels at every resolution r from 4 to ``image_size``: base / r, at most ``maximum`` (config F).

    Raises:
        ValueError: If ``image_size`` is not a power of two from 8 on.
    """
    if image_size < 8 or image_size & (image_size - 1):
        raise ValueError(f"image_size must be a power of two from 8 on, such as 32, 64 or 256, got {image_size}.")
    sizes = [2**power for power in range(2, image_size.bit_length())]
    return {size: max(1, min(base // size, maximum)) for size in sizes}


def low_pass(x: Tensor, padding: int, gain: float = 1.0, stride: int = 1) -> Tensor:
    """Filters feature maps by [1, 3, 3, 1] / 8 along both axes.

    Args:
        x: Feature maps, [B, C, H, W].
        padding: Number of zeros on every side.
        gain: Factor of the result; 4 after an upsampling that inserts zeros.
        stride: Distance of the kept pixels, 1 or 2.
    """
    # Exact in bfloat16. Computed on the device: a copy from the host makes a GPU wait at every layer.
    taps = 0.5 - (torch.arange(4, device=x.device, dtype=x.dtype) - 1.5).abs() / 4
    kernel = (torch.outer(taps, taps) * gain).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(x, kernel, padding=padding, stride=stride, groups=x.shape[1])


def upsample(x: Tensor) -> Tensor:
    """Doubles the resolution, [B, C, H, W] -> [B, C, 2 H, 2 W]: bilinear, but the border fades to zero."""
    batch, channels, height, width = x.shape
    spread = F.pad(x[:, :, :, None, :, None], (0, 1, 0, 0, 0, 1)).reshape(batch, channels, 2 * height, 2 * width)
    # Two zeros before and one after each row and column.
    return low_pass(F.pad(spread, (2, 1, 2, 1)), 0, 4.0)


class EqualLinear(nn.Module):
    """A linear layer whose weights have unit variance and are scaled when used.

    Args:
        in_features: Number of inputs.
        out_features: Number of outputs.
        bias: Initial value of the bias.
        lr_mul: Learning rate relative to that of other layers.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: float = 0.0, lr_mul: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_mul)
        self.bias = nn.Parameter(torch.full((out_features,), bias / lr_mul))
        self.gain, self.lr_mul = lr_mul / math.sqrt(in_features), lr_mul

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer, [..., in] -> [..., out]."""
        return F.linear(x, self.weight * self.gain, self.bias * self.lr_mul)


class EqualConv(nn.Module):
    """A convolution whose weights have unit variance and are scaled when used."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, padding: int, bias: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """Applies the convolution, [B, in, H, W] -> [B, out, H', W']."""
        return F.conv2d(x, self.weight * self.gain, self.bias, stride=self.stride, padding=self.padding)


class ResidualDown(nn.Module):
    """A residual block that halves the resolution, [B, in, H, W] -> [B, out, H / 2, W / 2]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = EqualConv(in_channels, in_channels, 3, padding=1)
        self.conv2 = EqualConv(in_channels, out_channels, 3, stride=2, padding=0)
        self.skip = EqualConv(in_channels, out_channels, 1, padding=0, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Adds residual and shortcut, scaled to keep the variance."""
        main = activate(self.conv2(low_pass(activate(self.conv1(x)), 2)))
        return (main + self.skip(low_pass(x, 1, stride=2))) * math.sqrt(0.5)


class ResidualTrunk(nn.Module):
    """Maps an image to features of 4 x 4 cells; StyleGAN2's critic and StylEx' encoder share this design.

    Args:
        in_channels: Channels of the image including label planes.
        widths: Channels at every resolution, from ``channel_table``.
    """

    def __init__(self, in_channels: int, widths: Mapping[int, int]) -> None:
        super().__init__()
        sizes = sorted(widths, reverse=True)
        self.stem = EqualConv(in_channels, widths[sizes[0]], 1, padding=0)
        self.blocks = nn.Sequential(*(ResidualDown(widths[size], widths[size // 2]) for size in sizes[:-1]))

    def forward(self, image: Tensor) -> Tensor:
        """Maps images to features, [B, C, R, R] -> [B, F, 4, 4]."""
        return self.blocks(activate(self.stem(image)))


def stddev_map(x: Tensor, group: int = 4) -> Tensor:
    """Appends the standard deviation within groups of images as a constant map, [B, C, H, W] -> [B, C + 1, H, W].

    Image i is grouped with images i + B / g, i + 2 B / g, ...; g is the largest divisor of B up to ``group``.
    """
    # Statistics in single precision; the epsilon bounds the slope of the root.
    batch = len(x)
    size = next(count for count in range(min(group, batch), 0, -1) if batch % count == 0)
    spread = (to_float32(x).unflatten(0, (size, batch // size)).var(dim=0, unbiased=False) + 1e-8).sqrt()
    value = spread.mean(dim=(1, 2, 3), keepdim=True).repeat(size, 1, 1, 1).to(x.dtype)
    return torch.cat([x, value.expand(-1, 1, *x.shape[2:])], dim=1)


def encode_bits(table: Tensor, condition: Tensor) -> Tensor:
    """Encodes labels or class probabilities [B, K] by a table of two rows, [2, N] -> [B, K, N].

    As in the code of CheXplaining in Style, every class takes one row: the second if its bit of the one-hot label is
    set, the first otherwise. Probabilities interpolate between both.
    """
    return torch.lerp(table[0], table[1], condition[:, :, None])
