"""Checkpoint files: whole or not at all, plain data, and removed only where the run has written."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cfe_lightning.training import checkpoints
from cfe_lightning.training.checkpoints import AtomicCheckpointIO


def test_a_kill_while_writing_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def dies(checkpoint: Any, file: Any) -> None:
        file.write(b"half of a")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.torch, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    monkeypatch.undo()
    assert torch.load(path, weights_only=True) == {"step": 1}
    AtomicCheckpointIO().save_checkpoint({"step": 3}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_full_disk_keeps_the_checkpoint_before_and_names_the_file(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*last\.ckpt") as error:
            AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.errno == errno.EFBIG
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_only_checkpoints_in_the_folder_of_the_run_are_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    io, run, other = AtomicCheckpointIO(), tmp_path / "run", tmp_path / "other"
    io.save_checkpoint({"epoch": 1}, run / "best.ckpt")
    (run / "folder.ckpt").mkdir()
    other.mkdir()
    for path in (other / "best.ckpt", other / "x.ckpt", run / "notes.txt", run / "folder.ckpt" / "x"):
        path.write_text("of the user")
    (run / "link.ckpt").symlink_to(other / "best.ckpt")
    before = sorted(tmp_path.rglob("*"))
    names = ["notes.txt", "folder.ckpt", "link.ckpt", "../other/best.ckpt", "../run/../other/best.ckpt"]
    for path in (*(f"{run}/{name}" for name in names), str(other), f"local://{other}/x.ckpt", f"{run}/gone.ckpt"):
        io.remove_checkpoint(path)
    assert sorted(tmp_path.rglob("*")) == before
    assert "other/best.ckpt is no checkpoint in the folder of this run, so it was not removed" in caplog.text
    io.remove_checkpoint(str(run / "best.ckpt"))
    assert not (run / "best.ckpt").exists()


def test_what_lightning_reads_is_plain_data_too(tmp_path: Path) -> None:
    io = AtomicCheckpointIO()
    io.save_checkpoint({"weight": torch.arange(3.0)}, tmp_path / "a.ckpt")
    assert torch.equal(io.load_checkpoint(tmp_path / "a.ckpt")["weight"], torch.arange(3.0))
    torch.save({"weight": torch.zeros(1).expand(10**12)}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a.ckpt cannot be read as a checkpoint: it claims a tensor"):
        io.load_checkpoint(str(tmp_path / "a.ckpt"))


def test_all_random_states_come_back() -> None:
    torch.manual_seed(3), np.random.seed(4), random.seed(5)

    def draw() -> tuple[Any, ...]:
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), np.random.randn(), random.gauss()

    draw()
    state = checkpoints._random_state()
    expected = draw()
    draw()
    checkpoints._set_random_state(state)
    assert draw() == expected
