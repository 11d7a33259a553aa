import base64
import hashlib
import html
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser
from PIL import Image

from cfe_lightning.manifest import OutputFolder, Row, image_folder
from cfe_lightning.report import write_html

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
    return {
        **{"name": name, "source": [1, 1], "status": "ok", "predicted": "cat" if index % 2 else "dog"},
        **{"target": "dog" if index % 2 else "<b>owl</b>", "p_predicted_before": 0.9, "p_target_before": 0.05},
        **{"p_predicted_after": 1 - after, "p_target_after": after, "flipped": flipped, "flipped_saved": flipped},
        **{"l1": 0.01 * (index + 1), "seconds": 0.5, "note": None, "difference_scale": 0.25, "folder": place},
        **{"files": {key: f"{key}.png" for key in KEYS}, "gains": {"distinct": 4.0}, "scores": {"agreement": 0.5}},
        "curve": {"strength": STRENGTHS, "predicted": [0.9, 0.8, 0.6, 0.3, 0.1], "target": [0.1, 0.2, 0.4, 0.7, 0.9]},
    }


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
    rows += [{"name": name, "source": [0, 0], "status": "failed", "error": f"Why <{name}>."} for name in failures]
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
