"""The results of the known-cause bench as files: ``known_cause.md``, ``.csv``, ``.json`` and ``.html``."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.evaluation.known_cause import BLIND, USES, VALUES, Bench, MarkUse, Verdict, headline
from cfe_lightning.evaluation.tables import Table, write_csv
from cfe_lightning.explanation import Explanation
from cfe_lightning.files.atomic import atomic_write, write_json
from cfe_lightning.files.text import data_address
from cfe_lightning.metrics.pointing import pointed_at
from cfe_lightning.metrics.statistics import Measurement, summarise
from cfe_lightning.report.html import write_page

#: Name of the picture of the right answer in a cell's folder; those of explainers are named after them.
TRUTH = "truth"
_WORDS: dict[Verdict, str] = {"uses": "uses it", "between": "in between", "blind": "does not"}
#: Meanings of the leading table's columns.
_MEANINGS = (
    "- AUC (higher is better, 0.5 is chance): how well the alarm tells images explained for classifiers that use the "
    "mark from those for classifiers that do not; intervals 95 %, over scenes. AUC of classifiers: the same for their "
    "mean alarms.\n"
    "- alarm: share of an explanation's change on the places of marks, over the share of the image that they cover.\n"
    "- on the cue: share of the change on the pixels that make the class. Where a classifier uses the mark, a right "
    "explanation leaves the cue alone.\n"
    "- to the truth: mean distance of the counterfactual from the exact one (L1); flip: share of counterfactuals that "
    "change the decision. Both where the mark is unused."
)
#: Drawing area of a strip plot, in units of the SVG.
_LEFT, _WIDTH = 56.0, 236.0
_HEIGHTS: dict[Verdict, float] = {"uses": 25.0, "blind": 63.0}


def save(bench: Bench, folder: Path, settings: Mapping[str, Any], pictures: Path, chance: float) -> list[Table]:
    """Writes all files to an existing folder, in place of an earlier call's, and returns the tables of the text.

    Args:
        bench: Results of the bench.
        folder: Existing folder for the files.
        settings: Plain data that say how the results were measured.
        pictures: Folder with one folder per cell, which holds the pictures of ``draw`` named after explainers.
        chance: Share of an image that the places of marks cover, 0 to 1.
    """
    # Text.
    heads = {name: headline(bench, name, seed=int(settings.get("seed", 0))) for name in bench.explainers}
    tables = [_headline_table(bench, heads), _use_table(bench), _full_table(bench)]
    with atomic_write(folder / "known_cause.md") as file:
        file.write("# Known causes\n\n" + "\n".join(table.markdown() for table in tables))

    # Numbers; a NaN would be our mistake and is refused.
    cells = _cells(bench)
    named = ["cell", "cue", "cue_size", "p", "accuracy", "use", "decisions", "verdict", "explainer"]
    heading = [*named, *VALUES, "n", "failure"]
    write_csv(folder / "known_cause.csv", [heading, *([cell[key] for key in heading] for cell in cells)])
    content = {
        "chance": chance,
        "classifiers": [_use(use) for use in bench.uses],
        "explainers": {name: {key: asdict(one) for key, one in found.items()} for name, found in heads.items()},
        "cells": cells,
    }
    write_json(folder / "known_cause.json", {**settings, **content})

    # Page.
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
    """Saves images, counterfactuals and maps of their change side by side, one row per image, unscaled."""
    shown = explanation.counterfactual
    blank = torch.ones_like(explanation.image) if shown is None else shown.clamp(-1, 1)
    images.save_image(images.grid([explanation.image, blank, images.heat_map(pointed_at(explanation))], 1), path)


def draw_truth(image: Tensor, counterfactual: Tensor, path: Path) -> None:
    """Saves the same picture for images and their exact counterfactuals, [B, C, H, W] each."""
    where = (image - counterfactual).abs().mean(dim=1, keepdim=True)
    images.save_image(images.grid([image, counterfactual, images.heat_map(where)], 1), path)


def _headline_table(bench: Bench, heads: Mapping[str, Mapping[str, Measurement]]) -> Table:
    # Columns.
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

    # Note.
    count = {verdict: sum(use.verdict == verdict for use in bench.uses) for verdict in _WORDS}
    counts = f"{count['uses']} classifiers use the mark, {count['blind']} do not, {count['between']} lie in between"
    reasons = {found["auc_images"].reason: None for found in heads.values() if found["auc_images"].status != "ok"}
    note = [f"- {counts} and count in neither group.", _MEANINGS, *(f"- no AUC: {reason}." for reason in reasons)]
    return Table(title="Alarm for a shortcut", heading=["explainer", *columns], lines=lines, note="\n".join(note))


def _use_table(bench: Bench) -> Table:
    lines = []
    for use in bench.uses:
        numbers = _use(use)
        shown = (f"{numbers[key]:.3f}" for key in ("accuracy", "use", "decisions"))
        lines.append([use.cell.cue, f"{use.cell.cue_size:g}", f"{use.cell.p:g}", *shown, _WORDS[use.verdict]])
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
    if failed := "\n".join(f"- {name} on {cell}: {reason}" for (cell, name), reason in bench.failures.items()):
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
    """Returns one row per cell and explainer with means over images; None is a mean that does not exist."""
    rows = []
    for use in bench.uses:
        for name in bench.explainers:
            place = use.cell.name, name
            found = summarise(bench.values.get(place, {}), resamples=1)
            measured = {key: found[key].value if key in found else None for key in VALUES}
            count, reason = found["alarm"].n_used if found else 0, bench.failures.get(place, "")
            rows.append({**_use(use), "explainer": name, **measured, "n": count, "failure": reason})
    return rows


def _strip(bench: Bench, name: str) -> dict[str, str]:
    """Draws one explainer's dots as two paths: an SVG element per image would make the page a hundred times larger."""
    strip = {"name": name}
    for verdict, height in _HEIGHTS.items():
        cells = bench.of(name, "mark_share", verdict)
        shares = torch.cat(cells) if cells else torch.zeros(0)
        # The golden ratio spreads neighbours over the height, so that their dots do not overlap.
        spread = (torch.arange(len(shares)) * 0.618034 % 1 - 0.5) * 26
        strip[verdict] = "".join(
            f"M{_x(share):.1f} {height + offset:.1f}h0"
            for share, offset in zip(shares.tolist(), spread.tolist(), strict=True)
            # NaN differs from itself and gets no dot.
            if share == share
        )
    return strip


