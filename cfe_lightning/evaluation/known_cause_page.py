"""The known-cause bench as files: ``known_cause.md``, ``.csv``, ``.json`` and a page, ``known_cause.html``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.evaluation.known_cause import BLIND, USES, VALUES, Bench, MarkUse, Verdict, headline
from cfe_lightning.evaluation.tables import Table
from cfe_lightning.explanation import Explanation
from cfe_lightning.files.atomic import atomic_write
from cfe_lightning.files.text import data_address
from cfe_lightning.metrics.pointing import pointed_at
from cfe_lightning.metrics.statistics import Measurement, summarise
from cfe_lightning.report.html import write_page

#: Picture of the right answer in a cell's folder; those of explainers are named after them.
TRUTH = "truth"
_WORDS: dict[Verdict, str] = {"uses": "uses it", "between": "in between", "blind": "does not"}
#: Of the drawing area of a strip plot, in units of the SVG.
_LEFT, _WIDTH = 56.0, 236.0
_HEIGHTS: dict[Verdict, float] = {"uses": 25.0, "blind": 63.0}


def save(bench: Bench, folder: Path, settings: Mapping[str, Any], pictures: Path, chance: float) -> list[Table]:
    """Writes all files; those of an earlier call are replaced.

    Args:
        bench: The results.
        folder: Exists.
        settings: Plain data that say how they came about.
        pictures: Folder with one folder per cell, which holds pictures named after explainers (see ``draw``).
        chance: Share of an image that marks' places cover.

    Returns:
        What ``known_cause.md`` shows.
    """
    heads = {name: headline(bench, name, seed=int(settings.get("seed", 0))) for name in bench.explainers}
    tables = [_headline_table(bench, heads), _use_table(bench), _full_table(bench)]
    text = "\n".join(table.markdown() for table in tables)
    _write(folder / "known_cause.md", f"# Known causes\n\n{text}")
    _write(folder / "known_cause.csv", _csv(bench))
    content = {
        **settings,
        "chance": chance,
        "classifiers": [_use(use) for use in bench.uses],
        "explainers": {name: {key: asdict(one) for key, one in found.items()} for name, found in heads.items()},
        "cells": _cells(bench),
    }
    # allow_nan=False: a NaN that got this far is our mistake and must not be written.
    _write(folder / "known_cause.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    facts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    write_page(
        folder / "known_cause.html",
        "evaluation/known_cause.html.j2",
        styles=["evaluation/evaluation.css", "evaluation/known_cause.css"],
        bench=bench,
        tables=tables,
        strips=[_strip(bench, name) for name in bench.explainers],
        ticks=[(_x(share), f"{share:g}") for share in (0, 0.1, 0.5, 1)],
        chance=_x(chance),
        scenes=_scenes(bench, pictures),
        facts=facts,
    )
    return tables


def draw(explanation: Explanation, path: Path) -> None:
    """Saves image, counterfactual and where it changes side by side, one row per image, at the images' own size."""
    shown = explanation.counterfactual
    blank = torch.ones_like(explanation.image) if shown is None else shown.clamp(-1, 1)
    images.save_image(images.grid([explanation.image, blank, images.heat_map(pointed_at(explanation))], 1), path)


def draw_truth(image: Tensor, counterfactual: Tensor, path: Path) -> None:
    """The same picture of exact counterfactuals, [B, C, H, W] each."""
    where = (image - counterfactual).abs().mean(dim=1, keepdim=True)
    images.save_image(images.grid([image, counterfactual, images.heat_map(where)], 1), path)


def _headline_table(bench: Bench, heads: Mapping[str, Mapping[str, Measurement]]) -> Table:
    cues = list(dict.fromkeys(use.cell.cue for use in bench.uses))
    columns = {
        "AUC": "auc_images",
        "AUC of classifiers": "auc_classifiers",
        **({f"AUC {cue}": f"auc_{cue}" for cue in cues} if len(cues) > 1 else {}),
        "alarm, used": "alarm_uses",
        "alarm, unused": "alarm_blind",
        "on the cue, used": "cue_share_uses",
        "on the cue, unused": "cue_share_blind",
        "to the truth, unused": "truth_l1_blind",
        "flip": "flip_blind",
    }
    lines = [
        [name, *(_text(found[key], interval=key in ("auc_images", "auc_classifiers")) for key in columns.values())]
        for name, found in heads.items()
    ]
    counts = {verdict: sum(use.verdict == verdict for use in bench.uses) for verdict in _WORDS}
    reasons = {found["auc_images"].reason: None for found in heads.values() if found["auc_images"].status != "ok"}
    note = f"""\
- {counts["uses"]} classifiers use the mark, {counts["blind"]} do not, {counts["between"]} lie in between and count in
  neither group.
- AUC (higher is better, 0.5 is chance): how well the alarm tells images explained for classifiers that use the mark
  from those for classifiers that do not; intervals 95 %, over scenes. Of classifiers: of their mean alarms.
- alarm: share of an explanation's change on the places of marks, over the share of the image that they cover.
- on the cue: share of the change on the pixels that make the class. Of a classifier that uses the mark, a right
  explanation leaves the cue.
- to the truth: mean distance of the counterfactual from the exact one (L1); flip: share of counterfactuals that change
  the decision. Both where the mark is unused."""
    note = "\n".join([note.replace("\n  ", " "), *(f"- no AUC: {reason}." for reason in reasons)])
    return Table(title="Alarm for a shortcut", heading=["explainer", *columns], lines=lines, note=note)


