"""Which config, folder and checkpoint a command line means, without any training."""

from pathlib import Path

import pytest

from cfe_lightning.training import folder as run_folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = Path("checkpoints/toy")
    folder.mkdir(parents=True)
    for name in ("config.yaml", "last.ckpt", "best.ckpt"):
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    ("resume", "name", "checkpoint"),
    [
        ("last", "toy", "last.ckpt"),
        ("checkpoints/toy", None, "last.ckpt"),
        ("checkpoints/toy/", None, "last.ckpt"),
        ("checkpoints/toy/last.ckpt", None, "last.ckpt"),
        ("checkpoints/toy/best.ckpt", None, "best.ckpt"),
    ],
)
def test_a_run_is_resumed_by_its_name_its_folder_or_a_checkpoint(
    resume: str, name: str | None, checkpoint: str, run: Path
) -> None:
    configs, folder = run_folder.locate([], name, None, resume)
    assert (configs, folder) == ([run / "config.yaml"], run)
    assert run_folder.find_checkpoint(resume, folder) == run / checkpoint


def test_a_folder_without_a_run_is_named(run: Path) -> None:
    Path("empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"There is no empty/config.yaml of a run to resume: name the config"):
        run_folder.locate([], None, None, "empty")
    with pytest.raises(FileNotFoundError, match=r"There is no empty/last.ckpt to resume: leave out --resume"):
        run_folder.find_checkpoint("empty", run)