def _x(share: float) -> float:
    return _LEFT + _WIDTH * share**0.5


def _scenes(bench: Bench, folder: Path) -> list[dict[str, Any]]:
    """Returns the pictures of each cue at its middle size, for the least and the most informative mark."""
    scenes = []
    for cue in dict.fromkeys(use.cell.cue for use in bench.uses):
        # Classifiers.
        of_cue = sorted((use for use in bench.uses if use.cell.cue == cue), key=lambda use: use.cell.p)
        sizes = sorted({use.cell.cue_size for use in of_cue})
        uses = [use for use in of_cue if use.cell.cue_size == sizes[len(sizes) // 2]]
        ends = uses if len(uses) < 2 else [uses[0], uses[-1]]
        headings = [f"p = {use.cell.p:g} (use of the mark {float(use.probability.mean()):.2f})" for use in ends]

        # Pictures.
        rows = [("right for the cue", [_embedded(folder / use.cell.name / f"{TRUTH}.png") for use in ends])]
        for name in bench.explainers:
            # An earlier call may have left a picture of an explainer that failed in this one.
            here = [(use.cell.name, (use.cell.name, name) in bench.values) for use in ends]
            rows.append((name, [_embedded(folder / cell / f"{name}.png") if given else "" for cell, given in here]))
        title = f"{cue.capitalize()}, size {ends[0].cell.cue_size:g}"
        scenes.append({"title": title, "headings": headings, "rows": rows})
    return scenes


def _embedded(path: Path) -> str:
    return data_address(path.read_bytes(), "png") if path.is_file() else ""


def _text(measurement: Measurement, *, interval: bool) -> str:
    if measurement.value is None:
        return ""
    ends = f" [{measurement.low:.3f}, {measurement.high:.3f}]" if interval and measurement.low is not None else ""
    return f"{measurement.value:.3f}{ends}"
