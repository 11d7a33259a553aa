"""``cfe-evaluate --bench``: trains classifiers with a planted shortcut and measures which explainers reveal it.

Results are kept per cell and explainer, so a stopped run continues. Cells of other calls are kept; the
``known_cause.*`` files cover the cells of this call.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from cfe_lightning.cli.bench_cell import CLASSIFIER, BenchCell, BenchMethod, keep_settings, shapes_of
from cfe_lightning.evaluation.options import NUM_TEST, EvaluateOptions
from cfe_lightning.files.text import VERSION
from cfe_lightning.training import folder as run_folder

if TYPE_CHECKING:
    import torch

    from cfe_lightning.evaluation.known_cause import Cell


def run_bench(options: EvaluateOptions, device: torch.device, baselines: Sequence[str]) -> int:
    """Runs the bench and returns the exit code: 0 measured, 128 + signal interrupted.

    Args:
        options: Checked options of the command.
        device: Device that everything runs on.
        baselines: Names of baselines.

    Raises:
        ValueError: If an option cannot be used, or a classifier cannot be trained.
    """
    from cfe_lightning.evaluation import known_cause_page
    from cfe_lightning.evaluation.known_cause import Bench

    options = replace(options, limit=options.limit or NUM_TEST)
    folder = options.folder
    cells = _cells(options)
    methods = [_method(name) for name in _names(options.methods)]
    bench = Bench(explainers=[*(method.name for method in methods), *baselines], num_cells=len(cells))
    if not bench.explainers:
        raise ValueError("There is nothing to measure: name at least one of --methods and --baselines.")
    settings = _settings(options, methods, baselines)
    folder.mkdir(parents=True, exist_ok=True)
    keep_settings(options)
    # Cell by cell.
    tables = []
    for number, cell in enumerate(cells, start=1):
        work = BenchCell(cell, options, device, title=f"[{number}/{len(cells)}] {cell.name}")
        bench.uses.append(work.use())
        for method in methods:
            work.measure(method.name, [method.config, method.autoencoder], partial(work.method, method), bench)
        for name in baselines:
            work.measure(name, [], partial(work.baseline, name), bench)
        # After every cell: finished cells can be looked at while the others are trained.
        tables = known_cause_page.save(bench, folder, settings, folder / "cells", float(work.batch["mark"].mean()))
    sys.stdout.write(f"{tables[0].markdown()}\nwritten to {folder}\n")
    return 0


def _cells(options: EvaluateOptions) -> list[Cell]:
    """Combines cues, sizes and shortcuts; all data are built once, so that a wrong size is refused before training."""
    from cfe_lightning.data.synthetic import Cue
    from cfe_lightning.evaluation.known_cause import Cell

    # Refuse impossible options.
    for cue in _names(options.cues):
        if cue not in get_args(Cue):
            raise ValueError(f"There is no cue {cue!r}: choose from {', '.join(get_args(Cue))}.")
    for p in options.shortcuts:
        if not 0 <= p <= 1:
            raise ValueError(f"--shortcuts are probabilities from 0 to 1, got {p:g}.")
    if not 0 < options.budget < math.inf:
        raise ValueError(f"--budget multiplies the length of trainings and must be above 0, got {options.budget:g}.")
    if options.limit is not None and options.limit < 2:
        raise ValueError(f"The bench needs at least one test image of each class: give --limit 2, not {options.limit}.")
    # Combine them.
    sizes, shortcuts = dict.fromkeys(options.cue_sizes), dict.fromkeys(options.shortcuts)
    cells = [Cell(cue=cue, cue_size=size, p=p) for cue, size, p in product(_names(options.cues), sizes, shortcuts)]
    for cell in cells:
        shapes_of(cell, options, options.cue_agreement)
    if not cells:
        raise ValueError("There is no cell to measure: give at least one of --cues, --cue-sizes and --shortcuts.")
    return cells


def _method(name: str) -> BenchMethod:
    """Finds the config of a method by its file name, or by the folder of the method's class."""
    from cfe_lightning.explainer import ExplainerModule
    from cfe_lightning.files.configs import load_config
    from cfe_lightning.files.trust import resolve_class_path

    # Configs by file name and by folder of the class.
    folder = run_folder.find_configs([CLASSIFIER])[0].parent
    found: dict[str, tuple[Path, dict[str, Any], bool]] = {}
    for path in sorted(folder.glob("*_synthetic.yaml")):
        model = load_config(path)["model"]
        kind = resolve_class_path(model["class_path"])
        if isinstance(kind, type) and issubclass(kind, ExplainerModule):
            found[path.name.removesuffix("_synthetic.yaml")] = (path, model, kind.needs_training)
            found.setdefault(model["class_path"].split(".")[-2], (path, model, kind.needs_training))
    # The chosen one.
    if name not in found:
        raise ValueError(f"There is no method {name!r} for the bench: choose from {', '.join(found)}.")
    config, model, needs_training = found[name]
    arguments = {key: value for key, value in model.get("init_args", {}).items() if key != "classifier"}
    base = arguments.get("autoencoder")
    return BenchMethod(
        name=name,
        config=config,
        class_path=model["class_path"],
        arguments=arguments,
        needs_training=needs_training,
        # A config names the checkpoint of its autoencoder, whose run folder is named after its own config.
        autoencoder=None if base is None else run_folder.find_configs([f"{Path(base).parent.name}.yaml"])[0],
    )


def _settings(options: EvaluateOptions, methods: Sequence[BenchMethod], baselines: Sequence[str]) -> dict[str, Any]:
    # The options in the order of the file, some of them in a form of its own.
    names = ("cues", "cue_sizes", "shortcuts", "cue_agreement", "methods", "baselines", "budget", "limit", "seed")
    return {
        "version": VERSION,
        "bench": options.bench,
        **{name: getattr(options, name) for name in names},
        "cues": _names(options.cues),
        "methods": {method.name: method.config.name for method in methods},
        "baselines": list(baselines),
    }


def _names(listed: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in listed.split(",") if name.strip()))
