"""Speed, memory and time to a fixed quality of all methods: tables of docs/measured/scale.md.

    python benchmarks/run.py --quick                    # two CPU cores, half an hour to an hour
    python benchmarks/run.py                            # small networks on the CPU, all sizes: hours
    python benchmarks/run.py --device cuda              # published widths
    python benchmarks/run.py --only speed/train/Dxai    # some cells

Every cell is one measurement in a fresh process: a method, its work (training step, explanation, decoding), the side
of the images and a variant (fp32, bf16, +compile, +channels_last, +recompute). What is compared takes turns in one
process: the variant, the module as built in fp32, and the straightforward implementations of
``benchmarks/straightforward.py``, whose answers are checked, too. Ratios are of one round each: median and quartiles.
Memory is the peak that CUDA allocated or the growth of the process. Results are written after every cell, so that an
interrupted run goes on; with other settings they need another --output.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cells import AS_BUILT, Cell, Settings
from children import Children
from contenders import METHODS, Variant
from fitting import GOALS
from straightforward import STRAIGHTFORWARD
from tables import markdown

from cfe_lightning.files.atomic import atomic_write

ROOT = Path(__file__).parents[1]
SIZES = (32, 64, 128, 256)
VARIANTS = ("fp32", "bf16", "fp32+compile", "bf16+compile")
#: What the GPU has to be 2.5 times as fast with as in fp32, at the size that is asked for.
_ACCEPTED = ("fp32", "bf16+channels_last", "bf16+compile+channels_last")
_ACCEPTED_SIZE = 128


def plan(device: str, quick: bool) -> list[Cell]:
    """All cells in the order of their importance."""
    cells = [*_accepted()] if device == "cuda" else []
    for method, what in METHODS.items():
        for work in what.works:
            cells += _speed(device, quick, method, work)
        if "explain" in what.works:
            cells.append(Cell(measure="files", work="explain", method=method, size=32 if quick else 64))
        if "train" in what.works:
            largest = 128 if quick else 256
            shared: dict[str, Any] = {"work": "train", "method": method, "size": largest, "variant": "fp32+recompute"}
            cells += [Cell(measure="speed", **shared), Cell(measure="memory", who=AS_BUILT, **shared)]
    cells.append(Cell(measure="search", work="explain", method="StylEx", size=32 if quick else 64))
    for method in GOALS:
        for variant in ("fp32",) if quick and device == "cpu" else _variants(device, quick):
            cells.append(Cell(measure="quality", work="train", method=method, size=32, variant=variant))
    return list(dict.fromkeys(cells))


def _variants(device: str, quick: bool) -> list[str]:
    if device == "cpu":
        return [*VARIANTS]
    return ["fp32", "bf16", *_ACCEPTED[1:]] if quick else [*VARIANTS, *(f"{name}+channels_last" for name in VARIANTS)]


def _accepted() -> list[Cell]:
    """What the GPU's speed-up is judged by."""
    cells = []
    for method, work in (("Dxai", "train"), ("StylEx", "train"), ("DiffExplainer", "decode")):
        for variant in _ACCEPTED:
            shared: dict[str, Any] = {"work": work, "method": method, "size": _ACCEPTED_SIZE, "variant": variant}
            cells.append(Cell(measure="speed", **shared))
            if work == "train":
                cells += [Cell(measure="curve", **shared), Cell(measure="steady", **shared)]
    return cells


def _speed(device: str, quick: bool, method: str, work: str) -> list[Cell]:
    """Seconds and memory of one work of a method."""
    cells = []
    ways = [AS_BUILT, *STRAIGHTFORWARD.get((work, method), {})]
    for size in SIZES[:3] if quick else SIZES:
        for variant in _variants(device, quick):
            if quick and device == "cpu" and not _is_quick(method, work, size, variant):
                continue
            cells.append(Cell(measure="speed", work=work, method=method, size=size, variant=variant))
            if quick and (size == SIZES[0] or variant != "fp32"):
                continue
            for who in ways if variant == "fp32" else [AS_BUILT]:
                cells.append(Cell(measure="memory", work=work, method=method, size=size, variant=variant, who=who))
    return cells


def _is_quick(method: str, work: str, size: int, variant: str) -> bool:
    """What a quarter of an hour is enough for: compilers take minutes, and so do searches of 20 passes a picture."""
    if (method, work) == ("DiffExplainer", "explain"):
        return (size, variant) == (32, "fp32")
    if variant == "fp32+compile":
        # The U-Net has so many kinds of blocks that its compilation alone takes three minutes.
        return (size, work) == (32, "train") and method != "DiffusionAutoencoder"
    if variant == "bf16":
        return size <= 64
    return variant == "fp32" and (size <= 64 or work != "decode")


