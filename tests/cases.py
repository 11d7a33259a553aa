"""The methods that ``test_contract.py`` runs for, with tiny arguments; a new method adds one row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import toy

from cfe_lightning.classifier import ClassifierSpec, FrozenClassifier
from cfe_lightning.classifier.networks import PooledCnn
from cfe_lightning.explainer import ExplainerModule
from cfe_lightning.methods.baselines import Baseline
from cfe_lightning.methods.diff_explainer import DiffExplainer
from cfe_lightning.methods.dxai import Dxai
from cfe_lightning.methods.mirror_cfe import MirrorCFE
from cfe_lightning.methods.steerable_lens import SteerableLens
from cfe_lightning.methods.stylex import StylEx

#: Number of classes and side of the images in all contract tests.
NUM_CLASSES = 3
IMAGE_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class Case:
    """One method under the contract.

    Attributes:
        kind: Class of the method.
        arguments: Constructor arguments that make it small.
        num_epochs: Training epochs of 4 batches after which every trainable parameter must have moved; 0 if there is
            nothing to train.
        classifier: Function that builds the classifier to be explained.
        prepare: Changes the untrained explainer, for example because its networks begin as zero.
    """

    kind: type[ExplainerModule]
    arguments: dict[str, Any] = field(default_factory=dict)
    num_epochs: int = 1
    classifier: Callable[[], FrozenClassifier] = field(default=lambda: toy.toy_classifier(NUM_CLASSES, IMAGE_SIZE))
    prepare: Callable[[ExplainerModule], object] = field(default=lambda explainer: None)

    def build(self, classifier: FrozenClassifier | None = None) -> ExplainerModule:
        """Builds an untrained explainer of the case's classifier, or of another one."""
        explainer = self.kind(classifier or self.classifier(), **self.arguments)
        self.prepare(explainer)
        return explainer


def with_noise(module: torch.nn.Module) -> None:
    """Fills the parameters that begin as zero, so that a diffusion autoencoder's pictures depend on its codes."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.abs().max() == 0:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def pooled_classifier(num_classes: int = NUM_CLASSES, channels: int = 3) -> FrozenClassifier:
    """Builds a small random network with a feature map of 4 x 4 cells."""
    arguments = {"num_classes": num_classes, "channels": channels, "width": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = PooledCnn(**arguments)
        # A random head hardly tells images apart: stretched, it decides.
        network.fc.weight.data.mul_(20)
    spec = ClassifierSpec(
        class_path="cfe_lightning.classifier.networks.PooledCnn",
        init_args=arguments,
        head="fc",
        feature_map="stage3",
        class_names=toy.toy_class_names(num_classes),
        image_size=IMAGE_SIZE,
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
    )
    return FrozenClassifier(network, spec)


#: A Mirror-CFE of a few thousand parameters.
MIRROR: dict[str, Any] = {"width": 4, "max_width": 8, "editor_width": 4, "norm": "group", "critic_widths": [4, 8]}
#: A DXAI of a few thousand parameters.
DXAI: dict[str, Any] = {
    "strength": "full",
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
#: A diffusion autoencoder of a few thousand parameters; random, so that its pictures are noise.
AUTOENCODER: dict[str, Any] = {
    "image_size": IMAGE_SIZE,
    "code_dim": 6,
    "width": 8,
    "multipliers": [1, 2],
    "blocks": 1,
    "attention_sizes": [8],
    "time_dim": 8,
    "groups": 4,
}
DIFF_EXPLAINER: dict[str, Any] = {
    "autoencoder": AUTOENCODER,
    "metric": "covariance",
    "num_steps": 3,
    "search_points": 2,
    "search_rounds": 1,
    "diffusion_steps": 2,
    "agent_epochs": 2,
}

_CASES = {
    "ToyExplainer": Case(kind=toy.ToyExplainer, arguments={"amplitude": 0.7}),
    "FixedToyExplainer": Case(kind=toy.FixedToyExplainer, num_epochs=0),
    "Dxai": Case(kind=Dxai, arguments=DXAI),
    "Dxai-all-terms": Case(
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
    "MirrorCFE": Case(kind=MirrorCFE, arguments=MIRROR, classifier=pooled_classifier),
    "MirrorCFE-other-options": Case(
        kind=MirrorCFE,
        arguments=MIRROR
        | {
            "bounds": [0.0],
            "spread": "waterfill",
            "soft_mask": True,
            "class_critic": False,
            "counterfactual": "reflection",
            "pairs": [["stripe 0", "stripe 1"]],
            "num_steps": 4,
        },
        classifier=pooled_classifier,
    ),
    "DiffExplainer": Case(kind=DiffExplainer, arguments=DIFF_EXPLAINER, prepare=with_noise),
    "DiffExplainer-other-options": Case(
        kind=DiffExplainer,
        arguments=DIFF_EXPLAINER
        | {"alignment": "kl", "metric": "diagonal", "confidence": 0.6, "sampler": "dpm", "decoding_steps": 4},
        classifier=pooled_classifier,
        prepare=with_noise,
    ),
    "StylEx": Case(kind=StylEx, arguments=toy.STYLEX),
    "StylEx-other-options": Case(
        kind=StylEx,
        arguments=toy.STYLEX
        | {
            "profile": "paper_code",
            "scoring": "strict",
            "conditioning": "w_concat",
            "label_entry": "planes",
            "encoder_space": "w+",
            "search_space": "pca_s",
            "smallest": False,
        },
        classifier=pooled_classifier,
    ),
    "StylEx-published-search": Case(
        kind=StylEx,
        arguments=toy.STYLEX
        | {
            "conditioning": "const_concat",
            "search_space": "sefa_w",
            "degree": 3.0,
            "degree_unit": "abs",
            "reaverage": True,
            "normalise_rows": True,
            "edited_layers": [1, 2],
        },
    ),
    "SteerableLens": Case(
        kind=SteerableLens, arguments={"num_steps": 4, "bisections": 2}, num_epochs=0, classifier=pooled_classifier
    ),
    "SteerableLens-other-options": Case(
        kind=SteerableLens,
        arguments={
            "beta": 1.0,
            "amplitude_mode": "log",
            "phase_rule": "unit",
            "residual_gain": 0.5,
            "loss": "margin",
            "colour": "y",
            "padding": "circular",
            "alpha_unit": "l2",
            "largest_alpha": 3.0,
            "live_steps": 3,
            "eight_bit": False,
        },
        num_epochs=0,
    ),
    "Baseline": Case(kind=Baseline, arguments={"name": "occlusion"}, num_epochs=0, classifier=pooled_classifier),
}
CASES = [pytest.param(case, id=name) for name, case in _CASES.items()]
