"""The page that shows a folder of explanations: one HTML file that opens without a network, made from the manifest.

Nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup
from PIL import Image

from cfe_lightning.explaining.folder import OutputFolder, Row
from cfe_lightning.explaining.sentence import measured_sentence
from cfe_lightning.files.text import data_address
from cfe_lightning.report.atlas import read_atlas
from cfe_lightning.report.html import write_page
from cfe_lightning.report.overview import read_overview

#: Pictures are embedded, in the manifest's order, until they have this many bytes; the rest is loaded from images/.
EMBEDDED_BYTES = 16 * 2**20
#: Longest side of an embedded picture, or of one step, in pixels.
THUMBNAIL = 160
#: Up to this side pictures are embedded without loss: of a small image every pixel is seen.
_LOSSLESS = 64
_WIDEST_WEBP = 16_383


def write_html(output: Path, embedded_bytes: int = EMBEDDED_BYTES) -> Path:
    """Writes ``report.html`` from the manifest, the summary and the pictures of an output folder.

    Args:
        output: A folder that ``explain.py`` wrote.
        embedded_bytes: How much of the pictures the page holds itself; it shows those without the folder. The global
            view takes up to a quarter of it, an atlas up to half of the rest.

    Returns:
        The page.

    Raises:
        FileNotFoundError: If the folder holds no manifest or no summary.
        ValueError: If it holds an atlas or a global view that cannot be read.
    """
    folder = OutputFolder(output)
    header = folder.header()
    if header is None or not (output / "summary.json").is_file():
        raise FileNotFoundError(f"{output} holds no manifest.jsonl and summary.json: give the --output of explain.py.")
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    files: dict[str, str] = next((row["files"] for row in folder.rows() if row["status"] == "ok"), {})
    whole = read_overview(output / "global.json")
    if whole is not None:
        _find_cards(whole, folder, files)
        embedded_bytes -= _embed_whole(whole, output, embedded_bytes // 4)
    atlas = read_atlas(output / "atlas.json")
    if atlas is not None:
        embedded_bytes -= _embed(atlas, output, embedded_bytes // 2)
    return write_page(
        output / "report.html",
        "report/report.html.j2",
        script="report/report.js",
        summary=summary,
        whole=whole,
        atlas=atlas,
        tiles=_tiles(summary),
        method=_method(summary),
        page=_json({"classes": summary["classes"], "files": files, "size": summary["image_size"]}),
        rows=_rows(folder, files, embedded_bytes),
    )


def _method(summary: dict[str, Any]) -> str:
    """The method's name as a reader knows it: a class, or a baseline by the name that was asked for."""
    kind = str(summary["method"]).rpartition(".")[2]
    return str(summary["untrained"]) if kind == "Baseline" else kind