def settings_of(options: argparse.Namespace) -> Settings:
    """What all cells share."""
    cuda = options.device == "cuda"
    return Settings(
        device=options.device,
        small=not (options.published or cuda) or options.small,
        threads=options.threads,
        seconds=3.0 if options.quick else 15.0,
        rounds=3 if options.quick else 7,
        train_images=16 if cuda else 8,
        explain_images=16 if cuda else 4,
        file_images=256 if cuda else 16 if options.quick else 64,
        curve_batches=300,
        workers=min(8, os.cpu_count() or 1) if cuda else 0,
        folder=str(options.output),
    )


def machine(settings: Settings) -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    described = {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": settings.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if settings.device == "cuda":
        described["gpu"] = torch.cuda.get_device_name()
        described["tf32 in convolutions"] = torch.backends.cudnn.allow_tf32
    return described


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


class Results:
    """The cells measured so far, in one JSON file that is whole at any time.

    Args:
        folder: Where ``results.json`` and ``results.md`` are.
        settings: Of all cells.
        overwrite: Forget what is there.

    Raises:
        ValueError: If there are results of other settings or of another machine.
    """

    def __init__(self, folder: Path, settings: Settings, overwrite: bool) -> None:
        self.path = folder / "results.json"
        described = machine(settings)
        self.content: dict[str, Any] = {"settings": asdict(settings), "machine": described, "cells": {}}
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite or not self.path.exists():
            return
        found = json.loads(self.path.read_text())
        if (found["settings"], found["machine"]) != (self.content["settings"], described):
            raise ValueError(
                f"{self.path} was measured with other settings or on another machine: give another --output, or "
                "--overwrite to begin anew."
            )
        self.content = found

    def __contains__(self, cell: Cell) -> bool:
        return "failed" not in self.content["cells"].get(cell.key, {"failed": ""})

    def add(self, cell: Cell, result: dict[str, Any]) -> None:
        """Keeps one result and writes everything."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.content["cells"][cell.key] = {"cell": asdict(cell), "date": now, **result}
        with atomic_write(self.path) as file:
            json.dump(self.content, file, indent=1)
        with atomic_write(self.path.with_suffix(".md")) as file:
            file.write(markdown(self.content))


def _brief(result: dict[str, Any]) -> str:
    """What is said of a cell while it runs."""
    if "failed" in result:
        return f"failed: {result['failed']}"
    if "peak_mib" in result:
        return f"{result['peak_mib']:.0f} MiB"
    if "goal" in result:
        return (
            f"{result['goal']} after {result['seconds']:.0f} s"
            if result["reached"]
            else f"{result['goal']} not reached"
        )
    rates = result.get("images_per_second", {})
    return ", ".join(f"{name} {rate:.3g}/s" for name, rate in rates.items()) or "done"


def run(cells: list[Cell], settings: Settings, results: Results, children: Children) -> None:
    """Measures what is missing."""
    missing = [cell for cell in cells if cell not in results]
    for index, cell in enumerate(missing, start=1):
        result = children.measure(cell, settings)
        results.add(cell, result)
        print(f"[{index}/{len(missing)}] {cell.key}: {_brief(result)}", flush=True)


def main() -> int:
    options = _parser().parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("error: --device cuda needs a GPU that torch sees: leave it out to measure the CPU.\n")
        return 2
    cells = [
        cell
        for cell in plan(options.device, options.quick)
        if cell.size in (options.sizes or SIZES)
        and cell.variant in (options.variants or [cell.variant])
        and (not options.only or any(part in cell.key for part in options.only))
    ]
    if options.list:
        print("\n".join(cell.key for cell in cells))
        return 0
    settings = settings_of(options)
    try:
        results = Results(options.output, settings, options.overwrite)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    run(cells, settings, results, Children(options.device, options.threads, options.time_limit))
    print(markdown(results.content))
    return 0


def _variant(name: str) -> str:
    try:
        Variant.named(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, variants and rounds")
    parser.add_argument("--published", action="store_true", help="published widths (the default on a GPU)")
    parser.add_argument("--small", action="store_true", help="widths of the shapes' configs (the default on a CPU)")
    parser.add_argument("--sizes", type=int, nargs="+", choices=SIZES, help="only these")
    parser.add_argument("--variants", type=_variant, nargs="+", help="only these, such as bf16+channels_last")
    parser.add_argument("--only", nargs="+", metavar="PART", help="only cells whose name has one of these parts")
    parser.add_argument("--list", action="store_true", help="print the names of the cells and stop")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    parser.add_argument("--time-limit", type=float, default=600, help="seconds for one cell (default: 600)")
    parser.add_argument("--output", type=Path, default=ROOT / "checkpoints" / "benchmarks")
    parser.add_argument("--overwrite", action="store_true", help="forget earlier results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
