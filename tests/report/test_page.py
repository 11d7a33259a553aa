import base64
import hashlib
import html
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import atlases
import numpy as np
import pytest
from browser import Browser
from PIL import Image

from cfe_lightning import images
from cfe_lightning.explaining.atlas import write_atlas
from cfe_lightning.explaining.folder import OutputFolder
from cfe_lightning.explaining.names import image_folder
from cfe_lightning.explaining.overview import write_overview
from cfe_lightning.explaining.row import Row
from cfe_lightning.report.page import write_html

KEYS = ("image", "counterfactual", "difference", "attribution", "steps", "part_distinct")
STRENGTHS = [0.0, 0.25, 0.5, 0.75, 1.0]
EVIL = ["<script>document.title='owned'</script>.png", "</script><img src=x onerror=\"document.title='owned'\">.png"]
EVIL += ["<!-- <script>.png", "\u2028quote\"'.png", "line\nbreak.png", "&amp;.png"]


def picture(path: Path, width: int, height: int = 24) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(len(path.parent.name)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


def row(name: str, index: int, side: int, folder: Path) -> Row:
    place = image_folder(name)
    for key in KEYS:
        picture(folder / place / f"{key}.png", side * len(STRENGTHS) if key == "steps" else side, side)
    flipped, after = index % 3 != 0, 0.8 if index % 3 else 0.3
    line: dict[str, Any] = {
        **{"name": name, "source": [1, 1], "status": "ok", "predicted": "cat" if index % 2 else "dog"},
        **{"target": "dog" if index % 2 else "<b>owl</b>", "p_predicted_before": 0.9, "p_target_before": 0.05},
        **{"p_predicted_after": 1 - after, "p_target_after": after, "flipped": flipped, "flipped_saved": flipped},
        **{"l1": 0.01 * (index + 1), "seconds": 0.5, "note": None, "difference_scale": 0.25, "folder": place},
        **{"files": {key: f"{key}.png" for key in KEYS}, "gains": {"distinct": 4.0}, "scores": {"agreement": 0.5}},
        "curve": {"strength": STRENGTHS, "predicted": [0.9, 0.8, 0.6, 0.3, 0.1], "target": [0.1, 0.2, 0.4, 0.7, 0.9]},
    }
    return Row(line)


def make(folder: Path, names: list[str], failures: list[str], side: int = 24) -> Path:
    output = OutputFolder(folder)
    classes = ["cat", "dog", "<b>owl</b>"]
    output.prepare(
        {
            **{"checkpoint_sha256": "ab" * 32, "method": "pack.age.Method", "version": "1.2.3", "classes": classes},
            **{"input": "/photos/<i>", "target": None, "precision": "32-true"},
        }
    )
    rows = [row(name, index, side, folder) for index, name in enumerate(names)]
    rows += [Row({"name": n, "source": [0, 0], "status": "failed", "error": f"Why <{n}>."}) for n in failures]
    output.append(0, rows)
    output.merge()
    facts: dict[str, Any] = {"checkpoint": "runs/<u>/best.ckpt", "device": "cpu", "versions": {"torch": "2.15"}}
    output.write_summary(n_planned=len(rows), image_size=side, batch_size=8, finished="2026-01-01", **facts)
    return folder


def embedded(page: str, identifier: str) -> Any:
    found = re.search(rf'<script type="application/json" id="{identifier}">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_page_holds_everything_itself(tmp_path: Path):
    page = write_html(make(tmp_path, ["a/x.png", "b/y.png"], ["z.png"])).read_text(encoding="utf-8")
    assert not re.search(r"(src|href)\s*=", page.split("<script>")[0])
    assert "http" not in re.sub(r"http-equiv|http://www\.w3\.org/2000/svg", "", page)
    rows = embedded(page, "rows")
    assert [entry["name"] for entry in rows] == ["a/x.png", "b/y.png", "z.png"]
    assert set(rows[0]["thumbs"]) == set(KEYS)
    assert rows[0]["thumbs"]["image"].startswith("data:image/webp;base64,")
    assert "source" not in rows[0]
    assert "Method explanations, 2 images" in page
    assert "50.0%" in page
    assert "1 of 2 (95%: 9.5–90.5%)" in page


def test_a_caution_stands_on_top_and_an_untrained_method_names_its_classifier(tmp_path: Path):
    folder = make(tmp_path, ["x.png"], [])
    assert "Checkpoint" in write_html(folder).read_text()
    summary = json.loads((folder / "summary.json").read_text())
    del summary["checkpoint"], summary["checkpoint_sha256"]
    summary |= {"classifier": "my.pt", "classifier_sha256": "cd" * 32, "untrained": "<grad_cam>"}
    summary |= {"method": "cfe_lightning.methods.baselines.Baseline", "caution": "Mind <this>."}
    (folder / "summary.json").write_text(json.dumps(summary))
    page = write_html(folder).read_text()
    assert '<p class="banner">Mind &lt;this&gt;.</p>' in page
    assert "&lt;grad_cam&gt; explanations, 1 images" in page
    assert "<dt>Classifier</dt><dd>my.pt</dd>" in page
    assert "cd" * 32 in page
    assert "Checkpoint" not in page


def test_small_pictures_are_embedded_exactly_and_large_ones_step_by_step(tmp_path: Path):
    folder = make(tmp_path / "small", ["x.png"], [])
    thumbs = embedded(write_html(folder).read_text(), "rows")[0]["thumbs"]
    shown = Image.open(_bytes(thumbs["steps"])).convert("RGB")
    assert np.array_equal(np.asarray(shown), np.asarray(Image.open(folder / "images" / "x.png" / "steps.png")))

    folder = make(tmp_path / "large", ["x.png"], [], side=320)
    strip = np.concatenate([np.full((320, 320, 3), value, np.uint8) for value in (0, 255, 0, 255, 0)], axis=1)
    Image.fromarray(strip).save(folder / "images" / "x.png" / "steps.png")
    thumbs = embedded(write_html(folder).read_text(), "rows")[0]["thumbs"]
    shown = Image.open(_bytes(thumbs["steps"])).convert("L")
    assert shown.size == (5 * 160, 160)
    # No step shines through into its neighbour, beyond what compression does.
    assert abs(int(shown.getpixel((160, 80))) - int(shown.getpixel((159, 80)))) > 200


def _bytes(address: str) -> Any:
    return io.BytesIO(base64.b64decode(address.partition(",")[2]))


def test_pictures_beyond_the_budget_stay_files(tmp_path: Path):
    folder = make(tmp_path, [f"{i:02d}.png" for i in range(10)], [])
    whole = embedded(write_html(folder).read_text(), "rows")
    size = sum(len(thumb) for thumb in whole[0]["thumbs"].values())
    rows = embedded(write_html(folder, embedded_bytes=3 * size).read_text(), "rows")
    kept = ["thumbs" in entry for entry in rows]
    assert kept == sorted(kept, reverse=True)
    assert 2 <= sum(kept) <= 4


def test_a_missing_or_broken_picture_does_not_stop_the_page(tmp_path: Path):
    folder = make(tmp_path, ["x.png"], [])
    (folder / "images" / "x.png" / "image.png").unlink()
    (folder / "images" / "x.png" / "steps.png").write_bytes(b"broken")
    assert set(embedded(write_html(folder).read_text(), "rows")[0]["thumbs"]) == set(KEYS) - {"image", "steps"}


def test_no_name_becomes_markup(tmp_path: Path):
    page = write_html(make(tmp_path, EVIL, [f"bad/{name}" for name in EVIL])).read_text(encoding="utf-8")
    assert {entry["name"] for entry in embedded(page, "rows")} == {*EVIL, *(f"bad/{name}" for name in EVIL)}
    data = page.split('id="page">')[1].rpartition("<script>")[0]
    assert "<" not in data.replace("</script>", "").replace('<script type="application/json" id="rows">', "")
    assert "\u2028" not in data
    # What the run was called and asked appears as text, too.
    head = page.split("<main")[0]
    for text in ("<b>owl</b>", "runs/<u>/best.ckpt", "/photos/<i>"):
        assert text not in head
        assert html.escape(text) in head


def test_the_policy_allows_our_own_script_and_style_only(tmp_path: Path):
    page = write_html(make(tmp_path, ["x.png"], [])).read_text(encoding="utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    allowed = html.unescape(policy[1])
    assert allowed.startswith("default-src 'none'; ")
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in allowed


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path):
    with pytest.raises(
        FileNotFoundError, match=r"holds no manifest\.jsonl and summary\.json: give the --output of expl"
    ):
        write_html(tmp_path)


def test_a_page_of_nothing_but_failures_and_a_partial_one(tmp_path: Path):
    folder = make(tmp_path, [], ["x.png"])
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"n_planned": 7}))
    page = write_html(folder).read_text(encoding="utf-8")
    assert "No explained image has a counterfactual" in page
    assert re.search(r"Partial: 1 of\s+7 images so far", page)


