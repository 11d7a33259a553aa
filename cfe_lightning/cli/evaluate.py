"""``cfe-evaluate``: measures checkpoints and baselines on the same images and writes one table."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cfe_lightning.cli.bench import run_bench
from cfe_lightning.cli.environment import check_torchvision
from cfe_lightning.cli.guard import add_debug, guarded
from cfe_lightning.evaluation.options import NUM_TEST, BenchOptions, EvaluateOptions, results_folder
from cfe_lightning.files.arguments import add_options, options_of
from cfe_lightning.files.atomic import check_writable, refuse_links

if TYPE_CHECKING:
    import torch

    from cfe_lightning.classifier import FrozenClassifier
    from cfe_lightning.explanation import Explainer

log = logging.getLogger(__name__)


def parser() -> argparse.ArgumentParser:
    """Builds the command line; imports nothing heavy, so that ``--help`` is immediate."""
    parser = argparse.ArgumentParser(
        prog="cfe-evaluate",
        description="Measures explainers on the same labelled images: prints one table and writes report.html, "
        "gallery.html, table.md, table.csv, differences.csv, groups.csv, metrics.json, per_image.csv and curves.npz.",
        epilog="Baselines: integrated_gradients, gradient_shap, internal_influence, guided_grad_cam, grad_cam, lrp, "
        "occlusion, saliency, random, neutral_descent; or all. Exit code: 0 measured, 1 fault of the program, "
        "2 nothing could be done, 128 + signal interrupted: 130 Ctrl-C, 143 SIGTERM.",
        allow_abbrev=False,
    )
    add_options(parser, EvaluateOptions, without=BenchOptions)
    bench = parser.add_argument_group(
        "known-cause bench (with --output, --baselines, --limit, --seed, --device, --batch-size)",
        f"Every classifier is tested on --limit images, {NUM_TEST} by default.",
    )
    add_options(bench, BenchOptions)
    add_debug(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    given = parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    return guarded(
        lambda: _evaluate(options_of(EvaluateOptions, given)),
        debug=given.debug,
        kept=f"what is measured at --batch-size {given.batch_size} is kept in "
        f"{results_folder(given.output, given.checkpoint)}, the same command again does the rest",
    )


def _evaluate(options: EvaluateOptions) -> int:
    check_torchvision()
    _check_output(options.folder)
    names = _baseline_names(options.baselines)
    device = _device(options.device)
    if options.bench is not None:
        return run_bench(options, device, names)
    from cfe_lightning.evaluation.run import EvaluateRun

    run = EvaluateRun(options, device)
    baselines, left_out = _baselines(names, run.classifiers(), set(run.checkpoints), options.seed)
    table = run.write(run.measure(baselines, left_out))
    encoding = sys.stdout.encoding or "utf-8"
    printable = table.encode(encoding, "backslashreplace").decode(encoding)
    sys.stdout.write(f"{printable}\nwritten to {options.folder}\n")
    return 0


def _baseline_names(listed: str) -> list[str]:
    from cfe_lightning.methods.baselines import BASELINES

    names = [name.strip() for name in listed.split(",") if name.strip()]
    if names == ["all"]:
        return list(BASELINES)
    for name in names:
        if name not in BASELINES:
            raise ValueError(f"There is no baseline {name!r}: choose from {', '.join(BASELINES)}.")
    return list(dict.fromkeys(names))


def _baselines(
    names: Sequence[str], classifiers: Mapping[str, FrozenClassifier], taken: set[str], seed: int
) -> tuple[dict[str, Explainer], dict[str, str]]:
    """Builds every baseline on every distinct classifier, which are named after their runs.

    Returns the baselines by title, none of which is ``taken``, and the reasons of those that cannot explain one.
    """
    from cfe_lightning.methods.baselines.captum import build_baseline

    built: dict[str, Explainer] = {}
    left_out: dict[str, str] = {}
    for name in names:
        for run, classifier in classifiers.items():
            title = name if len(classifiers) == 1 else f"{name} on the classifier of {run}"
            if title in taken:
                title = f"{title} (baseline)"
            try:
                built[title] = build_baseline(name, classifier, seed)
            except ValueError as error:
                log.warning("%s is left out: %s", title, error)
                left_out[title] = str(error)
    return built, left_out


def _device(asked: str) -> torch.device:
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked == "auto":
        return torch.device(next(name for name in available if available[name]))
    if not available[asked]:
        raise ValueError(f"There is no {asked} device here: use --device auto or cpu.")
    return torch.device(asked)


def _check_output(folder: Path) -> None:
    if (file := next((path for path in (folder, *folder.parents) if path.is_file()), None)) is not None:
        raise NotADirectoryError(f"--output {folder} cannot be a folder, {file} is a file: give a folder.")
    check_writable(folder)
    for part in (folder, folder / "unfinished"):
        refuse_links(part)
