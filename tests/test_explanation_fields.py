"""What an Explanation refuses, and the three questions it answers from its logits."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from cfe_lightning.decisions import decides_for, runner_up
from cfe_lightning.explanation import Explanation


def fields(**changes: Any) -> dict[str, Any]:
    """A complete batch of 2 grey images of 4 x 5 pixels, 3 classes and 6 steps."""
    image = torch.zeros(2, 1, 4, 5)
    complete = {
        "image": image,
        "logits": torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0]]),
        "target": torch.tensor([2, 0]),
        "attribution": image,
        "counterfactual": image,
        "counterfactual_logits": torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 0.0]]),
        "steps": torch.zeros(2, 6, 1, 4, 5),
        "strengths": torch.zeros(2, 6),
        "parts": {"distinct": image},
        "scores": {"psnr": torch.zeros(2)},
        "step_scores": {"l2": torch.zeros(2, 6)},
        "motion": torch.zeros(2, 2, 4, 5),
        "caveats": {"it is blurred": torch.tensor([True, False])},
    }
    return complete | changes


def test_questions_about_the_logits() -> None:
    explanation = Explanation(**fields())
    assert len(explanation) == 2
    assert explanation.predicted.tolist() == [0, 1]
    assert explanation.flipped is not None
    # The second counterfactual is undecided between target and another class: not flipped.
    assert explanation.flipped.tolist() == [True, False]
    assert Explanation(**fields(counterfactual=None, counterfactual_logits=None)).flipped is None
    assert runner_up(explanation.logits).tolist() == [2, 2]


def test_the_runner_up_is_never_the_predicted_class() -> None:
    torch.manual_seed(0)
    logits = torch.randn(200, 4)
    logits[:50, 1:] = 0  # ties
    assert not (runner_up(logits) == logits.argmax(dim=1)).any()
    assert not decides_for(torch.zeros(1, 3), torch.tensor([0])).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": torch.zeros(1, 4, 5)}, "Explanation.image must be [B, C, H, W], got [1, 4, 5]."),
        ({"logits": torch.zeros(3, 3)}, "Explanation.logits must be [2, K], got [3, 3]."),
        ({"target": torch.zeros(2, 1)}, "Explanation.target must be [2], got [2, 1]."),
        ({"motion": torch.zeros(2, 1, 4, 5)}, "Explanation.motion must be [2, 2, 4, 5], got [2, 1, 4, 5]."),
        (
            {"step_scores": {"l2": torch.zeros(2, 5)}},
            "Explanation.step_scores['l2'] must be [2, 6], got [2, 5].",
        ),
        (
            {"steps": None, "strengths": None, "intended": None},
            "Explanation.step_scores is about steps and needs Explanation.steps.",
        ),
        ({"attribution": torch.zeros(2, 3, 4, 5)}, "Explanation.attribution must be [2, 1, 4, 5], got [2, 3, 4, 5]."),
        (
            {"counterfactual": torch.zeros(2, 1, 5, 4)},
            "Explanation.counterfactual must be [2, 1, 4, 5], got [2, 1, 5, 4].",
        ),
        ({"counterfactual_logits": torch.zeros(2, 2)}, "Explanation.counterfactual_logits must be [2, 3], got [2, 2]."),
        (
            {"counterfactual_logits": None},
            "Explanation.counterfactual and Explanation.counterfactual_logits must be given",
        ),
        ({"strengths": None}, "Explanation.steps and Explanation.strengths must be given together."),
        ({"steps": torch.zeros(2, 6, 4, 5)}, "Explanation.steps must be [2, 0, 1, 4, 5], got [2, 6, 4, 5]."),
        ({"strengths": torch.zeros(6)}, "Explanation.strengths must be [2, 6], got [6]."),
        (
            {"parts": {"style_0": torch.zeros(2, 4, 5)}},
            "Explanation.parts['style_0'] must be [2, 1, 4, 5], got [2, 4, 5].",
        ),
        ({"caveats": {"dark": torch.zeros(3)}}, "Explanation.caveats['dark'] must be [2], got [3]."),
        ({"scores": {"psnr": torch.zeros(())}}, "Explanation.scores['psnr'] must be [2], got []."),
    ],
)
def test_a_field_of_the_wrong_shape_is_named(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Explanation(**fields(**changes))