def test_an_atlas_stands_above_the_cards_with_its_numbers(tmp_path: Path):
    folder = make(tmp_path, ["x.png"], [])
    without = write_html(folder).read_text(encoding="utf-8")
    assert 'class="wrap atlas"' not in without
    write_atlas(atlases.atlas(), folder)
    page = write_html(folder).read_text(encoding="utf-8")
    assert page.index("</header>\n<section") < page.index("found by hand") < page.index('<nav class="toolbar"')
    # All else is as it was.
    section = page.partition("</header>\n")[2].partition('<nav class="toolbar"')[0]
    assert page.replace(section, "", 1) == without
    text = " ".join(html.unescape(re.sub(r"<[^>]*>", " ", section)).split())
    for part in (
        "found by hand Mind the step.",
        "cat → dog 87.5% of 1,000 images become dog by at least one of 2 directions.",
        "1,200 images of cat were searched and 1,000 kept",
        "Step −4 SD length 9.31 Mean logit change +3.25 Flips alone 75.0% Adds 12.5% Pixel change 0.0625",
        "In known cause 81.2%",
        "← towards dog rendering standard deviations −4 −3 −2 −1 0 +1 +2 +3 +4",
        "Show all 3 images",
    ):
        assert part in text
    assert section.count('class="card atlas-card"') == 4
    assert 'aria-label="−3 standard deviations: dog 80.0%"' in section
    # Marked: the rendering, the side of the target, and the step that the numbers are about.
    heads = re.findall(r'<th scope="col" class="(.*?)">(.*?)</th>', section)[:9]
    assert heads[0] == ("towards step", "−4")
    assert heads[1:5] == [("towards", "−3"), ("towards", "−2"), ("towards", "−1"), ("zero", "0")]
    assert {kind for kind, _ in heads[5:]} == {"away"}


