"""The log of every run: ``metrics.csv`` with one row per logged step and one column per quantity."""

import csv
import io
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from cfe_lightning.files.atomic import atomic_write, naming


class CsvLog(Logger):
    """Appends to a CSV file; a resumed run first drops the steps that it will log again.

    The first of these steps is kept and completed, because a run may continue with the validation after it. Lightning's
    ``CSVLogger`` deletes the file of a continued run.

    Args:
        path: The CSV file.
        resume: Continues an existing file instead of starting a new one.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        super().__init__()
        self.path, self._resume = path, resume
        self._columns: list[str] = []
        self._row: dict[str, Any] = {}
        self._row_start = 0

    @property
    def name(self) -> str:
        """Names this logger for Lightning."""
        return "csv"

    @property
    def version(self) -> str:
        """Returns no version: a run has one file."""
        return ""

    @property
    def save_dir(self) -> str:
        """Returns the folder of the file."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Does nothing: ``config.yaml`` stands beside the file."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Writes at once, because a run may be killed; values of the same step share a row."""
        # Row of the step.
        if not self._columns:
            self._start(step or 0)
        if step != self._row.get("step"):
            self._row = {"step": step}
            self._row_start = self.path.stat().st_size
        self._row |= metrics

        # New columns rewrite the file.
        if new := [name for name in self._row if name not in self._columns]:
            rows = [row for row in self._read() if row["step"] != str(step)]
            self._columns += new
            self._write(rows)
            return

        # Otherwise the last row is replaced.
        with naming(self.path), self.path.open("r+b") as file:
            file.seek(self._row_start)
            # In one piece, and before the end is cut off: a kill must not lose values that the row held.
            file.write(self._line())
            file.flush()
            file.truncate()

    def _start(self, step: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = self._read() if self._resume and self.path.is_file() else []
        known = [row for row in rows if int(row["step"]) <= step]
        self._columns = list(known[0]) if known else ["step"]
        rows = [row for row in known if int(row["step"]) < step]
        for row in known[len(rows) :]:
            self._row = {name: value for name, value in row.items() if value} | {"step": step}
        self._write(rows)

    def _read(self) -> list[dict[str, str]]:
        with self.path.open(newline="") as file:
            # A kill can leave half a line behind.
            return [row for row in csv.DictReader(file) if None not in row.values() and row["step"].isdigit()]

    def _line(self) -> bytes:
        """Returns the current row as bytes, empty before the first one."""
        line = io.StringIO(newline="")
        if self._row:
            csv.DictWriter(line, self._columns).writerow(self._row)
        return line.getvalue().encode()

    def _write(self, rows: list[dict[str, str]]) -> None:
        """Writes all rows, the current one last."""
        with atomic_write(self.path) as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
            file.write(self._line().decode())
        self._row_start = self.path.stat().st_size - len(self._line())
