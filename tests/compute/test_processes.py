"""Ranks, means and rows of processes; whole trainings with several are in ``cli/test_train_processes.py``."""

from __future__ import annotations

import socket
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import distributed, nn

from cfe_lightning.compute.processes import all_gather_rows, average_gradients, is_first_process, launched_processes

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


def exchanged(rank: int, port: int, answer: Any) -> None:
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    held, idle, frozen = (nn.Parameter(torch.zeros(2, 3, 1, 1)) for _ in range(3))
    # In another layout than its weight.
    held.grad = (torch.arange(6.0).view(2, 3, 1, 1) * (rank + 1)).contiguous(memory_format=torch.channels_last)
    average_gradients([held, idle, frozen.requires_grad_(False)])
    answer.put([*held.grad.flatten().tolist(), idle.grad, frozen.grad])
    if rank == 0:
        idle.grad = torch.ones_like(idle)
    with pytest.raises(RuntimeError, match="gradients of other weights"):
        average_gradients([held, idle])
    answer.put([])


def test_gradients_are_averaged_and_none_appears_from_nowhere():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = get_context("fork")
    answer = context.Queue()
    processes = [context.Process(target=exchanged, args=(rank, port, answer)) for rank in (0, 1)]
    for process in processes:
        process.start()
    answers = [answer.get(timeout=120) for _ in range(4)]
    for process in processes:
        process.join()
    assert [one for one in answers if one] == [[0.0, 1.5, 3.0, 4.5, 6.0, 7.5, None, None]] * 2


def test_alone_a_gradient_stays_as_it_is():
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    before = weight.grad
    average_gradients([weight])
    assert weight.grad is before


def test_alone_there_are_no_other_rows():
    mine = torch.arange(6.0).view(3, 2)
    assert all_gather_rows(mine) is mine
