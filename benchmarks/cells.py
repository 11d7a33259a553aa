"""The measurements of ``benchmarks/run.py``, each for one cell: seconds in turns, peak memory, and ``explain.py``.

Machines are noisy, so nothing is compared across processes: what is to be compared does its work in turns, round after
round, and every round gives one ratio.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contenders import Contender, Variant, build, copied, shapes
from straightforward import STRAIGHTFORWARD
from torch import Tensor, nn

from cfe_lightning.classifier import counting
from cfe_lightning.cli import explain as explain_command
from cfe_lightning.data.synthetic import SyntheticShapes

AS_BUILT = "as built"
#: An iteration without penalties, whose gradients are compared.
_PLAIN_ITERATION = 1


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement.

    Attributes:
        measure: "speed", "memory", "files", "search", "quality", "curve" or "steady".
        work: "train", "explain" or "decode".
        method: See ``contenders.METHODS``.
        size: Side of the images.
        variant: See ``contenders.Variant``.
        who: Whose memory: "as built", or a straightforward implementation.
    """

    measure: str
    work: str
    method: str
    size: int
    variant: str = "fp32"
    who: str = ""

    @property
    def key(self) -> str:
        """What the cell is found by in the results."""
        return "/".join(str(value) for value in asdict(self).values() if value != "")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all cells share; results of other settings do not mix.

    Attributes:
        device: "cpu" or "cuda".
        small: Widths of the configs of the built-in shapes instead of the published ones.
        threads: Of the CPU.
        seconds: Time that the turns of a cell should take,
        rounds: in at least so many rounds, unless they take four times as long.
        train_images: Batch of a training step.
        explain_images: Batch of an explanation.
        file_images: Images that ``explain.py`` reads in one turn.
        curve_batches: Training batches of a loss curve.
        workers: Loader processes where images are decoded from files.
        folder: Where classifiers are kept that were trained on the way.
    """

    device: str = "cpu"
    small: bool = True
    threads: int = 1
    seconds: float = 5.0
    rounds: int = 3
    train_images: int = 8
    explain_images: int = 4
    file_images: int = 16
    curve_batches: int = 300
    workers: int = 0
    folder: str = "checkpoints/benchmarks"

    def images(self, cell: Cell) -> int:
        """How many images a turn of a cell handles."""
        if cell.work == "train":
            return self.train_images
        images = self.file_images if cell.measure == "files" else self.explain_images
        # Twenty network passes for every picture of a search.
        return max(1, images // 4) if cell.method == "DiffExplainer" else images


# --- seconds, in turns ---


def measure_speed(cell: Cell, settings: Settings) -> dict[str, Any]:
    """The variant, the module as built in fp32 and the straightforward implementations, in turns."""
    contenders = _contenders(cell, settings)
    built = contenders[AS_BUILT]
    answers, first, judged = {}, {}, {}
    for name, contender in contenders.items():
        torch.manual_seed(1)
        with counting.counted() as calls:
            begin = time.perf_counter()
            answer = contender(_PLAIN_ITERATION)
            _synchronise(settings.device)
            first[name] = time.perf_counter() - begin
        answers[name] = _outcome(contender, answer)
        judged[name] = calls.forwards / contender.num_images
        # Kernels are loaded, and tuned, when they are first needed; penalties and other settings of gradients are
        # graphs of their own, compiled once more when a size turns out to change.
        for iteration, _ in [*contender.phases()] * (2 if contender.variant.compiled else 1):
            contender(iteration)
    seconds = take_turns(contenders, settings)
    exact = answers.get("fp32", answers[AS_BUILT])
    ways = STRAIGHTFORWARD.get((cell.work, cell.method), {})
    return {
        "images": built.num_images,
        "rounds": len(seconds[AS_BUILT]),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "images_per_second": {name: 1 / statistics.median(values) for name, values in seconds.items()},
        "first_turn_seconds": first,
        "ratio": {name: spread(values, seconds[AS_BUILT]) for name, values in seconds.items() if name != AS_BUILT},
        "judged_per_image": judged,
        "difference": {
            name: float((value - exact).norm() / exact.norm().clamp_min(1e-12))
            for name, value in answers.items()
            if value is not exact and (name not in ways or ways[name].tolerance is not None)
        },
        "tolerance": {name: way.tolerance for name, way in ways.items() if way.tolerance is not None},
    }


def _contenders(cell: Cell, settings: Settings) -> dict[str, Contender]:
    """Who takes turns: copies of one module."""
    module = build(cell.method, cell.size, settings.small)
    batch = shapes(settings.images(cell), cell.size)
    variant = Variant.named(cell.variant)
    made: dict[str, Contender] = {}
    for name, way in STRAIGHTFORWARD.get((cell.work, cell.method), {}).items():
        made[name] = Contender(copied(module, way), cell.work, batch, settings.device, one_by_one=way.one_by_one)
    if variant != Variant():
        made["fp32"] = Contender(copied(module), cell.work, batch, settings.device)
    return {AS_BUILT: Contender(module, cell.work, batch, settings.device, variant), **made}


def _outcome(contender: Contender, answer: Any) -> Tensor:
    """What can be compared: the gradient of what renders, or all pictures of the answer, [N]."""
    if contender.work == "train":
        named = contender.module.named_parameters()
        parts = [p.grad for name, p in named if p.grad is not None and not name.startswith(("critic.", "classifier."))]
    elif contender.work == "explain":
        parts = [answer.steps, answer.counterfactual]
    else:
        parts = [answer]
    return torch.cat([part.detach().float().flatten() for part in parts])


def take_turns(contenders: dict[str, Contender], settings: Settings) -> dict[str, list[float]]:
    """Seconds per image of every contender, one value per round; who begins changes from round to round."""
    phases = next(iter(contenders.values())).phases()
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    while True:
        count = len(seconds[names[0]])
        for name in names[count % len(names) :] + names[: count % len(names)]:
            contender = contenders[name]
            took = [share * _timed(partial(contender, iteration), settings.device) for iteration, share in phases]
            seconds[name].append(sum(took) / contender.num_images)
        passed = time.perf_counter() - begin
        if passed >= settings.seconds and (count + 1 >= settings.rounds or passed >= 4 * settings.seconds):
            return seconds


def spread(values: list[float], base: list[float]) -> dict[str, float]:
    """Median and quartiles of how many times longer something takes, round by round."""
    ratios = sorted(value / start for value, start in zip(values, base, strict=True))
    if len(ratios) == 1:
        return {"median": ratios[0], "low": ratios[0], "high": ratios[0]}
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def _timed(work: Callable[[], Any], device: str) -> float:
    _synchronise(device)
    begin = time.perf_counter()
    work()
    _synchronise(device)
    return time.perf_counter() - begin


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# --- memory ---


def measure_memory(cell: Cell, settings: Settings) -> dict[str, Any]:
    """The peak of two iterations of every kind: what the device allocated, or how much the process grew."""
    batch = shapes(settings.images(cell), cell.size)
    _load_libraries(settings.device)
    if settings.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        # Forgets the peak so far.
        Path("/proc/self/clear_refs").write_text("5")
    before = _peak(settings.device)
    module = build(cell.method, cell.size, settings.small)
    way = STRAIGHTFORWARD.get((cell.work, cell.method), {}).get(cell.who)
    if way is not None:
        way.exchange(module)
    one_by_one = way is not None and way.one_by_one
    variant = Variant.named(cell.variant)
    contender = Contender(module, cell.work, batch, settings.device, variant, one_by_one)
    for iteration, _ in [*contender.phases()] * 2:
        contender(iteration)
    return {"images": contender.num_images, "peak_mib": (_peak(settings.device) - before) / 2**20}


def _peak(device: str) -> int:
    """The most memory that was held since the peak was forgotten, in bytes."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def _load_libraries(device: str) -> None:
    """The first convolution and optimiser bring libraries that are not what is measured."""
    layer = nn.Conv2d(3, 8, 3, padding=1).to(device)
    layer(torch.rand(2, 3, 16, 16, device=device)).mean().backward()
    torch.optim.Adam(layer.parameters()).step()


