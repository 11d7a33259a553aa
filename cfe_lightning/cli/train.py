"""``train.py``: trains whatever a config describes, an explainer or a classifier; one run fills one folder."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cfe_lightning.cli.environment import check_torchvision
from cfe_lightning.cli.guard import add_debug, guarded
from cfe_lightning.compute.signals import StopRequested
from cfe_lightning.training import folder as run_folder

NOT_FINITE = 1


def parser() -> argparse.ArgumentParser:
    """Options of the command itself; imports nothing heavy, so that ``--help`` is immediate."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Trains an explainer or a classifier as a config describes, into <output>/<run>: best.ckpt, "
        "last.ckpt, config.yaml, metrics.csv, samples/ and wandb/.",
        epilog="Any value of the config can be overridden: --model.num_branches 3 --trainer.max_epochs 2 "
        "--trainer.devices 4; --print_config shows all of them, --model.help CLASS explains those of a class. "
        "Exit code: 0 trained, 1 a loss was not finite or the program is at fault, 2 nothing could be done, 128 + "
        "signal stopped after a batch with last.ckpt saved: 130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1, 140 SIGUSR2.",
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
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run a few iterations, say what the run would take (time, memory, size of a checkpoint), and leave "
        "nothing behind",
    )
    parser.add_argument("--overwrite", action="store_true", help="remove an earlier run of this name")
    parser.add_argument(
        "--skip-classifier-check", action="store_true", help="do not measure the classifier before training"
    )
    parser.add_argument(
        "--trusted",
        metavar="PACKAGE",
        action="append",
        default=[],
        help="package besides cfe_lightning, lightning, torch and torchvision whose classes the config and its files "
        "may name; can be repeated",
    )
    add_debug(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options, overrides = parser().parse_known_args(arguments)
    _speak()
    return guarded(
        lambda: _train(options, overrides),
        debug=options.debug,
        kept="nothing is left behind, the same command measures anew"
        if options.dry_run
        else "a checkpoint that was written is whole, the same command with --resume goes on from it",
    )


def _speak() -> None:
    """Shows our own messages, and leaves the root logger alone: Lightning would then speak twice."""
    logger = logging.getLogger("cfe_lightning")
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())


def _train(options: argparse.Namespace, overrides: list[str]) -> int:
    check_torchvision()
    from cfe_lightning.files.trust import only_trusted

    # A config also says what is built long after it was read, as the network of a classifier that is trained.
    with only_trusted(options.trusted):
        return _run(options, overrides)


def _run(options: argparse.Namespace, overrides: list[str]) -> int:
    if any(override.partition("=")[0].endswith(".help") for override in overrides):
        from cfe_lightning.training.run import ConfiguredRun

        ConfiguredRun([], overrides, Path(), None, options.trusted)  # prints what was asked for and ends the program
    configs, folder = run_folder.locate(options.config, options.run, options.output, options.resume)
    checkpoint = run_folder.find_checkpoint(options.resume, folder)
    if options.dry_run:
        return _dry_run(options, (configs, overrides, folder, checkpoint, options.trusted))

    from cfe_lightning.compute.processes import is_first_process
    from cfe_lightning.training.run import ConfiguredRun
    from cfe_lightning.training.watching import NonFiniteLossError

    last, begun = folder / "last.ckpt", False
    if is_first_process():
        run_folder.check_folder(folder, checkpoint, overwrite=options.overwrite)
    try:
        run = ConfiguredRun(configs, overrides, folder, checkpoint, options.trusted)
        if not options.skip_classifier_check:
            run.check_classifier()
        if is_first_process() and options.overwrite:
            # Only now: nothing before has been in vain for the run that is replaced.
            run_folder.clear_folder(folder)
        begun = True
        run.fit()
    except StopRequested as stop:
        return _stopped(stop, last if begun and last.is_file() else None)
    except NonFiniteLossError as error:
        sys.stderr.write(f"error: {error}\n")
        return NOT_FINITE
    except Exception:
        logging.raiseExceptions = False  # on a full disk, logs of W&B complain about themselves until the very end
        if begun and is_first_process() and last.is_file():
            sys.stderr.write(f"{last} is whole: once what follows is mended, continue with: train.py --resume {last}\n")
        raise
    return 0


def _stopped(stop: StopRequested, last: Path | None) -> int:
    """Says how to continue what a signal has stopped, and returns the exit code."""
    from cfe_lightning.compute.processes import is_first_process, launched_processes

    if is_first_process():
        how = "No batch is lost: give the same command again." if last is None else "Continue with: train.py --resume "
        sys.stderr.write(f"\n{stop} {how}{last or ''}\n")
    # Lightning kills the process that a user waits for as soon as one that it has launched fails: not where that one
    # ends by itself, but where it waits for the others to come, deaf to signals.
    own_launcher = int(os.environ.get("LOCAL_RANK", "0")) > 0 and launched_processes() == 1
    return 0 if own_launcher and stop.agreed else stop.exit_code


def _dry_run(options: argparse.Namespace, arguments: tuple[Any, ...]) -> int:
    from cfe_lightning.compute.processes import is_first_process
    from cfe_lightning.training.dry_run import DryRun

    run = DryRun(*arguments)
    if not options.skip_classifier_check:
        run.check_classifier()
    table = run.measure()
    if is_first_process():
        sys.stdout.write(table)
    return 0
