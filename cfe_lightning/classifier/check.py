"""Measures a classifier on labelled images before hours are spent on explaining it.

A classifier still runs when the scale, the size or the colour order of its images, or the order of its class names,
differs from its training. Every explanation of it is then meaningless.

Accuracies are means over the classes' recalls: a constant answer reaches 1/K however unequal the classes are.
"""

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

#: Number of images that judge the classifier, and that judge each alternative once it is in doubt.
_NUM_IMAGES = 500
_NUM_TRIAL_IMAGES = 150
#: 99.5 % quantile of the normal distribution: the upper end of a two-sided 99 % interval.
_NORMAL_QUANTILE = 2.576
#: Usual sides of square input images in pixels.
_SIZES = (32, 64, 128, 224, 256, 299)
_IMAGENET = (0.485, 0.456, 0.406)


class _Scale(NamedTuple):
    """A usual normalisation with its mean and standard deviation per channel on the [0, 1] scale."""

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


_RGB_SCALES = (
    _Scale("ImageNet's", _IMAGENET, (0.229, 0.224, 0.225)),
    _Scale("[-1, 1]", (0.5,) * 3, (0.5,) * 3),
    _Scale("[0, 1]", (0.0,) * 3, (1.0,) * 3),
    _Scale("[0, 255]", (0.0,) * 3, (1 / 255,) * 3),
    _Scale("CIFAR-10's", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    # Caffe subtracts ImageNet's mean from images in [0, 255].
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
    """Another way to feed the same network: in words, as the settings to change, and as a spec."""

    words: str
    remedy: str
    spec: ClassifierSpec


def check_classifier(
    classifier: FrozenClassifier, batches: Iterable[dict[str, Any]], class_names: Sequence[str]
) -> float:
    """Measures the accuracy on up to 500 labelled images, and looks for the reason if it is poor.

    The check fails if the classes' names or their order differ, if the accuracy is within the 99 % interval around
    chance, or if another usual normalisation, colour order or size removes at least half of the errors. It looks for
    such a remedy only if the accuracy is below the middle between chance and 1.

    Args:
        classifier: Classifier to check.
        batches: Batches with ``image`` and ``label``, read several times; from a larger loader a fixed random choice.
        class_names: The data's class names in the order of the labels.

    Returns:
        The share of images that the classifier gives their label.

    Raises:
        ValueError: If the check fails; the message gives the reason and the remedy.
    """
    check_class_names(class_names, classifier.class_names)
    counts = _confusion(classifier, _choose(batches, _NUM_IMAGES), len(class_names))
    accuracy, chance = _mean_recall(counts), 1 / len(class_names)
    if (order := _other_order(counts)) is not None:
        pairs = [(class_names[label], class_names[output]) for label, output in enumerate(order) if label != output]
        moved = ", ".join(f"{label!r} is its output {output!r}" for label, output in pairs)
        raise ValueError(
            f"The classifier's outputs seem to be in another order than its class_names say: {moved} (accuracy "
            f"{accuracy:.2f} as named, {_mean_recall(counts[:, list(order)]):.2f} in that order): correct class_names."
        )

    # Input format.
    if accuracy < (1 + chance) / 2:
        _find_remedy(classifier, batches, counts)
        _log.warning("Classifier accuracy is only %.2f (chance %.2f): explanations can be no better.", accuracy, chance)
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
    more = [f"... {len(names)} in all"] if len(names) > most else []
    return f"[{', '.join([*map(repr, names[:most]), *more])}]"


def _choose(batches: Iterable[dict[str, Any]], limit: int) -> Iterator[dict[str, Any]]:
    """Yields batches until ``limit`` images are reached, a random choice because data may be sorted by class."""
    if isinstance(batches, DataLoader) and isinstance(batches.dataset, Sized) and len(batches.dataset) > limit:
        chosen = torch.randperm(len(batches.dataset), generator=torch.Generator().manual_seed(0))[:limit].sort().values
        subset = Subset(batches.dataset, chosen.tolist())
        batches = DataLoader(subset, batches.batch_size or 32, collate_fn=batches.collate_fn)
    seen = 0
    for batch in batches:
        yield batch
        if (seen := seen + len(batch["image"])) >= limit:
            return


def _confusion(classifier: FrozenClassifier, batches: Iterable[dict[str, Any]], num_classes: int) -> Tensor:
    """Counts the images of each label (row) that got each answer (column), [K, K]."""
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
    """Returns the accuracy averaged over the classes that occur."""
    totals = counts.sum(dim=1)
    occurs = totals > 0
    return float((counts.diagonal()[occurs] / totals[occurs]).mean())


def _near_chance(counts: Tensor) -> bool:
    """Tells whether the mean recall lies below the upper end of a 99 % interval around 1/K."""
    totals = counts.sum(dim=1)
    totals = totals[totals > 0]
    chance = 1 / len(counts)
    # Standard deviation of the mean recall of random answers.
    deviation = math.sqrt(float((chance * (1 - chance) / totals).sum())) / len(totals)
    return _mean_recall(counts) <= chance + _NORMAL_QUANTILE * deviation


def _other_order(counts: Tensor) -> tuple[int, ...] | None:
    """Returns the order of outputs that makes the classifier good, or None if that is the claimed order.

    The order counts only if the accuracy in it passes the middle between chance and 1, and if most images of every
    class that moves get its new output.
    """
    num_classes = len(counts)
    recalls = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
    # All orders of six outputs are 720; of more outputs each class takes its most frequent answer.
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
    """Raises a ValueError if another way to feed the network is better, or if there is none and it is at chance."""
    num_classes = len(counts)
    # Measured anew, because alternatives are judged by fewer images and only the same images are comparable.
    accuracy = _mean_recall(_confusion(classifier, _choose(batches, _NUM_TRIAL_IMAGES), num_classes))

    # Alternatives; sizes come last, because they cost the most.
    for trials in (_scale_trials(classifier.spec), _size_trials(classifier.spec)):
        measured = [(_trial_accuracy(classifier, batches, trial), trial) for trial in trials]
        best_accuracy, best = max(measured, key=lambda pair: pair[0])
        if 1 - best_accuracy <= (1 - accuracy) / 2:
            raise ValueError(
                f"The classifier's accuracy on validation images is {accuracy:.2f} with the given mean, std and size, "
                f"but {best_accuracy:.2f} {best.words}: set {best.remedy}."
            )

    # No alternative.
    if _near_chance(counts):
        raise ValueError(
            f"The classifier's accuracy on validation images is {_mean_recall(counts):.2f} (chance is "
            f"{1 / num_classes:.2f}), and no usual normalisation, colour order or image size improves it: check that "
            "weights, class_names and data belong together (--skip-classifier-check goes on all the same)."
        )


def _trial_accuracy(classifier: FrozenClassifier, batches: Iterable[dict[str, Any]], trial: _Trial) -> float:
    """Returns the mean recall of the network as an alternative feeds it; 0 if it does not take such images."""
    fed = FrozenClassifier(classifier.network, trial.spec).to(classifier.mean.device)
    try:
        return _mean_recall(_confusion(fed, _choose(batches, _NUM_TRIAL_IMAGES), fed.num_classes))
    # A network for one size may raise any of these on others.
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError):
        return 0.0


def _scale_trials(spec: ClassifierSpec) -> list[_Trial]:
    """Lists the usual normalisations in both colour orders, without the spec's own combination."""
    scales = _RGB_SCALES if spec.channels == 3 else _GREY_SCALES
    # The given scale is a trial, too, in the other colour order.
    given = _Scale("the given", spec.mean, spec.std)
    trials = []
    for bgr in (False, True) if spec.channels == 3 else (False,):
        for scale in (given, *scales):
            same_scale = (scale.mean, scale.std) == (spec.mean, spec.std)
            if same_scale and (scale is not given or bgr == spec.bgr):
                continue
            # The difference from the spec.
            words, remedies = [], []
            if scale is not given:
                words.append(f"with {scale.name} mean and std")
                mean, std = ([round(value, 6) for value in values] for values in (scale.mean, scale.std))
                remedies.append(f"mean: {mean} and std: {std}")
            if bgr != spec.bgr:
                words.append(f"with colours in the order {'blue, green, red' if bgr else 'red, green, blue'}")
                remedies.append(f"bgr: {str(bgr).lower()}")
            fed = replace(spec, mean=scale.mean, std=scale.std, bgr=bgr)
            trials.append(_Trial(" and ".join(words), ", ".join(remedies), fed))
    return trials


def _size_trials(spec: ClassifierSpec) -> list[_Trial]:
    return [
        _Trial(f"at {size} x {size} pixels", f"image_size: {size}", replace(spec, image_size=size))
        for size in sorted({*_SIZES} - {spec.image_size})
    ]
