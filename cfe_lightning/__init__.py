"""Generative explainers for frozen image classifiers."""

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
