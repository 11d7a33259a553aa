"""Checks of the command line that need no torch."""

import argparse
from pathlib import Path

import pytest

from cfe_lightning.cli import evaluate
from cfe_lightning.explaining.options import check_folders
from cfe_lightning.files import arguments
from cfe_lightning.files.atomic import check_writable


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that takes no files, also from a user who may do anything."""
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path / "locked")
    return tmp_path / "locked"


@pytest.mark.parametrize("below", [".", "new", "new/deeper"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(locked: Path, below: str) -> None:
    output, source = locked / below, locked.parent / "photos"
    source.mkdir()
    sentence = f"^--output {output} cannot be written to: give another folder.$"
    with pytest.raises(PermissionError, match=sentence):
        check_folders(source, output)
    with pytest.raises(PermissionError, match=sentence):
        evaluate._check_output(output)
    assert list(locked.iterdir()) == []


def test_an_output_that_is_yet_to_be_made_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for output in (Path("new"), Path("new/deeper"), Path(".")):
        check_writable(output)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["table", "table/new"])
def test_an_output_within_a_file_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "table").touch()
    with pytest.raises(NotADirectoryError, match=rf"{tmp_path}/table is a file: give a folder\.$"):
        evaluate._check_output(tmp_path / below)


def test_an_assignment_is_a_name_and_plain_data() -> None:
    assert arguments.assignment("num_steps=16") == ("num_steps", 16)
    assert arguments.assignment("confidence=0.9") == ("confidence", 0.9)
    assert arguments.assignment("confidence=null") == ("confidence", None)
    assert arguments.assignment("sampler=dpm") == ("sampler", "dpm")
    assert arguments.assignment("name=a=b") == ("name", "a=b")
    for text in ("num_steps", "=16", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="must be NAME=VALUE"):
            arguments.assignment(text)


@pytest.mark.parametrize("text", ["-1", "many", "1.5", ""])
def test_a_count_is_a_whole_number(text: str) -> None:
    assert arguments.count("0") == 0
    with pytest.raises(argparse.ArgumentTypeError, match="must be a whole number"):
        arguments.count(text)
    with pytest.raises(argparse.ArgumentTypeError, match="must be at least 1"):
        arguments.positive("0")
