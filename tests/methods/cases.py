"""The methods that ``test_contract.py`` runs for, with tiny arguments; a new method adds one row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import toy

from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.explainer import ExplainerModule
from cfe_lightning.methods.dxai import Dxai

#: Of all contract tests: classes, side of the images.
NUM_CLASSES = 3
IMAGE_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class Case:
    """One method.

    Attributes:
        kind: Its class.
        arguments: Constructor arguments that make it small.
        num_epochs: Training epochs of 4 batches after which every trainable parameter must have moved; 0 where there
            is nothing to train.
    """

    kind: type[ExplainerModule]
    arguments: dict[str, Any] = field(default_factory=dict)
    num_epochs: int = 1

    def build(self, classifier: FrozenClassifier | None = None) -> ExplainerModule:
        """An untrained explainer of the toy classifier."""
        return self.kind(classifier or toy.toy_classifier(NUM_CLASSES, IMAGE_SIZE), **self.arguments)


#: A DXAI of a few thousand parameters.
DXAI: dict[str, Any] = {
    "num_branches": 3,
    "branch_width": 2,
    "min_resolution": 8,
    "blocks_per_stage": 1,
    "style_dim": 4,
    "latent_dim": 4,
    "mapping_width": 8,
    "mapping_shared": 1,
    "mapping_unshared": 1,
    "critic_width": 4,
    "critic_max_width": 8,
}

CASES = [
    pytest.param(Case(kind=toy.ToyExplainer, arguments={"amplitude": 0.7}), id="ToyExplainer"),
    pytest.param(Case(kind=toy.FixedToyExplainer, num_epochs=0), id="FixedToyExplainer"),
    pytest.param(Case(kind=Dxai, arguments=DXAI), id="Dxai"),
    pytest.param(
        Case(
            kind=Dxai,
            arguments=DXAI
            | {
                "preset": "first",
                "objective": "neutral",
                "strength": "neutral",
                "image_skip": True,
                "neutral_weight": 1.0,
                "sparsity_weight": 1.0,
                "counterfactual_weight": 1.0,
                "r1_interval": 2,
            },
        ),
        id="Dxai-all-terms",
    ),
]
