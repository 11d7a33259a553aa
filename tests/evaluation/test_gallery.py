"""Tests of ``cfe_lightning.evaluation.gallery``: what is kept, what the page says, and that no name becomes markup."""

from __future__ import annotations

import base64
import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Browser
from PIL import Image
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.evaluation.gallery import Gallery
from cfe_lightning.explanation import Explanation

CLASSES = ("cat", "<b>dog</b>", "<i>owl</i>")
NASTY = "<script>alert(1)</script>"
NAMES = [f"animals/{NASTY}.png", "quote\"'\udcff&amp;.png"]
SURE = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1]])
AFTER = torch.tensor([[0.2, 0.8, 0.0], [0.3, 0.6, 0.1]])
needs_browser = pytest.mark.skipif(
    shutil.which("chromedriver") is None or not (shutil.which("chromium") or shutil.which("google-chrome")),
    reason="needs chromium and chromedriver on the path",
)


def explanation(counterfactual: Tensor | None = None, side: int = 8, **rest: Any) -> Explanation:
    """Explains two even images, the first towards the second class and the second towards the first."""
    image = torch.stack([torch.zeros(3, side, side), torch.full((3, side, side), 0.5)])
    logits = SURE.log().clamp_min(-9)
    attribution = torch.rand(2, 1, side, side, generator=torch.Generator().manual_seed(0))
    given = {"image": image, "logits": logits, "target": torch.tensor([1, 0]), "attribution": attribution}
    edit = {} if counterfactual is None else {"counterfactual": counterfactual, "counterfactual_logits": logits}
    return Explanation(**given | edit | rest)


def edited(by: float, side: int = 8) -> Tensor:
    """Returns the images with one pixel made brighter by ``by``, where 1 is black to white."""
    made = explanation(side=side).image.clone()
    made[:, 1, 2, 3] += 2 * by
    return made


def add(gallery: Gallery, explainer: str, given: Explanation, before: Tensor = SURE) -> None:
    after = None if given.counterfactual is None else AFTER
    gallery.add(explainer, NAMES, torch.tensor([0, 2]), given, before, after)


def full() -> Gallery:
    """Returns a gallery with every kind of explainer."""
    # Edits, attributions and renderings.
    gallery = Gallery(64)
    add(gallery, "edits", explanation(edited(0.12)))
    add(gallery, f"points {NASTY}", explanation())
    rendering = edited(0.12).sub(0.1)
    add(gallery, "renders", explanation(edited(0.25), parts={"reconstruction": rendering}))

    # A decomposition, and a failure.
    distinct = torch.zeros(2, 3, 8, 8)
    distinct[:, :, 4:, 4:] = -0.3
    parts = {"reconstruction": rendering, "distinct": distinct}
    add(gallery, "splits", explanation(edited(0.12), parts=parts))
    gallery.fail("breaks", f"gave a {NASTY} that is not finite")
    return gallery


def write(gallery: Gallery, folder: Path) -> str:
    path = gallery.write(folder, CLASSES)
    assert path == folder / "gallery.html"
    return path.read_text(encoding="utf-8")


def cell(text: str, explainer: str, section: int = 0) -> str:
    """Returns the page's HTML about an explainer on the image number ``section``."""
    articles = re.findall(r"<article.*?</article>", text.split('<section class="card"')[section + 1], re.DOTALL)
    (found,) = [one for one in articles if f'<h4 class="name">{explainer}<' in one]
    return str(found)


def captions(text: str) -> list[str]:
    return [
        " ".join(re.sub("<[^>]*>", " ", one).split()) for one in re.findall(r"<figcaption>(.*?)</figcaption>", text)
    ]


def pictures(text: str) -> list[Tensor]:
    """Reads the embedded pictures, [3, h, w] in [-1, 1]."""
    found = []
    for payload in re.findall(r"data:image/webp;base64,([^\"]*)", text):
        with Image.open(io.BytesIO(base64.b64decode(payload))) as opened:
            found.append(images.from_pil(opened, 3))
    return found


def test_a_state_draws_the_same_page_byte_for_byte(tmp_path: Path) -> None:
    # Two galleries.
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    gallery = full()
    torch.save(gallery.state(), tmp_path / "state.pt")
    resumed = Gallery(64)
    resumed.load(torch.load(tmp_path / "state.pt", weights_only=True))
    write(gallery, first)
    write(resumed, second)
    assert (first / "gallery.html").read_bytes() == (second / "gallery.html").read_bytes()

    # Later answers are added to both alike, and an earlier state does not change.
    state = gallery.state()
    for one in (gallery, resumed):
        add(one, "edits", explanation(edited(0.12)))
    assert write(gallery, first) == write(resumed, second)
    assert len(state["originals"]) == 2
    assert len(state["cells"]["edits"]) == 2


