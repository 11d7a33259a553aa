"""Generative explainers for frozen image classifiers."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cfe_lightning.classifier import ClassifierSpec, FrozenClassifier, load_classifier
    from cfe_lightning.explainer import ExplainerModule, load_explainer
    from cfe_lightning.explanation import Explainer, Explanation

__all__ = [
    "ClassifierSpec",
    "Explainer",
    "ExplainerModule",
    "Explanation",
    "FrozenClassifier",
    "load_classifier",
    "load_explainer",
]

_MODULES = {
    "classifier": ("ClassifierSpec", "FrozenClassifier", "load_classifier"),
    "explainer": ("ExplainerModule", "load_explainer"),
    "explanation": ("Explainer", "Explanation"),
}


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds: `explain.py --help` and the report must not wait for it.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"cfe_lightning.{module}"), name)
    raise AttributeError(f"module 'cfe_lightning' has no attribute {name!r}")
