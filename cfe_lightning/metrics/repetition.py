"""What an explainer does when it is asked again: once more the same, the way back, with other random numbers, and for a
classifier that has forgotten what it learned.

Source: evaluation, sections 9.2, 9.3 and 9.7. Images [B, C, H, W] in [-1, 1]; one value per image, [B].
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.decisions import decides_for
from cfe_lightning.explanation import Explainer
from cfe_lightning.metrics.agreement import rank_agreement
from cfe_lightning.metrics.counterfactual import l1

#: How often "change nothing" is asked in a row (9.2).
COMPOSITIONS = (1, 10)


def compositions(
    explainer: Explainer, image: Tensor, source: Tensor, times: Sequence[int] = COMPOSITIONS
) -> dict[int, Tensor]:
    """L1 to the image after asking so often in a row for the class that it has already; empty without edits (9.2).

    Args:
        explainer: Who is asked.
        image: Where it starts.
        source: Decisions on the images, [B].
        times: How often, ascending.
    """
    found, current = {}, image
    for count in range(1, max(times) + 1):
        answer = explainer.explain(current, source).counterfactual
        if answer is None:
            return {}
        current = answer.clamp(-1, 1)
        if count in times:
            found[count] = l1(image, current)
    return found


def there_and_back(
    explainer: Explainer, judge: Callable[[Tensor], Tensor], image: Tensor, edited: Tensor, source: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Edits of the edits towards the first class: L1 to the image, and whether it is decided as before (9.2).

    Returns:
        [B] and [B] bool; None where the explainer makes no edits.
    """
    answer = explainer.explain(edited, source).counterfactual
    if answer is None:
        return None
    back = answer.clamp(-1, 1)
    return l1(image, back), decides_for(judge(back), source)


def diversity(edits: Sequence[Tensor], distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Mean distance of every two edits of the same image, [B] (9.3).

    Args:
        edits: At least two answers for the same images.
        distance: Two batches of images to [B].
    """
    return torch.stack([distance(one, other) for one, other in combinations(edits, 2)]).mean(dim=0)


def sensitivity(one: Tensor, other: Tensor) -> Tensor:
    """1 - rank correlation of two maps [B, 1, H, W], [B] (9.7).

    0 where the same places matter, 1 where unrelated ones do, 2 the opposite ones; NaN where a map points nowhere.
    """
    return 1 - rank_agreement(torch.stack([one, other]))[:, 0, 1]


def forgetful(explainer: Explainer, part: str, seed: int = 0) -> Explainer | None:
    """A copy whose classifier has random weights, in its head or everywhere; None where nothing can be forgotten (9.7).

    Args:
        explainer: Stays as it is. Whatever it has learned about the classifier, its copy knows too.
        part: ``head`` or ``all``.
        seed: Of the weights.
    """
    twin = copy.deepcopy(explainer)
    forgotten = False
    # All copies within forget alike: a baseline asks one of its own.
    for classifier in (module for module in _modules(twin) if isinstance(module, FrozenClassifier)):
        head = classifier.spec.head
        if part == "head" and head is None:
            continue
        forgetting = classifier.network.get_submodule(head) if part == "head" and head else classifier.network
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            forgotten |= _forget(forgetting)
    return twin if forgotten else None


def _forget(network: nn.Module) -> bool:
    """Draws all weights anew; whether there were any."""
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    for layer in network.modules():
        # Attention keeps its own under another name.
        reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
        if callable(reset):
            reset()
    for name, parameter in network.named_parameters():
        # What nobody resets, such as the tokens of a transformer. Norms reset to what they may have been.
        if parameter.ndim > 1 and torch.equal(parameter, before[name]):
            nn.init.normal_(parameter, std=0.02)
    return bool(before)


def _modules(explainer: object) -> list[nn.Module]:
    """Every module in an explainer, which need not be one itself; each once."""
    roots = [explainer] if isinstance(explainer, nn.Module) else vars(explainer).values()
    found = {id(m): m for root in roots if isinstance(root, nn.Module) for m in root.modules()}
    nested = vars(explainer).get("_explainer")
    if nested is not None:
        found |= {id(m): m for m in _modules(nested)}
    return list(found.values())
