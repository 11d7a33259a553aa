"""How much of a change is motion: the share of its energy that a smooth warp of the image explains.

Source: the Steerable Lens specification, sections 4.1 and 4.2. Images [B, C, H, W] in [-1, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cfe_lightning import images


def warp_energy(image: Tensor, changed: Tensor, *, points: int = 8, gain: bool = False) -> Tensor:
    """Share of the energy of a change that the best small warp makes, [B] in [0, 1]; NaN where nothing changed.

    The warp is linearised, change = -gradient of the image . displacement, and the displacement interpolated
    bilinearly between ``points`` x ``points`` values. White noise is explained by chance: the share is about the number
    of unknowns over that of values.

    Args:
        image: Before, [B, C, H, W].
        changed: After.
        points: Displacements a side.
        gain: Let the image also become brighter or darker, smoothly over the same grid.
    """
    basis = torch.eye(points**2, dtype=torch.float64, device=image.device).view(1, -1, points, points)
    basis = F.interpolate(basis, size=image.shape[-2:], mode="bilinear", align_corners=True)[0]
    # Every unknown is a picture of its own: as many images at a time as fit into some hundred megabytes.
    at_once = max(1, 2**24 // (3 * points**2 * image[0].numel()))
    some = zip(image.double().split(at_once), changed.double().split(at_once), strict=True)
    return torch.cat([_explained(before, after - before, basis, gain) for before, after in some]).float()


def _explained(before: Tensor, change: Tensor, basis: Tensor, gain: bool) -> Tensor:
    moved = [-torch.gradient(before, dim=dim)[0] for dim in (2, 3)]
    maps = torch.stack([*moved, images.to_unit(before)] if gain else moved, dim=1)
    # What each unknown adds to the image, [B, U, C * H * W].
    design = (maps[:, :, None] * basis[None, None, :, None]).flatten(3).flatten(1, 2)
    flat = change.flatten(1)[:, :, None]
    right = design @ flat
    # Where the image is flat a warp does nothing, so the equations may be singular.
    solution = torch.linalg.pinv(design @ design.transpose(1, 2), rtol=1e-10, hermitian=True) @ right
    energy = flat.square().sum(dim=(1, 2))
    return torch.where(energy > 0, ((right * solution).sum(dim=(1, 2)) / energy).clamp(0, 1), torch.nan)
