import re

import pytest
import torch
import toy

from cfe_lightning import images
from cfe_lightning.explanation import Explanation, draw_part


def explained(num_images: int = 3) -> Explanation:
    return toy.FixedToyExplainer(toy.toy_classifier(3)).explain(toy.toy_images(num_images, 3))


def test_a_notebook_shows_images_and_decisions():
    page = explained(10)._repr_html_()
    assert re.findall("<th>(.*?)</th>", page) == [
        *("decision", "image", "counterfactual", "reconstruction", "agnostic", "distinct", "residual", "attribution"),
    ]
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
