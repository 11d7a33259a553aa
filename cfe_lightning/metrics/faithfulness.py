"""Curves of the classifier's probabilities while pixels are exchanged in the order of an explanation.

COUT is of C3LT (arXiv 2203.15064), deletion and insertion are of RISE (arXiv 1806.07421). Images [B, C, H, W] in
[-1, 1]; ``classify`` maps them to logits [B, K]. Orders of pixels are total: by value, ties by pixel index, so a curve
exchanges exactly as many pixels as asked.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from cfe_lightning.metrics.case import Case
from cfe_lightning.metrics.metric import rows

Classify = Callable[[Tensor], Tensor]

METRICS = rows("""
key      better  range    needs                  published  meaning
cout     higher  [-1, 1]  counterfactual curves  correct
    do the few most-changed pixels carry the decision? exact areas
ins_auc  higher  [0, 1]   curves                 -
    probability while pixels are inserted into a blurred image, attribution first
del_auc  lower   [0, 1]   curves                 -          probability while pixels are blurred, attribution first
""")


def measure(case: Case) -> dict[str, Tensor]:
    """Measures areas under curves of a batch, [B] by metric key, and keeps the curves, [B, T]."""
    judge, image, source, num_pixels = case.judge, case.image, case.source, case.image[0, 0].numel()
    blocks = {"steps": case.measures.curve_steps, "max_batch": case.measures.max_batch}
    found = {"positions/replaced": torch.tensor(cut_points(num_pixels, blocks["steps"])) / num_pixels}

    # The change.
    if "counterfactual" in case.available:
        found["cout"], found["curves/cout_source"], found["curves/cout_target"] = cout(
            judge, image, case.shown, source, case.target, **blocks
        )

    # The attribution.
    attribution, baseline = case.explanation.attribution, blurred(image)
    found["ins_auc"], found["curves/ins_auc"] = insertion(judge, image, attribution, source, baseline, **blocks)
    found["del_auc"], found["curves/del_auc"] = deletion(judge, image, attribution, source, baseline, **blocks)
    return found


def path_logits(classify: Classify, frame: Callable[[int], Tensor], length: int, max_batch: int = 256) -> Tensor:
    """Computes logits along a path of ``length`` frames, [B, T, K], with several frames in one batch of the classifier.

    ``frame`` maps a position to images [B, C, H, W]; a batch has at most ``max_batch`` images, unless B is larger.
    """
    # Frames of all images fill a batch.
    collected: list[Tensor] = []
    position = 0
    while position < length:
        frames = [frame(position)]
        batch = len(frames[0])
        fitting = min(length - position, max(1, max_batch // batch))
        frames += [frame(position + offset) for offset in range(1, fitting)]
        collected.append(classify(torch.cat(frames)).unflatten(0, (fitting, batch)))
        position += fitting
    return torch.cat(collected).transpose(0, 1)


def area(curve: Tensor, positions: Tensor) -> Tensor:
    """Applies the trapezoid rule to the last dimension, [..., T] -> [...]."""
    return torch.trapezoid(curve, positions.to(curve), dim=-1)


def rank(importance: Tensor) -> Tensor:
    """Ranks pixels by importance [B, 1, H, W]; 0 is the most important, ties go by pixel index."""
    order = importance.flatten(1).argsort(dim=1, descending=True, stable=True)
    positions = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, positions).view_as(importance)


def cut_points(num_pixels: int, steps: int) -> list[int]:
    """Counts the pixels exchanged after each block, from 0 to all; the last block may be shorter."""
    block = max(1, num_pixels // steps)
    return [*range(0, num_pixels, block), num_pixels]


def exchange_curve(
    classify: Classify, start: Tensor, end: Tensor, importance: Tensor, steps: int = 50, max_batch: int = 256
) -> tuple[Tensor, Tensor]:
    """Computes probabilities while pixels of ``start`` are exchanged for those of ``end``, most important first.

    Pixels are exchanged in ``steps`` blocks, if that divides their number; ``importance`` is [B, 1, H, W].

    Returns:
        Probabilities [B, T, K] and the exchanged share of pixels [T] from 0 to 1.
    """
    # Pixels whose rank is below a cut are exchanged.
    ranks = rank(importance)
    num_pixels = ranks[0].numel()
    cuts = cut_points(num_pixels, steps)
    logits = path_logits(classify, lambda index: torch.where(ranks < cuts[index], end, start), len(cuts), max_batch)
    return logits.softmax(dim=-1), torch.tensor(cuts, device=start.device) / num_pixels


def cout(
    classify: Classify, image: Tensor, counterfactual: Tensor, source: Tensor, target: Tensor, **blocks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the counterfactual transition score: do the few most-changed pixels already carry the decision?

    ``blocks`` are ``steps`` and ``max_batch`` of ``exchange_curve``, also in ``deletion`` and ``insertion``.
    Paper: a short last block counts with the full width, which inflates areas by up to 2 %; here: exact areas.

    Returns:
        Score [B] in [-1, 1], NaN where nothing changed; the curves of source and target, [B, T] each.
    """
    change = (image - counterfactual).abs().sum(dim=1, keepdim=True)
    probabilities, replaced = exchange_curve(classify, image, counterfactual, change, **blocks)

    # Areas between the curves.
    source_curve, target_curve = _curve_of(probabilities, source), _curve_of(probabilities, target)
    score = area(target_curve, replaced) - area(source_curve, replaced)
    return torch.where(change.flatten(1).amax(dim=1) > 0, score, torch.nan), source_curve, target_curve


def deletion(
    classify: Classify, image: Tensor, importance: Tensor, source: Tensor, baseline: Tensor, **blocks: int
) -> tuple[Tensor, Tensor]:
    """Follows the probability of ``source`` while the image turns into the baseline, most important pixels first.

    Returns:
        Area [B] in [0, 1], lower is better; the curve [B, T].
    """
    probabilities, replaced = exchange_curve(classify, image, baseline, importance, **blocks)
    curve = _curve_of(probabilities, source)
    return area(curve, replaced), curve


def insertion(
    classify: Classify, image: Tensor, importance: Tensor, source: Tensor, baseline: Tensor, **blocks: int
) -> tuple[Tensor, Tensor]:
    """Follows the probability of ``source`` while the baseline turns into the image: higher is better."""
    return deletion(classify, baseline, importance, source, image, **blocks)


def blurred(image: Tensor, share: float = 0.05) -> Tensor:
    """Blurs images as the baseline of deletion and insertion; the Gaussian's sigma is a share of the height."""
    sigma = share * image.shape[-2]
    # Reflection at the border needs a kernel that reaches less than one image away.
    reach = min(math.ceil(3 * sigma), min(image.shape[-2:]) - 1)
    return gaussian_blur(image, kernel_size=[2 * reach + 1, 2 * reach + 1], sigma=[sigma, sigma])


def _curve_of(probabilities: Tensor, wanted: Tensor) -> Tensor:
    """Selects the curve of one class per image, [B, T, K] and [B] -> [B, T]."""
    return probabilities.gather(2, wanted[:, None, None].expand(-1, probabilities.shape[1], 1)).squeeze(2)