def test_pictures_of_the_atlas_are_embedded_exactly(tmp_path: Path):
    folder = make(tmp_path, ["x.png"], [])
    write_atlas(atlases.atlas(), folder)
    addresses = re.findall(r'<image id="(.*?)" href="(.*?)"', write_html(folder).read_text(encoding="utf-8"))
    assert [name for name, _ in addresses] == [f"atlas-{p}-{d}-picture" for p in (0, 1) for d in (0, 1)]
    shown = Image.open(_bytes(addresses[0][1])).convert("L")
    moved = atlases.pictures()
    assert shown.size == (9 * 32, 3 * 32)
    assert np.array_equal(np.asarray(shown)[32:64, 64:96], np.asarray(images.to_pil(moved[1, 2])))


def test_large_pictures_of_the_atlas_shrink_one_by_one(tmp_path: Path):
    folder = make(tmp_path, ["x.png"], [])
    moved = atlases.pictures(2, 1, 400, 200)
    moved[:] = -1
    moved[1, 4] = 1
    write_atlas(atlases.atlas(atlases.pair(directions=[atlases.direction(images=moved)])), folder)
    page = write_html(folder).read_text(encoding="utf-8")
    shown = np.asarray(Image.open(_bytes(re.findall(r'<image .*? href="(.*?)"', page)[0])).convert("L")).astype(int)
    assert shown.shape == (2 * 160, 9 * 80)
    assert shown[160:, 320:400].min() > 250
    assert shown[160:, 400:].max() < 5
    assert shown[:160].max() < 5


def test_every_cell_is_cut_from_its_place_in_the_picture(tmp_path: Path):
    folder = make(tmp_path, ["x.png"], [])
    small, large = (atlases.direction(images=atlases.pictures(2, 1, *size)) for size in ((16, 32), (200, 100)))
    write_atlas(atlases.atlas(atlases.pair(directions=[small, large])), folder)
    page = write_html(folder).read_text(encoding="utf-8")
    boxes = re.findall(r'class="cell" viewBox="(.*?)" width="(.*?)" height="(.*?)".*?<use href="#(.*?)"', page)
    assert len(boxes) == 2 * 2 * 9
    # 16 x 32 pixels, enlarged to 48 x 96 in the file; shown twice as large as they are.
    assert boxes[0] == ("0 0 96 48", "64", "32", "atlas-0-0-picture")
    assert boxes[9 + 8] == ("768 48 96 48", "64", "32", "atlas-0-0-picture")
    # A hundredth is cut off around pictures that are scaled smoothly.
    assert boxes[18 + 9 + 2] == ("201 202 98 196", "32", "64", "atlas-0-1-picture")
    images_of = re.findall(r'<image id="(.*?)" .*? width="(.*?)" height="(.*?)"', page)
    assert images_of == [("atlas-0-0-picture", "864", "96"), ("atlas-0-1-picture", "900", "400")]


def test_the_plots_of_the_atlas(tmp_path: Path):
    folder = make(tmp_path, ["x.png"], [])
    curve = [(0.0, 0.0), (2.5, 0.5), (5.0, 1.0)]
    directions = [atlases.direction(newly=newly) for newly in (0.5, 0.25, 0.0)]
    write_atlas(atlases.atlas(atlases.pair(directions=directions, curve=curve, covered=0.0004)), folder)
    page = write_html(folder).read_text(encoding="utf-8")
    # Axes from (38, 100) to (292, 14); the step is 4 of 5.
    assert '<polyline points="38.0,100.0 165.0,57.0 292.0,14.0"/>' in page
    assert '<line class="step" x1="241.2" x2="241.2"' in page
    assert "<title>2.5 SD: 50.0%</title>" in page
    ticks = re.findall(r'<text x="([\d.]+)" y="114" text-anchor="middle">(.*?)</text>', page)
    assert ticks[:3] == [("80.3", "1"), ("165.0", "2"), ("249.7", "3")]
    assert ticks[3:] == [("38.0", "0"), ("88.8", "1"), ("139.6", "2"), ("190.4", "3"), ("241.2", "4"), ("292.0", "5")]
    bars = re.findall(r'class="(before|added)" x="[\d.]+" y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', page)
    assert bars == [
        *[("before", "100.0", "0.0"), ("added", "57.0", "43.0"), ("before", "57.0", "43.0"), ("added", "35.5", "21.5")],
        *[("before", "35.5", "64.5"), ("added", "35.5", "0.0")],
    ]
    assert "<title>rank 2: 75.0% together, 25.0% of them added</title>" in page
    assert '<p class="value">&lt;0.1%</p>' in page


