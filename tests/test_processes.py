"""Who is the first process, and means and rows of all; with several of them in ``cli/test_train_processes.py``."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from cfe_lightning.processes import is_first_process, launched_processes, rows_of_all

LAUNCHERS = ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "NODE_RANK", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


def test_lightnings_own_launcher_has_a_first_process_on_the_first_machine_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    assert is_first_process()
    monkeypatch.setenv("NODE_RANK", "0")
    assert is_first_process()
    monkeypatch.setenv("NODE_RANK", "1")
    assert not is_first_process()
    monkeypatch.delenv("NODE_RANK")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert not is_first_process()


def test_torchrun_and_srun_are_asked_and_a_batch_script_is_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert launched_processes() == 1
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert launched_processes() == 4
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    assert launched_processes() == 8


def test_alone_there_are_no_other_rows():
    mine = torch.arange(6.0).view(3, 2)
    assert rows_of_all(mine) is mine
