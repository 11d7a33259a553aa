"""Finds explainers that need no training by name: the folder of a method, or a baseline."""

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

import cfe_lightning.methods
from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.explainer import ExplainerModule, check_arguments
from cfe_lightning.methods.baselines import BASELINES, Baseline


def build_untrained(name: str, classifier: FrozenClassifier, arguments: Mapping[str, Any]) -> ExplainerModule:
    """Builds an explainer that needs no training, in eval mode.

    Args:
        name: Folder in ``methods`` of a method that learns nothing, or name of a baseline.
        classifier: The classifier to be explained.
        arguments: Constructor arguments of the method.

    Raises:
        ValueError: If there is no such method, it has to be trained, it cannot explain this classifier, or an argument
            does not fit.
    """
    # Method or baseline.
    kind: type[ExplainerModule]
    if name in BASELINES:
        kind, arguments = Baseline, {"name": name, **arguments}
    elif name in _method_folders():
        kind = _method_in(name)
    else:
        ready = (*(each for each in _method_folders() if not _method_in(each).needs_training), *BASELINES)
        raise ValueError(f"There is no method {name!r} to use untrained: choose from {', '.join(ready)}.")
    if kind.needs_training:
        raise ValueError(
            f"{kind.__name__} has to be trained first: run `python train.py --config {name}_<data>.yaml` (configs/ has "
            "some), then `explain.py --checkpoint` with the best.ckpt that it writes."
        )
    # Explainer.
    check_arguments(kind, arguments)
    if kind.needs_gradient:
        classifier.require_gradient()
    return kind(classifier, **arguments).eval()


def _method_folders() -> list[str]:
    found = pkgutil.iter_modules(cfe_lightning.methods.__path__)
    return sorted(module.name for module in found if module.ispkg and module.name != "baselines")


def _method_in(folder: str) -> type[ExplainerModule]:
    module = importlib.import_module(f"cfe_lightning.methods.{folder}")
    return next(kind for _, kind in inspect.getmembers(module, inspect.isclass) if issubclass(kind, ExplainerModule))
