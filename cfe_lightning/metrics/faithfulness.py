"""What the classifier does while the explanation is taken out of the image: DXAI AUC, pixel removal, COUT, deletion.

Source: evaluation, section 7, and DXAI, section 5. Images [B, C, H, W] in [-1, 1]; ``classify`` maps them to logits
[B, K]. Orders of pixels are total: by value, ties by pixel index, so a curve replaces exactly as many pixels as asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

Classify = Callable[[Tensor], Tensor]

#: How much of the distinct part is removed along the DXAI curve.
STRENGTHS = tuple(round(0.1 * step, 1) for step in range(11))
#: Shares of pixels removed along the pixel-removal curve (DXAI, table 2).
REMOVED = (0.0, 0.05, 0.1, 0.15, 0.2)


def path_logits(classify: Classify, frame: Callable[[int], Tensor], length: int, max_batch: int = 256) -> Tensor:
    """Logits along a path of images, several frames of all images in one batch of the classifier.

    Args:
        classify: Images [N, C, H, W] to logits [N, K].
        frame: Position on the path to images [B, C, H, W].
        length: Number of positions T.
        max_batch: Largest N, unless B alone is larger.

    Returns:
        [B, T, K].
    """
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
    """Trapezoid rule over the last dimension, [..., T] -> [...]."""
    return torch.trapezoid(curve, positions.to(curve), dim=-1)


def normalised_area(curve: Tensor, positions: Tensor) -> Tensor:
    """DXAI AUC of an accuracy curve [..., T]: area / (first value * last position), NaN where the first value is 0.

    1 is a removal without effect, lower is better (evaluation 7.4; DXAI, equation 9).
    """
    return _over_clean(area(curve, positions) / positions[-1].to(curve), curve)


def removal_area(curve: Tensor, fractions: Tensor) -> Tensor:
    """Pixel-removal AUC of an accuracy curve [..., T]: area / first value, so the ceiling is the last fraction.

    Source: DXAI, section 5.2; NaN where the first value is 0.
    """
    return _over_clean(area(curve, fractions), curve)


def _over_clean(value: Tensor, curve: Tensor) -> Tensor:
    return torch.where(curve[..., 0] > 0, value / curve[..., 0], torch.nan)


def sweep_logits(
    classify: Classify,
    image: Tensor,
    distinct: Tensor,
    strengths: Sequence[float] = STRENGTHS,
    max_batch: int = 256,
) -> Tensor:
    """Logits of image - a * distinct for every strength a, unclamped as the definition asks, [B, T, K]."""
    return path_logits(classify, lambda index: image - strengths[index] * distinct, len(strengths), max_batch)


def outside_range(image: Tensor, distinct: Tensor, strengths: Sequence[float] = STRENGTHS) -> Tensor:
    """Share of the sweep's values that leave [-1, 1] and so could not be shown, [B]."""
    outside = torch.stack([((image - a * distinct).abs() > 1 + 1e-6).flatten(1).float().mean(1) for a in strengths])
    return outside.mean(dim=0)


def rank(importance: Tensor) -> Tensor:
    """Position of each pixel when sorted by importance [B, 1, H, W], 0 is the most important; ties by pixel index."""
    order = importance.flatten(1).argsort(dim=1, descending=True, stable=True)
    positions = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, positions).view_as(importance)


def removal_logits(
    classify: Classify,
    image: Tensor,
    importance: Tensor,
    fractions: Sequence[float] = REMOVED,
    max_batch: int = 256,
) -> Tensor:
    """Logits with the most important share of pixels set to mid-grey, [B, T, K].

    Paper: pixels strictly above the value of a rank, which removes fewer where values tie; here: exactly the share.
    """
    ranks = rank(importance)
    # The slack keeps 0.15 * 20 from becoming 2.
    counts = [math.floor(fraction * ranks[0].numel() + 1e-9) for fraction in fractions]
    return path_logits(classify, lambda index: image * (ranks >= counts[index]), len(counts), max_batch)


