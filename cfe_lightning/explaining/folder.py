"""The output folder of an explanation run: which images are done, the manifest and the summary. Knows no tensors.

The folder holds::

    manifest.jsonl          header, then one row per image: what resuming and the report read
    manifest.<rank>.jsonl   rows of the run in progress, one file per process; merged into manifest.jsonl
    manifest.<i>of<n>-<rank>.jsonl   rows of one shard; the run without shards merges them
    manifest.csv            the same rows as a table
    summary.json            counts and means
    report.html             see ``cfe_lightning.report.page``
    verification.json       what ``explain.py --verify`` found
    images/<name>/...       pictures of one image, see ``image_folder``
    atlas.json, atlas/      directions of the whole data set, of methods that have some: see ``cfe_lightning.atlas``
    global.json, global/    what the changes of all images have in common: see ``cfe_lightning.explaining.overview``

A batch of rows counts only with the line that closes it, so whatever kills a run costs at most the batch in flight.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from cfe_lightning.explaining.row import is_row
from cfe_lightning.explaining.sentence import measured_sentence
from cfe_lightning.files.atomic import atomic_write, refuse_links, write_json
from cfe_lightning.files.trust import present_path

SCHEMA = 1
#: Of atlas.json, and the pictures beside it that a writer has left, whole or not.
ATLAS_SCHEMA = 1
ATLAS_PICTURE = re.compile(r"\d+-\d+\.png|\..+\.part")
#: Of global.json, likewise.
GLOBAL_SCHEMA = 1
GLOBAL_PICTURE = re.compile(r"\d+-(change|strength)\.png|\..+\.part")
#: Pairs of global.json with pictures and examples; of the others there are numbers. As many the page shows.
MAX_PICTURED = 12
#: Columns of manifest.csv that every run has; parts, gains and scores follow with prefixes.
COLUMNS = (
    *("name", "status", "predicted", "p_predicted_before", "p_predicted_after"),
    *(
        "target",
        "p_target_before",
        "p_target_after",
        "p_predicted_saved",
        "p_target_saved",
        "flipped",
        "flipped_saved",
        "l1",
        *("changed_area", "where", "where_share", "survives", "lost_under"),
        *("attribution_where", "attribution_share", "sentence"),
        "seconds",
        "note",
        "error",
    ),
    *("image", "counterfactual", "difference", "attribution", "steps", "motion"),
)
#: Flip rates of floats and of the saved pixels that differ by more than this hint at changes below one grey level.
QUANTISATION_GAP = 0.005

Row = dict[str, Any]
Source = list[int]


class Shard(NamedTuple):
    """One of several runs that share an input without knowing of each other.

    Attributes:
        number: This one, from 1 to ``total``.
        total: How many there are.
    """

    number: int
    total: int

    def __str__(self) -> str:
        return f"{self.number}of{self.total}"

    def own(self, batches: list[list[str]]) -> list[list[str]]:
        """Every ``total``-th batch: whole batches, so that each meets the images that it meets without shards."""
        return batches[self.number - 1 :: self.total]


_OURS = (
    "manifest.jsonl",
    "manifest.csv",
    "summary.json",
    "report.html",
    "verification.json",
    "images",
    "atlas.json",
    "atlas",
    "global.json",
    "global",
)
_PICTURE = re.compile(r"(image|counterfactual|difference|attribution|steps|motion|part_.+)\.png|\..+\.part")
_PLAIN = re.compile(r"[a-z0-9_][a-z0-9_ .-]*(?<![ .])")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?")
_LONGEST_COMPONENT = 80
_LONGEST_FOLDER = 160
#: Merged rows that one line closes: whoever reads them holds so many at a time.
_ROWS_TOGETHER = 256


class OutputFolder:
    """Where explanations of one input folder by one checkpoint are collected, over as many runs as it takes.

    Args:
        path: The folder; need not exist yet.
        shard: The run is one of several that write here at the same time: it reads and writes its own rows only, and
            merges nothing.
    """

    def __init__(self, path: Path, shard: Shard | None = None) -> None:
        self.path = path
        self.shard = shard
        self.manifest_path = path / "manifest.jsonl"

    def prepare(self, header: dict[str, Any], overwrite: bool = False) -> None:
        """Makes the folder ready for a run: new, or continued when an earlier run had the same header.

        Args:
            header: What makes two runs the same: checkpoint, classes, options.
            overwrite: Remove what an earlier run wrote, and nothing else, instead of continuing it.

        Raises:
            ValueError: If the folder is a file, holds files of these names from elsewhere, links, or another run's
                results.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"The output {self.path} is a file: give a folder.")
        header = json.loads(json.dumps({"schema": SCHEMA, **header}))
        earlier = self.header()
        if earlier is None:
            foreign = [name for name in _OURS if os.path.lexists(self.path / name)]
            # What another shard has begun since is no stranger's.
            earlier = self.header()
            if foreign and earlier is None:
                raise ValueError(
                    f"The output folder {self.path} holds {' and '.join(foreign)} that no run of explain.py left "
                    "there: give another --output."
                )
        elif overwrite:
            self._remove()
        if earlier is not None and not overwrite and earlier != header:
            changed = [key for key in (*header, *earlier) if header.get(key) != earlier.get(key)]
            described = ", ".join(
                f"{key} was {_short(earlier.get(key))} and is now {_short(header.get(key))}"
                for key in dict.fromkeys(changed)
            )
            raise ValueError(
                f"The output folder {self.path} holds explanations made otherwise ({described}): give another "
                "--output, or pass --overwrite to start again."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        refuse_links(self.path)
        if self.header() is None:
            # Shards that begin together write the same line, each from a file of its own.
            with atomic_write(self.manifest_path, owner=str(self.shard or "")) as file:
                _write_lines(file, [header])
        if self.shard is None:
            self.merge()
        for path in self._shard_parts():
            with path.open("ab") as file:  # closes the batch that a kill tore, so that it takes none with it
                file.write(b'\n{"end": -1}\n')

    def header(self) -> dict[str, Any] | None:
        """What the run that wrote this folder was, or None where there was no run."""
        try:
            with self.manifest_path.open(encoding="utf-8") as file:
                header = json.loads(file.readline())
        except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
            return None
        if not (isinstance(header, dict) and "schema" in header):
            return None
        return header | ({"method": present_path(header["method"])} if isinstance(header.get("method"), str) else {})

    def append(self, rank: int, rows: Sequence[Row]) -> None:
        """Records a finished batch of one process; call it when the pictures are on the disk."""
        content = "".join(json.dumps(line) + "\n" for line in (*rows, {"end": len(rows)}))
        process = str(rank) if self.shard is None else f"{self.shard}-{rank}"
        # Opened anew each time: the file may have been merged and removed by a second run on the same folder.
        with (self.path / f"manifest.{process}.jsonl").open("ab") as file:
            file.write(content.encode())

    def rows(self) -> Iterator[Row]:
        """The merged rows, ordered by name; then those of this shard, as they were written."""
        for path in (self.manifest_path, *self._shard_parts()):
            for _, row in _committed(path):
                yield row

    def _shard_parts(self) -> list[Path]:
        return [] if self.shard is None else sorted(self.path.glob(f"manifest.{self.shard}-*.jsonl"))

    def parts(self) -> list[Path]:
        """Files with rows that are not merged yet: of processes that are at work, or were stopped."""
        return sorted(self.path.glob("manifest.[0-9]*.jsonl"))

    def merge(self) -> None:
        """Moves the rows of all processes into manifest.jsonl, each name once; a later row replaces an earlier one."""
        parts = self.parts()
        if not parts:
            return
        # Only names and places are held in memory, so 100,000 images fit everywhere.
        places: dict[str, tuple[Path, int]] = {}
        for path in (self.manifest_path, *parts):
            places |= {row["name"]: (path, offset) for offset, row in _committed(path)}
        header = self.header()
        assert header is not None, "prepare() writes the header before any process appends"
        files = {path: path.open("rb") for path in (self.manifest_path, *parts)}
        try:
            with atomic_write(self.manifest_path) as file:
                _write_lines(file, [header])
                ordered = sorted(places, key=lambda name: name.split("/"))
                for first in range(0, len(ordered), _ROWS_TOGETHER):
                    some = ordered[first : first + _ROWS_TOGETHER]
                    for path, offset in map(places.__getitem__, some):
                        files[path].seek(offset)
                        file.write(files[path].readline().decode())
                    _write_lines(file, [{"end": len(some)}])
                # The rows must not be in the memory only while the parts that held them are removed.
                file.flush()
                os.fsync(file.fileno())
        finally:
            for opened in files.values():
                opened.close()
        for path in parts:
            path.unlink()

    def write_table(self) -> None:
        """Writes manifest.csv from the merged rows.

        Cells are data as they are: a file name that starts with ``=`` is a formula to a spreadsheet that is told to
        run formulas. Bytes of names that are no UTF-8 appear as ``\\udcXX``.
        """
        extra: dict[str, None] = {}
        for row in self.rows():
            extra |= dict.fromkeys(key for key in _cells(row) if key not in COLUMNS)
        columns = [*COLUMNS, *sorted(extra)]
        with atomic_write(self.path / "manifest.csv") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(map(_cells, self.rows()))

    def write_summary(self, **facts: Any) -> dict[str, Any]:
        """Writes summary.json, the statistics of the merged rows after the given facts, and returns it."""
        summary = {**(self.header() or {}), **facts, **summarise(self.rows())}
        write_json(self.path / "summary.json", summary)
        return summary

    def summary(self) -> dict[str, Any]:
        """What summary.json says; nothing where there is none."""
        try:
            content = json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}

    def write_verification(self, content: dict[str, Any]) -> None:
        """Writes verification.json."""
        write_json(self.path / "verification.json", content)

    def _remove(self) -> None:
        """Removes what runs have written; a file of another name that the user put there stays, with its folder."""
        for folder, picture in (("images", _PICTURE), ("atlas", ATLAS_PICTURE), ("global", GLOBAL_PICTURE)):
            if (self.path / folder).is_symlink():  # what it leads to is not of the output folder
                (self.path / folder).unlink()
                continue
            for directory, _, names in os.walk(self.path / folder, topdown=False):
                for name in names:
                    if picture.fullmatch(name):
                        os.unlink(os.path.join(directory, name))
                if not os.listdir(directory):
                    os.rmdir(directory)
        written = [
            self.path / name
            for name in (
                "manifest.csv",
                "summary.json",
                "report.html",
                "verification.json",
                "atlas.json",
                "global.json",
            )
        ]
        unfinished = [path for name in _OURS for path in self.path.glob(f".{name}.*part")]
        # The header goes last: without it the folder could no longer be recognised as ours.
        for path in [*written, *unfinished, *self.parts(), self.manifest_path]:
            path.unlink(missing_ok=True)


