"""What every test starts from: no W&B, no seed left in the environment, no talk."""

from __future__ import annotations

import logging
import os

import pytest

# Before torch is imported, and for all processes that tests start: tensors are small here, and more threads would
# mostly wait for each other, on a busy machine for seconds.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning hands the seed to other processes by the environment, where the next test would find it."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for name in [name for name in os.environ if name.startswith("PL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
