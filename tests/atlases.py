"""Atlases of directions, small ones made by hand."""

from typing import Any

import torch
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.atlas import Atlas, AtlasDirection, AtlasPair

STRENGTHS = torch.linspace(-4, 4, 9)


def pictures(num_images: int = 3, channels: int = 1, height: int = 32, width: int = 32) -> Tensor:
    shape = (num_images, len(STRENGTHS), channels, height, width)
    return images.saved(torch.rand(shape, generator=torch.Generator().manual_seed(height)) * 2 - 1)


def direction(**changes: Any) -> AtlasDirection:
    moved = changes.pop("images", pictures())
    given: dict[str, Any] = {
        **{"name": "direction 3, backwards", "strengths": STRENGTHS, "step": -4.0, "degree": 9.3125},
        **{"mean_change": 3.25, "flipped": 0.75, "newly": 0.125, "change": 0.0625, "inside": 0.8125},
        "probabilities": torch.linspace(0.9, 0.1, len(STRENGTHS)).expand(len(moved), -1),
    }
    return AtlasDirection(images=moved, **(given | changes))


def pair(source: str = "cat", target: str = "dog", num_directions: int = 2, **changes: Any) -> AtlasPair:
    given: dict[str, Any] = {
        **{"num_images": 1200, "num_kept": 1000, "covered": 0.875, "curve": [(0.0, 0.0), (2.0, 0.5), (4.0, 0.875)]},
        "directions": [direction(name=f"direction {index}") for index in range(num_directions)],
    }
    return AtlasPair(source=source, target=target, **(given | changes))


def atlas(*pairs: AtlasPair) -> Atlas:
    return Atlas(title="found by hand", note="Mind the step.", pairs=pairs or (pair(), pair("dog", "cat")))