def image_folder(name: str) -> str:
    """The folder of one image's pictures, relative to the output folder, unique for every name on every file system.

    Names of lower-case letters, digits, ``_ . -`` and inner spaces are kept, so the input tree is mirrored. Any other
    name keeps what is safe of it and ends in ``~`` and a hash of the whole name: ``A.PNG`` and ``a.png`` differ on
    file systems that ignore case, and no name can leave the folder.
    """
    components = name.split("/")
    kept = "/".join(components)
    if len(kept) <= _LONGEST_FOLDER and all(map(_is_plain, components)):
        return f"images/{kept}"
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    safe = [_safe(component) for component in components]
    path = "/".join(safe)
    return f"images/{path}~{digest}" if len(path) <= _LONGEST_FOLDER else f"images/long/{safe[-1][:40]}~{digest}"


def part_file(name: str) -> str:
    """The file of a named part inside ``image_folder``."""
    if _is_plain(name):
        return f"part_{name}.png"
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"part_{_safe(name)[:40]}~{digest}.png"


def _is_plain(component: str) -> bool:
    plain = len(component) <= _LONGEST_COMPONENT and _PLAIN.fullmatch(component)
    return bool(plain) and not _RESERVED.fullmatch(component)


def _safe(component: str) -> str:
    """What is safe of a file name; two names may share it."""
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", component)[:_LONGEST_COMPONENT].strip(".") or "_"
    return f"_{safe}" if _RESERVED.fullmatch(safe.lower()) else safe