def test_the_page_escapes_names_and_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    text = write(full(), tmp_path)
    # Names.
    assert NASTY not in text
    assert "<b>dog</b>" not in text
    assert "is <b>&lt;i&gt;owl&lt;/i&gt;</b>" in text
    assert "points &lt;script&gt;" in text
    assert '<span class="folder">animals/&lt;script&gt;alert(1)&lt;/</span>script&gt;.png' in text
    assert "quote&#34;&#39;\\udcff&amp;amp;.png" in text
    assert "gave a &lt;script&gt;" in text

    # Policy.
    assert "http" not in text.replace("http-equiv", "")
    assert "<script" not in text
    assert 'style="' not in text, "the policy would not let it act"
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert policy[1].startswith("default-src &#39;none&#39;; style-src &#39;sha256-")
    assert [path.name for path in tmp_path.iterdir()] == ["gallery.html"]


@pytest.mark.parametrize(("by", "said"), [(0.12, "0.12"), (-0.25, "0.25"), (0.0, None), (0.001, "0.001")])
def test_a_change_is_told_by_its_largest_value(by: float, said: str | None, tmp_path: Path) -> None:
    gallery = Gallery(64)
    add(gallery, "edits", explanation(edited(by)))
    # Caption.
    found = cell(write(gallery, tmp_path), "edits")
    faint = ", less than a grey level" if by == 0.001 else ""
    peak = "nothing" if said is None else f"full colour = {said}{faint}"
    assert captions(found) == ["counterfactual", f"change {peak}"]

    # Pictures.
    shown, change = pictures(found)
    assert torch.equal(shown, images.saved(edited(by)[0]))
    # Levels in [-1, 1]: full colour at the change, white elsewhere.
    expected = {0.0: [1, 1, 1], -0.25: [-1, -1, 1]}.get(by, [1, -1, -1])
    assert change[:, 2, 3].tolist() == expected
    assert change[:, 0, 0].tolist() == [1, 1, 1]


def test_what_leaves_the_range_does_not_count(tmp_path: Path) -> None:
    gallery = Gallery(64)
    add(gallery, "edits", explanation(edited(3.0)))
    text = write(gallery, tmp_path)
    assert captions(cell(text, "edits"))[1] == "change full colour = 0.5"
    assert captions(cell(text, "edits", 1))[1] == "change full colour = 0.25"


def test_of_a_rendering_only_what_was_changed_beyond_it_is_shown(tmp_path: Path) -> None:
    found = cell(write(full(), tmp_path), "renders")
    # One pixel by 0.25 against the image; 0.05 everywhere and 0.13 + 0.05 there against the rendering.
    changes = ["change full colour = 0.25", "changed beyond it full colour = 0.18"]
    assert captions(found) == ["counterfactual", "rendering alone", *changes]
    _, rendering, change, beyond = pictures(found)
    assert torch.equal(rendering, images.saved(edited(0.12).sub(0.1)[0]))
    assert change[:, 0, 0].tolist() == [1, 1, 1]
    assert beyond[1, 0, 0] == pytest.approx(1 - 2 * 0.05 / 0.18, abs=0.01)


def test_a_decomposition_shows_its_distinct_part(tmp_path: Path) -> None:
    text = write(full(), tmp_path)
    changes = ["change full colour = 0.12", "distinct part full colour = 0.15"]
    assert captions(cell(text, "splits")) == ["counterfactual", "without this part", *changes]
    _, without, _, distinct = pictures(cell(text, "splits"))
    assert without[0, 6, 6] == pytest.approx(0.3, abs=0.01)
    assert distinct[:, 6, 6].tolist() == [-1, -1, 1]
    assert "<dt>Distinct part</dt>" in text


def test_without_a_counterfactual_there_is_the_attribution_or_the_part_that_it_shows(tmp_path: Path) -> None:
    gallery = Gallery(64)
    # A distinct part that is not the attribution, and one that is.
    distinct = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    add(gallery, "points", explanation(parts={"distinct": distinct}))
    add(gallery, "splits", explanation(parts={"distinct": distinct}, attribution=distinct.abs().mean(1, keepdim=True)))
    text = write(gallery, tmp_path)

    # Pictures.
    assert captions(cell(text, "points")) == ["attribution"]
    (heat,) = pictures(cell(text, "points"))
    assert torch.equal(heat, images.saved(images.heat_map(explanation().attribution)[0]))
    assert "flipped" not in cell(text, "points")
    assert [one.split(" full")[0] for one in captions(cell(text, "splits"))] == ["without this part", "distinct part"]
    assert re.findall("<h3>(.*?)</h3>", text)[:2] == ["What would have to change", "Where it looks"]
    assert "<dt>Rendering alone</dt>" not in text


def test_decisions_are_those_of_the_judge(tmp_path: Path) -> None:
    text = write(full(), tmp_path)
    first, second = text.split('<section class="card"')[1:]
    assert "<p>is <b>cat</b></p>" in first
    assert "<p>decided <b>cat</b>, 90.0%</p>" in first
    assert '<p class="caveat">decided <b>&lt;b&gt;dog&lt;/b&gt;</b>, 70.0%</p>' in second, "it is an owl"
    assert "10.0% → 80.0%" in cell(text, "edits")
    assert ">flipped<" in cell(text, "edits")
    assert "20.0% → 30.0%" in cell(text, "edits", 1)
    assert ">not flipped<" in cell(text, "edits", 1)
    assert "decided" not in cell(text, "edits")


