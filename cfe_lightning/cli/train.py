"""``train.py``: trains the explainer or classifier that a config describes; one run fills one folder."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfe_lightning.cli.environment import check_torchvision
from cfe_lightning.cli.guard import add_debug, guarded
from cfe_lightning.compute.signals import StopRequested
from cfe_lightning.files.arguments import add_options, option, options_of
from cfe_lightning.training import folder as run_folder

NOT_FINITE = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """Options of the command itself; everything else on the command line overrides the config."""

    config: list[str] = option(
        [], "YAML file, as named or in configs/", flag="-c --config", metavar="FILE", action="append"
    )
    run: str | None = option(None, "name of the run (default: the config's file name)", metavar="NAME")
    output: str | None = option(None, "folder of the runs (default: checkpoints)", metavar="DIR")
    resume: str | None = option(
        None,
        "continue the run from its last.ckpt, or from the named checkpoint or run folder",
        metavar="CKPT",
        nargs="?",
        const=run_folder.LAST,
    )
    dry_run: bool = option(
        False,
        "run a few iterations, print what the run would take (time, memory, size of a checkpoint), and leave nothing "
        "behind",
    )
    overwrite: bool = option(False, "remove an earlier run of this name")
    skip_classifier_check: bool = option(False, "do not measure the classifier before training")
    trusted: list[str] = option(
        [],
        "package besides cfe_lightning, lightning, torch and torchvision whose classes the config and its files may "
        "name; can be repeated",
        metavar="PACKAGE",
        action="append",
    )


def parser() -> argparse.ArgumentParser:
    """Builds the options of the command itself; imports nothing heavy, so that ``--help`` is immediate."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Trains an explainer or a classifier as a config describes, into <output>/<run>: best.ckpt, "
        "last.ckpt, config.yaml, metrics.csv, samples/ and wandb/.",
        epilog="Any value of the config can be overridden: --model.num_branches 3 --trainer.max_epochs 2 "
        "--trainer.devices 4; --print_config shows all of them, --model.help CLASS explains those of a class. "
        "Exit code: 0 trained, 1 a loss was not finite or fault of the program, 2 nothing could be done, 128 + "
        "signal stopped after a batch with last.ckpt saved: 130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1, 140 SIGUSR2.",
        allow_abbrev=False,
    )
    add_options(parser, TrainOptions)
    add_debug(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    given, overrides = parser().parse_known_args(arguments)
    options = options_of(TrainOptions, given)
    logger = logging.getLogger("cfe_lightning")
    if not logger.handlers:
        # Not the root logger, through which Lightning would print twice.
        logger.addHandler(logging.StreamHandler())
    return guarded(
        lambda: _train(options, overrides),
        debug=given.debug,
        kept="nothing is left behind, the same command measures anew"
        if options.dry_run
        else "a checkpoint that was written is whole, the same command with --resume goes on from it",
    )


def _train(options: TrainOptions, overrides: list[str]) -> int:
    check_torchvision()
    from cfe_lightning.files.trust import only_trusted

    # Some classes of a config are built long after it was read, such as the network of a trained classifier.
    with only_trusted(options.trusted):
        return _run(options, overrides)


def _run(options: TrainOptions, overrides: list[str]) -> int:
    # Help of a class.
    if any(override.partition("=")[0].endswith(".help") for override in overrides):
        from cfe_lightning.training.run import ConfiguredRun

        ConfiguredRun([], overrides, Path(), None, options.trusted)  # prints the help and ends the program
    # Configs, folder and checkpoint.
    configs, folder = run_folder.locate(options.config, options.run, options.output, options.resume)
    checkpoint = run_folder.find_checkpoint(options.resume, folder)
    if options.dry_run:
        return _dry_run(options, (configs, overrides, folder, checkpoint, options.trusted))
    # Build, check, train.
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
            # Only after all checks: a refused command must not cost the earlier run.
            run_folder.clear_folder(folder)
        begun = True
        run.fit()
    except StopRequested as stop:
        return _stopped(stop, last if begun and last.is_file() else None)
    except NonFiniteLossError as error:
        sys.stderr.write(f"error: {error}\n")
        return NOT_FINITE
    except Exception:
        logging.raiseExceptions = False  # on a full disk, W&B's logs would report their own failures to the very end
        if begun and is_first_process() and last.is_file():
            sys.stderr.write(f"{last} is whole: once what follows is mended, continue with: train.py --resume {last}\n")
        raise
    return 0


def _stopped(stop: StopRequested, last: Path | None) -> int:
    """Prints how to continue after a signal, and returns the exit code."""
    from cfe_lightning.compute.processes import is_first_process, launched_processes

    if is_first_process():
        how = "No batch is lost: give the same command again." if last is None else "Continue with: train.py --resume "
        sys.stderr.write(f"\n{stop} {how}{last or ''}\n")
    # Lightning kills the user's process as soon as a process that it launched fails: not one that ends by itself, but
    # one that waits for the others, deaf to signals.
    own_launcher = int(os.environ.get("LOCAL_RANK", "0")) > 0 and launched_processes() == 1
    return 0 if own_launcher and stop.agreed else stop.exit_code


def _dry_run(options: TrainOptions, arguments: tuple[Any, ...]) -> int:
    from cfe_lightning.compute.processes import is_first_process
    from cfe_lightning.training.dry_run import DryRun

    run = DryRun(*arguments)
    if not options.skip_classifier_check:
        run.check_classifier()
    table = run.measure()
    if is_first_process():
        sys.stdout.write(table)
    return 0