def summarise(rows: Iterable[Row]) -> dict[str, Any]:
    """Counts, flip rates with 95 % Wilson intervals, and means (keys and formulas: evaluation, sections 2 to 4).

    Images that the classifier already gives to the target have nothing to flip and are in no flip rate and no mean.
    A value that cannot be computed is ``{"undefined": reason}``, never a zero.
    """
    done = failed = already = 0
    flipped: list[bool] = []
    flipped_saved: list[bool] = []
    distances: list[float] = []
    gains: list[float] = []
    seconds: list[float] = []
    for row in rows:
        if row["status"] != "ok":
            failed += 1
            continue
        done += 1
        seconds.append(row["seconds"])
        already += row["predicted"] == row["target"]
        if row["flipped"] is not None:
            flipped.append(row["flipped"])
            flipped_saved.append(row["flipped_saved"])
            distances.append(row["l1"])
            gains.append(row["p_target_after"] - row["p_target_before"])
    summary = {
        "n_done": done,
        "n_failed": failed,
        "n_already_target": already,
        "flip_rate": _share(flipped),
        "flip_rate_saved": _share(flipped_saved),
        "delta_p": _mean(gains),
        "l1": _mean(distances),
        "s_per_image": _quantiles(seconds),
    }
    if flipped and abs(sum(flipped) - sum(flipped_saved)) / len(flipped) > QUANTISATION_GAP:
        summary["warning"] = (
            "The flip rate of the saved 8-bit pixels differs from that of the computed images by more than half a "
            "point: some flips live in changes smaller than one grey level."
        )
    return summary


