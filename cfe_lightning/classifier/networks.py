"""The networks that can be trained here: two small CNNs, ResNet-18 and DenseNet-121, and a network for montages.

They are classes, not functions, because a checkpoint names the class that rebuilds it. Layers keep torchvision's
names. No network starts from downloaded weights.
"""

import math
from functools import partial

from torch import Tensor, nn
from torchvision.models.densenet import DenseNet
from torchvision.models.resnet import BasicBlock, ResNet

from cfe_lightning.images import cut_montage, montage_side, tile_montage


class SimpleCnn(nn.Module):
    """Two convolutions and two linear layers: "Simple" of DXAI (arXiv 2401.00320, appendix B, table 7).

    The pooling window is 2 at 32 and 64 pixels and 3 at 256: 2,048, 8,192 and 25,088 inputs to the first linear layer.

    Args:
        num_classes: Number of logits.
        channels: 1 for grey, 3 for RGB.
        image_size: Side of the square images, at least 4 pixels.
    """

    def __init__(self, num_classes: int, channels: int = 3, image_size: int = 32) -> None:
        super().__init__()
        # Size of the last map.
        window = max(2, round(math.sqrt(image_size / 32)))
        side = image_size // window // window
        if side < 1:
            raise ValueError(f"SimpleCnn needs images of at least {window * window} pixels, got {image_size}.")

        # Layers.
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, 16, kernel_size=3, padding=1),
            nn.MaxPool2d(window),
            nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.MaxPool2d(window),
        )
        self.hidden = nn.Linear(32 * side * side, 128)
        self.activation = nn.ReLU()
        self.fc = nn.Linear(128, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """[B, C, S, S] -> [B, K]."""
        return self.fc(self.activation(self.hidden(self.convolutions(image).flatten(1))))


class PooledCnn(nn.Module):
    """Five convolutions with batch norm, a global average and one linear layer: a small network with a feature map.

    The map of a 32-pixel image is 8 x 8 cells; the levels before it are 16 x 16 and 32 x 32.

    Args:
        num_classes: Number of logits.
        channels: 1 for grey, 3 for RGB.
        width: Number of channels of the first convolution; the feature map has four times as many.
    """

    def __init__(self, num_classes: int, channels: int = 3, width: int = 16) -> None:
        super().__init__()
        self.stem = _normed(channels, width, 1)
        self.stage1 = _normed(width, 2 * width, 2)
        self.stage2 = nn.Sequential(_normed(2 * width, 4 * width, 2), _normed(4 * width, 4 * width, 1))
        self.stage3 = _normed(4 * width, 4 * width, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """[B, C, S, S] -> [B, K]."""
        return self.fc(self.pool(self.stage3(self.stage2(self.stage1(self.stem(image))))).flatten(1))


class ResNet18(ResNet):
    """ResNet-18 of torchvision for any number of channels, with an optional stem for small images.

    Args:
        num_classes: Number of logits.
        channels: 1 for grey, 3 for RGB.
        small_image: Replaces the first convolution by one of 3 x 3 and stride 1 without pooling, for images below about
            100 pixels: the last map of a 32-pixel image is 4 x 4 instead of 1 x 1.
    """

    def __init__(self, num_classes: int, channels: int = 3, small_image: bool = False) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
        self.conv1 = _stem(channels, small_image)
        if small_image:
            self.maxpool = nn.Identity()


class DenseNet121(DenseNet):
    """DenseNet-121 of torchvision for any number of channels, with an optional stem for small images.

    Args:
        num_classes: Number of logits.
        channels: 1 for grey, 3 for RGB.
        small_image: Replaces the first convolution by one of 3 x 3 and stride 1 without pooling, for images below about
            100 pixels: the last map of a 32-pixel image is 4 x 4 instead of 1 x 1.
    """

    def __init__(self, num_classes: int, channels: int = 3, small_image: bool = False) -> None:
        super().__init__(growth_rate=32, block_config=(6, 12, 24, 16), num_init_features=64, num_classes=num_classes)
        self.features.conv0 = _stem(channels, small_image)
        if small_image:
            self.features.pool0 = nn.Identity()


class SliceStack(DenseNet121):
    """One DenseNet-121 for all slices of a montage: a linear layer on the average of the slices' pooled features.

    Every convolution and pooling window stays within one slice, and every map is tiled like the slices. So an explainer
    finds maps that lie on the montage, and their average over all cells is the average over the slices. The weights
    have the names and shapes of ``DenseNet121``.

    Paper: the experiments of DiffExplainer (MICCAI 2024) do not say how the slices enter the classifier; here: averaged
    features, because then neither the order nor the number of slices changes the weights.

    Args:
        num_classes: Number of logits.
        channels: 1 for grey, 3 for RGB.
        num_slices: Number of slices in the montage, a square number.
        small_image: Uses a first convolution of 3 x 3 and stride 1 without pooling, for slices below about 100 pixels.

    Raises:
        ValueError: If ``num_slices`` is no square number; in ``forward``, if its root does not divide the image's side.
    """

    def __init__(self, num_classes: int, channels: int = 3, num_slices: int = 4, small_image: bool = False) -> None:
        super().__init__(num_classes, channels, small_image)
        montage_side(num_slices)
        # A longer batch of slices would give the same logits, but an explainer expects one map per image in each layer.
        for layer in self.features.modules():
            if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) and layer.kernel_size not in (1, (1, 1)):
                layer.register_forward_pre_hook(partial(_cut, num_slices))
                layer.register_forward_hook(partial(_tile, num_slices))


# The hooks are functions of the module, because a network with closures could not be pickled.
def _cut(num_slices: int, layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return cut_montage(inputs[0], num_slices).flatten(0, 1)


def _tile(num_slices: int, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return tile_montage(output.unflatten(0, (-1, num_slices)))


def _normed(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())


def _stem(channels: int, small_image: bool) -> nn.Conv2d:
    """Returns the first convolution with torchvision's initial weights."""
    kernel, stride = (3, 1) if small_image else (7, 2)
    stem = nn.Conv2d(channels, 64, kernel_size=kernel, stride=stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    return stem
