"""The page that shows a folder of explanations: one HTML file that opens without a network, made without torch."""

import contextlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup
from PIL import Image

from cfe_lightning.explaining.folder import OutputFolder
from cfe_lightning.explaining.names import ATLAS, OVERVIEW
from cfe_lightning.explaining.row import Row
from cfe_lightning.explaining.sentence import measured_sentence
from cfe_lightning.files.text import data_address
from cfe_lightning.report.atlas import read_atlas
from cfe_lightning.report.html import write_page
from cfe_lightning.report.overview import read_overview

#: Bytes of pictures that the page embeds, in the manifest's order; the rest is loaded from images/.
EMBEDDED_BYTES = 16 * 2**20
#: Longest side of an embedded picture, or of one step, in pixels.
THUMBNAIL = 160
#: Up to this side pictures are embedded without loss, because every pixel of a small image is seen.
_LOSSLESS = 64
_WIDEST_WEBP = 16_383


def write_html(output: Path, embedded_bytes: int = EMBEDDED_BYTES) -> Path:
    """Writes ``report.html`` from the manifest, the summary and the pictures of an output folder; returns its path.

    Args:
        output: A folder that ``explain.py`` wrote.
        embedded_bytes: Bytes of pictures that the page holds itself and shows without the folder. The global view
            takes up to a quarter of it, an atlas up to half of the rest.

    Raises:
        FileNotFoundError: If the folder holds no manifest or no summary.
        ValueError: If it holds an atlas or a global view that cannot be read.
    """
    # Manifest and summary.
    folder = OutputFolder(output)
    header = folder.header()
    if header is None or not (output / "summary.json").is_file():
        raise FileNotFoundError(f"{output} holds no manifest.jsonl and summary.json: give the --output of explain.py.")
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    files: dict[str, str] = next((row.files for row in folder.rows() if row.status == "ok"), {})

    # Views of the whole folder.
    whole = read_overview(output / OVERVIEW.file)
    if whole is not None:
        _find_cards(whole, folder, files)
        embedded_bytes -= _embed(_whole_places(whole), output, embedded_bytes // 4)
    atlas = read_atlas(output / ATLAS.file)
    if atlas is not None:
        directions = (direction for pair in atlas["pairs"] for direction in pair["directions"])
        places = ((one, "address", one["file"], one["table"], one["enlarged"]) for one in directions)
        embedded_bytes -= _embed(places, output, embedded_bytes // 2)

    # Page.
    method = str(summary["method"]).rpartition(".")[2]
    return write_page(
        output / "report.html",
        "report/report.html.j2",
        script="report/report.js",
        summary=summary,
        whole=whole,
        atlas=atlas,
        tiles=_tiles(summary),
        # Readers know a method by its class, but a baseline by its name on the command line.
        method=summary["untrained"] if method == "Baseline" else method,
        page=_json({"classes": summary["classes"], "files": files, "size": summary["image_size"]}),
        rows=_rows(folder, files, embedded_bytes),
    )


def _tiles(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the numbers on top of the page."""
    median, time = summary["s_per_image"].get("median"), "–"
    if median is not None:
        time = f"{median:.3g} s" if median >= 0.1 else f"{1000 * median:.3g} ms"
    return [
        _rate("Flip rate", summary["flip_rate"]),
        _rate("Flip rate, saved pixels", summary["flip_rate_saved"]),
        _measured("Gain of the target", summary["delta_p"], "{:+.3f}", "mean change of its probability"),
        _measured("Change L1", summary["l1"], "{:.4f}", "mean absolute change of a pixel, range 0 to 1"),
        {"title": "Time per image", "value": time, "note": f"median, on {summary['device']}"},
    ]


def _rate(title: str, rate: dict[str, Any]) -> dict[str, Any]:
    if "value" not in rate:
        return {"title": title, "value": "–", "note": rate["undefined"]}
    (low, high), value = rate["interval"], rate["value"]
    note = f"{round(value * rate['n']):,} of {rate['n']:,} (95%: {100 * low:.1f}–{high:.1%})"
    meter = {"low": 100 * low, "high": 100 * high, "value": 100 * value}
    return {"title": title, "value": f"{value:.1%}", "note": note, "meter": meter}


def _measured(title: str, mean: dict[str, Any], form: str, note: str) -> dict[str, Any]:
    if "value" not in mean:
        return {"title": title, "value": "–", "note": mean["undefined"]}
    return {"title": title, "value": form.format(mean["value"]), "note": note}


def _rows(folder: OutputFolder, files: dict[str, str], embedded_bytes: int) -> Iterator[Markup]:
    """Yields the rows as elements of a JSON list, without what the page does not show."""
    separator = ""
    for row in folder.rows():
        shown = {key: value for key, value in vars(row).items() if key not in ("source", "digests")}
        if row.files == files:
            del shown["files"]
        if said := measured_sentence(row):
            shown["sentence"] = said
        if row.status == "ok" and embedded_bytes > 0:
            shown["thumbs"] = _thumbnails(folder.path / row.folder, shown.get("files", files), row)
            embedded_bytes -= sum(map(len, shown["thumbs"].values()))
        yield Markup(separator) + _json(shown)
        separator = ",\n"


def _find_cards(whole: dict[str, Any], folder: OutputFolder, files: dict[str, str]) -> None:
    """Gives the typical examples the numbers of their cards and their pictures, and drops examples without a card."""
    cards: dict[str, dict[str, Any]] = {example["name"]: {} for pair in whole["pairs"] for example in pair["typical"]}
    for number, row in enumerate((row for row in folder.rows() if row.status == "ok"), start=1):
        given = files if row.files is None else row.files
        if row.name in cards and {"image", "counterfactual"} <= given.keys():
            addresses = [f"{row.folder}/{given[key]}" for key in ("image", "counterfactual")]
            cards[row.name] = {"card": number, "files": addresses, "addresses": list(map(quote, addresses))}
    for pair in whole["pairs"]:
        found = [example | cards[example["name"]] for example in pair["typical"]]
        pair["typical"] = [example for example in found if "card" in example]


def _whole_places(whole: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Yields the pictures of the global view, then those of its examples, for ``_embed``."""
    for picture in (picture for pair in whole["pairs"] for picture in pair["pictures"]):
        yield picture, "address", picture["file"]
    for example in (example for pair in whole["pairs"] for example in pair["typical"]):
        yield from ((example["addresses"], index, file) for index, file in enumerate(example["files"]))


def _embed(places: Iterable[tuple[Any, ...]], output: Path, budget: int) -> int:
    """Replaces addresses of files by data addresses until these have ``budget`` bytes, and returns the bytes used.

    Places hold the container of an address, its key there, the file, and further arguments of ``_thumbnail``.
    """
    used = 0
    for holder, key, file, *form in places:
        if used >= budget:
            break
        # A picture that cannot be read keeps its file's address, as on the cards.
        with contextlib.suppress(OSError, ValueError, Image.DecompressionBombError):
            holder[key] = _thumbnail(output / file, *form)
            used += len(holder[key])
    return used


def _thumbnails(folder: Path, files: dict[str, str], row: Row) -> dict[str, str]:
    """Returns the pictures of a row as data addresses; pictures that cannot be read are left to the browser."""
    thumbs = {}
    for key, file in files.items():
        frames = len(row.curve["strength"]) if row.curve and key == "steps" else 1
        with contextlib.suppress(OSError):
            thumbs[key] = _thumbnail(folder / file, (frames, 1))
    return thumbs


def _thumbnail(path: Path, cells: tuple[int, int] = (1, 1), enlarged: int = 1) -> str:
    """Returns a picture, or a table of ``cells`` (columns, rows) of ``enlarged`` pictures, as a data address."""
    buffer, (columns, rows) = io.BytesIO(), cells
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
    cell_size = (picture.width // columns, picture.height // rows)
    width, height = (max(1, round(side * THUMBNAIL / max(cell_size))) for side in cell_size)
    shrunk = Image.new("RGB", (width * columns, height * rows))
    for row in range(rows):
        top, bottom = (index * picture.height // rows for index in (row, row + 1))
        for column in range(columns):
            left, right = (index * picture.width // columns for index in (column, column + 1))
            cell = picture.crop((left, top, right, bottom)).resize((width, height), Image.Resampling.BOX)
            shrunk.paste(cell, (column * width, row * height))
    return shrunk


def _json(value: object) -> Markup:
    """Returns JSON that is safe inside a script element, whatever the names are: no tag can open or close there."""
    text = json.dumps(value, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
