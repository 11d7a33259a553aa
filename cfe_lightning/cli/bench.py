"""``cfe-evaluate --bench``: trains classifiers with a planted shortcut and asks which explainers give it away.

What is done is kept per cell and explainer, so a run that was stopped continues. Cells of other calls are kept; the
``known_cause.*`` files cover what this call asks for.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from cfe_lightning.cli.bench_cell import CLASSIFIER, BenchCell, BenchMethod, keep_settings, shapes_of
from cfe_lightning.files.text import VERSION
from cfe_lightning.training import folder as run_folder

if TYPE_CHECKING:
    import torch

    from cfe_lightning.evaluation.known_cause import Cell

#: Test images of every cell, unless --limit says otherwise.
_NUM_TEST = 64


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the bench to a command that has ``--output``, ``--baselines``, ``--limit`` and ``--seed``."""
    group = parser.add_argument_group(
        "known-cause bench (with --output, --baselines, --limit, --seed, --device, --batch-size)",
        f"Every classifier is tested on --limit images, {_NUM_TEST} by default.",
    )
    group.add_argument(
        "--bench",
        choices=("synthetic",),
        help="train classifiers with a planted shortcut and measure which explainers give it away; no --checkpoint",
    )
    group.add_argument("--cues", metavar="NAMES", default="lesion,colour,texture", help="(default: all three)")
    group.add_argument("--cue-sizes", metavar="X,...", type=_numbers, default=[0.7, 1.0, 1.4], help="0.5 to 1.6")
    group.add_argument(
        "--shortcuts",
        metavar="P,...",
        type=_numbers,
        default=[0.0, 0.5, 0.9, 1.0],
        help="probabilities that the mark follows the class, else it sits anywhere (default: 0,0.5,0.9,1)",
    )
    group.add_argument(
        "--cue-agreement",
        metavar="P",
        type=float,
        default=0.95,
        help="share of training images with the cue of their class; at 1 cues are the easier reason and hardly any "
        "classifier uses its mark (default: 0.95)",
    )
    group.add_argument(
        "--methods",
        metavar="NAMES",
        default="steerable_lens,dxai,mirror_cfe",
        help="comma-separated, of configs NAME_synthetic.yaml (default: steerable_lens,dxai,mirror_cfe)",
    )
    group.add_argument(
        "--budget", metavar="X", type=float, default=1.0, help="multiplies the length of all trainings (default: 1)"
    )


def run_bench(options: argparse.Namespace, device: torch.device, baselines: Sequence[str]) -> int:
    """Runs the bench and returns the exit code: 0 measured, 128 + signal interrupted.

    Args:
        options: Of ``add_bench_options`` and of the command.
        device: Where everything runs.
        baselines: Names of baselines.

    Raises:
        ValueError: If an option cannot be used, or a classifier cannot be trained.
    """
    if options.checkpoint or options.data:
        raise ValueError("--bench trains its own explainers on built-in data: leave out --checkpoint and --data.")
    if options.output is None:
        raise ValueError("--bench keeps its trainings and results in a folder: add --output DIR.")
    return _run(options, device, baselines)


def _run(options: argparse.Namespace, device: torch.device, baselines: Sequence[str]) -> int:
    from cfe_lightning.evaluation import known_cause_page as known_cause_report
    from cfe_lightning.evaluation.known_cause import Bench

    cells = _cells(options)
    methods = [_method(name) for name in _names(options.methods)]
    bench = Bench(explainers=[*(method.name for method in methods), *baselines], num_cells=len(cells))
    if not bench.explainers:
        raise ValueError("There is nothing to measure: name at least one of --methods and --baselines.")
    settings = _settings(options, methods, baselines)
    options.output.mkdir(parents=True, exist_ok=True)
    keep_settings(options)
    tables = []
    for number, cell in enumerate(cells, start=1):
        work = BenchCell(cell, options, device, title=f"[{number}/{len(cells)}] {cell.name}")
        bench.uses.append(work.use())
        for method in methods:
            work.measure(method.name, [method.config, method.autoencoder], partial(work.method, method), bench)
        for name in baselines:
            work.measure(name, [], partial(work.baseline, name), bench)
        # After every cell: what there is can be looked at while the others are trained.
        tables = known_cause_report.save(
            bench, options.output, settings, options.output / "cells", float(work.batch["mark"].mean())
        )
    sys.stdout.write(f"{tables[0].markdown()}\nwritten to {options.output}\n")
    return 0


