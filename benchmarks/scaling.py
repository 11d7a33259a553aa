"""Scaling efficiency of two processes with one core each against one process with one core, as one table.

    python benchmarks/scaling.py --json scaling.json                  every trained method, then explain.py
    python benchmarks/scaling.py --only dxai stylex --rounds 3 --no-explain

Weak scaling: every process has as much to do, so two processes should do twice the work of one in the same time. Three
set-ups of one config take turns in one run, because a machine is not equally fast all the time:

    alone     one process,
    together  two processes of one run (``--trainer.devices 2``, ``--devices 2``; gloo),
    apart     two runs that know nothing of each other: what caches, memory and clock of this machine leave of 2.

The efficiency is together / (2 alone), the ceiling apart / (2 alone); medians over the rounds. Start-up does not count:
training is timed from batch to batch in blocks that hold every lazy term equally often, explaining from a process's
first finished batch to its last. DiffExplainer's training is one fit, which is timed as a whole. "Of processor time" is
the same with seconds that the processes were computing in the place of seconds that passed: it leaves out waiting, and
says on a busy machine what exchanging gradients costs. Every process is bound to a core of its own. Networks are
untrained, which changes no time.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import select
import signal
import socket
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from cfe_lightning.classifier import ClassifierSpec, FrozenClassifier, load_classifier
from cfe_lightning.classifier.networks import PooledCnn, SimpleCnn
from cfe_lightning.cli import explain, train
from cfe_lightning.data.synthetic import SyntheticShapes
from cfe_lightning.explaining.writer import ExplanationWriter
from cfe_lightning.files.trust import resolve_class_path
from cfe_lightning.methods.diff_explainer import DiffusionAutoencoder

ROOT = Path(__file__).resolve().parents[1]
SIZE = 32
SETUPS = {"alone": 1, "together": 2, "apart": 2}


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is trained.

    Attributes:
        config: Of ``configs/``.
        block: Iterations of a block; 0 times the fit before the first one.
        warm_up: Iterations before the first block.
        images: Of the fit, per process.
    """

    config: str
    block: int
    warm_up: int = 2
    images: int = 500_000  # never an end of an epoch inside a block


TRAININGS = {
    "dxai": Training(config="dxai_synthetic.yaml", block=12),  # R1 every 4
    "stylex": Training(config="stylex_synthetic.yaml", block=16),  # R1 every 16, path length every 4
    "mirror": Training(config="mirror_synthetic.yaml", block=8),
    "autoencoder": Training(config="diffusion_autoencoder_synthetic.yaml", block=8),
    "diff_explainer": Training(config="diff_explainer_synthetic.yaml", block=0, images=640),
    "classifier": Training(config="classifier_synthetic.yaml", block=60, warm_up=8),
}
#: What explains, and the images of a process.
EXPLAINED = {"dxai": 160, "mirror": 160}


class Turns(pl.Callback):
    """Trains in blocks: after each it tells the seconds it took and waits to be told to go on.

    Args:
        ask: File descriptor that a byte is read from before every block: g for go, anything else is the end.
        answer: File descriptor for what a block took, in seconds that passed and seconds of the processor.
        block: Iterations of a block; 0 for the fit before the first.
        warm_up: Iterations before the first.
    """

    def __init__(self, ask: int, answer: int, block: int, warm_up: int) -> None:
        self.ask, self.answer, self.block, self.left = ask, answer, block, warm_up
        self.began: tuple[float, float] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        while not self.block:
            self.take_turn()
            pl_module.fitted.fill_(False)
            pl_module.on_fit_start()

    def on_train_batch_end(self, *_: Any) -> None:
        self.left -= 1
        if not self.left:
            self.take_turn()
            self.left = self.block

    def take_turn(self) -> None:
        if self.began is None:
            os.write(self.answer, b"ready\n")
        else:
            passed, computed = time.perf_counter() - self.began[0], time.process_time() - self.began[1]
            os.write(self.answer, f"{passed} {computed}\n".encode())
        if os.read(self.ask, 1) != b"g":
            os._exit(0)
        self.began = time.perf_counter(), time.process_time()