def test_no_name_of_the_atlas_becomes_markup(tmp_path: Path):
    folder = make(tmp_path, ["x.png"], [])
    evil = [*EVIL, "\udcff"]
    direction = atlases.direction(name=EVIL[0])
    write_atlas(
        replace(
            atlases.atlas(*(atlases.pair(n, n, directions=[direction]) for n in evil)),
            title=EVIL[1],
            note=EVIL[2],
        ),
        folder,
    )
    page = write_html(folder).read_text(encoding="utf-8")
    # Names are text.
    section = page.partition("</header>\n")[2].partition('<nav class="toolbar"')[0]
    for name in (*EVIL[:3], EVIL[5]):
        assert name not in section
        assert html.escape(name).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in section
    assert "<script" not in section
    assert 'onerror="' not in section


def test_the_atlas_needs_nothing_that_the_policy_forbids(tmp_path: Path):
    folder = make(tmp_path, ["x.png"], [])
    write_atlas(atlases.atlas(), folder)
    body = write_html(folder).read_text(encoding="utf-8").partition("</style>")[2].rpartition("<script>")[0]
    assert not re.search(r"<[^>]*\sstyle\s*=", body)
    assert not re.search(r"<[^>]*\son\w+\s*=", body)


def test_the_atlas_takes_half_of_the_budget_at_most(tmp_path: Path):
    folder = make(tmp_path, [f"{i:02d}.png" for i in range(10)], [])
    write_atlas(atlases.atlas(atlases.pair(num_directions=8)), folder)
    addresses = re.findall(r'<image .*? href="(.*?)"', write_html(folder).read_text(encoding="utf-8"))
    assert all(address.startswith("data:image/webp;base64,") for address in addresses)
    size = len(addresses[0])
    page = write_html(folder, embedded_bytes=4 * size).read_text(encoding="utf-8")
    addresses = re.findall(r'<image .*? href="(.*?)"', page)
    assert [address.startswith("data:") for address in addresses] == [True] * 2 + [False] * 6
    assert addresses[2:] == [f"atlas/0-{index}.png" for index in range(2, 8)]
    assert any("thumbs" in row for row in embedded(page, "rows"))


def test_a_missing_picture_of_the_atlas_does_not_stop_the_page(tmp_path: Path):
    folder = make(tmp_path, ["x.png"], [])
    write_atlas(atlases.atlas(), folder)
    (folder / "atlas" / "0-0.png").unlink()
    (folder / "atlas" / "0-1.png").write_bytes(b"broken")
    addresses = re.findall(r'<image .*? href="(.*?)"', write_html(folder).read_text(encoding="utf-8"))
    assert addresses[:2] == ["atlas/0-0.png", "atlas/0-1.png"]
    assert addresses[2].startswith("data:")


def test_pairs_without_directions_or_curve_and_long_lists(tmp_path: Path):
    folder = make(tmp_path, ["x.png"], [])
    nothing = atlases.pair("cat", "owl", directions=[], num_kept=0, covered=0.0, curve=[])
    write_atlas(atlases.atlas(nothing, atlases.pair(num_directions=11, curve=[])), folder)
    page = write_html(folder).read_text(encoding="utf-8")
    assert re.search(r"No direction was found that leads to <b>owl</b>", page)
    assert 'cat → owl <span class="count">–</span>' in page
    assert "<polyline" not in page.partition("<script>")[0]
    assert "3 more directions" in page
    write_atlas(replace(atlases.atlas(), pairs=[]), folder)
    assert "No direction was found." in write_html(folder).read_text(encoding="utf-8")


def broken(**changes: Any) -> str:
    """Returns atlas.json with values changed, named like pairs__0__directions__0__file, or removed by None."""
    content = json.loads(BROKEN_FROM)
    for path, value in changes.items():
        *way, last = path.split("__")
        place: Any = content
        for key in way:
            place = place[int(key) if key.isdigit() else key]
        if value is None:
            del place[last]
        else:
            place[int(last) if last.isdigit() else last] = value
    return json.dumps(content)


