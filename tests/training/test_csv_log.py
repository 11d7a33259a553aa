"""metrics.csv: complete at any moment, continued by a resumed run."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from cfe_lightning.training import csv_log
from cfe_lightning.training.csv_log import CsvLog


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_numbers_of_a_step_share_a_row_and_new_columns_may_come(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.csv"
    log = CsvLog(path)
    log.log_metrics({"train/a": 1.0, "epoch": 0}, step=4)
    assert rows(path) == [{"step": "4", "train/a": "1.0", "epoch": "0"}]
    log.log_metrics({"train/a": 2.0, "epoch": 0}, step=9)
    log.log_metrics({"val/loss": 0.5, "epoch": 0}, step=9)
    log.log_metrics({"train/a": 3.0, "epoch": 1}, step=14)
    log.finalize("success")
    assert rows(path) == [
        {"step": "4", "train/a": "1.0", "epoch": "0", "val/loss": ""},
        {"step": "9", "train/a": "2.0", "epoch": "0", "val/loss": "0.5"},
        {"step": "14", "train/a": "3.0", "epoch": "1", "val/loss": ""},
    ]


def test_a_resumed_run_continues_where_its_checkpoint_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    killed = CsvLog(path)
    for step in (0, 1, 2, 3):
        killed.log_metrics({"loss": float(step), "old": 1.0}, step=step)
    with path.open("a") as file:
        file.write("4,0.2")  # a kill in the middle of a line
    resumed = CsvLog(path, resume=True)
    resumed.log_metrics({"loss": 20.0, "new": 7.0}, step=2)
    assert [(row["step"], row["loss"], row["old"], row["new"]) for row in rows(path)] == [
        ("0", "0.0", "1.0", ""),
        ("1", "1.0", "1.0", ""),
        # The first step again is completed, not replaced: only its validation may be logged again.
        ("2", "20.0", "1.0", "7.0"),
    ]


def test_a_run_that_goes_on_with_a_validation_keeps_the_row_of_its_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    killed = CsvLog(path)
    killed.log_metrics({"loss": 0.0}, step=0)
    killed.log_metrics({"loss": 1.0}, step=1)
    resumed = CsvLog(path, resume=True)
    resumed.log_metrics({"val/loss": 2.0}, step=1)
    resumed.log_metrics({"loss": 3.0}, step=2)
    assert [tuple(row.values()) for row in rows(path)] == [("0", "0.0", ""), ("1", "1.0", "2.0"), ("2", "3.0", "")]


def test_a_kill_while_a_row_is_completed_leaves_what_it_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.csv"
    log = CsvLog(path)
    log.log_metrics({"loss": 1.0, "val/loss": 1.0}, step=0)
    log.log_metrics({"loss": 2.0}, step=1)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(csv.DictWriter, "writerow", killed)
    with pytest.raises(KeyboardInterrupt):
        log.log_metrics({"val/loss": 2.0}, step=1)
    assert [row["loss"] for row in rows(path)] == ["1.0", "2.0"]


def test_a_kill_while_a_log_is_continued_leaves_what_its_last_row_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.csv"
    killed = CsvLog(path)
    killed.log_metrics({"loss": 0.0, "val/loss": 1.0}, step=0)
    killed.log_metrics({"loss": 2.0}, step=1)
    killed.log_metrics({"loss": 3.0}, step=2)

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    # The older steps have been written anew, the row of the step not yet.
    monkeypatch.setattr(csv_log, "naming", dies)
    with pytest.raises(KeyboardInterrupt):
        CsvLog(path, resume=True).log_metrics({"val/loss": 4.0}, step=1)
    assert [tuple(row.values()) for row in rows(path)] == [("0", "0.0", "1.0"), ("1", "2.0", "")]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "metrics.csv"
    log = CsvLog(path)
    log.log_metrics({"loss": 1.0}, step=0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, before[1]))
    try:
        with pytest.raises(OSError, match=r"metrics\.csv"):
            log.log_metrics({"loss": 2.0}, step=1)
        with pytest.raises(OSError, match=r"metrics\.csv"):
            log.log_metrics({"other": 2.0}, step=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.csv"]
    CsvLog(path, resume=True).log_metrics({"loss": 2.0}, step=1)
    assert [row["loss"] for row in rows(path)] == ["1.0", "2.0"]


def test_a_new_run_starts_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    CsvLog(path).log_metrics({"loss": 1.0}, step=0)
    CsvLog(path).log_metrics({"other": 2.0}, step=0)
    assert rows(path) == [{"step": "0", "other": "2.0"}]
