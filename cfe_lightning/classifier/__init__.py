"""The frozen classifier: its spec, its file, the sources it can come from, and the training of our own."""

from cfe_lightning.classifier.file import load_classifier
from cfe_lightning.classifier.frozen import Activations, FrozenClassifier
from cfe_lightning.classifier.sources import exported_classifier, torchvision_classifier, wrap_classifier
from cfe_lightning.classifier.spec import ClassifierSpec

__all__ = [
    "Activations", "ClassifierSpec", "FrozenClassifier", "exported_classifier", "load_classifier",
    "torchvision_classifier", "wrap_classifier",
]  # fmt: skip