BROKEN_FROM = json.dumps(
    {
        **{"schema": 1, "title": "t", "note": "n"},
        "pairs": [
            {
                **{"source": "a", "target": "b", "num_images": 2, "num_kept": 2, "covered": 1.0, "curve": [[1, 0.5]]},
                "directions": [
                    {
                        **{
                            "name": "d",
                            "file": "atlas/0-0.png",
                            "cell": [4, 4],
                            "enlarged": 1,
                            "strengths": [-1, 0, 1],
                        },
                        **{"probabilities": [[0.1, 0.2, 0.3]], "step": 1, "degree": 1, "mean_change": 1},
                        **{"flipped": 1, "newly": 1, "change": 1, "inside": None},
                    }
                ],
            }
        ],
    }
)
FIRST = "pairs__0__directions__0__"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("[]", "list indices must be integers"),
        (broken(schema=2), "its schema is 2, this version reads 1"),
        (broken(pairs=None), "'pairs' is missing"),
        (broken(pairs=7), "'int' object is not iterable"),
        (broken(**{FIRST + "newly": None}), "'newly' is missing"),
        (broken(**{FIRST + "step": "1"}), "'1' stands where a number should"),
        (broken(**{FIRST + "flipped": float("nan")}), "nan stands where a number should"),
        (broken(**{FIRST + "degree": 10**400}), "too large"),
        (broken(**{FIRST + "probabilities": [[0.5]]}), "3 strengths but other numbers of probabilities"),
        (broken(**{FIRST + "cell": [0, 4]}), "cells of 0 x 4 pixels"),
        (broken(**{FIRST + "enlarged": 3}), "cells of 4 x 4 pixels, enlarged 3 times"),
        (broken(**{FIRST + "file": "../../etc/passwd"}), "it names the picture '../../etc/passwd'"),
        (broken(**{FIRST + "file": "https://example.org/x.png"}), "it names the picture 'https://example.org/x.png'"),
        (broken(**{FIRST + "file": "atlas/0-0.png\n"}), "it names the picture"),
    ],
)
def test_a_broken_atlas_is_refused_in_one_sentence(tmp_path: Path, content: str, reason: str):
    folder = make(tmp_path, ["x.png"], [])
    (folder / "atlas.json").write_text(content)
    with pytest.raises(ValueError, match=r"atlas\.json is no atlas of directions that can be shown \(") as raised:
        write_html(folder)
    assert reason in str(raised.value)
    assert str(raised.value).endswith("): remove it, or run explain.py again.")
    assert "\n" not in str(raised.value)


def test_the_atlas_that_the_broken_ones_are_made_of_is_fine(tmp_path: Path):
    folder = make(tmp_path, ["x.png"], [])
    (folder / "atlas.json").write_text(BROKEN_FROM)
    assert '<h2 id="atlas-title">t</h2>' in write_html(folder).read_text(encoding="utf-8")


MEASURED = {
    **{"p_target_saved": 0.8, "changed_area": 0.25, "where": "top", "where_share": 0.5},
    **{"survives": ["blur1"], "lost_under": ["jpeg90"]},
}


def measured(folder: Path, **changes: Any) -> None:
    """Adds what later versions measure to every row of a folder."""
    output = OutputFolder(folder)
    rows = [Row(vars(entry) | MEASURED | changes) for entry in output.rows() if entry.status == "ok"]
    output.append(0, rows)
    output.merge()


def with_global(folder: Path, names: list[str], **changes: Any) -> Path:
    """Makes a folder of changes at the upper edge, with its global view."""
    make(folder, names, ["z/broken.png"])
    measured(folder, **changes)
    for entry in OutputFolder(folder).rows():
        if entry.status == "ok":
            place = folder / entry.folder
            values = np.asarray(Image.open(place / "image.png")).copy()
            values[:2] = 255 - values[:2]
            Image.fromarray(values).save(place / "counterfactual.png")
    write_overview(OutputFolder(folder))
    return folder


def global_section(page: str) -> str:
    return page.partition("</header>\n")[2].partition('<nav class="toolbar"')[0]