class Process:
    """A fork of this process that runs a function on one core; importing torch once saves most of the time."""

    running: ClassVar[set[int]] = set()

    def __init__(self, work: Callable[[int, int], object], core: int, environment: dict[str, str], log: Path) -> None:
        asked, self.ask = os.pipe()
        self.answer, answered = os.pipe()
        self.log = log
        self.id = os.fork()
        if self.id == 0:
            os.close(self.ask)
            os.close(self.answer)
            os.environ.update(environment)
            rank_zero_only.rank = int(environment.get("LOCAL_RANK", "0"))
            os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[core]})
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            try:
                # Makes PyTorch's pool of threads anew, which a fork has lost: two threads that did so at the same time
                # would fail.
                torch.set_num_threads(1)
                work(asked, answered)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(1)
        self.running.add(self.id)
        os.close(asked)
        os.close(answered)
        # Unbuffered: what has been read but not handed out could not be waited for.
        self.lines = os.fdopen(self.answer, "rb", buffering=0)

    def says(self) -> str:
        """The next line of its answer.

        Raises:
            RuntimeError: If it has ended instead, or says nothing for ten minutes.
        """
        heard = select.select([self.lines], [], [], 600)[0]
        line = self.lines.readline().decode().strip() if heard else ""
        if not line:
            raise RuntimeError(f"A process ended early, or hangs:\n{self.log.read_text()[-3000:]}")
        return line

    def tell(self, byte: bytes) -> None:
        """One byte for ``ask``."""
        os.write(self.ask, byte)

    def end(self) -> None:
        """Waits until it has ended."""
        os.waitpid(self.id, 0)
        self.running.remove(self.id)
        os.close(self.ask)
        self.lines.close()


def start(setup: str, work: Callable[[str, str, int, int], object], folder: Path) -> list[Process]:
    """The processes of a set-up; ``work`` gets it, a name that those of one run share, and two file descriptors."""
    port = free_port()
    processes = []
    for index in range(SETUPS[setup]):
        name = f"apart{index}" if setup == "apart" else setup
        environment = {}
        if setup == "together":
            # What Lightning's own launcher would set, without importing everything once more.
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(index)}
        run = functools.partial(work, setup, name)
        processes.append(Process(run, index, environment, folder / f"{setup}{index}.log"))
    return processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def configured(name: str, folder: Path, **trainer: Any) -> dict[str, Any]:
    """A shipped config with untrained parts instead of files that a user trains first."""
    config = yaml.safe_load((ROOT / "configs" / name).read_text())
    arguments = config["model"]["init_args"]
    if "classifier" in arguments:
        arguments["classifier"]["init_args"]["path"] = str(folder / ("pooled.pt" if "mirror" in name else "simple.pt"))
    if "autoencoder" in arguments:
        arguments["autoencoder"] = str(folder / "autoencoder.ckpt")
    if "output" in arguments:
        arguments["output"] = str(folder / "trained.pt")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    config["trainer"] |= {"logger": False, "accelerator": "cpu", "num_sanity_val_steps": 0} | quiet | trainer
    return config


