"""The output folder of an explanation run: which images are done, the manifest and the summary. Knows no tensors.

The folder holds::

    manifest.jsonl          header, then one row per image: what resuming and the report read
    manifest.<rank>.jsonl   rows of the run in progress, one file per process; merged into manifest.jsonl
    manifest.<i>of<n>-<rank>.jsonl   rows of one shard; the run without shards merges them
    manifest.csv            the same rows as a table
    summary.json            counts and means
    report.html             the page, see ``cfe_lightning.report.page``
    verification.json       problems that ``explain.py --verify`` found
    images/<name>/...       pictures of one image, see ``image_folder``
    atlas.json, atlas/      directions of the whole data set, of methods that have some: see ``cfe_lightning.atlas``
    global.json, global/    what the changes of all images have in common: see ``cfe_lightning.explaining.overview``

A batch of rows counts only with the line that closes it, so a kill costs at most the batch in flight.
"""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from cfe_lightning.explaining.names import FILES, PICTURE_FOLDERS
from cfe_lightning.explaining.row import COLUMNS, Row, is_row
from cfe_lightning.explaining.sentence import measured_sentence
from cfe_lightning.explaining.summary import summarise
from cfe_lightning.files.atomic import atomic_write, refuse_links, write_json
from cfe_lightning.files.trust import present_path

SCHEMA = 1
#: Number of merged rows that one line closes; readers hold this number at a time.
_ROWS_TOGETHER = 256
_NAMES = (*FILES, *(name for pictures in PICTURE_FOLDERS for name in (pictures.file, pictures.name) if name))


class Shard(NamedTuple):
    """One of several runs that share an input and do not know one another."""

    number: int  # from 1 to ``total``
    total: int

    def __str__(self) -> str:
        return f"{self.number}of{self.total}"

    def own(self, batches: list[list[str]]) -> list[list[str]]:
        """Returns every ``total``-th batch, whole, so that the same images meet as without shards."""
        return batches[self.number - 1 :: self.total]


class OutputFolder:
    """Collects explanations of one input folder by one checkpoint, over as many runs as it takes.

    Args:
        path: The folder; need not exist yet.
        shard: The run is one of several that write here at the same time: it reads and writes its own rows only, and
            merges nothing.
    """

    def __init__(self, path: Path, shard: Shard | None = None) -> None:
        self.path, self.shard = path, shard
        self.manifest_path = path / "manifest.jsonl"

    def prepare(self, header: dict[str, Any], overwrite: bool = False) -> None:
        """Makes the folder ready for a run: new, or continued when an earlier run had the same header.

        Args:
            header: Everything that two runs must share to fill one folder: checkpoint, classes, options.
            overwrite: Removes the files that an earlier run wrote, and nothing else, instead of continuing it.

        Raises:
            ValueError: If the folder is a file, holds files of these names from elsewhere, links, or another run's
                results.
        """
        # Refuse or remove earlier content.
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"The output {self.path} is a file: give a folder.")
        header = json.loads(json.dumps({"schema": SCHEMA, **header}))
        earlier = self.header() or self._refuse_foreign()
        if earlier is not None and overwrite:
            self._remove()
        elif earlier is not None and earlier != header:
            self._refuse_change(earlier, header)
        self.path.mkdir(parents=True, exist_ok=True)
        refuse_links(self.path)

        # Write the header.
        if self.header() is None:
            # Shards that begin together write the same line, each from a file of its own.
            with atomic_write(self.manifest_path, owner=str(self.shard or "")) as file:
                _write_lines(file, [header])

        # Take over earlier rows.
        if self.shard is None:
            self.merge()
        for path in self._shard_parts():
            # Closes the batch that a kill tore, so that the next one is not lost with it.
            with path.open("ab") as file:
                file.write(b'\n{"end": -1}\n')

    def _refuse_foreign(self) -> dict[str, Any] | None:
        """Refuses files of our names without a header; returns the header of a shard that has begun since."""
        foreign = " and ".join(name for name in _NAMES if os.path.lexists(self.path / name))
        earlier = self.header()
        if foreign and earlier is None:
            message = f"The output folder {self.path} holds {foreign} that no run of explain.py left there"
            raise ValueError(f"{message}: give another --output.")
        return earlier

    def _refuse_change(self, earlier: dict[str, Any], header: dict[str, Any]) -> None:
        changed = [key for key in dict.fromkeys([*header, *earlier]) if header.get(key) != earlier.get(key)]
        described = [f"{key} was {_short(earlier.get(key))} and is now {_short(header.get(key))}" for key in changed]
        raise ValueError(
            f"The output folder {self.path} holds explanations made otherwise ({', '.join(described)}): give another "
            "--output, or pass --overwrite to start again."
        )

    def _remove(self) -> None:
        """Removes everything that runs have written; files of other names stay, with their folders."""
        for pictures in PICTURE_FOLDERS:
            pictures.remove(self.path)
        unfinished = [path for name in _NAMES for path in self.path.glob(f".{name}.*part")]
        # The header, in the first of the files, goes last: without it the folder would not be recognised as ours.
        for path in [*unfinished, *self.parts(), *(self.path / name for name in reversed(FILES))]:
            path.unlink(missing_ok=True)

    def header(self) -> dict[str, Any] | None:
        """Returns the header that the run of this folder wrote, or None where there was no run."""
        try:
            with self.manifest_path.open(encoding="utf-8") as file:
                header = json.loads(file.readline())
        except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
            return None
        if not (isinstance(header, dict) and "schema" in header):
            return None
        # Classes have moved between versions.
        return header | ({"method": present_path(header["method"])} if isinstance(header.get("method"), str) else {})

    def append(self, rank: int, rows: Sequence[Row]) -> None:
        """Records a finished batch of one process; call it when the pictures are on the disk."""
        content = "".join(json.dumps(line) + "\n" for line in (*map(vars, rows), {"end": len(rows)}))
        process = str(rank) if self.shard is None else f"{self.shard}-{rank}"
        # Opened anew each time: the file may have been merged and removed by a second run on the same folder.
        with (self.path / f"manifest.{process}.jsonl").open("ab") as file:
            file.write(content.encode())

    def rows(self) -> Iterator[Row]:
        """Yields the merged rows, ordered by name; then those of this shard, in the order of writing."""
        for path in (self.manifest_path, *self._shard_parts()):
            yield from (row for _, row in _committed(path))

    def _shard_parts(self) -> list[Path]:
        return [] if self.shard is None else sorted(self.path.glob(f"manifest.{self.shard}-*.jsonl"))

    def parts(self) -> list[Path]:
        """Returns the files with rows that are not merged yet, of processes that are at work or were stopped."""
        return sorted(self.path.glob("manifest.[0-9]*.jsonl"))

    def merge(self) -> None:
        """Moves the rows of all processes into manifest.jsonl, each name once; a later row replaces an earlier one."""
        parts = self.parts()
        if not parts:
            return

        # Find the last row of each name. Only names and places are held in memory, so 100,000 images fit everywhere.
        places: dict[str, tuple[Path, int]] = {}
        for path in (self.manifest_path, *parts):
            places |= {row.name: (path, offset) for offset, row in _committed(path)}
        header = self.header()
        assert header is not None, "prepare() writes the header before any process appends"

        # Copy the rows by name.
        with ExitStack() as opened, atomic_write(self.manifest_path) as file:
            files = {path: opened.enter_context(path.open("rb")) for path in (self.manifest_path, *parts)}
            _write_lines(file, [header])
            ordered = sorted(places, key=lambda name: name.split("/"))
            for first in range(0, len(ordered), _ROWS_TOGETHER):
                some = ordered[first : first + _ROWS_TOGETHER]
                for path, offset in map(places.__getitem__, some):
                    files[path].seek(offset)
                    file.write(files[path].readline().decode())
                _write_lines(file, [{"end": len(some)}])
            # The disk must have the rows before the parts that held them are removed.
            file.flush()
            os.fsync(file.fileno())
        for path in parts:
            path.unlink()

    def write_table(self) -> None:
        """Writes manifest.csv from the merged rows.

        Cells are plain data: a file name that starts with ``=`` is a formula to a spreadsheet that is told to run
        formulas. Bytes of names that are no UTF-8 appear as ``\\udcXX``.
        """
        extra = {key for row in self.rows() for key in _cells(row)}.difference(COLUMNS)
        with atomic_write(self.path / "manifest.csv") as file:
            writer = csv.DictWriter(file, [*COLUMNS, *sorted(extra)], restval="")
            writer.writeheader()
            writer.writerows(map(_cells, self.rows()))

    def write_summary(self, **facts: Any) -> dict[str, Any]:
        """Writes summary.json, the statistics of the merged rows after the given facts, and returns it."""
        summary = {**(self.header() or {}), **facts, **summarise(self.rows())}
        write_json(self.path / "summary.json", summary)
        return summary

    def summary(self) -> dict[str, Any]:
        """Returns the content of summary.json; nothing where there is none."""
        try:
            content = json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}

    def write_verification(self, content: dict[str, Any]) -> None:
        """Writes verification.json."""
        write_json(self.path / "verification.json", content)