def _cells(options: argparse.Namespace) -> list[Cell]:
    """All combinations; every set of data is made once, so that a wrong size is refused before the first training."""
    from cfe_lightning.data.synthetic import Cue
    from cfe_lightning.evaluation.known_cause import Cell

    for cue in _names(options.cues):
        if cue not in get_args(Cue):
            raise ValueError(f"There is no cue {cue!r}: choose from {', '.join(get_args(Cue))}.")
    for p in options.shortcuts:
        if not 0 <= p <= 1:
            raise ValueError(f"--shortcuts are probabilities from 0 to 1, got {p:g}.")
    if not 0 < options.budget < math.inf:
        raise ValueError(f"--budget multiplies the length of trainings and must be above 0, got {options.budget:g}.")
    options.limit = options.limit or _NUM_TEST
    if options.limit < 2:
        raise ValueError(f"The bench needs at least one test image of each class: give --limit 2, not {options.limit}.")
    cells = [
        Cell(cue=cue, cue_size=size, p=p)
        for cue in _names(options.cues)
        for size in dict.fromkeys(options.cue_sizes)
        for p in dict.fromkeys(options.shortcuts)
    ]
    for cell in cells:
        shapes_of(cell, options, options.cue_agreement)
    if not cells:
        raise ValueError("There is no cell to measure: give at least one of --cues, --cue-sizes and --shortcuts.")
    return cells


def _method(name: str) -> BenchMethod:
    """The config of a method: by its file name, or by the module that the method is in."""
    from cfe_lightning.explainer import ExplainerModule
    from cfe_lightning.files.configs import load_config
    from cfe_lightning.files.trust import resolve_class_path

    folder = run_folder.find_configs([CLASSIFIER])[0].parent
    found: dict[str, Path] = {}
    needs_training: dict[Path, bool] = {}
    for path in sorted(folder.glob("*_synthetic.yaml")):
        model = load_config(path)["model"]
        kind = resolve_class_path(model["class_path"])
        if not (isinstance(kind, type) and issubclass(kind, ExplainerModule)):
            continue
        stem = path.name.removesuffix("_synthetic.yaml")
        found[stem] = path
        needs_training[path] = kind.needs_training
        found.setdefault(model["class_path"].split(".")[-2], path)
    if name not in found:
        raise ValueError(f"There is no method {name!r} for the bench: choose from {', '.join(found)}.")
    config = found[name]
    model = load_config(config)["model"]
    arguments = dict(model.get("init_args", {}))
    arguments.pop("classifier", None)
    base = arguments.get("autoencoder")
    return BenchMethod(
        name=name,
        config=config,
        class_path=model["class_path"],
        arguments=arguments,
        needs_training=needs_training[config],
        # A config names the checkpoint of what it stands on, and a run is named after its config.
        autoencoder=None if base is None else run_folder.find_configs([f"{Path(base).parent.name}.yaml"])[0],
    )


def _settings(options: argparse.Namespace, methods: Sequence[BenchMethod], baselines: Sequence[str]) -> dict[str, Any]:
    """How the numbers came about."""
    return {
        "version": VERSION,
        "bench": options.bench,
        "cues": _names(options.cues),
        "cue_sizes": options.cue_sizes,
        "shortcuts": options.shortcuts,
        "cue_agreement": options.cue_agreement,
        "methods": {method.name: method.config.name for method in methods},
        "baselines": list(baselines),
        "budget": options.budget,
        "limit": options.limit,
        "seed": options.seed,
    }


def _names(listed: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in listed.split(",") if name.strip()))


def _numbers(text: str) -> list[float]:
    """Numbers separated by commas."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers separated by commas, got {text!r}") from None
