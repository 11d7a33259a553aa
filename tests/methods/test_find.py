"""Tests of ``cfe_lightning.methods.find``: names that explain without training, and errors for the others."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import toy

from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.methods.baselines import BASELINES, Baseline
from cfe_lightning.methods.baselines.captum import build_baseline
from cfe_lightning.methods.find import build_untrained
from cfe_lightning.methods.steerable_lens import SteerableLens


def classifier() -> FrozenClassifier:
    return toy.toy_classifier(3)


def test_a_method_is_built_with_its_arguments() -> None:
    explainer = build_untrained("steerable_lens", classifier(), {"beta": 1, "cap": None})
    assert isinstance(explainer, SteerableLens)
    assert not explainer.training
    assert explainer.extrapolator.beta == 1
    assert explainer.extrapolator.cap is None


def test_a_baseline_explains_as_it_does_elsewhere() -> None:
    explainer = build_untrained("random", classifier(), {"seed": 3})
    assert isinstance(explainer, Baseline)
    image = toy.toy_images(2, 3)
    expected = build_baseline("random", classifier(), 3).explain(image)
    assert torch.equal(explainer.explain(image).attribution, expected.attribution)


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("stylex", {}, "StylEx has to be trained first: run `python train.py --config stylex_<data>.yaml`"),
        ("grad-cam", {}, "There is no method 'grad-cam' to use untrained: choose from "),
        ("grad-cam", {}, "steerable_lens, integrated_gradients, gradient_shap, "),
        ("lens_course", {}, "There is no method 'lens_course' to use untrained"),
        ("os", {}, "There is no method 'os' to use untrained"),
        ("../dxai", {}, "There is no method '../dxai' to use untrained"),
        ("steerable_lens", {"steps": 3}, "SteerableLens has no argument steps: choose from alpha_unit, "),
        ("steerable_lens", {"phase_rule": "best"}, "takes cartesian or coordinate or unit as phase_rule, not 'best'"),
        ("steerable_lens", {"num_steps": 2.5}, "takes a whole number as num_steps, not 2.5"),
        ("steerable_lens", {"scales": "many"}, "takes a whole number or null as scales, not 'many'"),
        ("steerable_lens", {"decimate": 1}, "takes true or false as decimate, not 1"),
        ("steerable_lens", {"beta": True}, "takes a number as beta, not True"),
        ("random", {"name": 3}, "Baseline takes a text as name, not 3"),
        ("random", {"sign": "abs"}, "Baseline has no argument sign: choose from name, seed"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_sentence(name: str, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        build_untrained(name, classifier(), arguments)


def test_every_baseline_has_a_name_that_no_method_takes() -> None:
    assert all(isinstance(build_untrained(name, classifier(), {}), Baseline) for name in ("saliency", "occlusion"))
    assert "steerable_lens" not in BASELINES


class Opaque(torch.nn.Module):
    """Answers without a gradient."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.detach().mean(dim=(1, 2, 3))[:, None].expand(-1, 3)


def test_a_classifier_without_gradients_is_refused() -> None:
    spec = replace(classifier().spec, head=None, feature_map=None)
    with pytest.raises(ValueError, match="No gradient reaches the image"):
        build_untrained("steerable_lens", FrozenClassifier(Opaque(), spec), {})
