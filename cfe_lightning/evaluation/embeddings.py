"""Fixed networks that tell how alike two images are: they take what they were trained on out of the package's images.

Images [B, C, H, W] in [-1, 1], grey or RGB, of any size; embeddings [B, D], without gradients. The weights are the
user's; see ``cfe_lightning.evaluation.instruments``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import ResNet, resnet50

from cfe_lightning import images

#: Side of the square image that both networks take.
IMAGE_SIZE = 224
#: Blue, green and red of the mean face, 0 to 255 (VGGFace2; evaluation, section 6.1).
_MEAN_FACE = (91.4953, 103.8827, 131.0912)
#: Red, green and blue of ImageNet, 0 to 1.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class FaceEmbedding(nn.Module):
    """ResNet-50 of VGGFace2 (Cao et al. 2018) without its classifier, [B, C, H, W] -> [B, 2048] (6.1).

    Its weights came from Caffe: they have torchvision's names and shapes, but a block halves its map in the first
    convolution, not the second, and the first pooling has no border. With torchvision's own arrangement the same
    weights make other embeddings. They are published as a pickle of arrays, which has to be written as a state
    dictionary of tensors once.
    """

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.network = resnet50()
        self.network.fc = nn.Identity()
        _halve_first(self.network)
        self.register_buffer("mean", torch.tensor(_MEAN_FACE).view(1, 3, 1, 1), persistent=False)

    def prepare(self, image: Tensor) -> Tensor:
        """Levels 0 to 255 as blue, green, red, less the mean face, [B, C, H, W] in [-1, 1] -> [B, 3, 224, 224]."""
        return images.to_unit(_enlarged(image)).mul(255).flip(1) - self.mean

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Embeddings, [B, 2048]."""
        return self.network(self.prepare(image))


class SimSiamEmbedding(nn.Module):
    """ResNet-50 and projector of SimSiam (Chen and He 2021, section 3), [B, C, H, W] -> [B, 2048] (6.2).

    It is the projector's output that is compared: the predictor, which only training needs, is left out.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int = 2048) -> None:
        super().__init__()
        self.encoder = resnet50(num_classes=width)
        last = self.encoder.fc
        self.encoder.fc = nn.Sequential(  # type: ignore[assignment]
            *(nn.Linear(last.in_features, last.in_features, bias=False), nn.BatchNorm1d(last.in_features), nn.ReLU()),
            *(nn.Linear(last.in_features, last.in_features, bias=False), nn.BatchNorm1d(last.in_features), nn.ReLU()),
            *(last, nn.BatchNorm1d(width, affine=False)),
        )
        for name, values in zip(("mean", "std"), _IMAGENET, strict=True):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def prepare(self, image: Tensor) -> Tensor:
        """As ImageNet is normalised, [B, C, H, W] in [-1, 1] -> [B, 3, 224, 224]."""
        # ACE's code: images as large as they are; here: the size of training, so that sizes can be compared.
        return (images.to_unit(_enlarged(image)) - self.mean) / self.std

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Embeddings, [B, 2048]."""
        return self.encoder(self.prepare(image))


class UserEmbedding(nn.Module):
    """A network of the user's, which takes RGB images in [0, 1] as large as they are, [B, C, H, W] -> [B, D].

    Args:
        network: Maps [B, 3, H, W] to [B, D]; grey images are given to it three times over.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Embeddings, [B, D].

        Raises:
            ValueError: If the network refuses the images, or returns anything but one row per image.
        """
        shown = images.to_unit(coloured(image))
        features: Any
        try:
            features = self.network(shown)
        # Every network refuses in its own words what it was not made for.
        except Exception as error:
            reason = " ".join(str(error).split())[-200:]
            raise ValueError(
                f"The user's network cannot take images {list(shown.shape)} in [0, 1]: {reason}"
            ) from error
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(image):
            got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"The user's network returns {got} for {len(image)} images, but one row of features for each is "
                "needed, [N, D]: export it with its pooling."
            )
        return features


def coloured(image: Tensor) -> Tensor:
    """Grey as three equal channels, [B, C, H, W] -> [B, 3, H, W]."""
    return image.expand(-1, 3, -1, -1)


def _enlarged(image: Tensor) -> Tensor:
    return images.resize(coloured(image), IMAGE_SIZE)


def _halve_first(network: ResNet) -> None:
    """The arrangement of the ResNets that were trained with Caffe (He et al. 2016)."""
    network.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)
    for layer in (network.layer2, network.layer3, network.layer4):
        block: Any = layer[0]
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