def words(part: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", part)).split())


def test_the_sentence_of_a_card_comes_from_its_row(tmp_path: Path):
    folder = make(tmp_path, ["a.png", "b.png"], ["z.png"])
    assert all("sentence" not in entry for entry in embedded(write_html(folder).read_text(), "rows"))
    measured(folder)
    rows = embedded(write_html(folder).read_text(), "rows")
    assert rows[1]["sentence"] == (
        "Changing 25% of the pixels, 50% of the change at the top, moved 'dog' from 0.05 to 0.80; survives blur; does "
        "not survive JPEG."
    )
    assert "moved '<b>owl</b>' only from 0.05 to 0.80: not flipped." in rows[0]["sentence"]
    assert "sentence" not in rows[2]


def test_the_global_view_stands_above_the_cards(tmp_path: Path):
    folder = with_global(tmp_path, [f"{index:02d}.png" for index in range(20)])
    page = write_html(folder).read_text(encoding="utf-8")
    section = global_section(page)
    text = words(section)
    for part in (
        "Over the whole folder What does this classifier look at? The changes of 13 flipped images, averaged pixel "
        "by pixel, one card for each pair of classes.",
        "Shortcut alarm, cat → dog: 100% of the change lies near the border (44% of the area; in 7 of 7 images "
        "more than 2 times as strong as inside), where usually nothing of the subject is: look for marks, "
        "frames or text.",
        "cat → dog 7 flipped images shortcut alarm Mean change ±",
        "Near the border 100% of the change, on 44% of the area: no change inside",
    ):
        assert part in text
    assert section.count('class="card whole-card alarming"') == 2
    # Links lead to the cards by their number among all that have one.
    names = [entry["name"] for entry in embedded(page, "rows") if entry["status"] == "ok"]
    links = re.findall(r'href="#card=(\d+)" title="(.*?), similarity [\d.]+"', section)
    assert len(links) == 6
    assert all(names[int(number) - 1] == name for number, name in links)
    assert len(re.findall(r'<img src="data:image/webp;base64,', section)) == 2 * 2 + 6 * 2
    (folder / "global.json").unlink()
    assert page.replace(section, "", 1) == write_html(folder).read_text(encoding="utf-8")


def test_pictures_of_the_global_view_beyond_the_budget_stay_files(tmp_path: Path):
    folder = with_global(tmp_path, [f"{index:02d}.png" for index in range(6)])
    (folder / "global" / "0-change.png").write_bytes(b"broken")
    section = global_section(write_html(folder).read_text(encoding="utf-8"))
    assert '<img src="global/0-change.png"' in section
    section = global_section(write_html(folder, embedded_bytes=0).read_text(encoding="utf-8"))
    assert "data:" not in section
    assert '<img src="images/' in section


def test_no_name_of_the_global_view_becomes_markup(tmp_path: Path):
    folder = with_global(tmp_path, [*EVIL, *(f"{index}.png" for index in range(8))], predicted=EVIL[0], target=EVIL[1])
    view = json.loads((folder / "global.json").read_text())
    view["pairs"][0]["typical"] = [{"name": name, "similarity": 1} for name in [*EVIL, "not there.png"]]
    view["pairs"][0]["where"] = EVIL[0]
    (folder / "global.json").write_text(json.dumps(view))
    section = global_section(write_html(folder).read_text(encoding="utf-8"))
    assert "<script" not in section
    assert "<img src=x" not in section
    assert section.count('href="#card=') == len(EVIL), "what has no card has no link"
    for name in (EVIL[0], EVIL[1]):
        assert html.escape(name).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in section
    bare = re.sub(r'"[^"]*"', '""', section)
    assert not re.search(r"<[^>]*\s(style|on\w+)=", bare), "the policy forbids these"


def test_twelve_pairs_are_shown_and_all_alarms(tmp_path: Path):
    folder = with_global(tmp_path, [f"{index:02d}.png" for index in range(6)])
    view = json.loads((folder / "global.json").read_text())
    (first, *_) = view["pairs"]
    view["pairs"] = [first | {"target": f"class {index}", "alarm": False, "num_used": 2} for index in range(20)]
    view["pairs"][15] |= {"alarm": True, "pictures": {}, "typical": [], "num_flipped": 3000, "num_used": 2000}
    (folder / "global.json").write_text(json.dumps(view))
    section = global_section(write_html(folder).read_text(encoding="utf-8"))
    assert section.count('class="card whole-card') == 12
    assert "The 12 most frequent of 20 pairs are shown" in words(section)
    assert section.count("Shortcut alarm, ") == 1
    assert "→ class 15:" in words(section)

    # Alarms everywhere.
    view["pairs"][0] |= {"num_flipped": 3000, "num_used": 1999, "num_left_out": 1}
    view["pairs"] = [pair | {"alarm": True} for pair in view["pairs"]]
    (folder / "global.json").write_text(json.dumps(view))
    section = global_section(write_html(folder).read_text(encoding="utf-8"))
    assert section.count("Shortcut alarm, ") == 12
    assert "8 more pairs raise the alarm, see global.json." in section
    assert "means over 1,999 of 3,000 flipped images, drawn evenly, 1 could not be read" in section


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda view: view.update(schema=2), "its schema is 2, this version reads 1"),
        (lambda view: view.pop("pairs"), "'pairs' is missing"),
        (lambda view: view.update(pairs=7), "'int' object is not iterable"),
        (lambda view: view["pairs"][0].pop("num_used"), "'num_used' is missing"),
        (lambda view: view["pairs"][0].update(frame_share="<b>"), "'<b>' stands where a number should"),
        (lambda view: view["pairs"][0].update(num_flipped=float("nan")), "nan stands where a number should"),
        (lambda view: view["pairs"][0].update(typical=["x"]), "string indices must be integers"),
        (lambda view: view["pairs"][0].update(frame_area=1, frame_share=1), "division by zero"),
        (
            lambda view: view["pairs"][0]["pictures"]["change"].update(file="../x.png"),
            "it names the picture '../x.png'",
        ),
        (lambda view: view["pairs"][0]["pictures"].pop("strength"), "'strength' is missing"),
    ],
)
def test_a_broken_global_view_is_refused_in_one_sentence(tmp_path: Path, change: Any, reason: str):
    folder = with_global(tmp_path, [f"{index}.png" for index in range(3)])
    view = json.loads((folder / "global.json").read_text())
    change(view)
    (folder / "global.json").write_text(json.dumps(view))
    with pytest.raises(ValueError, match=r"global\.json is no global view that can be shown \(") as raised:
        write_html(folder)
    assert reason in str(raised.value)
    assert str(raised.value).endswith("): remove it, or run explain.py again.")


