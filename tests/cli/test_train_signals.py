"""train.py as two processes that a cluster stops: whoever is told, all stop after the same batch and continue."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from cfe_lightning.cli.train import _stopped
from cfe_lightning.compute.signals import StopRequested

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

#: As torchrun and srun start them.
CLUSTERS: dict[str, dict[str, str]] = {
    "torchrun": {
        **{"RANK": "{rank}", "LOCAL_RANK": "{rank}", "GROUP_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        **{"TORCHELASTIC_RUN_ID": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "{port}"},
    },
    "SLURM": {
        **{"SLURM_PROCID": "{rank}", "SLURM_LOCALID": "{rank}", "SLURM_NODEID": "0", "SLURM_NTASKS": "2"},
        **{"SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train"},
        **{"SLURM_STEP_NUM_TASKS": "2", "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": "{port}"},
    },
}

# Importing torch takes seconds, so one process does it and forks itself for all others.
PROGRAM = """
import json, os, signal, socket, sys
import lightning.pytorch, toy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from cfe_lightning.images import UnreadableImageError
import cfe_lightning.training.run
from cfe_lightning.cli.train import main

def befall(rank, told, what):
    step, read = toy.ToyExplainer.training_step, toy.ToyDataset.__getitem__
    reached = []

    def training_step(self, batch, batch_idx):
        if rank in told and self.trainer.fit_loop.total_batch_idx == 2:
            reached.append(True)
            if what != "gone":
                os.kill(os.getpid(), what)
        step(self, batch, batch_idx)

    def getitem(self, index):
        if reached and what == "gone" and self.split == "train":
            raise UnreadableImageError(f"The image {index}.png cannot be used (it is gone).")
        return read(self, index)

    toy.ToyExplainer.training_step, toy.ToyDataset.__getitem__ = training_step, getitem

def run(arguments, cluster, told=(), what=None):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            os.environ |= {name: value.format(rank=rank, port=port) for name, value in cluster.items()}
            rank_zero_only.rank = rank  # found out on import, when there was no environment yet
            befall(rank, told, what)
            os._exit(main(arguments))
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

sys.argv = ["train.py"]
print("RESULT", json.dumps([run(**job) for job in json.loads(os.environ["JOBS"])]))
"""


def execute(folder: Path, jobs: list[dict[str, Any]]) -> tuple[list[list[int]], str]:
    """Runs the jobs one after the other; returns the exit codes of both processes of each, and what they said."""
    toy.toy_classifier().save(folder / "classifier.pt")
    load = {"path": "classifier.pt", "trusted": ["toy"]}
    classifier = {"class_path": "cfe_lightning.classifier.load_classifier", "init_args": load}
    config = {
        "model": {"class_path": "toy.ToyExplainer", "init_args": {"classifier": classifier}},
        "data": {"class_path": "toy.ToyData", "init_args": {"num_images": 24, "batch_size": 2}},
        "trainer": {
            **{"max_epochs": 1, "logger": False, "accelerator": "cpu", "devices": 2, "log_every_n_steps": 1},
            **{"enable_progress_bar": False, "enable_model_summary": False},
        },
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(config))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "SLURM"))}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    environment["JOBS"] = json.dumps(jobs)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("RESULT")[2]), done.stderr


def arguments(name: str, *more: str) -> list[str]:
    return ["--config", "toy.yaml", "--run", name, "--trusted", "toy", "--skip-classifier-check", *more]


def state(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / name / "last.ckpt", weights_only=True)


def test_all_processes_stop_after_the_same_batch_and_continue_bit_for_bit(tmp_path: Path) -> None:
    told: dict[str, dict[str, Any]] = {
        "first": {"cluster": CLUSTERS["torchrun"], "told": [0], "what": signal.SIGTERM},
        "second": {"cluster": CLUSTERS["torchrun"], "told": [1], "what": signal.SIGUSR2},
        "slurm": {"cluster": CLUSTERS["SLURM"], "told": [0, 1], "what": signal.SIGUSR1},
        "gone": {"cluster": CLUSTERS["torchrun"], "told": [1], "what": "gone"},
    }
    jobs = [{"arguments": arguments("straight"), "cluster": CLUSTERS["torchrun"]}]
    for name, fate in told.items():
        jobs += [{"arguments": arguments(name), **fate}]
        jobs += [{"arguments": arguments(name, "--resume"), "cluster": fate["cluster"]}]
    codes, said = execute(tmp_path, jobs)
    print(said)
    assert codes == [[0, 0], [143, 143], [0, 0], [140, 140], [0, 0], [138, 138], [0, 0], [2, 2], [0, 0]]
    assert said.count("Training stopped after 3 batches by SIGTERM. Continue with: train.py --resume") == 1
    assert said.count("Training stopped after 3 batches by SIGUSR2. Continue with: train.py --resume") == 1
    assert said.count("Training stopped after 3 batches by SIGUSR1. Continue with: train.py --resume") == 1
    assert said.count("png cannot be used (it is gone).") == 1
    assert said.count("Training stopped after 3 batches, because another process failed.") == 1
    assert "Traceback" not in said
    # SLURM's jobs are requeued by whoever started them, with the one last.ckpt.
    assert not list(tmp_path.rglob("hpc_ckpt*"))
    expected = state(tmp_path, "straight")
    for name in told:
        resumed = state(tmp_path, name)
        for key, value in expected["state_dict"].items():
            assert torch.equal(value, resumed["state_dict"][key]), (name, key)
        assert str(resumed["callbacks"]["RandomState"]) == str(expected["callbacks"]["RandomState"])


@pytest.mark.parametrize(("agreed", "code"), [(True, 0), (False, 143)])
def test_a_process_of_lightnings_own_launcher_fails_only_where_the_first_would_wait_for_it(
    agreed: bool, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert _stopped(StopRequested(signal.SIGTERM, agreed=agreed), None) == code