_NOTHING_TO_FLIP = {"undefined": "No explained image has a counterfactual for a class other than its own."}


def _share(values: Sequence[bool]) -> dict[str, Any]:
    if not values:
        return _NOTHING_TO_FLIP
    # Imported here because it brings torch: the report reads this module without.
    from cfe_lightning.metrics.statistics import wilson

    low, high = wilson(sum(values), len(values))
    return {"value": sum(values) / len(values), "interval": [low, high], "n": len(values), "population": "all"}


def _mean(values: Sequence[float]) -> dict[str, Any]:
    if not values:
        return _NOTHING_TO_FLIP
    return {"value": math.fsum(values) / len(values), "n": len(values), "population": "all"}


def _quantiles(seconds: Sequence[float]) -> dict[str, Any]:
    if not seconds:
        return {"undefined": "No image was explained."}
    p95 = sorted(seconds)[math.ceil(0.95 * len(seconds)) - 1]
    return {"median": statistics.median(seconds), "p95": p95, "n": len(seconds)}


def _committed(path: Path) -> Iterator[tuple[int, Row]]:
    """Rows of closed batches with their byte offsets; what a kill tore is passed over."""
    batch: list[tuple[int, Row]] = []
    offset = 0
    with path.open("rb") as file:
        for line in file:
            try:
                content = json.loads(line)
            except (ValueError, RecursionError):
                content = {}
            if isinstance(content, dict) and "end" in content:
                if content["end"] == len(batch):
                    yield from batch
                batch = []
            elif is_row(content):
                batch.append((offset, content))
            elif not (isinstance(content, dict) and ("schema" in content or not content)):
                raise ValueError(
                    f"{path} holds a line that explain.py did not write ({line[:40].decode(errors='replace')!r}...): "
                    "give another --output, or start again with --overwrite."
                )
            offset += len(line)


def _write_lines(file: TextIO, lines: Iterable[dict[str, Any]]) -> None:
    file.writelines(json.dumps(line) + "\n" for line in lines)


def _cells(row: Row) -> dict[str, Any]:
    """One row of manifest.csv."""
    cells = {key: value for key, value in row.items() if key in COLUMNS and value is not None}
    # The sentence is made from the numbers wherever it is shown, so the two never disagree.
    cells |= {"sentence": said} if (said := measured_sentence(row)) else {}
    cells |= {key: " ".join(value) for key, value in cells.items() if isinstance(value, list)}
    cells |= {key: f"{row['folder']}/{file}" for key, file in row.get("files", {}).items()}
    cells |= {f"gain_{name}": gain for name, gain in row.get("gains", {}).items()}
    cells |= {f"score_{name}": score for name, score in row.get("scores", {}).items()}
    return {key: str(value).lower() if isinstance(value, bool) else value for key, value in cells.items()}


def _short(value: Any) -> str:
    text = str(value)
    return repr(text if len(text) <= 40 else f"{text[:12]}...{text[-12:]}")
