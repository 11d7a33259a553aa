"""The classifiers that can be trained here: DXAI's small CNN, and torchvision's ResNet-18 and DenseNet-121.

They are classes, not functions, because a checkpoint names the class it is rebuilt from; layers keep torchvision's
names. None starts from downloaded weights.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torchvision.models.densenet import DenseNet
from torchvision.models.resnet import BasicBlock, ResNet


class SimpleCnn(nn.Module):
    """Two convolutions and two linear layers ("Simple", DXAI appendix B, table 7).

    The pooling window is 2 at 32 and 64 pixels and 3 at 256: 2,048, 8,192 and 25,088 inputs to the first linear layer.

    Args:
        num_classes: Number of logits.
        channels: 1 for grey, 3 for RGB.
        image_size: Side of the square images, at least 4 pixels.
    """

    def __init__(self, num_classes: int, channels: int = 3, image_size: int = 32) -> None:
        super().__init__()
        window = max(2, round(math.sqrt(image_size / 32)))
        side = image_size // window // window
        if side < 1:
            raise ValueError(f"SimpleCnn needs images of at least {window * window} pixels, got {image_size}.")
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


class ResNet18(ResNet):
    """torchvision's ResNet-18 for any number of channels, with a stem for small images on request.

    Args:
        num_classes: Number of logits.
        channels: 1 for grey, 3 for RGB.
        small_image: A 3x3 first convolution of stride 1 and no first max-pooling, for images below about 100 pixels:
            the last map of a 32-pixel image is 4 x 4 instead of 1 x 1.
    """

    def __init__(self, num_classes: int, channels: int = 3, small_image: bool = False) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
        self.conv1 = _stem(channels, small_image)
        if small_image:
            self.maxpool = nn.Identity()


class DenseNet121(DenseNet):
    """torchvision's DenseNet-121 for any number of channels, with a stem for small images on request.

    Args:
        num_classes: Number of logits.
        channels: 1 for grey, 3 for RGB.
        small_image: As in ``ResNet18``.
    """

    def __init__(self, num_classes: int, channels: int = 3, small_image: bool = False) -> None:
        super().__init__(growth_rate=32, block_config=(6, 12, 24, 16), num_init_features=64, num_classes=num_classes)
        self.features.conv0 = _stem(channels, small_image)
        if small_image:
            self.features.pool0 = nn.Identity()


def _stem(channels: int, small_image: bool) -> nn.Conv2d:
    kernel, stride = (3, 1) if small_image else (7, 2)
    stem = nn.Conv2d(channels, 64, kernel_size=kernel, stride=stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    return stem
