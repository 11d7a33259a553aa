"""A 3x3 convolution beside a change of resolution, computed as one strided convolution with a 4x4 kernel.

Nearest-neighbour upsampling and average pooling are convolutions with a 2x2 box, so box and kernel can be folded into
one. The result is the same to rounding, and the multiplications are less than half. The map at full resolution is
never made: on a CPU it cost a third of a whole DXAI iteration.

Shapes: B images, H, W pixels.
"""

from torch import Tensor, nn
from torch.nn import functional as F


def upsample_and_convolve(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Computes ``layer(interpolate(x, scale_factor=2, mode="nearest"))``, [B, in, H, W] -> [B, out, 2 H, 2 W].

    Args:
        x: The map at low resolution.
        layer: A 3x3 convolution with stride 1 and padding 1, grouped or not.
    """
    groups, width = layer.groups, layer.out_channels
    # A transposed convolution stores the mirrored kernel, inputs first within each group.
    kernel = _with_box(layer.weight.flip(2, 3)).unflatten(0, (groups, width // groups)).transpose(1, 2).flatten(0, 1)
    return F.conv_transpose2d(x, kernel, layer.bias, stride=2, padding=1, groups=groups)


def convolve_and_pool(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Computes ``avg_pool2d(layer(x), 2)``, [B, in, H, W] -> [B, out, H // 2, W // 2].

    Args:
        x: The map at high resolution.
        layer: A 3x3 convolution with stride 1 and padding 1, grouped or not.
    """
    return F.conv2d(x, _with_box(layer.weight) / 4, layer.bias, stride=2, padding=1, groups=layer.groups)


def _with_box(kernel: Tensor) -> Tensor:
    """Convolves kernels [.., 3, 3] with a 2x2 box of ones, [.., 4, 4]."""
    rows = F.pad(kernel, (0, 0, 1, 0)) + F.pad(kernel, (0, 0, 0, 1))
    return F.pad(rows, (1, 0)) + F.pad(rows, (0, 1))
