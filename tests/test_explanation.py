"""Fields of an Explanation, its answers about its logits, drawn parts, and its view in a notebook."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import toy
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.decisions import runner_up
from cfe_lightning.explanation import Explanation, draw_part

# Fields.


def fields(**changes: Any) -> dict[str, Any]:
    """Returns the fields of 2 grey images of 4 x 5 pixels, with 3 classes and 6 steps."""
    image = torch.zeros(2, 1, 4, 5)
    complete = {
        # Verdict.
        "image": image,
        "logits": torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0]]),
        "target": torch.tensor([2, 0]),
        "attribution": image,
        "counterfactual": image,
        "counterfactual_logits": torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 0.0]]),
        # Path and parts.
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": torch.zeros(1, 4, 5)}, "Explanation.image must be [B, C, H, W], got [1, 4, 5]."),
        ({"logits": torch.zeros(3, 3)}, "Explanation.logits must be [2, K], got [3, 3]."),
        ({"target": torch.zeros(2, 1)}, "Explanation.target must be [2], got [2, 1]."),
        ({"motion": torch.zeros(2, 1, 4, 5)}, "Explanation.motion must be [2, 2, 4, 5], got [2, 1, 4, 5]."),
        ({"step_scores": {"l2": torch.zeros(2, 5)}}, "Explanation.step_scores['l2'] must be [2, 6], got [2, 5]."),
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


# Drawings.


def explained(num_images: int = 3) -> Explanation:
    return toy.FixedToyExplainer(toy.toy_classifier(3)).explain(toy.toy_images(num_images, 3))


def test_a_notebook_shows_images_and_decisions():
    page = explained(10)._repr_html_()
    shown = "decision image counterfactual reconstruction agnostic distinct residual attribution"
    assert re.findall("<th>(.*?)</th>", page) == shown.split()
    assert page.count("<tr>") == 1 + 8
    assert "<caption>8 of 10 images</caption>" in page
    assert page.count('src="data:image/png;base64,') == 8 * 7
    assert re.search(r"class 0: 9\d\.\d% &rarr; \d\.\d%<br>class 1: \d\.\d% &rarr; 9\d\.\d%<br>flipped", page)


def test_a_notebook_shows_an_attribution_alone_and_escapes_part_names():
    given = explained()
    made = Explanation(
        image=given.image,
        logits=given.logits,
        target=given.target,
        attribution=given.attribution,
        parts={"<script>": given.image},
    )
    page = made._repr_html_()
    assert re.findall("<th>(.*?)</th>", page) == ["decision", "image", "&lt;script&gt;", "attribution"]
    assert "<script>" not in page
    assert "flipped" not in page


def test_parts_are_drawn_by_what_they_are():
    part = torch.zeros(2, 3, 2, 2)
    part[0, :, 0, 0], part[1, :, 1, 1] = 0.5, -0.25
    as_it_is, gain = draw_part("reconstruction", part)
    assert torch.equal(as_it_is, part)
    assert gain is None
    _, gain = draw_part("distinct", part)
    assert gain is not None
    assert gain.tolist() == [2.0, 4.0]
    # Red where it became brighter, blue where darker, white where nothing happened.
    coloured, gain = draw_part("redrawn", part)
    assert gain is not None
    assert gain.tolist() == [2.0, 4.0]
    assert coloured[0, :, 0, 0].tolist() == [1, -1, -1]
    assert coloured[1, :, 1, 1].tolist() == [-1, -1, 1]
    assert coloured[0, :, 1, 1].tolist() == [1, 1, 1]


def test_differences_are_amplified_to_the_full_range_and_no_further():
    difference = torch.zeros(3, 1, 2, 2)
    difference[0, 0, 0, 0], difference[1, 0, 0, 0], difference[2, 0, 0, 0] = -0.25, 1.5, 1e-6
    shown, gain = images.amplify(difference)
    assert gain.tolist() == [4.0, 1.0, 64.0]
    assert shown[:, 0, 0, 0].tolist() == pytest.approx([-1.0, 1.5, 6.4e-5])
