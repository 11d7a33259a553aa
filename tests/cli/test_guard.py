"""Every way out of a command: one sentence, an exit code, and the traceback only for those who ask."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from cfe_lightning.cli import evaluate, explain, train
from cfe_lightning.cli.guard import FAULT, NOTHING_DONE, guarded, plain
from cfe_lightning.images import UnreadableImageError, save_image


def ending(command: Callable[[], object], capsys: pytest.CaptureFixture[str], debug: bool = False) -> tuple[int, str]:
    """The exit code and what was said."""

    def run() -> int:
        command()
        return 0

    code = guarded(run, debug=debug, kept="all is kept")
    return code, capsys.readouterr().err


def raising(error: BaseException, cause: BaseException | None = None) -> Callable[[], object]:
    def command() -> None:
        raise error from cause

    return command


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (ValueError("two\nlines"), NOTHING_DONE, "two lines"),
        (FileNotFoundError("There is no x: give one."), NOTHING_DONE, "There is no x: give one."),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.png"), 2, "No space left on device: a.png (all is kept)"),
        (OSError(errno.EACCES, os.strerror(errno.EACCES), "a.png"), 2, "Permission denied: a.png (all is kept)"),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), 2, "File too large (all is kept)"),
        (
            RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0"),
            NOTHING_DONE,
            "A file could not be written to its end, the disk is full or gone (all is kept)",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            NOTHING_DONE,
            "Memory ran out (CUDA out of memory. Tried): choose smaller batches or images, or a machine with more of "
            "it (all is kept).",
        ),
        (
            MemoryError(),
            2,
            "Memory ran out: choose smaller batches or images, or a machine with more of it (all is kept).",
        ),
        (
            ModuleNotFoundError("No module named 'wandb'", name="wandb"),
            NOTHING_DONE,
            "No module named 'wandb': install it, for example with `pip install wandb`.",
        ),
        (
            KeyError("x"),
            FAULT,
            "This is a fault of the program, KeyError: 'x' (all is kept); please report it with what the same command "
            "prints with --debug.",
        ),
    ],
)
def test_an_exception_is_one_sentence(
    error: Exception, code: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ending(raising(error), capsys) == (code, f"error: {sentence}\n")


def test_a_full_disk_is_told_whatever_it_has_become(capsys: pytest.CaptureFixture[str]) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert ending(raising(RuntimeError("unexpected pos 64 vs 0"), full), capsys) == (
        NOTHING_DONE,
        "error: No space left on device (all is kept)\n",
    )
    # A sentence of ours that was made from it says more.
    assert ending(raising(ValueError("ours"), full), capsys) == (NOTHING_DONE, "error: ours\n")


def test_a_full_disk_while_a_checkpoint_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")

    def write() -> None:
        with Path("/dev/full").open("wb", buffering=0) as file:
            torch.save({"a": torch.zeros(100_000)}, file)

    code, said = ending(write, capsys)
    assert (code, said) == (NOTHING_DONE, "error: No space left on device (all is kept)\n")


def test_the_traceback_is_for_those_who_ask(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = ending(raising(KeyError("x")), capsys, debug=True)
    assert code == FAULT
    assert said.startswith("Traceback (most recent call last)")
    assert said.splitlines()[-1].startswith("error: This is a fault of the program, KeyError: 'x'")


def test_ctrl_c_has_its_own_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(raising(KeyboardInterrupt()), capsys) == (130, "\ninterrupted: all is kept\n")


class Broken(Dataset[int]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise UnreadableImageError("The file is empty:\nFile or what?")


def test_a_worker_process_says_the_sentence_alone(capsys: pytest.CaptureFixture[str]) -> None:
    loader = DataLoader(Broken(), num_workers=1)
    code, said = ending(lambda: list(loader), capsys)
    assert (code, said) == (NOTHING_DONE, "error: The file is empty: File or what?\n")


def test_what_a_terminal_would_act_on_is_shown() -> None:
    assert plain("a\x1b[2J\u202eb\udcff  c\n") == "a\\x1b[2J\\u202eb\\udcff c"
    assert len(plain("x" * 10**6)) < 1300


@pytest.mark.parametrize("command", [train, explain, evaluate])
def test_all_commands_are_guarded(command: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def fails(*_: object) -> int:
        raise ZeroDivisionError("by zero")

    name = "_train" if command is train else "options_of"
    monkeypatch.setattr(command, name, fails)
    assert command.main([]) == FAULT
    assert "fault of the program, ZeroDivisionError: by zero" in capsys.readouterr().err
    assert command.main(["--debug"]) == FAULT
    assert "Traceback" in capsys.readouterr().err


def test_an_image_that_becomes_unreadable_is_one_sentence_through_worker_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cfe_lightning.data.folder import ImageFolder

    for index in range(8):
        save_image(torch.zeros(3, 8, 8), tmp_path / "ab"[index % 2] / f"{index}.png")
    data = ImageFolder(
        root=str(tmp_path), image_size=8, num_workers=1, batch_size=1, val_fraction=0.2, test_fraction=0.2
    )
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"")
    data.setup("fit")
    code, said = ending(lambda: list(data.train_dataloader()), capsys)
    assert code == NOTHING_DONE
    assert said.count("\n") == 1
    assert "The file is empty" in said
    assert "Caught" not in said
