"""``benchmarks/run.py``: a cell end to end, interrupted runs, and that straightforward implementations agree."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest

# Scripts, not a package: they import each other as they do when one of them is run.
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import cells
import children
import contenders
import run
import straightforward
from fitting import GOALS

#: One round with as few images as possible.
QUICK = cells.Settings(seconds=0.0, rounds=1, train_images=4, explain_images=2, file_images=2, curve_batches=4)
LENS = cells.Cell(measure="speed", work="explain", method="SteerableLens", size=32)


class InProcess:
    """Stands for ``children.Children`` and counts."""

    def __init__(self) -> None:
        self.measured: list[str] = []

    def measure(self, cell: cells.Cell, settings: cells.Settings) -> dict:
        self.measured.append(cell.key)
        return children.measure(cell, settings)


def test_a_run_measures_writes_and_goes_on(tmp_path, capsys):
    files = dataclasses.replace(LENS, measure="files")
    first, second = InProcess(), InProcess()
    run.run([LENS], QUICK, run.Results(tmp_path, QUICK, overwrite=False), first)
    results = run.Results(tmp_path, QUICK, overwrite=False)
    run.run([LENS, files], QUICK, results, second)
    assert first.measured == [LENS.key]
    assert second.measured == [files.key]
    row = json.loads((tmp_path / "results.json").read_text())["cells"][LENS.key]
    assert row["images_per_second"].keys() == {"as built", "one by one"}
    assert row["ratio"]["one by one"]["low"] > 0
    text = (tmp_path / "results.md").read_text()
    assert "| SteerableLens | 32 | fp32 | 2 |" in text
    assert "explain.py with reading and writing" in text
    assert "as built" in capsys.readouterr().out


def test_results_of_other_settings_are_not_mixed(tmp_path):
    run.Results(tmp_path, QUICK, overwrite=False).add(LENS, {"failed": "nothing"})
    other = dataclasses.replace(QUICK, train_images=5)
    with pytest.raises(ValueError, match="other settings or on another machine: give another --output"):
        run.Results(tmp_path, other, overwrite=False)
    assert LENS not in run.Results(tmp_path, QUICK, overwrite=False)
    assert run.Results(tmp_path, other, overwrite=True).content["cells"] == {}


def test_a_failure_is_one_sentence_in_the_tables(tmp_path):
    results = run.Results(tmp_path, QUICK, overwrite=False)
    broken = dataclasses.replace(LENS, variant="fp32+compile")
    run.run([broken], QUICK, results, InProcess())
    assert "names no blocks" in results.content["cells"][broken.key]["failed"]
    assert "### Not measured" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize(
    ("work", "method"),
    # DiffExplainer is only asked image by image, which takes long and changes nothing.
    [key for key in straightforward.STRAIGHTFORWARD if key[1] != "DiffExplainer"],
)
def test_straightforward_implementations_give_the_same_answers(work, method):
    row = cells.measure_speed(cells.Cell(measure="speed", work=work, method=method, size=32), QUICK)
    assert row["tolerance"].keys() == straightforward.STRAIGHTFORWARD[work, method].keys()
    for name in row["tolerance"]:
        assert row["difference"][name] < 2e-5


def test_penalties_count_by_their_share():
    module = contenders.build("StylEx", 32, small=True)
    contender = contenders.Contender(module, "train", contenders.shapes(2, 32), "cpu")
    phases = contender.phases()
    # Every 4th iteration has the path penalty, every 16th R1 beside it.
    assert phases == [(0, 1 / 16), (1, 12 / 16), (4, 3 / 16)]


def test_ratios_are_of_one_round_each():
    spread = cells.spread([2.0, 30.0, 4.0], [1.0, 10.0, 1.0])
    assert spread == {"median": 3.0, "low": 2.5, "high": 3.5}


def test_a_process_of_its_own_measures_memory_and_may_be_killed(monkeypatch):
    # Children sets them all.
    for name in ("OMP_NUM_THREADS", "PYTHONPATH", "PYTHONWARNINGS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    processes = children.Children("cpu", threads=1, time_limit=120)
    cell = dataclasses.replace(LENS, measure="memory", who="as built")
    assert 1 < processes.measure(cell, QUICK)["peak_mib"] < 500
    processes.time_limit = 0.0
    assert processes.measure(cell, QUICK) == {"failed": "took longer than the 0 s of --time-limit"}


@pytest.mark.parametrize(("value", "reached", "batches"), [(-100.0, True, 2), (1000.0, False, 4)])
def test_a_training_stops_at_its_goal(tmp_path, monkeypatch, value, reached, batches):
    goal = dataclasses.replace(GOALS["DiffusionAutoencoder"], value=value, every=2, most=4, images=4)
    monkeypatch.setitem(GOALS, "DiffusionAutoencoder", goal)
    cell = cells.Cell(measure="quality", work="train", method="DiffusionAutoencoder", size=32)
    row = children.measure(cell, dataclasses.replace(QUICK, folder=str(tmp_path)))
    assert (row["reached"], row["batches"]) == (reached, batches)
    assert row["seconds"] > 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [True, False])
def test_every_planned_cell_can_be_told_apart_and_measured(device, quick):
    planned = run.plan(device, quick)
    assert len({cell.key for cell in planned}) == len(planned)
    assert {cell.measure for cell in planned} <= children.MEASURES.keys()
    assert {cell.method for cell in planned} == contenders.METHODS.keys()