def test_classifiers_that_decide_differently_are_told_apart(tmp_path: Path) -> None:
    gallery = Gallery(64)
    add(gallery, "one", explanation(edited(0.1)))
    # Another class for the first image with the same probability; the same class for the second with a smaller one.
    add(gallery, "other", explanation(edited(0.1)), before=torch.tensor([[0.1, 0.9, 0.0], [0.2, 0.6, 0.2]]))
    text = write(gallery, tmp_path)
    assert "decided cat, 90.0%" in cell(text, "one")
    assert "decided &lt;b&gt;dog&lt;/b&gt;, 90.0%" in cell(text, "other")
    assert ">nothing to flip<" in cell(text, "other"), "it is decided as asked already"
    assert "decided &lt;b&gt;dog&lt;/b&gt;, 70.0%" in cell(text, "one", 1)
    assert "decided &lt;b&gt;dog&lt;/b&gt;, 60.0%" in cell(text, "other", 1)
    assert "decided <b>" not in text


def test_a_failure_has_a_cell_with_the_reason(tmp_path: Path) -> None:
    gallery = Gallery(64)
    # An explainer that answers for all images, one for the first, and one for none.
    add(gallery, "whole", explanation(edited(0.1)))
    half = explanation(edited(0.1))
    one = Explanation(
        **{name: getattr(half, name)[:1] for name in ("image", "logits", "target", "attribution", "counterfactual")},
        counterfactual_logits=half.logits[:1],
    )
    gallery.add("half", NAMES[:1], torch.tensor([0]), one, SURE[:1], AFTER[:1])
    gallery.fail("half", "gave a picture that is not finite")
    gallery.fail("none", "cannot explain this classifier")

    # Reasons.
    text = write(gallery, tmp_path)
    assert "not finite" not in cell(text, "half")
    assert "gave a picture that is not finite" in cell(text, "half", 1)
    assert "cannot explain this classifier" in cell(text, "none")
    assert re.findall("<h3>(.*?)</h3>", text)[:2] == ["What would have to change", "Not shown"]


def test_pictures_are_kept_small(tmp_path: Path) -> None:
    gallery = Gallery(20)
    add(gallery, "edits", explanation(edited(0.12, side=40), side=40))
    text = write(gallery, tmp_path)
    assert {tuple(picture.shape) for picture in pictures(text)} == {(3, 20, 20)}
    # The value is measured before the picture is shrunk.
    assert captions(cell(text, "edits"))[1] == "change full colour = 0.12"
    kept = gallery.state()["cells"]["edits"][0]["pictures"][0]["pixels"]
    assert kept.dtype == torch.uint8
    assert kept.untyped_storage().nbytes() == 3 * 20 * 20
    assert "--base: 140px" in text
    assert '<main class="wrap pixelated">' in text


def test_nothing_to_show_gives_no_page(tmp_path: Path) -> None:
    write(full(), tmp_path)
    gallery = Gallery(64)
    gallery.fail("none", "cannot explain this classifier")
    assert gallery.write(tmp_path, CLASSES) is None
    assert list(tmp_path.iterdir()) == []


def test_other_images_than_the_others_had_are_refused() -> None:
    gallery = Gallery(64)
    given = explanation(edited(0.1))
    add(gallery, "one", given)
    with pytest.raises(ValueError, match=r"'two' explains 'b\.png' and so on where the others explain 'animals"):
        gallery.add("two", ["b.png", "c.png"], torch.tensor([0, 0]), given, SURE, AFTER)
    with pytest.raises(ValueError, match="one name, label and decision per explanation, got 1, 2 and 2 for 2"):
        gallery.add("two", NAMES[:1], torch.tensor([0, 0]), given, SURE, AFTER)
    with pytest.raises(ValueError, match="go together: 'two' has but one"):
        gallery.add("two", NAMES, torch.tensor([0, 0]), given, SURE, None)
    with pytest.raises(ValueError, match="at least 1 pixel, got size 0"):
        Gallery(0)


@needs_browser
def test_a_telephone_shows_all_of_it_and_nothing_is_refused(tmp_path: Path) -> None:
    # Nine more columns with long names.
    gallery = full()
    for index in range(9):
        add(gallery, f"point_{'_'.join(str(index) * 9)}{'x' * 60}", explanation())
    path = gallery.write(tmp_path, CLASSES)
    assert path is not None

    # Two widths.
    with Browser(tmp_path / "profile") as browser:
        browser.open(path.as_uri())
        loaded = "return [...document.images].filter((image) => !image.naturalWidth).length"
        assert browser.run(loaded) == 0
        for width in (420, 320):
            browser.resize(width, 900)
            beyond = "const page = document.documentElement; return page.scrollWidth - page.clientWidth"
            assert browser.run(beyond) == 0
            box = "[...document.images].map((image) => image.getBoundingClientRect())"
            assert browser.run(f"return {box}.every((box) => box.width > 90 && box.right < {width} - 16)")
            assert browser.run(f"return new Set({box}.map((box) => box.left)).size") > 1, "beside each other"
        assert browser.problems() == []
