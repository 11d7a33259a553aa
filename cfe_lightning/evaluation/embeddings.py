"""Fixed networks that tell how alike two images are.

They take images [B, C, H, W] in [-1, 1], grey or RGB, of any size, and give embeddings [B, D] without gradients. Each
prepares images as in its own training. The weights come from files of the user; see ``instruments``.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import ResNet, resnet50

from cfe_lightning import images

#: Side of the square images on which both published networks were trained.
IMAGE_SIZE = 224
#: Mean blue, green and red of VGGFace2, 0 to 255.
_MEAN_FACE = (91.4953, 103.8827, 131.0912)
#: Mean and standard deviation of ImageNet per channel, on the [0, 1] scale.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class FaceEmbedding(nn.Module):
    """ResNet-50 of VGGFace2 (arXiv 1710.08092) without its classifier, [B, C, H, W] -> [B, 2048].

    The weights were trained with Caffe. They have torchvision's names and shapes, but a block halves its map in the
    first convolution instead of the second, and the first pooling has no border: torchvision's own arrangement gives
    other embeddings. They are published as a pickle of arrays, which the user converts to a state dictionary once.
    """

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.network = resnet50()
        self.network.fc = nn.Identity()
        _halve_first(self.network)
        self.register_buffer("mean", torch.tensor(_MEAN_FACE).view(1, 3, 1, 1), persistent=False)

    def prepare(self, image: Tensor) -> Tensor:
        """Returns blue, green and red of 0 to 255 minus the mean face, [B, C, H, W] in [-1, 1] -> [B, 3, 224, 224]."""
        return images.to_unit(_enlarged(image)).mul(255).flip(1) - self.mean

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Returns embeddings [B, 2048] of images [B, C, H, W] in [-1, 1]."""
        return self.network(self.prepare(image))


class SimSiamEmbedding(nn.Module):
    """ResNet-50 and projector of SimSiam (arXiv 2011.10566, section 3), [B, C, H, W] -> [B, ``width``].

    The predictor, which only training needs, is left out: ACE (arXiv 2303.09962) compares the projector's outputs.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int = 2048) -> None:
        super().__init__()
        self.encoder = resnet50(num_classes=width)
        last = self.encoder.fc
        size = last.in_features
        # fmt: off
        self.encoder.fc = nn.Sequential(  # type: ignore[assignment]
            nn.Linear(size, size, bias=False), nn.BatchNorm1d(size), nn.ReLU(),
            nn.Linear(size, size, bias=False), nn.BatchNorm1d(size), nn.ReLU(),
            last, nn.BatchNorm1d(width, affine=False),
        )
        # fmt: on
        for name, values in zip(("mean", "std"), _IMAGENET, strict=True):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def prepare(self, image: Tensor) -> Tensor:
        """Returns RGB normalised like ImageNet, [B, C, H, W] in [-1, 1] -> [B, 3, 224, 224]."""
        # ACE's code: the images' own size; here: the size of training, so that results of all sizes compare.
        return (images.to_unit(_enlarged(image)) - self.mean) / self.std

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Returns embeddings [B, 2048] of images [B, C, H, W] in [-1, 1]."""
        return self.encoder(self.prepare(image))


class UserEmbedding(nn.Module):
    """A network of the user for RGB images in [0, 1] of any size, [B, C, H, W] -> [B, D].

    Args:
        network: Maps RGB images [B, 3, H, W] to features [B, D]; grey images become RGB with equal channels.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Returns the network's features [B, D] of images [B, C, H, W] in [-1, 1].

        Raises:
            ValueError: If the network refuses the images, or does not return one row per image.
        """
        shown = images.to_unit(coloured(image))
        try:
            features: Any = self.network(shown)
        # Networks raise anything on images that they were not made for.
        except Exception as error:
            reason = " ".join(str(error).split())[-200:]
            raise ValueError(
                f"The user's network cannot take images {list(shown.shape)} in [0, 1]: {reason}"
            ) from error

        # One row per image.
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(image):
            got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"The user's network returns {got} for {len(image)} images, but one row of features for each is "
                "needed, [N, D]: export it with its pooling."
            )
        return features


def coloured(image: Tensor) -> Tensor:
    """Turns grey into three equal channels, [B, C, H, W] -> [B, 3, H, W]."""
    return image.expand(-1, 3, -1, -1)


def _enlarged(image: Tensor) -> Tensor:
    return images.resize(coloured(image), IMAGE_SIZE)


def _halve_first(network: ResNet) -> None:
    """Moves the strides of a ResNet to where the original ones in Caffe have them (arXiv 1512.03385)."""
    network.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)
    for layer in (network.layer2, network.layer3, network.layer4):
        block: Any = layer[0]
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
