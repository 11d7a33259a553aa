"""``train.py``: trains whatever a config describes, an explainer or a classifier; one run fills one folder."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from cfe_lightning.cli import run_folder
from cfe_lightning.cli.arguments import INTERRUPTED
from cfe_lightning.environment import check_torchvision

NOT_FINITE = 1


def parser() -> argparse.ArgumentParser:
    """Options of the command itself; imports nothing heavy, so that ``--help`` is immediate."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Trains an explainer or a classifier as a config describes, into <output>/<run>: best.ckpt, "
        "last.ckpt, config.yaml, metrics.csv, samples/ and wandb/.",
        epilog="Any value of the config can be overridden: --model.num_branches 3 --trainer.max_epochs 2 "
        "--trainer.devices 4; --print_config shows all of them, --model.help CLASS explains those of a class. "
        "Exit code: 0 trained, 1 a loss was not finite, 2 nothing could be done, 130 interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "-c", "--config", metavar="FILE", action="append", default=[], help="YAML file, as named or in configs/"
    )
    parser.add_argument("--run", metavar="NAME", help="name of the run (default: the config's file name)")
    parser.add_argument("--output", metavar="DIR", help="folder of the runs (default: checkpoints)")
    parser.add_argument(
        "--resume",
        metavar="CKPT",
        nargs="?",
        const=run_folder.LAST,
        help="continue the run from its last.ckpt, or from the named checkpoint or run folder",
    )
    parser.add_argument("--overwrite", action="store_true", help="remove an earlier run of this name")
    parser.add_argument(
        "--skip-classifier-check", action="store_true", help="do not measure the classifier before training"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options, overrides = parser().parse_known_args(arguments)
    _speak()
    try:
        return _train(options, overrides)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted before a checkpoint could be written\n")
        return INTERRUPTED


def _speak() -> None:
    """Shows our own messages, and leaves the root logger alone: Lightning would then speak twice."""
    logger = logging.getLogger("cfe_lightning")
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())


def _train(options: argparse.Namespace, overrides: list[str]) -> int:
    check_torchvision()
    if any(override.partition("=")[0].endswith(".help") for override in overrides):
        from cfe_lightning.cli.configured_run import ConfiguredRun

        ConfiguredRun([], overrides, Path(), None)  # prints what was asked for and ends the program
    configs, folder = run_folder.locate(options.config, options.run, options.output, options.resume)
    checkpoint = run_folder.find_checkpoint(options.resume, folder)

    from cfe_lightning.callbacks import NonFiniteLossError
    from cfe_lightning.checkpointing import TrainingStoppedError
    from cfe_lightning.cli.configured_run import ConfiguredRun, is_first_process

    if is_first_process():
        run_folder.check_folder(folder, checkpoint, overwrite=options.overwrite)
    try:
        run = ConfiguredRun(configs, overrides, folder, checkpoint)
        if not options.skip_classifier_check:
            run.check_classifier()
        if is_first_process() and options.overwrite:
            # Only now: nothing before has been in vain for the run that is replaced.
            run_folder.clear_folder(folder)
        run.fit()
    except TrainingStoppedError as error:
        if is_first_process():
            sys.stderr.write(f"{error} Continue with: train.py --resume {folder / 'last.ckpt'}\n")
        return INTERRUPTED
    except NonFiniteLossError as error:
        sys.stderr.write(f"error: {error}\n")
        return NOT_FINITE
    return 0