# --- explain.py ---


def measure_files(cell: Cell, settings: Settings) -> dict[str, Any]:
    """``explain.py`` from reading to the report, in batches and image by image, in turns; what it loads counts."""
    module: Any = build(cell.method, cell.size, settings.small)
    images = settings.images(cell)
    variant = Variant.named(cell.variant)
    precision = "bf16-mixed" if variant.bf16 else "32-true"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        SyntheticShapes(image_size=cell.size).write_folder("test", root / "images", images)
        checkpoint: dict[str, Any] = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
        module.on_save_checkpoint(checkpoint)
        torch.save(checkpoint, root / "explainer.ckpt")
        shared = ["--checkpoint", root / "explainer.ckpt", "--input", root / "images", "--precision", precision]
        shared += ["--accelerator", "gpu" if settings.device == "cuda" else "cpu"]

        def explain(batch_size: int, limit: int, turn: int) -> float:
            output = root / f"{batch_size}_{turn}"
            arguments = [*shared, "--output", output, "--batch-size", batch_size, "--limit", limit]
            with contextlib.redirect_stdout(io.StringIO()):
                seconds = _timed(lambda: explain_command.main([str(part) for part in arguments]), settings.device)
            return seconds / limit

        # Imports, and what is found out once for a checkpoint.
        explain(settings.explain_images, 1, -1)
        batches, singles = [], []
        for turn in range(settings.rounds):
            batches.append(explain(settings.explain_images, images, turn))
            singles.append(explain(1, images, turn))
    return {
        "images": images,
        "rounds": settings.rounds,
        "batch_size": settings.explain_images,
        "images_per_second": {
            AS_BUILT: 1 / statistics.median(batches),
            "--batch-size 1": 1 / statistics.median(singles),
        },
        "ratio": {"--batch-size 1": spread(singles, batches)},
    }


