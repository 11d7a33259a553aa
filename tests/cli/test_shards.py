"""One folder explained by several runs that do not know of each other, and by one whose memory is short."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
import toy
from explained import NoisyToy, checkpoint, content, photos, restore_process_settings, run, sentence, table
from torch import Tensor

from cfe_lightning.cli import explain
from cfe_lightning.explaining.folder import OutputFolder, Shard
from cfe_lightning.explaining.row import Row
from cfe_lightning.explaining.run import _own_device
from cfe_lightning.explaining.writer import ExplanationWriter
from cfe_lightning.explanation import Explanation
from cfe_lightning.files.arguments import shard as read_shard

__all__ = ["checkpoint", "photos", "restore_process_settings"]


class ForgetfulToy(toy.FixedToyExplainer):
    """Has memory for three images."""

    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        if len(image) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().explain(image, target)


class FullToy(toy.FixedToyExplainer):
    """Has no memory at all."""

    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: ...")


def test_shards_in_any_order_leave_what_one_run_leaves(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Random numbers depend on the images of a batch, so this also says that batches are the same.
    noisy = toy.save_checkpoint(NoisyToy(toy.toy_classifier(3)), tmp_path / "noisy.ckpt")
    (photos / "b" / "broken.png").write_bytes(b"broken")
    assert run(noisy, photos, tmp_path / "one") == explain.FAILED_ROWS
    out = tmp_path / "shards"
    codes = [run(noisy, photos, out, "--shard", f"{index}/3") for index in (3, 1, 2)]
    assert sorted(codes) == [0, 0, explain.FAILED_ROWS]
    assert not (out / "report.html").exists()
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("shard")]
    assert told[0].startswith("shard 3 of 3: 2 explained, 0 failed; when all shards are through, the same command")
    assert run(noisy, photos, out) == explain.FAILED_ROWS
    assert content(out) == content(tmp_path / "one")


def test_a_killed_shard_goes_on_where_it_was(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(checkpoint, photos, out, "--shard", "1/2")
    rows = out / "manifest.1of2-0.jsonl"
    before = rows.read_bytes()
    closed = before.index(b'"end"')
    # The second batch was recorded in part.
    rows.write_bytes(before[: before.index(b"\n", closed) + 40])
    run(checkpoint, photos, out, "--shard", "1/2")
    mine = [row.name for row in OutputFolder(out, Shard(1, 2)).rows()]
    assert sorted(mine) == ["a/0.png", "a/2.png", "b/1.png", "b/3.png"]
    first = rows.stat().st_size
    run(checkpoint, photos, out, "--shard", "1/2")
    assert rows.stat().st_size < first + 40, "nothing is explained twice"


def test_what_a_lost_shard_left_undone_is_done_in_the_end(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    run(checkpoint, photos, tmp_path / "one")
    out = tmp_path / "shards"
    assert run(checkpoint, photos, out, "--shard", "2/2") == 0
    assert run(checkpoint, photos, out) == 0
    assert content(out) == content(tmp_path / "one")


def test_more_shards_than_batches_have_nothing_to_do(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(checkpoint, photos, tmp_path / "out", "--shard", "9/9") == 0
    assert "shard 9 of 9: 0 explained, 0 failed" in capsys.readouterr().out


def test_shards_may_begin_at_the_same_time(tmp_path: Path) -> None:
    header = {"classes": ["a", "b"]}
    ready = threading.Barrier(8)
    errors: list[Exception] = []

    def begin(index: int) -> None:
        ready.wait()
        try:
            OutputFolder(tmp_path / "out", Shard(index, 8)).prepare(header)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=begin, args=(index,)) for index in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert OutputFolder(tmp_path / "out").header() == {"schema": 1, **header}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.jsonl"]


def test_a_shard_keeps_away_from_the_rows_of_others(tmp_path: Path) -> None:
    for index in (1, 2):
        folder = OutputFolder(tmp_path, Shard(index, 2))
        folder.prepare({"classes": []})
        folder.append(0, [Row({"name": f"{index}.png", "status": "failed", "error": "gone"})])
    OutputFolder(tmp_path, Shard(2, 2)).prepare({"classes": []})
    assert [row.name for row in OutputFolder(tmp_path, Shard(1, 2)).rows()] == ["1.png"]
    assert (tmp_path / "manifest.1of2-0.jsonl").exists()
    OutputFolder(tmp_path).prepare({"classes": []})
    assert [row.name for row in OutputFolder(tmp_path).rows()] == ["1.png", "2.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.jsonl"]


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "1/0", "-1/2", "1/2/3"])
def test_a_shard_is_one_of_several(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        explain.main([f"--shard={text}"])
    assert "must be one of several parts counted from 1, as 3/8, got" in capsys.readouterr().err


def test_a_shard_is_counted_from_one() -> None:
    assert read_shard("3/8") == (3, 8)


def test_a_shard_must_not_remove_what_others_write(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(checkpoint, photos, tmp_path / "out", "--shard", "1/2", "--overwrite") == 2
    assert "--overwrite with --shard would remove what the other shards are writing" in sentence(capsys)


@pytest.mark.parametrize(
    ("environment", "num_gpus", "accelerator", "devices"),
    [
        ({"SLURM_LOCALID": "2"}, 4, "auto", [2]),
        ({"LOCAL_RANK": "5", "SLURM_LOCALID": "0"}, 4, "gpu", [1]),
        ({"SLURM_LOCALID": "2"}, 1, "auto", 1),
        ({"SLURM_LOCALID": "2"}, 4, "cpu", 1),
        ({}, 4, "auto", 1),
    ],
)
def test_shards_on_one_machine_take_a_gpu_each(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], num_gpus: int, accelerator: str, devices: object
) -> None:
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert _own_device(accelerator) == devices


def test_machines_started_by_hand_take_shards(
    checkpoint: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NODE_RANK", "1")
    assert run(checkpoint, photos, tmp_path / "out") == 2
    assert "NODE_RANK is 1, but machines that torchrun or srun has not started cannot share" in sentence(capsys)
    assert not (tmp_path / "out").exists()
    assert run(checkpoint, photos, tmp_path / "out", "--shard", "2/2") == 0
    capsys.readouterr()
    assert run(checkpoint, photos, tmp_path / "out", "--shard", "1/2", "--devices", "2") == 2
    assert "NODE_RANK is 1" in sentence(capsys)


def test_what_shards_still_write_is_neither_verified_nor_merged(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(checkpoint, photos, out, "--shard", "1/2") == 0
    rows = (out / "manifest.1of2-0.jsonl").read_bytes()
    capsys.readouterr()
    assert explain.main(["--verify", str(out), "--checkpoint", str(checkpoint), "--trusted", "toy"]) == 2
    assert sentence(capsys) == (
        f"{out} holds rows of a run or shard that has not finished (manifest.1of2-0.jsonl): let it finish, or "
        "give its command again without --shard, then --verify."
    )
    assert (out / "manifest.1of2-0.jsonl").read_bytes() == rows
    assert run(checkpoint, photos, out) == 0
    assert explain.main(["--verify", str(out), "--trusted", "toy"]) == 0


def test_where_memory_is_short_a_batch_is_explained_in_parts(
    photos: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = toy.save_checkpoint(ForgetfulToy(toy.toy_classifier(3)), tmp_path / "short.ckpt")
    assert run(short, photos, tmp_path / "parts", "--batch-size", "7", "--trusted", __name__.partition(".")[0]) == 0
    assert "memory was short: --batch-size 2 saves the attempts in vain" in capsys.readouterr().out
    whole = toy.save_checkpoint(toy.FixedToyExplainer(toy.toy_classifier(3)), tmp_path / "whole.ckpt")
    assert run(whole, photos, tmp_path / "at_once", "--batch-size", "7") == 0
    assert content(tmp_path / "parts") == content(tmp_path / "at_once")


def test_an_image_too_large_for_the_device_is_one_sentence(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = toy.save_checkpoint(FullToy(toy.toy_classifier(3)), tmp_path / "full.ckpt")
    assert run(full, photos, tmp_path / "out", "--trusted", __name__.partition(".")[0]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(
        "error: The device ran out of memory with a single image: the same command with --precision"
    )


def test_memory_that_runs_out_elsewhere_is_not_said_to_be_for_want_of_a_single_image(
    checkpoint: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ExplanationWriter, "on_predict_start", full)
    assert run(checkpoint, photos, tmp_path / "out") == 2
    assert sentence(capsys) == (
        "Memory ran out (CUDA out of memory): choose smaller batches or images, or a machine with more of it (what is "
        f"finished at --batch-size 2 is kept in {tmp_path / 'out'}, the same command again does the rest)."
    )


def test_the_table_of_a_sharded_run_is_complete(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    for index in (1, 2):
        run(checkpoint, photos, tmp_path / "out", "--shard", f"{index}/2", "--limit", "5")
    run(checkpoint, photos, tmp_path / "out", "--limit", "5")
    assert len(table(tmp_path / "out")) == 5
