"""Finds configs by name, the folder ``<output>/<run>`` of a run, and the checkpoint to resume."""

import difflib
import shutil
from collections.abc import Sequence
from pathlib import Path

from cfe_lightning.files.atomic import refuse_links

#: The value of a bare ``--resume``: the run's own last checkpoint.
LAST = "last"
#: Files of a run, which ``--overwrite`` removes; anything else in its folder belongs to the user.
RUN_FILES = ("*.ckpt", "*.survey.pt", ".*.part", "config.yaml", "metrics.csv", "samples", "wandb")
_PACKAGE = Path(__file__).resolve().parents[1]
#: The shipped configs: inside the package where it was installed from a wheel, beside it in a checkout.
_SHIPPED = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"


def locate(names: Sequence[str], run: str | None, output: str | None, resume: str | None) -> tuple[list[Path], Path]:
    """Finds the configs and the folder of a run.

    Args:
        names: Configs as the user named them; none to resume a run with its own ``config.yaml``.
        run: Name of the run; None takes the first config's file name.
        output: Folder of all runs; None is ``checkpoints``.
        resume: ``LAST``, the path of a checkpoint, or None.

    Raises:
        FileNotFoundError: If a config does not exist.
        ValueError: If no run is named, or its name is a path.
    """
    # A new run, or one resumed with a given config.
    runs = Path(output or "checkpoints")
    if run is not None and (run in ("", ".", "..") or Path(run).name != run):
        raise ValueError(f"--run {run!r} is no name of a folder: choose the folder of the runs with --output.")
    if names or resume is None:
        configs = find_configs(names)
        return configs, runs / (run or _run_name(configs[0]))

    # A run resumed with its own config.
    if resume != LAST:
        left = _named(resume).parent
    elif run is not None:
        left = runs / run
    else:
        raise ValueError("--resume needs to know which run: add --config, --run NAME, or the path of a checkpoint.")
    config = left / "config.yaml"
    if not config.is_file():
        raise FileNotFoundError(f"There is no {config} of a run to resume: name the config with --config.")
    return [config], left if run is None and output is None else runs / (run or left.name)


def find_configs(names: Sequence[str]) -> list[Path]:
    """Finds configs as named, in ``configs/`` of the current folder, or among the shipped ones.

    Raises:
        FileNotFoundError: If a config does not exist; the message lists the known ones, the nearest names first.
        ValueError: If no config is named.
    """
    folders = list(dict.fromkeys([Path("configs").resolve(), _SHIPPED]))
    known = sorted({path.name for folder in folders for path in folder.glob("*.yaml")})
    if not names:
        listed = ", ".join(known) or "none"
        raise ValueError(f"No config is named: give --config FILE; in configs/ there are: {listed}.")
    # Configs as named, from the first place that has them.
    paths = []
    for name in names:
        found = [path for path in (Path(name), *(folder / name for folder in folders)) if path.is_file()]
        if not found:
            near = difflib.get_close_matches(name, known, n=len(known) or 1, cutoff=0.5)
            listed = ", ".join([*near, *(other for other in known if other not in near)]) or "none"
            raise FileNotFoundError(
                f"There is no config {name!r}, neither as given nor in configs/, where there are: {listed}."
            )
        paths.append(found[0])
    return paths


def _run_name(config: Path) -> str:
    """Names a run after its config, or after its folder where the config is a run's own ``config.yaml``."""
    return config.resolve().parent.name if config.name == "config.yaml" else config.stem


def find_checkpoint(resume: str | None, folder: Path) -> Path | None:
    """Finds the checkpoint that ``--resume`` names.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if resume is None:
        return None
    path = folder / "last.ckpt" if resume == LAST else _named(resume)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {path} to resume: leave out --resume to start the run from the beginning."
        )
    return path


def _named(resume: str) -> Path:
    """Returns a checkpoint as the user named it; a run's folder stands for its last.ckpt."""
    path = Path(resume)
    return path / "last.ckpt" if path.is_dir() else path


def check_folder(folder: Path, checkpoint: Path | None, *, overwrite: bool) -> None:
    """Refuses to write over another run's checkpoints, or through links to elsewhere.

    Args:
        folder: The run folder.
        checkpoint: Checkpoint to resume; one in ``folder`` continues the run there.
        overwrite: Allows removing the earlier run.

    Raises:
        ValueError: If the folder holds checkpoints that would be lost, or links.
    """
    continued = checkpoint is not None and checkpoint.resolve().parent == folder.resolve()
    if continued and overwrite:
        raise ValueError(f"--overwrite would remove {checkpoint}, which --resume needs: give one of the two.")
    if not continued and not overwrite and any(folder.glob("*.ckpt")):
        raise ValueError(
            f"{folder} already holds a run: continue it with --resume, keep it with --run OTHER_NAME, "
            "or replace it with --overwrite."
        )
    if not overwrite:
        refuse_links(folder)


def clear_folder(folder: Path) -> None:
    """Removes the files of an earlier run, and nothing else."""
    for pattern in RUN_FILES:
        for path in folder.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