@pytest.mark.parametrize(
    ("share", "times"), [(0.2, "1"), (0.9, "36"), (0.99, "396"), (0.9997, "13,329"), (0.7133, "10"), (0.7, "9.3")]
)
def test_how_much_stronger_the_border_is_reads_as_a_number(tmp_path: Path, share: float, times: str):
    folder = with_global(tmp_path, [f"{index}.png" for index in range(3)])
    view = json.loads((folder / "global.json").read_text())
    view["pairs"] = view["pairs"][:1]
    view["pairs"][0] |= {"frame_share": share, "frame_area": 0.2}
    (folder / "global.json").write_text(json.dumps(view))
    text = words(global_section(write_html(folder).read_text(encoding="utf-8")))
    assert f"on 20% of the area: {times}× as strong as inside" in text


needs_browser = pytest.mark.skipif(
    shutil.which("chromedriver") is None or not (shutil.which("chromium") or shutil.which("google-chrome")),
    reason="needs chromium and chromedriver on the path",
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    names = [f"{'ab'[i % 2]}/{i:03d}.png" for i in range(60)]
    folder = make(tmp_path_factory.mktemp("page"), names + EVIL, [f"bad/{name}" for name in EVIL])
    return write_html(folder, embedded_bytes=100_000).as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def cards(browser: Browser) -> list[str]:
    found: list[str] = browser.run("return [...document.querySelectorAll('.card .name')].map((n) => n.textContent)")
    return found


def click(browser: Browser, text: str) -> None:
    browser.run(
        "[...document.querySelectorAll('button')].find((b) => b.textContent.startsWith(arguments[0])).click()", text
    )


@needs_browser
class TestInABrowser:
    def test_cards_show_names_as_they_are_and_nothing_runs_or_fails(self, browser: Browser, page: str):
        browser.open(page)
        assert browser.run("return document.documentElement.dataset.ready") == "true"
        assert cards(browser)[:2] == ["&amp;.png", EVIL[1]]
        assert len(cards(browser)) == 24
        broken = browser.run(
            "const images = [...document.images];"
            "return Promise.all(images.map((image) => { image.loading = 'eager'; return image.decode(); }))"
            ".then(() => 0, () => images.filter((image) => !image.naturalWidth).length)"
        )
        assert broken == 0
        assert browser.run("return document.title") == "Method explanations, 66 images"
        assert browser.problems() == []

    def test_files_are_shown_and_linked_where_nothing_is_embedded(self, browser: Browser, page: str):
        browser.open(page + "#card=60")
        assert browser.run("return document.querySelectorAll('img[src^=\"data:\"]').length") == 0
        loaded = browser.run(
            "const links = [...document.querySelectorAll('figure a')];"
            "return Promise.all(links.map((link) => new Promise((done) => { const image = new Image();"
            "image.onload = () => done(true); image.onerror = () => done(link.href); image.src = link.href; })))"
        )
        assert set(loaded) == {True}
        assert browser.problems() == []

    def test_filters_pairs_search_and_order(self, browser: Browser, page: str):
        browser.open(page)
        click(browser, "Not flipped")
        assert browser.run("return document.querySelectorAll('.badge.good').length") == 0
        assert browser.run("return location.hash") == "#filter=kept"
        browser.open(page + "#pair=cat+%E2%86%92+dog&sort=l1&order=down&q=B%2F0")
        assert cards(browser)[:3] == ["b/059.png", "b/057.png", "b/055.png"]
        assert browser.run("return document.querySelector('select').value") == "cat → dog"
        browser.open(page + "#q=nothing+like+it")
        assert "No image fits these filters." in browser.run("return document.getElementById('main').textContent")

    def test_failures_have_their_tab_with_reasons(self, browser: Browser, page: str):
        browser.open(page)
        click(browser, "Failures")
        table = browser.run(
            "const rows = [...document.querySelectorAll('.failures tbody tr')];"
            "return rows.map((row) => [...row.cells].map((cell) => cell.textContent))"
        )
        assert sorted(table) == sorted([f"bad/{name}", f"Why <bad/{name}>."] for name in EVIL)
        assert browser.run("return document.querySelectorAll('.card').length") == 0

    def test_keys_move_between_cards_steps_and_pages(self, browser: Browser, page: str):
        browser.open(page)
        readout = "return document.querySelector('.card.active .readout').textContent"
        active = "return document.querySelector('.card.active').id"
        browser.press("j", "j", "ARROW_DOWN", "k")
        assert browser.run(active) == "card-3"
        assert browser.run(readout).startswith("step 5 of 5, strength 1")
        browser.press("ARROW_LEFT", "ARROW_LEFT", "ARROW_LEFT")
        assert browser.run(readout).startswith("step 2 of 5, strength 0.25")
        assert "80.0%" in browser.run(readout)
        assert "20.0%" in browser.run(readout)
        frame = "return getComputedStyle(document.querySelector('.card.active .frame')).backgroundPositionX"
        assert browser.run(frame).startswith("25%")
        assert browser.run("return document.querySelector('.card.active .cursor').getAttribute('x1')") == "25"
        # Pages and search.
        browser.press("n")
        assert browser.run(active) == "card-27"
        assert cards(browser)[2] == "a/044.png"
        browser.press("p", "/", "0", "5", "ESCAPE")
        assert browser.run("return location.hash") == "#q=05"
        assert all("05" in name for name in cards(browser))

    def test_a_view_can_be_sent_as_an_address(self, browser: Browser, page: str):
        browser.open(page + "#card=30&step=2")
        assert browser.run("return document.querySelector('.card.active .name').textContent") == cards(browser)[5]
        readout = browser.run("return document.querySelector('.card.active .readout').textContent")
        assert readout.startswith("step 3 of 5, strength 0.5")
        browser.open(page + "#card=nonsense&step=x&sort=constructor&filter=__proto__&size=toString")
        assert len(cards(browser)) == 24
        assert browser.problems() == []

    def test_the_atlas_shows_its_pictures_and_changes_pairs(self, browser: Browser, tmp_path: Path):
        folder = make(tmp_path, ["a.png", "b.png"], [])
        pair = atlases.pair(EVIL[0], EVIL[1])
        write_atlas(atlases.atlas(pair, atlases.pair("dog", "cat", 9)), folder)
        browser.open(write_html(folder, embedded_bytes=90_000).as_uri())
        shown = (
            "return [...document.querySelectorAll('.atlas .cell')]"
            ".filter((cell) => cell.checkVisibility() && cell.getBoundingClientRect().width === 64).length"
        )
        assert browser.run(shown) == 2 * 2 * 9
        assert EVIL[0] in browser.run("return document.querySelector('.atlas-tab').textContent")
        browser.run("document.getElementById('atlas-rows').focus()")
        browser.press(" ")
        assert browser.run(shown) == 2 * 3 * 9
        # The keys of a radio button stay its own, those of the cards work from there.
        browser.run("document.getElementById('atlas-0').focus()")
        browser.press("ARROW_RIGHT", "j")
        assert browser.run("return document.querySelector('.card.active').id") == "card-2"
        assert browser.run(shown) == 8 * 3 * 9
        sizes = browser.run(
            "return Promise.all([...document.querySelectorAll('.atlas image')].map((image) => new Promise((done) => {"
            "const probe = new Image(); probe.onload = () => done(probe.naturalWidth); probe.onerror = () => done(0);"
            "probe.src = image.getAttribute('href'); })))"
        )
        # Embedded as they were before they were enlarged, the rest from the files.
        assert set(sizes) == {9 * 32, 9 * 64}
        assert browser.run("return document.title") == "Method explanations, 2 images"
        assert browser.problems() == []

    def test_sentences_and_the_global_view_are_text_and_its_links_lead_to_cards(self, browser: Browser, tmp_path: Path):
        names = [*EVIL, *(f"{index:02d}.png" for index in range(40))]
        folder = with_global(tmp_path, names, target=EVIL[1])
        browser.open(write_html(folder).as_uri() + "#filter=kept&q=0")
        sentence = "return document.querySelector('.card .sentence').textContent"
        assert f"moved '{EVIL[1]}' only from 0.05 to 0.80: not flipped." in browser.run(sentence)
        assert EVIL[1] in browser.run("return document.querySelector('.whole-card h3').textContent")
        link = "const link = document.querySelectorAll('a.to-card')[5];"
        wanted = browser.run(f"{link} link.click(); return link.querySelector('.name').textContent")
        assert browser.run("return document.querySelector('.card.active .name').textContent") == wanted
        assert browser.run("return document.activeElement.classList.contains('active')")
        # A second click leads there again.
        browser.run(f"window.scrollTo(0, 0); {link} link.click()")
        assert browser.run("return document.querySelector('.card.active').getBoundingClientRect().top < innerHeight")
        broken = browser.run(
            "const images = [...document.querySelectorAll('.whole img')];"
            "return Promise.all(images.map((image) => image.decode())).then(() => 0, () => 1)"
        )
        assert broken == 0
        assert browser.run("return document.title") == "Method explanations, 46 images"
        browser.resize(420, 900)
        wide = browser.run("return document.documentElement.scrollWidth")
        browser.resize(1400, 1000)
        assert wide <= 420, "nothing sticks out of a narrow window"
        assert browser.problems() == []