def _tiles(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The numbers on top of the page."""
    tiles = [_rate("Flip rate", summary["flip_rate"]), _rate("Flip rate, saved pixels", summary["flip_rate_saved"])]
    tiles.append(_measured("Gain of the target", summary["delta_p"], "{:+.3f}", "mean change of its probability"))
    tiles.append(_measured("Change L1", summary["l1"], "{:.4f}", "mean absolute change of a pixel, range 0 to 1"))
    seconds = summary["s_per_image"]
    text = _duration(seconds["median"]) if "median" in seconds else "–"
    tiles.append({"title": "Time per image", "value": text, "note": f"median, on {summary['device']}"})
    return tiles


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"


def _rate(title: str, rate: dict[str, Any]) -> dict[str, Any]:
    if "value" not in rate:
        return {"title": title, "value": "–", "note": rate["undefined"]}
    low, high = rate["interval"]
    flipped = round(rate["value"] * rate["n"])
    return {
        "title": title,
        "value": f"{rate['value']:.1%}",
        "note": f"{flipped:,} of {rate['n']:,} (95%: {100 * low:.1f}–{high:.1%})",
        "meter": {"low": 100 * low, "high": 100 * high, "value": 100 * rate["value"]},
    }


def _measured(title: str, mean: dict[str, Any], form: str, note: str) -> dict[str, Any]:
    if "value" not in mean:
        return {"title": title, "value": "–", "note": mean["undefined"]}
    return {"title": title, "value": form.format(mean["value"]), "note": note}


def _rows(folder: OutputFolder, files: dict[str, str], embedded_bytes: int) -> Iterator[Markup]:
    """The rows as elements of a JSON list, one after the other."""
    separator = ""
    for row in folder.rows():
        for key in ("source", "digests"):
            row.pop(key, None)
        if row.get("files") == files:
            del row["files"]
        if said := measured_sentence(row):
            row["sentence"] = said
        if row["status"] == "ok" and embedded_bytes > 0:
            row["thumbs"] = _thumbnails(folder.path / row["folder"], row.get("files", files), row)
            embedded_bytes -= sum(map(len, row["thumbs"].values()))
        yield Markup(separator) + _json(row)
        separator = ",\n"


def _find_cards(whole: dict[str, Any], folder: OutputFolder, files: dict[str, str]) -> None:
    """Gives the typical examples the numbers of their cards and their pictures; what has no card is left out."""
    cards: dict[str, dict[str, Any]] = {example["name"]: {} for pair in whole["pairs"] for example in pair["typical"]}
    done = (row for row in folder.rows() if row["status"] == "ok")
    for number, row in enumerate(done, start=1):
        given = row.get("files", files)
        if row["name"] in cards and {"image", "counterfactual"} <= given.keys():
            addresses = [f"{row['folder']}/{given[key]}" for key in ("image", "counterfactual")]
            cards[row["name"]] = {"card": number, "files": addresses, "addresses": list(map(quote, addresses))}
    for pair in whole["pairs"]:
        found = [example | cards[example["name"]] for example in pair["typical"]]
        pair["typical"] = [example for example in found if "card" in example]


def _embed_whole(whole: dict[str, Any], output: Path, budget: int) -> int:
    """Gives the pictures of the global view their data addresses until they have ``budget`` bytes; returns how many."""
    used = 0
    pictures = [picture for pair in whole["pairs"] for picture in pair["pictures"]]
    places: list[tuple[Any, Any, str]] = [(picture, "address", picture["file"]) for picture in pictures]
    examples = [example for pair in whole["pairs"] for example in pair["typical"]]
    places += [(ex["addresses"], index, file) for ex in examples for index, file in enumerate(ex["files"])]
    for holder, key, file in places:
        if used >= budget:
            break
        with contextlib.suppress(OSError, ValueError, Image.DecompressionBombError):
            holder[key] = _thumbnail(output / file, (1, 1))
            used += len(holder[key])
    return used


def _embed(atlas: dict[str, Any], output: Path, budget: int) -> int:
    """Gives the directions' pictures their data addresses until they have ``budget`` bytes; returns how many."""
    used = 0
    for direction in (direction for pair in atlas["pairs"] for direction in pair["directions"]):
        if used >= budget:
            break
        # Of a picture that cannot be read the file's address stays, as with the cards.
        with contextlib.suppress(OSError, ValueError, Image.DecompressionBombError):
            direction["address"] = _thumbnail(output / direction["file"], direction["table"], direction["enlarged"])
            used += len(direction["address"])
    return used


def _thumbnails(folder: Path, files: dict[str, str], row: Row) -> dict[str, str]:
    """Every picture of a row as a data address; pictures that cannot be read are left to the browser."""
    frames = {"steps": len(row["curve"]["strength"])} if "curve" in row else {}
    thumbs = {}
    for key, file in files.items():
        try:
            thumbs[key] = _thumbnail(folder / file, (frames.get(key, 1), 1))
        except OSError:
            continue
    return thumbs


def _thumbnail(path: Path, cells: tuple[int, int], enlarged: int = 1) -> str:
    """A picture, or a table of ``cells`` (columns, rows) of pictures that was ``enlarged``, as a data address."""
    buffer = io.BytesIO()
    columns, rows = cells
    with Image.open(path) as opened:
        picture: Image.Image = opened
        if enlarged > 1:
            picture = opened.resize((opened.width // enlarged, opened.height // enlarged), Image.Resampling.NEAREST)
        longest = max(picture.width // columns, picture.height // rows)
        if longest > THUMBNAIL:
            picture = _shrink(picture, columns, rows)
        lossless = longest <= _LOSSLESS
        form = "WEBP" if max(picture.size) <= _WIDEST_WEBP else "PNG"
        picture.save(buffer, format=form, lossless=lossless, quality=0 if lossless else 88, method=1)
    return data_address(buffer.getvalue(), form.lower())


def _shrink(picture: Image.Image, columns: int, rows: int) -> Image.Image:
    """Shrinks a table of pictures cell by cell: resizing it as a whole would blend neighbours."""
    width, height = picture.width // columns, picture.height // rows
    longest = max(width, height)
    width, height = (max(1, round(side * THUMBNAIL / longest)) for side in (width, height))
    shrunk = Image.new("RGB", (width * columns, height * rows))
    for row in range(rows):
        top, bottom = (index * picture.height // rows for index in (row, row + 1))
        for column in range(columns):
            left, right = (index * picture.width // columns for index in (column, column + 1))
            cell = picture.crop((left, top, right, bottom)).resize((width, height), Image.Resampling.BOX)
            shrunk.paste(cell, (column * width, row * height))
    return shrunk


def _json(value: object) -> Markup:
    """JSON that is safe inside a script element, whatever the names are: no tag can open or close there."""
    text = json.dumps(value, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
