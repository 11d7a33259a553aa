"""Small classifiers and specs for the tests of ``cfe_lightning.classifier``."""

import torch

from cfe_lightning.classifier import ClassifierSpec, FrozenClassifier
from cfe_lightning.classifier.networks import SimpleCnn


def spec_of(**changes):
    fields = {
        "class_path": "cfe_lightning.classifier.networks.SimpleCnn",
        "init_args": {"num_classes": 3, "channels": 3, "image_size": 8},
        "head": "fc",
        "class_names": ("a", "b", "c"),
        "image_size": 8,
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
    }
    return ClassifierSpec(**(fields | changes))


def simple(**changes):
    torch.manual_seed(0)
    return FrozenClassifier(SimpleCnn(num_classes=3, channels=3, image_size=8), spec_of(**changes))