def _committed(path: Path) -> Iterator[tuple[int, Row]]:
    """Yields the rows of closed batches with their byte offsets, without lines that a kill tore."""
    batch: list[tuple[int, Row]] = []
    offset = 0
    with path.open("rb") as file:
        for line in file:
            try:
                content = json.loads(line)
            except (ValueError, RecursionError):
                content = {}
            if isinstance(content, dict) and "end" in content:
                # The end of a batch.
                if content["end"] == len(batch):
                    yield from batch
                batch = []
            elif is_row(content):
                batch.append((offset, Row(content)))
            elif not (isinstance(content, dict) and ("schema" in content or not content)):
                # Neither a header nor torn.
                raise ValueError(
                    f"{path} holds a line that explain.py did not write ({line[:40].decode(errors='replace')!r}...): "
                    "give another --output, or start again with --overwrite."
                )
            offset += len(line)


def _write_lines(file: TextIO, lines: Iterable[dict[str, Any]]) -> None:
    file.writelines(json.dumps(line) + "\n" for line in lines)


def _cells(row: Row) -> dict[str, Any]:
    """Returns the cells of one row of manifest.csv by column."""
    cells = {key: value for key, value in vars(row).items() if key in COLUMNS and value is not None}
    # The sentence is made from the numbers wherever it is shown, so the two never disagree.
    cells |= {"sentence": said} if (said := measured_sentence(row)) else {}
    cells |= {key: " ".join(value) for key, value in cells.items() if isinstance(value, list)}
    cells |= {key: f"{row.folder}/{file}" for key, file in (row.files or {}).items()}
    cells |= {f"gain_{name}": gain for name, gain in (row.gains or {}).items()}
    cells |= {f"score_{name}": score for name, score in (row.scores or {}).items()}
    return {key: str(value).lower() if isinstance(value, bool) else value for key, value in cells.items()}


def _short(value: Any) -> str:
    text = str(value)
    return repr(text if len(text) <= 40 else f"{text[:12]}...{text[-12:]}")
