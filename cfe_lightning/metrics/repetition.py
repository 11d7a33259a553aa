"""Repeated questions: the same once more, the way back, other random numbers, and a classifier with random weights.

Composition and reversibility follow Monteiro et al. (arXiv 2303.01274), diversity follows DiME (arXiv 2203.15636),
random weights follow Adebayo et al. (arXiv 1810.03292). Images [B, C, H, W] in [-1, 1]; one value per image, [B].
"""

import copy
from itertools import combinations

import torch
from torch import Tensor, nn

from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.decisions import decides_for, runner_up
from cfe_lightning.explanation import Explainer, seed_of
from cfe_lightning.metrics.case import Case
from cfe_lightning.metrics.counterfactual import l1
from cfe_lightning.metrics.metric import rows
from cfe_lightning.metrics.pointing import pointed_at, rank_agreement
from cfe_lightning.metrics.similarity import feature_distance

CYCLES = rows("""
needs: counterfactual cycles
key               better  range   meaning
composition_1     lower   [0, 1]
    l1 after asking for the class that the image has; what a method does when it is asked for nothing
composition_10    lower   [0, 1]  l1 after asking so ten times in a row
reversibility_l1  lower   [0, 1]
    l1 between the image and the edit of its edit back to the first class, of what was flipped
reversibility     higher  [0, 1]  share of flipped images that are decided as at first after going back
""")
DIVERSITY = rows("""
needs: counterfactual diversity
absent: needs a classifier whose layers can be watched, or --weights lpips=FILE
key      better   range   meaning
sigma_l  neither  [0, 4]
    lpips_f (lpips where it is there) between edits with other random numbers; 0 for methods without any
""")
SANITY = rows("""
needs: sanity
absent: the classifier has no layer that could forget what it learned
key          better  range   meaning
sanity_head  higher  [0, 2]  1 - rank correlation of the explanation with that for a random last layer; near 0 it
    ignores the classifier, or has learned it by heart
sanity_all   higher  [0, 2]  as sanity_head, all layers random
""")


def measure_cycles(case: Case) -> dict[str, Tensor]:
    """Asks for no change ten times in a row, and for the way back, [B] by metric key."""
    # Composition.
    found: dict[str, Tensor] = {}
    distances: list[Tensor] = []
    current = case.image
    while len(distances) < 10 and (answer := case.explainer.explain(current, case.source).counterfactual) is not None:
        current = answer.clamp(-1, 1)
        distances.append(l1(case.image, current))
    if len(distances) == 10:
        found |= {"composition_1": distances[0], "composition_10": distances[9]}

    # Reversibility, of flips alone.
    answer = case.explainer.explain(case.shown, case.source).counterfactual
    if answer is not None:
        back, hit = answer.clamp(-1, 1), decides_for(case.judge(case.shown), case.target)
        found["reversibility_l1"] = torch.where(hit, l1(case.image, back), torch.nan)
        found["reversibility"] = torch.where(hit, decides_for(case.judge(back), case.source).float(), torch.nan)
    return found


def measure_diversity(case: Case) -> dict[str, Tensor]:
    """Asks again with other random numbers and averages the distance of every two edits, [B] by metric key."""

    # LPIPS where its file is given, else its stand-in.
    def in_maps(one: Tensor, other: Tensor) -> Tensor:
        return feature_distance(*(case.judge.maps(image, case.stages)[0] for image in (one, other)))

    distance = case.instruments.lpips or (in_maps if case.stages else None)
    if distance is None:
        return {}

    # Edits, then pairs.
    edits = [case.shown]
    for repeat in range(1, case.measures.diversity):
        torch.manual_seed(seed_of([*case.batch["name"], str(repeat)]))
        other = case.explainer.explain(case.image, case.target).counterfactual
        assert other is not None, "it made edits before"
        edits.append(other.clamp(-1, 1))
    return {"sigma_l": torch.stack([distance(one, other) for one, other in combinations(edits, 2)]).mean(dim=0)}


def measure_sanity(case: Case) -> dict[str, Tensor]:
    """Compares the explanations with those for classifiers with random weights, [B] by metric key."""
    found, pointed = {}, pointed_at(case.explanation)
    for key, layers in (("sanity_head", "head"), ("sanity_all", "all")):
        twin = case.twin(layers)
        if twin is None:
            continue
        # The random numbers of the first answer, so that only the classifier differs.
        torch.manual_seed(seed_of(case.batch["name"]))
        # An image that already is of the target class would stay as it is.
        decided = twin.classifier(case.image)
        wanted = torch.where(decided.argmax(dim=1) == case.target, runner_up(decided), case.target)
        found[key] = sensitivity(pointed, pointed_at(twin.explain(case.image, wanted)))
    return found


def sensitivity(one: Tensor, other: Tensor) -> Tensor:
    """Computes 1 - rank correlation of two maps [B, 1, H, W], [B].

    0 where the same places matter, 1 where unrelated ones do, 2 the opposite ones; NaN where a map points nowhere.
    """
    return 1 - rank_agreement(torch.stack([one, other]))[:, 0, 1]


def forgetful(explainer: Explainer, part: str, seed: int = 0) -> Explainer | None:
    """Copies an explainer and draws its classifier's weights anew; None where there are no weights to draw.

    Args:
        explainer: Explainer to copy. The copy keeps what the explainer has learned about its classifier.
        part: Layers that get random weights, ``head`` or ``all``.
        seed: Seed of the weights.
    """
    twin = copy.deepcopy(explainer)
    forgotten = False
    # All classifiers within the copy get the same weights: a baseline asks a copy of its own.
    for classifier in (module for module in _modules(twin) if isinstance(module, FrozenClassifier)):
        layer = classifier.spec.head if part == "head" else ""
        if layer is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                forgotten |= _forget(classifier.network.get_submodule(layer))
    return twin if forgotten else None


def _forget(network: nn.Module) -> bool:
    """Draws all weights anew and tells whether there were any."""
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    for layer in network.modules():
        # Attention has this method under a private name.
        reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
        if callable(reset):
            reset()
    for name, parameter in network.named_parameters():
        # Some weights have no reset, such as the tokens of a transformer. Norms may reset to their former values.
        if parameter.ndim > 1 and torch.equal(parameter, before[name]):
            nn.init.normal_(parameter, std=0.02)
    return bool(before)


def _modules(explainer: object) -> list[nn.Module]:
    """Lists every module in an explainer once; the explainer itself need not be a module."""
    roots = [explainer] if isinstance(explainer, nn.Module) else vars(explainer).values()
    found = {id(m): m for root in roots if isinstance(root, nn.Module) for m in root.modules()}
    nested = vars(explainer).get("_explainer")
    if nested is not None:
        found |= {id(m): m for m in _modules(nested)}
    return list(found.values())