# --- the search of StylEx ---


def measure_search(cell: Cell, settings: Settings) -> dict[str, Any]:
    """EigenFind and AttFind against plain loops over images, directions and signs (``benchmarks/stylex.py``)."""
    from stylex import attfind, loops

    model: Any = build(cell.method, cell.size, settings.small).to(settings.device).eval()
    latent, logits = (values[: settings.explain_images] for values in model.starting_points())
    directions = model.latent_search.directions(model.generator, latent, model.label(logits))
    eigen: dict[str, list[float]] = {"as built": [], "loop": []}
    att: dict[str, list[float]] = {"as built": [], "loop": []}
    for _ in range(settings.rounds):
        eigen["as built"].append(model.measure(directions, latent, logits).seconds / len(latent))
        table, seconds = attfind(model, latent, logits, 1.0)
        att["as built"].append(seconds / len(latent))
        plain = loops(model, latent, logits, table, 1.0, 1)
        eigen["loop"].append(plain["EigenFind loop, s per image"])
        att["loop"].append(plain["AttFind loop, s per image"])
    return {
        "images": len(latent),
        "rounds": settings.rounds,
        "styles": table.shape[2],
        "seconds_per_image": {
            f"{name}, {who}": statistics.mean(values)
            for name, rows in (("EigenFind", eigen), ("AttFind", att))
            for who, values in rows.items()
        },
        "ratio": {
            "EigenFind loop": spread(eigen["loop"], eigen["as built"]),
            "AttFind loop": spread(att["loop"], att["as built"]),
        },
        "difference": {name: plain[f"{name}, largest difference of logits"] for name in ("EigenFind", "AttFind")},
    }