def cut_points(num_pixels: int, steps: int) -> list[int]:
    """Pixels replaced after each block, from 0 to all; the last block may be shorter (7.1)."""
    block = max(1, num_pixels // steps)
    return [*range(0, num_pixels, block), num_pixels]


def exchange_curve(
    classify: Classify,
    start: Tensor,
    end: Tensor,
    importance: Tensor,
    steps: int = 50,
    max_batch: int = 256,
) -> tuple[Tensor, Tensor]:
    """Probabilities while pixels of ``start`` are exchanged for those of ``end``, most important first.

    Args:
        classify: Images to logits.
        start: Images at the beginning, [B, C, H, W].
        end: Images at the end, [B, C, H, W].
        importance: Order of exchange, [B, 1, H, W].
        steps: Number of blocks, if it divides the number of pixels.
        max_batch: Largest batch of the classifier.

    Returns:
        Probabilities [B, T, K] and the exchanged share of pixels [T] from 0 to 1.
    """
    ranks = rank(importance)
    num_pixels = ranks[0].numel()
    cuts = cut_points(num_pixels, steps)
    logits = path_logits(classify, lambda index: torch.where(ranks < cuts[index], end, start), len(cuts), max_batch)
    return logits.softmax(dim=-1), torch.tensor(cuts, device=start.device) / num_pixels


def cout(
    classify: Classify,
    image: Tensor,
    counterfactual: Tensor,
    source: Tensor,
    target: Tensor,
    *,
    steps: int = 50,
    max_batch: int = 256,
    protocol: Literal["exact", "published"] = "exact",
) -> tuple[Tensor, Tensor, Tensor]:
    """Counterfactual transition score: do the few most-changed pixels already carry the decision? (7.1)

    Args:
        classify: Images to logits.
        image: [B, C, H, W].
        counterfactual: [B, C, H, W].
        source: The class before, [B].
        target: The class asked for, [B].
        steps: Number of blocks.
        max_batch: Largest batch of the classifier.
        protocol: ``published`` gives a short last block the full width, which inflates areas by up to 2 %.

    Returns:
        Score [B] in [-1, 1], NaN where nothing changed; the curves of source and target, [B, T] each.
    """
    change = (image - counterfactual).abs().sum(dim=1, keepdim=True)
    probabilities, replaced = exchange_curve(classify, image, counterfactual, change, steps, max_batch)
    if protocol == "published":
        replaced = torch.arange(len(replaced), device=replaced.device) * replaced[1]
    index = source[:, None, None].expand(-1, probabilities.shape[1], 1)
    source_curve = probabilities.gather(2, index).squeeze(2)
    target_curve = probabilities.gather(2, target[:, None, None].expand_as(index)).squeeze(2)
    score = area(target_curve, replaced) - area(source_curve, replaced)
    return torch.where(change.flatten(1).amax(dim=1) > 0, score, torch.nan), source_curve, target_curve


def deletion(
    classify: Classify,
    image: Tensor,
    importance: Tensor,
    source: Tensor,
    baseline: Tensor,
    *,
    steps: int = 50,
    max_batch: int = 256,
) -> tuple[Tensor, Tensor]:
    """Probability of ``source`` while the image turns into the baseline, most important pixels first (7.2).

    Returns:
        Area [B] in [0, 1], lower is better; the curve [B, T].
    """
    probabilities, replaced = exchange_curve(classify, image, baseline, importance, steps, max_batch)
    index = source[:, None, None].expand(-1, probabilities.shape[1], 1)
    curve = probabilities.gather(2, index).squeeze(2)
    return area(curve, replaced), curve


def insertion(
    classify: Classify,
    image: Tensor,
    importance: Tensor,
    source: Tensor,
    baseline: Tensor,
    *,
    steps: int = 50,
    max_batch: int = 256,
) -> tuple[Tensor, Tensor]:
    """As ``deletion``, from the baseline to the image: higher is better (7.2)."""
    return deletion(classify, baseline, importance, source, image, steps=steps, max_batch=max_batch)


def blurred(image: Tensor, share: float = 0.05) -> Tensor:
    """The default baseline of deletion and insertion: Gaussian blur, sigma a share of the height (7.2)."""
    sigma = share * image.shape[-2]
    # Reflection at the border needs a kernel that reaches less than one image away.
    reach = min(math.ceil(3 * sigma), min(image.shape[-2:]) - 1)
    return gaussian_blur(image, kernel_size=[2 * reach + 1, 2 * reach + 1], sigma=[sigma, sigma])
