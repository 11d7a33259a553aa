"""Robustness of flips: do they survive saving, compressing, blurring and shrinking, and a second classifier?

Images [B, C, H, W] in [-1, 1].
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

from cfe_lightning import images
from cfe_lightning.decisions import decides_for
from cfe_lightning.metrics.case import Case, Kept
from cfe_lightning.metrics.metric import rows
from cfe_lightning.metrics.statistics import Measurement

#: Keys of the metrics in the order of ``TRANSFORMATIONS``.
_KEYS = ("robust_flip_quant8", "robust_flip_jpeg90", "robust_flip_blur1", "robust_flip_down_up")

METRICS = rows("""
needs: counterfactual
key                  title     better  range   needs   meaning
robust_flip          robust    higher  [0, 1]  -
    share of flips that survive the worst of 8 bits, JPEG, blur and half the size, where the image's own does
robust_flip_quant8   -         higher  [0, 1]  -       flips that survive 8 bits
robust_flip_jpeg90   -         higher  [0, 1]  -       flips that survive JPEG of quality 90
robust_flip_blur1    -         higher  [0, 1]  -       flips that survive a blur of 1 pixel at 128 pixels height
robust_flip_down_up  -         higher  [0, 1]  -       flips that survive half the size and back
transfer_flip        transfer  higher  [0, 1]  second
    share decided as the target by a second classifier that agreed on the image
""")


def measure(case: Case) -> dict[str, Tensor]:
    """Measures the robustness of flips, [B] by metric key; NaN where the image's own decision does not survive."""
    # Mild transformations.
    survived = survives(case.judge, case.image, case.shown, case.source, case.target).values()
    found = {key: torch.where(kept, hit.float(), torch.nan) for key, (kept, hit) in zip(_KEYS, survived, strict=True)}

    # A second classifier.
    second = case.measures.second
    if second is not None:
        agreed, told = decides_for(second(case.image), case.source), decides_for(second(case.shown), case.target)
        found["transfer_flip"] = torch.where(agreed, told.float(), torch.nan)
    return found


def summarise(kept: Kept) -> dict[str, Measurement]:
    """Takes the least of all transformations as ``robust_flip``."""
    # Transformations that no image survives have no rate.
    found = [kept.means[key] for key in _KEYS if key in kept.means and kept.means[key].value is not None]
    return {"robust_flip": min(found, key=lambda one: one.value or 0.0)} if found else {}


def quant8(image: Tensor) -> Tensor:
    """Rounds images to 8 bits."""
    return images.saved(image)


def jpeg90(image: Tensor) -> Tensor:
    """Compresses images as JPEG of quality 90 and reads them back."""
    # The encoder works on the CPU, one image at a time.
    level = images.to_uint8(image).cpu()
    saved = torch.stack([transforms.jpeg(one, quality=90) for one in level])
    return (saved.to(image) / 255) * 2 - 1


def blur1(image: Tensor) -> Tensor:
    """Blurs images by a Gaussian of one pixel at 128 pixels height, and in proportion."""
    deviation = image.shape[-2] / 128
    # Three deviations on either side.
    size = 2 * max(1, round(3 * deviation)) + 1
    return transforms.gaussian_blur(image, [size, size], [deviation, deviation])


def down_up(image: Tensor) -> Tensor:
    """Shrinks images to half the size and enlarges them again."""
    half = [max(1, side // 2) for side in image.shape[-2:]]
    small = F.interpolate(image, size=half, mode="bilinear", antialias=True, align_corners=False)
    return F.interpolate(small, size=image.shape[-2:], mode="bilinear", align_corners=False)


#: Mild transformations by the names in the metrics' keys.
TRANSFORMATIONS: dict[str, Callable[[Tensor], Tensor]] = {one.__name__: one for one in (quant8, jpeg90, blur1, down_up)}


@torch.no_grad()
def survives(
    judge: Callable[[Tensor], Tensor],
    image: Tensor,
    counterfactual: Tensor,
    source: Tensor,
    target: Tensor,
    names: Iterable[str] = tuple(TRANSFORMATIONS),
) -> dict[str, tuple[Tensor, Tensor]]:
    """Tells for every transformation whether the image's own decision survives it, and whether the flip does too.

    The rate of a set of images is the sum of the second over the sum of the first.

    Args:
        judge: Maps images to logits, [B, K].
        image: Images before the change.
        counterfactual: Images after the change.
        source: Decisions before the change, [B].
        target: Target classes, [B].
        names: Keys of ``TRANSFORMATIONS`` to try, which are the keys of the answer, [B] bool twice each.
    """
    found = {}
    for name in names:
        transformed = TRANSFORMATIONS[name]
        # A decision that the transformation alone changes says nothing about the flip.
        kept = decides_for(judge(transformed(image)), source)
        found[name] = (kept, kept & decides_for(judge(transformed(counterfactual)), target))
    return found
