"""Do flips survive what happens to pictures: saving, compressing, blurring, shrinking.

Source: evaluation, section 3.4. Images [B, C, H, W] in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

from cfe_lightning import images
from cfe_lightning.decisions import decides_for


def quant8(image: Tensor) -> Tensor:
    """There and back through 8 bits."""
    return images.saved(image)


def jpeg90(image: Tensor) -> Tensor:
    """There and back through JPEG of quality 90."""
    level = images.to_uint8(image).cpu()
    saved = torch.stack([transforms.jpeg(one, quality=90) for one in level])
    return (saved.to(image) / 255) * 2 - 1


def blur1(image: Tensor) -> Tensor:
    """A Gaussian blur of one pixel at 128 pixels height, and in proportion."""
    deviation = image.shape[-2] / 128
    size = 2 * max(1, round(3 * deviation)) + 1
    return transforms.gaussian_blur(image, [size, size], [deviation, deviation])


def down_up(image: Tensor) -> Tensor:
    """To half the size and back."""
    height, width = image.shape[-2:]
    small = F.interpolate(
        image, size=(max(1, height // 2), max(1, width // 2)), mode="bilinear", antialias=True, align_corners=False
    )
    return F.interpolate(small, size=(height, width), mode="bilinear", align_corners=False)


#: The mild transformations, by the names of the metric's columns.
TRANSFORMATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quant8": quant8,
    "jpeg90": jpeg90,
    "blur1": blur1,
    "down_up": down_up,
}


@torch.no_grad()
def survives(
    judge: Callable[[Tensor], Tensor],
    image: Tensor,
    counterfactual: Tensor,
    source: Tensor,
    target: Tensor,
    names: Iterable[str] = tuple(TRANSFORMATIONS),
) -> dict[str, tuple[Tensor, Tensor]]:
    """For every transformation whether the image's own decision survives it, and whether the flip does too.

    ``robust_flip`` of a set of images is the sum of the second over the sum of the first.

    Args:
        judge: Images to logits, [B, K].
        image: Before.
        counterfactual: After.
        source: Decisions before, [B].
        target: Decisions asked for, [B].
        names: Of the transformations.

    Returns:
        By name, [B] bool twice.
    """
    found = {}
    for name in names:
        transformed = TRANSFORMATIONS[name]
        kept = decides_for(judge(transformed(image)), source)
        found[name] = (kept, kept & decides_for(judge(transformed(counterfactual)), target))
    return found
