"""The log that is always kept: ``metrics.csv``, one row per logged step, one column per quantity."""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from cfe_lightning.files.atomic import atomic_write, naming


class CsvLog(Logger):
    """Appends to a CSV file; continuing a file first drops the steps that a resumed run is about to log again.

    The first of them is kept and completed: a run may go on with the validation that follows a step.

    Lightning's ``CSVLogger`` deletes the file of the run that is being continued.

    Args:
        path: The file.
        resume: Continue an existing file instead of starting a new one.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        super().__init__()
        self.path = path
        self._resume = resume
        self._columns: list[str] = []
        self._row: dict[str, Any] = {}
        self._row_start = 0

    @property
    def name(self) -> str:
        """Lightning's name of this logger."""
        return "csv"

    @property
    def version(self) -> str:
        """No versions: one run, one file."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder of the file."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: ``config.yaml`` stands beside the file."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Writes at once, because a run may be killed; numbers of the same step share a row."""
        if not self._columns:
            self._start(step or 0)
        if step != self._row.get("step"):
            self._row = {"step": step}
            self._row_start = self.path.stat().st_size
        self._row |= metrics
        if new := [name for name in self._row if name not in self._columns]:
            rows = [row for row in self._read() if row["step"] != str(step)]
            self._columns += new
            self._write(rows)
            return
        with naming(self.path), self.path.open("r+b") as file:
            file.seek(self._row_start)
            # In one piece and before anything is cut off: a kill must not cost what the row held already.
            file.write(self._line())
            file.flush()
            file.truncate()

    def _start(self, step: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._columns = ["step"]
        rows: list[dict[str, str]] = []
        if self._resume and self.path.is_file():
            known = [row for row in self._read() if int(row["step"]) <= step]
            self._columns = list(known[0]) if known else self._columns
            rows = [row for row in known if int(row["step"]) < step]
            for row in known[len(rows) :]:
                self._row = {name: value for name, value in row.items() if value} | {"step": step}
        self._write(rows)

    def _read(self) -> list[dict[str, str]]:
        with self.path.open(newline="") as file:
            # A kill can leave half a line behind.
            return [row for row in csv.DictReader(file) if None not in row.values() and row["step"].isdigit()]

    def _line(self) -> bytes:
        """The current row; nothing before there is one."""
        line = io.StringIO(newline="")
        if self._row:
            csv.DictWriter(line, self._columns).writerow(self._row)
        return line.getvalue().encode()

    def _write(self, rows: list[dict[str, str]]) -> None:
        """All rows at once, the current one as the last."""
        with atomic_write(self.path) as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
            file.write(self._line().decode())
        self._row_start = self.path.stat().st_size - len(self._line())