def _use_table(bench: Bench) -> Table:
    lines = []
    for use in bench.uses:
        numbers = _use(use)
        shown = (f"{numbers[key]:.3f}" for key in ("accuracy", "use", "decisions"))
        cell = use.cell
        lines.append([cell.cue, f"{cell.cue_size:g}", f"{cell.p:g}", *shown, _WORDS[use.verdict]])
    return Table(
        title="Use of the mark, by intervention",
        heading=["cue", "size", "p", "accuracy", "change of p(decided)", "decisions changed", "the mark"],
        lines=lines,
        note="The mark of each test image is moved to the corner of another class, everything else bit for bit equal. "
        f"From a mean change of {USES:g} on a classifier uses the mark, below {BLIND:g} it does not. Marks tell "
        "nothing on test images: accuracy falls where the classifier relies on them.",
    )


def _full_table(bench: Bench) -> Table:
    lines = [
        [row["cell"], row["explainer"], *("" if row[key] is None else f"{row[key]:.4g}" for key in VALUES)]
        for row in _cells(bench)
    ]
    note = "\n".join(f"- `{key}`: {meaning}" for key, meaning in VALUES.items())
    failed = "\n".join(f"- {name} on {cell}: {reason}" for (cell, name), reason in bench.failures.items())
    if failed:
        note += f"\n\nNot computed:\n\n{failed}"
    return Table(title="All cells", heading=["cell", "explainer", *VALUES], lines=lines, note=note)


def _use(use: MarkUse) -> dict[str, Any]:
    return {
        **asdict(use.cell),
        "cell": use.cell.name,
        "accuracy": float(use.correct.double().mean()),
        "use": float(use.probability.mean()),
        "decisions": float(use.decision.double().mean()),
        "verdict": use.verdict,
    }


def _cells(bench: Bench) -> list[dict[str, Any]]:
    """One row per cell and explainer: means over images, None where there is none."""
    rows = []
    for use in bench.uses:
        for name in bench.explainers:
            found = summarise(bench.values.get((use.cell.name, name), {}), resamples=1)
            measured = {key: found[key].value if key in found else None for key in VALUES}
            count = found["alarm"].n_used if "alarm" in found else 0
            reason = bench.failures.get((use.cell.name, name), "")
            rows.append({**_use(use), "explainer": name, **measured, "n": count, "failure": reason})
    return rows


def _csv(bench: Bench) -> str:
    """One line per cell and explainer; an empty cell is a number that does not exist."""
    buffer = io.StringIO()
    heading = ["cell", "cue", "cue_size", "p", "accuracy", "use", "decisions", "verdict", "explainer"]
    writer = csv.DictWriter(buffer, [*heading, *VALUES, "n", "failure"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(_cells(bench))
    return buffer.getvalue()


def _strip(bench: Bench, name: str) -> dict[str, str]:
    """The dots of one explainer as paths of points: a mark per image would make the page a hundred times larger."""
    strip = {"name": name}
    for verdict, height in _HEIGHTS.items():
        cells = bench.of(name, "mark_share", verdict)
        shares = torch.cat(cells) if cells else torch.zeros(0)
        # Spread over the height by the golden ratio: dots of neighbours do not lie on each other.
        spread = (torch.arange(len(shares)) * 0.618034 % 1 - 0.5) * 26
        strip[verdict] = "".join(
            f"M{_x(share):.1f} {height + offset:.1f}h0"
            for share, offset in zip(shares.tolist(), spread.tolist(), strict=True)
            if share == share
        )
    return strip


def _x(share: float) -> float:
    return _LEFT + _WIDTH * share**0.5


def _scenes(bench: Bench, folder: Path) -> list[dict[str, Any]]:
    """Per cue the pictures of the classifiers with the least and the most informative mark, of the middle size."""
    scenes = []
    for cue in dict.fromkeys(use.cell.cue for use in bench.uses):
        of_cue = [use for use in bench.uses if use.cell.cue == cue]
        sizes = sorted({use.cell.cue_size for use in of_cue})
        uses = sorted(
            (use for use in of_cue if use.cell.cue_size == sizes[len(sizes) // 2]), key=lambda use: use.cell.p
        )
        ends = uses if len(uses) < 2 else [uses[0], uses[-1]]
        headings = [f"p = {use.cell.p:g} (use of the mark {float(use.probability.mean()):.2f})" for use in ends]
        rows = [
            (
                "right for the cue" if name == TRUTH else name,
                # Of an explainer that failed now, an earlier call may have left a picture.
                [
                    _embedded(folder / u.cell.name / f"{name}.png")
                    if name == TRUTH or (u.cell.name, name) in bench.values
                    else ""
                    for u in ends
                ],
            )
            for name in (TRUTH, *bench.explainers)
        ]
        title = f"{cue.capitalize()}, size {ends[0].cell.cue_size:g}"
        scenes.append({"title": title, "headings": headings, "rows": rows})
    return scenes


def _embedded(path: Path) -> str:
    if not path.is_file():
        return ""
    return data_address(path.read_bytes(), "png")


def _text(measurement: Measurement, *, interval: bool) -> str:
    if measurement.value is None:
        return ""
    ends = f" [{measurement.low:.3f}, {measurement.high:.3f}]" if interval and measurement.low is not None else ""
    return f"{measurement.value:.3f}{ends}"


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text)