def measure_training(training: Training, rounds: int, folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Images per second, and per second of the processors, of every set-up in every round."""
    config = configured(training.config, folder, max_epochs=-1, limit_val_batches=1)
    shown = config["trainer"]["callbacks"]
    kept = [entry for entry in shown if not entry["class_path"].endswith("SampleGrid")]

    def work(setup: str, name: str, ask: int, answer: int) -> None:
        turns = {"ask": ask, "answer": answer, "block": training.block, "warm_up": training.warm_up}
        config["trainer"]["callbacks"] = [*kept, {"class_path": "scaling.Turns", "init_args": turns}]
        config["trainer"]["devices"] = processes = 2 if setup == "together" else 1
        config["data"]["init_args"]["num_train"] = training.images * processes
        path = folder / f"{name}.{os.getpid()}.yaml"
        path.write_text(yaml.safe_dump(config))
        command = ["--config", str(path), "--skip-classifier-check", "--output", str(folder / "runs"), "--overwrite"]
        train.main([*command, "--run", name, "--trusted", "scaling"])

    images = training.block * config["data"]["init_args"]["batch_size"] or training.images
    running = {setup: start(setup, work, folder) for setup in SETUPS}
    for processes in running.values():
        for process in processes:
            process.says()
    rates: dict[str, list[tuple[float, float]]] = {setup: [] for setup in SETUPS}
    for _ in range(rounds):
        for setup, processes in running.items():
            for process in processes:
                process.tell(b"g")
            said = [tuple(map(float, process.says().split())) for process in processes]
            passed, computed = (sum(images / taken[kind] for taken in said) for kind in (0, 1))
            rates[setup].append((passed, computed))
    for processes in running.values():
        for process in processes:
            process.tell(b"e")
            process.end()
    return rates


def measure_explaining(method: str, rounds: int, folder: Path) -> dict[str, list[tuple[float, float]]]:
    """As ``measure_training``, of ``explain.py`` with ``EXPLAINED`` images for every process."""
    write_on_batch_end = ExplanationWriter.write_on_batch_end

    def work(setup: str, name: str, ask: int, answer: int) -> None:
        def timed(*arguments: Any) -> None:
            write_on_batch_end(*arguments)
            count = len(arguments[5]["name"])
            os.write(answer, f"{time.perf_counter()} {time.process_time()} {count}\n".encode())

        ExplanationWriter.write_on_batch_end = timed  # type: ignore[method-assign]
        devices = 2 if setup == "together" else 1
        where = ["--checkpoint", str(folder / f"{method}.ckpt"), "--input", str(folder / "photos")]
        count = ["--limit", str(EXPLAINED[method] * devices), "--devices", str(devices), "--overwrite"]
        rest = ["--output", str(folder / name), "--accelerator", "cpu", "--batch-size", "8"]
        if code := explain.main([*where, *count, *rest]):
            raise RuntimeError(f"explain.py ended with {code}.")
        os.write(answer, b"end\n")
        os.read(ask, 1)
        os._exit(0)

    rates: dict[str, list[tuple[float, float]]] = {setup: [] for setup in SETUPS}
    for _ in range(rounds):
        for setup in SETUPS:
            processes = start(setup, work, folder)
            passed = computed = 0.0
            for process in processes:
                finished = [tuple(map(float, line.split())) for line in iter(process.says, "end")]
                images = sum(count for _, _, count in finished[1:])
                passed += images / (finished[-1][0] - finished[0][0])
                computed += images / (finished[-1][1] - finished[0][1])
            for process in processes:
                process.tell(b"e")
                process.end()
            rates[setup].append((passed, computed))
    return rates


def prepare(folder: Path) -> None:
    """Images, untrained classifiers, an autoencoder, and checkpoints of what explains."""
    shapes = SyntheticShapes(image_size=SIZE)
    shapes.write_folder("test", folder / "photos", 2 * max(EXPLAINED.values()))
    for name, kind, layers in (("simple", SimpleCnn, {}), ("pooled", PooledCnn, {"feature_map": "stage3"})):
        arguments = {"num_classes": 2, "channels": 3} | ({"image_size": SIZE} if name == "simple" else {})
        network = kind(**arguments).eval()
        spec = ClassifierSpec(
            class_path=f"{kind.__module__}.{kind.__qualname__}",
            init_args=arguments,
            head="fc",
            **layers,
            class_names=shapes.class_names,
            image_size=SIZE,
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
        )
        FrozenClassifier(network, spec).save(folder / f"{name}.pt")
    arguments = configured("diffusion_autoencoder_synthetic.yaml", folder)["model"]["init_args"]
    save(DiffusionAutoencoder(**arguments), folder / "autoencoder.ckpt")
    for method in EXPLAINED:
        model = configured(TRAININGS[method].config, folder)["model"]
        loader = model["init_args"].pop("classifier")["init_args"]
        kind = resolve_class_path(model["class_path"], ())
        save(kind(load_classifier(loader["path"]), **model["init_args"]), folder / f"{method}.ckpt")


def save(module: pl.LightningModule, path: Path) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=str(path.parent))
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)


def row(rates: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    """Medians of images per second, and of the rounds' ratios: neighbours in time have met the same machine."""

    def ratio(setup: str, kind: int) -> float:
        pairs = zip(rates[setup], rates["alone"], strict=True)
        return statistics.median(two[kind] / (2 * one[kind]) for two, one in pairs)

    speed = {f"{setup} [images/s]": statistics.median(rate[0] for rate in rates[setup]) for setup in SETUPS}
    return speed | {
        "efficiency": ratio("together", 0),
        "ceiling": ratio("apart", 0),
        "efficiency of processor time": ratio("together", 1),
        "ceiling of processor time": ratio("apart", 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=sorted(TRAININGS), default=sorted(TRAININGS), help="methods")
    parser.add_argument("--rounds", type=int, default=4, help="turns of every set-up")
    parser.add_argument("--no-explain", action="store_true", help="measure training only")
    parser.add_argument("--json", type=Path, help="file for the table and the single rounds")
    options = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        parser.error("two cores are needed, this process may use one only")
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        tasks: list[tuple[str, Callable[[], dict[str, list[tuple[float, float]]]]]] = [
            (f"train {method}", lambda method=method: measure_training(TRAININGS[method], options.rounds, folder))
            for method in TRAININGS
            if method in options.only
        ]
        tasks += [
            (f"explain {method}", lambda method=method: measure_explaining(method, options.rounds, folder))
            for method in EXPLAINED
            if method in options.only and not options.no_explain
        ]
        for title, measure in tasks:
            began = time.perf_counter()
            try:
                rates = measure()
            finally:
                for process in Process.running:
                    os.kill(process, signal.SIGKILL)
                    os.waitpid(process, 0)
            values = row(rates)
            if not rows:
                print(f"| 2 processes, 1 core each | {' | '.join(values)} |")
                print("| --- " * (len(values) + 1) + "|")
            shown = (f"{value:.1f}" if "images/s" in key else f"{value:.3f}" for key, value in values.items())
            print(f"| {title} | {' | '.join(shown)} |", flush=True)
            sys.stderr.write(f"{title}: {time.perf_counter() - began:.0f} s\n")
            rows[title] = values | {"rounds": rates}
            if options.json:
                options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
