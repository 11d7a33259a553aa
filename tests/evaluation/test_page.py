"""Tests of ``cfe_lightning.evaluation.page``: what the page draws, and that no name becomes markup."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from cfe_lightning.evaluation.evaluate import Evaluation
from cfe_lightning.evaluation.page import charts, write_evaluation_html
from cfe_lightning.evaluation.summary import ResultRow
from cfe_lightning.evaluation.tables import save
from cfe_lightning.metrics.catalogue import METRICS
from cfe_lightning.metrics.statistics import skipped, summarise

NASTY = "<script>alert(1)</script>"


def row(name: str, shift: float = 0.0) -> ResultRow:
    per_image = {"l1": torch.full((6,), 0.1 + shift), "flip_rate": torch.tensor([True] * 3 + [False] * 3)}
    return ResultRow(
        name=name,
        measurements={metric.key: skipped("not measured") for metric in METRICS} | summarise(per_image),
        curves={
            "cout_target": torch.tensor([0.0, 0.5, 1.0]),
            "replaced": torch.tensor([0.0, 0.9, 1.0]),
            "path": torch.linspace(0, 1, 21),
            "dxai_label": torch.linspace(1, 0.5, 11),
        },
        per_image=per_image,
        predicted=torch.tensor([0, 0, 0, 1, 1, 1]),
        target=torch.tensor([1, 1, 1, 0, 0, 0]),
    )


def evaluation() -> Evaluation:
    return Evaluation(
        rows=[row("ours"), row(NASTY, 0.1)],
        image_names=[f"{index}.png" for index in range(6)],
        labels=torch.tensor([0, 0, 0, 1, 1, 1]),
        class_names=("cat", "<b>dog</b>"),
    )


def page(folder: Path, given: Evaluation) -> str:
    tables = save(given, folder, {})
    return write_evaluation_html(given, tables, folder, {"split": "test", "seed": "<0>"}).read_text(encoding="utf-8")


def test_curves_lie_where_their_values_say() -> None:
    found = {chart.title: chart for chart in charts(evaluation())}
    curves = {"Counterfactual transition (COUT)", "Along the path", "Removing the distinct part"}
    assert set(found) == curves | {"Flip rate against change"}

    # The area is 258 x 120 from (34, 8); pixels were exchanged at 0, 0.9 and 1.
    (ours, _) = found["Counterfactual transition (COUT)"].lines
    assert ours["points"] == "34.0,128.0 266.2,68.0 292.0,8.0"
    assert found["Removing the distinct part"].lines[0]["points"].startswith("34.0,8.0 59.8,14.0")
    # Points.
    dots = found["Flip rate against change"].dots
    assert [dot["y"] for dot in dots] == pytest.approx([68.0, 68.0])
    assert dots[0]["x"] < dots[1]["x"] < 292
    assert dots[0]["high"] < dots[0]["y"] < dots[0]["low"]


def test_the_page_shows_every_table_and_no_name_becomes_markup(tmp_path: Path) -> None:
    text = page(tmp_path, evaluation())
    # Names.
    assert NASTY not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<b>dog</b>" not in text
    assert "<dt>seed</dt><dd>&lt;0&gt;</dd>" in text

    # Content.
    for heading in ("At a glance", "Curves", "Paired differences", "Worst pair of classes", "All metrics"):
        assert f"{heading}<" in text, heading
    assert text.count("<polyline") == 6
    assert text.count("<circle") == 2

    # Policy.
    assert "http" not in re.sub(r"http-equiv", "", text)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert policy[1].startswith("default-src &#39;none&#39;; style-src &#39;sha256-")
    assert "script-src" not in policy[1]
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("of the user")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("table.md", "curves.npz", ".report.html.part", "metrics.json"):
        (out / name).symlink_to(tmp_path / "notes")
    page(out, evaluation())
    assert (tmp_path / "notes").read_text() == "of the user"
    assert not any(path.is_symlink() for path in out.iterdir())
    with np.load(out / "curves.npz") as curves:
        assert len(curves.files) > 0


def test_without_curves_there_is_no_chart(tmp_path: Path) -> None:
    given = evaluation()
    for one in given.rows:
        one.curves = {}
        one.measurements["l1"] = skipped("not measured")
    assert charts(given) == []
    assert ">Curves<" not in page(tmp_path, given)


def test_more_explainers_than_colours_are_told_apart_by_dashes() -> None:
    given = evaluation()
    given.rows = [row(f"number {index}") for index in range(12)]
    lines = next(chart for chart in charts(given) if chart.title == "Along the path").lines
    assert [(line["colour"], line["dashed"]) for line in lines[9:]] == [(9, False), (0, True), (1, True)]
