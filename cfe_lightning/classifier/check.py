"""Measures a classifier on labelled images before hours are spent on explaining it.

A classifier that is fed at another scale, in another colour order or size, or whose outputs are named in another order
than it was trained with still runs, and every explanation of it is then about nothing.

Accuracies are means over the classes' recalls: a constant answer reaches 1/K however unequal the classes are.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from cfe_lightning.classifier.frozen import FrozenClassifier
from cfe_lightning.classifier.spec import ClassifierSpec

_log = logging.getLogger(__name__)

#: Images that judge the classifier, and images that judge each alternative once it is in doubt.
_NUM_IMAGES = 500
_NUM_TRIAL_IMAGES = 150
#: One-sided 99.5 % of a normal distribution: the upper end of a 99 % interval.
_NORMAL_QUANTILE = 2.576
_SIZES = (32, 64, 128, 224, 256, 299)
_IMAGENET = (0.485, 0.456, 0.406)


class _Scale(NamedTuple):
    """A usual normalisation; ``mean`` and ``std`` on the [0, 1] scale."""

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


_RGB_SCALES = (
    _Scale("ImageNet's", _IMAGENET, (0.229, 0.224, 0.225)),
    _Scale("[-1, 1]", (0.5,) * 3, (0.5,) * 3),
    _Scale("[0, 1]", (0.0,) * 3, (1.0,) * 3),
    _Scale("[0, 255]", (0.0,) * 3, (1 / 255,) * 3),
    _Scale("CIFAR-10's", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    _Scale("Caffe's", _IMAGENET, (1 / 255,) * 3),
)
_GREY_SCALES = (
    _Scale("[-1, 1]", (0.5,), (0.5,)),
    _Scale("[0, 1]", (0.0,), (1.0,)),
    _Scale("[0, 255]", (0.0,), (1 / 255,)),
    _Scale("MNIST's", (0.1307,), (0.3081,)),
    _Scale("ImageNet's", (0.449,), (0.226,)),
)


class _Trial(NamedTuple):
    """Another way to feed the same network: in words, and as a spec."""

    words: str
    remedy: str
    spec: ClassifierSpec


def check_classifier(
    classifier: FrozenClassifier, batches: Iterable[dict[str, Any]], class_names: Sequence[str]
) -> float:
    """Measures the accuracy on up to 500 labelled images, and looks for the reason where it is poor.

    The check stops when names or order of the classes differ, when the accuracy is within the 99 % interval around
    chance, or when another usual normalisation, colour order or size removes at least half of the errors; the latter
    is looked for only where the accuracy is below the middle between chance and 1.

    Args:
        classifier: What is to be explained.
        batches: Batches of the batch contract, to be read more than once: a loader, or a list. Of a loader over more
            images a fixed random choice is read.
        class_names: The data's classes in the order of its labels.

    Returns:
        The share of images whose label the classifier says.

    Raises:
        ValueError: If the check stops; one sentence says why and what to do.
    """
    check_class_names(class_names, classifier.class_names)
    counts = _confusion(classifier, _choose(batches, _NUM_IMAGES), len(class_names))
    accuracy, chance = _mean_recall(counts), 1 / len(class_names)
    order = _other_order(counts)
    if order is not None:
        said = ", ".join(
            f"{class_names[label]!r} is its output {class_names[output]!r}"
            for label, output in enumerate(order)
            if label != output
        )
        raise ValueError(
            f"The classifier's outputs seem to be in another order than its class_names say: {said} (accuracy "
            f"{accuracy:.2f} as named, {_mean_recall(counts[:, list(order)]):.2f} in that order): correct class_names."
        )
    if accuracy < (1 + chance) / 2:
        _find_remedy(classifier, batches, counts)
        _log.warning(
            "The classifier's accuracy on validation images is only %.2f (chance %.2f): explanations can be no better.",
            accuracy,
            chance,
        )
    return float(counts.diagonal().sum() / counts.sum())


def check_class_names(of_data: Sequence[str], of_classifier: Sequence[str]) -> None:
    """Raises a ValueError unless data and classifier have the same classes in the same order."""
    if tuple(of_data) == tuple(of_classifier):
        return
    if sorted(of_data) == sorted(of_classifier):
        raise ValueError(
            f"The data number the classes {_listed(of_data)}, the classifier {_listed(of_classifier)}: give the data "
            "the classifier's order (class_names), or retrain the classifier on these data."
        )
    raise ValueError(
        f"The data's classes are {_listed(of_data)}, the classifier's are {_listed(of_classifier)}: they must be the "
        "same names in the same order; set class_names (or the classifier's label) to what its outputs mean."
    )


def _listed(names: Sequence[str], most: int = 10) -> str:
    shown = [repr(name) for name in names[:most]]
    return f"[{', '.join(shown)}{f', ... {len(names)} in all' if len(names) > most else ''}]"


def _choose(batches: Iterable[dict[str, Any]], limit: int) -> Iterator[dict[str, Any]]:
    """Batches with ``limit`` images at most; a data set in the order of its classes must not show only the first."""
    if isinstance(batches, DataLoader) and isinstance(batches.dataset, Sized) and len(batches.dataset) > limit:
        chosen = torch.randperm(len(batches.dataset), generator=torch.Generator().manual_seed(0))[:limit].sort().values
        batches = DataLoader(
            dataset=Subset(batches.dataset, chosen.tolist()),
            batch_size=batches.batch_size or 32,
            collate_fn=batches.collate_fn,
        )
    seen = 0
    for batch in batches:
        yield batch
        seen += len(batch["image"])
        if seen >= limit:
            return


def _confusion(classifier: FrozenClassifier, batches: Iterable[dict[str, Any]], num_classes: int) -> Tensor:
    """How many images of each label (row) got each answer (column), [K, K]."""
    counts = torch.zeros(num_classes, num_classes)
    device = classifier.mean.device
    for batch in batches:
        if "label" not in batch:
            raise ValueError("The validation images have no labels, so the classifier cannot be checked on them.")
        labels = batch["label"].to(device)
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(f"The validation labels reach {int(labels.max())}, but there are {num_classes} classes.")
        with torch.no_grad():
            answers = classifier(batch["image"].to(device)).argmax(dim=1)
        counts += torch.bincount(labels * num_classes + answers, minlength=num_classes**2).view_as(counts).cpu()
    if counts.sum() == 0:
        raise ValueError("There are no validation images to check the classifier on.")
    return counts


def _mean_recall(counts: Tensor) -> float:
    """Accuracy averaged over the classes that occur."""
    totals = counts.sum(dim=1)
    occurs = totals > 0
    return float((counts.diagonal()[occurs] / totals[occurs]).mean())


def _near_chance(counts: Tensor) -> bool:
    """Whether the mean recall lies below the upper end of a 99 % interval around 1/K."""
    totals = counts.sum(dim=1)
    totals = totals[totals > 0]
    chance = 1 / len(counts)
    deviation = math.sqrt(float((chance * (1 - chance) / totals).sum())) / len(totals)
    return _mean_recall(counts) <= chance + _NORMAL_QUANTILE * deviation


def _other_order(counts: Tensor) -> tuple[int, ...] | None:
    """The order of outputs that makes the classifier good, if it is not the one it claims.

    Believed only where accuracy in that order passes the middle between chance and 1, and where most images of every
    class that moves are answered by its new output.
    """
    num_classes = len(counts)
    recalls = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
    if num_classes <= 6:
        orders = itertools.permutations(range(num_classes))
        order = max(orders, key=lambda order: float(recalls[range(num_classes), order].sum()))
    else:
        order = tuple(recalls.argmax(dim=1).tolist())
    moved = [label for label, output in enumerate(order) if label != output]
    if not moved or len(set(order)) < num_classes or min(recalls[label, order[label]] for label in moved) <= 0.5:
        return None
    return order if _mean_recall(counts[:, list(order)]) >= (1 + 1 / num_classes) / 2 else None


def _find_remedy(classifier: FrozenClassifier, batches: Iterable[dict[str, Any]], counts: Tensor) -> None:
    """Raises a ValueError that names a better way to feed the network, or says that there is none if it is hopeless."""
    num_classes = len(counts)
    # Measured anew, because alternatives are judged by fewer images and only equal images compare.
    accuracy = _mean_recall(_confusion(classifier, _choose(batches, _NUM_TRIAL_IMAGES), num_classes))
    # Sizes come last: they cost the most.
    for trials in (_scale_trials(classifier.spec), _size_trials(classifier.spec)):
        best, best_accuracy = _best_trial(classifier, batches, trials, num_classes)
        if best is not None and 1 - best_accuracy <= (1 - accuracy) / 2:
            raise ValueError(
                f"The classifier's accuracy on validation images is {accuracy:.2f} with the given mean, std and size, "
                f"but {best_accuracy:.2f} {best.words}: set {best.remedy}."
            )
    if _near_chance(counts):
        raise ValueError(
            f"The classifier's accuracy on validation images is {_mean_recall(counts):.2f} (chance is "
            f"{1 / num_classes:.2f}), and no usual normalisation, colour order or image size improves it: check that "
            "weights, class_names and data belong together (--skip-classifier-check goes on all the same)."
        )


def _best_trial(
    classifier: FrozenClassifier, batches: Iterable[dict[str, Any]], trials: Sequence[_Trial], num_classes: int
) -> tuple[_Trial | None, float]:
    best: tuple[_Trial | None, float] = (None, 0.0)
    for trial in trials:
        fed = FrozenClassifier(classifier.network, trial.spec).to(classifier.mean.device)
        try:
            accuracy = _mean_recall(_confusion(fed, _choose(batches, _NUM_TRIAL_IMAGES), num_classes))
        # A network for one size only refuses others, each in its own words.
        except (RuntimeError, ValueError, AssertionError, TypeError, IndexError):
            continue
        if accuracy > best[1]:
            best = trial, accuracy
    return best


def _scale_trials(spec: ClassifierSpec) -> list[_Trial]:
    scales = _RGB_SCALES if spec.channels == 3 else _GREY_SCALES
    given = _Scale("the given", spec.mean, spec.std)
    trials = []
    for bgr in (False, True) if spec.channels == 3 else (False,):
        for scale in (given, *scales):
            same_scale = (scale.mean, scale.std) == (spec.mean, spec.std)
            if same_scale and (scale is not given or bgr == spec.bgr):
                continue
            words = f"with {scale.name} mean and std" if scale is not given else ""
            remedy = f"mean: {_rounded(scale.mean)} and std: {_rounded(scale.std)}" if scale is not given else ""
            if bgr != spec.bgr:
                order = "blue, green, red" if bgr else "red, green, blue"
                words = " and ".join(filter(None, (words, f"with colours in the order {order}")))
                remedy = ", ".join(filter(None, (remedy, f"bgr: {str(bgr).lower()}")))
            trials.append(_Trial(words, remedy, replace(spec, mean=scale.mean, std=scale.std, bgr=bgr)))
    return trials


def _size_trials(spec: ClassifierSpec) -> list[_Trial]:
    sizes = [size for size in _SIZES if size != spec.image_size]
    return [
        _Trial(f"at {size} x {size} pixels", f"image_size: {size}", replace(spec, image_size=size)) for size in sizes
    ]


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 6) for value in values]
