"""Training and explaining, killed at random moments and continued: is anything lost, repeated or different?

    python benchmarks/kills.py [--kills 50] [--explain-kills 25] [--files 120] [--seed 0] [--json kills.json]

Some 10 minutes on a CPU. Small networks of every trained method train on the images of the tests with a checkpoint
every 3 batches, a validation every 4 and a sample grid every 8; the explainer that comes out explains a hostile folder
(truncated, wrongly named, CMYK, 16-bit, animated, 1x1 and empty files, symlink loops, names with newlines and markup).
Every run is forked from one process that has imported torch, gets SIGKILL at a random moment (one in eight while it is
set up; of the others every second waits for a phase that is drawn first) and is continued with ``--resume``.

After every kill, all files that exist must be readable; the next run must start at the batch that ``last.ckpt`` holds.
In the end weights, optimisers, random states, best.ckpt, metrics.csv and pictures must be those of a run that nobody
disturbed, bit for bit (speeds aside), and manifests and pictures of the explanations, too (times aside). Ends with 1
where anything is otherwise.
"""

from __future__ import annotations

import argparse
import collections
import csv
import functools
import importlib
import itertools
import json
import mmap
import os
import random
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import yaml  # noqa: E402
from cases import CASES  # noqa: E402
from hostile import write_hostile_folder  # noqa: E402
from lightning.pytorch.loops.fetchers import _DataFetcher  # noqa: E402
from PIL import Image  # noqa: E402

from cfe_lightning.cli import explain, train  # noqa: E402
from cfe_lightning.explaining.folder import OutputFolder  # noqa: E402
from cfe_lightning.explaining.writer import ExplanationWriter  # noqa: E402
from cfe_lightning.training import SampleGrid  # noqa: E402
from cfe_lightning.training.checkpoints import AtomicCheckpointIO  # noqa: E402
from cfe_lightning.training.csv_log import CsvLog  # noqa: E402

#: What the commands import when they need it: once, before the first fork.
for module in ("explaining.atlas", "training.run", "data.stream", "explaining.overview", "report.page", "methods.find"):
    importlib.import_module(f"cfe_lightning.{module}")
#: What a run is doing when the kill hits it.
PHASES = ("set-up", "between batches", "loader", "training step", "validation", "checkpoint", "metrics.csv", "samples")
EXPLAIN_PHASES = ("set-up", "between batches", "loader", "explanation", "pictures", "manifest", "report")
EVERY_N_BATCHES = 3
TRAINED = ("ToyExplainer", "Dxai-all-terms", "MirrorCFE", "DiffExplainer", "StylEx")


class Watch:
    """What a forked run tells about itself through memory that outlives it."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 24)
        self.reset()

    def reset(self) -> None:
        """Before a run: nothing was begun."""
        self._memory[:] = struct.pack("qqq", 0, -1, -1)

    @property
    def phase(self) -> int:
        """Index of the phase."""
        return struct.unpack_from("q", self._memory, 0)[0]

    @phase.setter
    def phase(self, index: int) -> None:
        struct.pack_into("q", self._memory, 0, index)

    @property
    def first(self) -> int:
        """The first training batch that this run has begun, -1 for none."""
        return struct.unpack_from("q", self._memory, 8)[0]

    @property
    def last(self) -> int:
        """The last training batch that this run has begun, -1 for none."""
        return struct.unpack_from("q", self._memory, 16)[0]

    def begin(self, batch: int) -> None:
        """Notes that a training batch begins."""
        struct.pack_into("q", self._memory, 16, batch)
        if self.first < 0:
            struct.pack_into("q", self._memory, 8, batch)

    def during(self, owner: Any, name: str, phase: int, after: int | None = None) -> None:
        """Lets a method say that it runs, and what follows it; by default what was before."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def watched(*arguments: Any, **options: Any) -> Any:
            before, self.phase = self.phase, phase
            if name == "training_step":
                self.begin(arguments[0].trainer.fit_loop.total_batch_idx)
            try:
                return function(*arguments, **options)
            finally:
                self.phase = before if after is None else after

        setattr(owner, name, watched)


def watch_training(watch: Watch, kind: type) -> None:
    """In a forked process: lets all parts of a training say when they run."""
    watch.during(_DataFetcher, "__next__", PHASES.index("loader"), PHASES.index("between batches"))
    watch.during(kind, "training_step", PHASES.index("training step"), PHASES.index("between batches"))
    watch.during(kind, "validation_step", PHASES.index("validation"))
    watch.during(AtomicCheckpointIO, "save_checkpoint", PHASES.index("checkpoint"))
    watch.during(CsvLog, "log_metrics", PHASES.index("metrics.csv"))
    watch.during(SampleGrid, "_draw", PHASES.index("samples"))


def watch_explaining(watch: Watch, kind: type) -> None:
    """In a forked process: lets all parts of an explanation say when they run."""
    watch.during(_DataFetcher, "__next__", EXPLAIN_PHASES.index("loader"), EXPLAIN_PHASES.index("between batches"))
    watch.during(kind, "explain", EXPLAIN_PHASES.index("explanation"))
    watch.during(ExplanationWriter, "save", EXPLAIN_PHASES.index("pictures"))
    watch.during(OutputFolder, "append", EXPLAIN_PHASES.index("manifest"))
    watch.during(explain, "_finish", EXPLAIN_PHASES.index("report"))


class Forked:
    """A command in a process that is forked from this one.

    Args:
        command: ``main`` of the command.
        arguments: Its arguments.
        log: Where what it says goes.
        watch: What it tells about itself.
        prepare: Called in the process, before the command.
    """

    def __init__(
        self,
        command: Callable[[list[str]], int],
        arguments: list[str],
        log: Path,
        watch: Watch,
        prepare: Callable[[], None],
    ) -> None:
        watch.reset()
        self.watch = watch
        self.began = time.perf_counter()
        sys.stdout.flush()
        self.process = os.fork()
        if self.process == 0:
            with log.open("ab") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            code = 99
            try:
                # Makes PyTorch's pool of threads anew, which a fork has lost: two threads that did so at the same time
                # would fail.
                torch.set_num_threads(1)
                prepare()
                code = command(arguments)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def wait(self) -> int:
        """The exit code; a signal is negative."""
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])

    def set_up(self) -> float:
        """Waits until the work itself begins, and returns the seconds from the fork."""
        while self.watch.phase == 0 and not self._ended():
            time.sleep(0.0005)
        return time.perf_counter() - self.began

    def kill(self, seconds: float, phase: int | None) -> int:
        """Kills the process at a moment and returns its exit code; it may have ended by itself before.

        Args:
            seconds: From now on.
            phase: Wait for this phase, 5 seconds at most; None takes what there is.
        """
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline and not self._ended():
            time.sleep(0.0005)
        deadline += 5
        while phase not in (None, self.watch.phase) and time.perf_counter() < deadline and not self._ended():
            pass
        os.kill(self.process, signal.SIGKILL)
        return self.wait()

    def _ended(self) -> bool:
        """Without taking its exit code from ``wait``."""
        return os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def readable(folder: Path) -> list[str]:
    """What is wrong with the files of a folder; unfinished files have names of their own."""
    wrong = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".part")):
        try:
            if path.suffix == ".ckpt":
                torch.load(path, weights_only=True)
            elif path.suffix == ".png":
                Image.open(path).load()
            elif path.suffix == ".yaml":
                yaml.safe_load(path.read_text())
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".csv":
                list(csv.DictReader(path.read_text().splitlines()))
        except Exception as error:
            wrong.append(f"{path.name}: {type(error).__name__} {error}")
    return wrong


def batches_in(path: Path) -> int:
    """Training batches that a checkpoint holds."""
    if not path.is_file():
        return 0
    loops = torch.load(path, weights_only=True)["loops"]["fit_loop"]
    return loops["epoch_loop.batch_progress"]["total"]["completed"]


def same(one: Any, other: Any) -> bool:
    """Bit for bit, through all containers."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) or (one != one and other != other)


def training_content(folder: Path) -> dict[str, Any]:
    """What a training leaves, without speeds and paths."""
    content: dict[str, Any] = {}
    for name in ("last.ckpt", "best.ckpt"):
        checkpoint = torch.load(folder / name, weights_only=True)
        for key in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
            content[f"{name} {key}"] = checkpoint.get(key)
        content[f"{name} random states"] = checkpoint["callbacks"]["RandomState"]
    with (folder / "metrics.csv").open(newline="") as file:
        content["metrics.csv"] = [{**row, "images_per_second": ""} for row in csv.DictReader(file)]
    content |= {path.name: path.read_bytes() for path in (folder / "samples").glob("*.png")}
    content["unfinished files"] = sorted(path.name for path in folder.rglob("*.part"))
    return content


def explaining_content(folder: Path) -> dict[str, Any]:
    """What explain.py leaves, without times."""
    content: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_bytes()
        for name in ("images", "global")
        for path in (folder / name).rglob("*")
        if path.is_file()
    }
    with (folder / "manifest.csv").open(newline="") as file:
        content["manifest.csv"] = [{**row, "seconds": ""} for row in csv.DictReader(file)]
    summary = json.loads((folder / "summary.json").read_text())
    timed = ("finished", "seconds", "s_per_image")
    content["summary.json"] = {key: value for key, value in summary.items() if key not in timed}
    content |= {path.name: json.loads(path.read_text()) for path in folder.glob("global.json")}
    return content


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what is not the same."""
    return sorted(key for key in one.keys() | other.keys() if not same(one.get(key), other.get(key)))


def first_difference(one: Any, other: Any) -> str:
    """Where two things part: the row of a table, or the tensor in nested containers and by how much."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and one.shape == other.shape:
        return f" by {(one.double() - other.double()).abs().max():.3g}"
    if isinstance(one, dict) and isinstance(other, dict):
        if all(isinstance(value, str) for value in one.values()):
            return f": {one} became {other}"
        pairs = [(name, one.get(name), other.get(name)) for name in one.keys() | other.keys()]
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        pairs = [(place, *pair) for place, pair in enumerate(itertools.zip_longest(one, other))]
    else:
        return f": {one!r:.200} became {other!r:.200}"
    found = ((name, old, new) for name, old, new in sorted(pairs, key=lambda p: str(p[0])) if not same(old, new))
    return "".join(f" {name}{first_difference(old, new)}" for name, old, new in itertools.islice(found, 1))


class Trial:
    """Kills one command again and again; every run that comes to its end is compared with the undisturbed one.

    Args:
        name: For the table.
        phases: Names of the phases.
        start: Starts the command with an output folder; the second argument is whether it continues.
        content: Reads what is compared.
        code: The exit code of success.
        draw: Random numbers.
    """

    def __init__(
        self,
        name: str,
        phases: Sequence[str],
        start: Callable[[Path, bool], Forked],
        content: Callable[[Path], dict[str, Any]],
        code: int,
        draw: random.Random,
    ) -> None:
        self.name, self.phases, self.start, self.content, self.code, self.draw = (
            *(name, phases, start, content, code, draw),
        )
        self.hits: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []
        self.kills = self.repeated = self.runs = self.identical = 0
        self.times = (0.0, 0.0)  # seconds to set up and to work

    def run(self, folder: Path, kills: int) -> dict[str, Any]:
        """Kills so often; returns a row of the table."""
        undisturbed = self.start(folder / "undisturbed", False)
        set_up = undisturbed.set_up()
        if (code := undisturbed.wait()) != self.code:
            self.faults.append(f"the undisturbed run ended with {code}")
            return self.row()
        self.times = (set_up, time.perf_counter() - undisturbed.began - set_up)
        expected = self.content(folder / "undisturbed")
        while self.kills < kills and not self.faults:
            self.runs += 1
            self._one(folder / f"run{self.runs}", kills, expected)
        return self.row()

    def _one(self, folder: Path, kills: int, expected: dict[str, Any]) -> None:
        """One run, killed until it is through or there have been enough kills."""
        continues, held = False, 0
        while True:
            running = self.start(folder, continues)
            code = self._killed(running) if self.kills < kills else running.wait()
            watch = running.watch
            if continues and watch.first >= 0 and watch.first != held:
                self.faults.append(f"last.ckpt held {held} batches, but the next run began with batch {watch.first}")
            if code == self.code:
                break
            if code != -signal.SIGKILL:
                self.faults.append(f"a run ended with {code}")
                return
            self.kills += 1
            self.hits[self.phases[watch.phase]] += 1
            self.faults += readable(folder) if folder.exists() else []
            continues, held = (folder / "last.ckpt").is_file(), batches_in(folder / "last.ckpt")
            again = max(watch.last + 1 - held, 0)
            self.repeated += again
            if again > EVERY_N_BATCHES:
                self.faults.append(f"{again} batches are not in last.ckpt")
        content = self.content(folder)
        different = differences(expected, content)
        self.identical += not different
        for name in different:
            self.faults.append(
                f"{folder.name}: {name} differs{first_difference(expected.get(name), content.get(name))}"
            )

    def _killed(self, running: Forked) -> int:
        """Draws a moment; one in eight is before the work has begun, of the others every second is one of a phase."""
        if self.draw.random() < 1 / 8:
            return running.kill(self.draw.uniform(0, self.times[0]), None)
        running.set_up()
        aimed = self.draw.randrange(1, len(self.phases)) if self.draw.random() < 0.5 else None
        return running.kill(self.draw.uniform(0, self.times[1]), aimed)

    def row(self) -> dict[str, Any]:
        """The numbers of the table."""
        return {
            "name": self.name,
            "kills": self.kills,
            "hits": dict(self.hits),
            "runs": self.runs,
            "identical": self.identical,
            "repeated_batches": self.repeated,
            "faults": self.faults,
        }


def write_config(folder: Path, name: str, workers: int) -> None:
    """The method's smallest settings of the tests as a config of ``train.py``."""
    case = next(case.values[0] for case in CASES if case.id == name)
    case.classifier().save(folder / f"{name}.pt")
    load = {"path": str(folder / f"{name}.pt"), "trusted": ["toy"]}
    classifier = {"class_path": "cfe_lightning.classifier.load_classifier", "init_args": load}
    data = {"num_images": 32, "num_classes": 3, "horizontal_flip": True, "num_workers": workers}
    config = {
        "seed_everything": 1,
        "model": {
            "class_path": f"{case.kind.__module__}.{case.kind.__qualname__}",
            "init_args": {"classifier": classifier, **case.arguments},
        },
        "data": {"class_path": "toy.ToyData", "init_args": data},
        "trainer": {
            **{"max_epochs": 3, "val_check_interval": 4, "accelerator": "cpu", "logger": False},
            **{"log_every_n_steps": 1, "enable_progress_bar": False, "enable_model_summary": False},
            "callbacks": [
                {"class_path": "cfe_lightning.training.EMA", "init_args": {"decay": 0.9}},
                {"class_path": "cfe_lightning.training.SampleGrid", "init_args": {"every_n_batches": 8}},
                {
                    "class_path": "cfe_lightning.training.LastCheckpoint",
                    "init_args": {"every_n_batches": EVERY_N_BATCHES},
                },
            ],
        },
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))


def train_and_kill(folder: Path, name: str, workers: int, kills: int, draw: random.Random) -> dict[str, Any]:
    """One method."""
    folder.mkdir()
    write_config(folder, name, workers)
    kind = next(case.values[0].kind for case in CASES if case.id == name)
    watch = Watch()

    def start(run: Path, continues: bool) -> Forked:
        arguments = ["--config", str(folder / f"{name}.yaml"), "--run", run.name, "--output", str(folder)]
        arguments += ["--trusted", "toy", "--skip-classifier-check", *(["--resume"] if continues else [])]
        return Forked(train.main, arguments, folder / "log", watch, lambda: watch_training(watch, kind))

    title = f"train {name.removesuffix('-all-terms')}{', a loader process' if workers else ''}"
    return Trial(title, PHASES, start, training_content, 0, draw).run(folder, kills)


def explain_and_kill(folder: Path, checkpoint: Path, files: int, kills: int, draw: random.Random) -> dict[str, Any]:
    """A hostile folder."""
    folder.mkdir()
    good, bad = write_hostile_folder(folder / "in", files)
    kind = next(case.values[0].kind for case in CASES if case.id == "Dxai-all-terms")
    watch = Watch()

    def start(run: Path, continues: bool) -> Forked:
        arguments = ["--checkpoint", str(checkpoint), "--input", str(folder / "in"), "--output", str(run)]
        arguments += ["--trusted", "toy", "--accelerator", "cpu", "--batch-size", "4"]
        return Forked(explain.main, arguments, folder / "log", watch, lambda: watch_explaining(watch, kind))

    trial = Trial("explain Dxai, hostile folder", EXPLAIN_PHASES, start, explaining_content, explain.FAILED_ROWS, draw)
    row = trial.run(folder, kills)
    with (folder / "undisturbed" / "manifest.csv").open(newline="") as file:
        given = sorted(found["name"] for found in csv.DictReader(file))
    # A table in UTF-8 spells bytes that are no text.
    if given != sorted(name.encode("utf-8", "backslashreplace").decode() for name in good | bad):
        row["faults"].append("a name has no row, or two")
    return row


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table."""
    titles = ("command", "kills", "where they hit", "runs", "identical", "batches done again", "faults")
    lines = [" | ".join(titles), " | ".join(["---"] * len(titles))]
    for row in rows:
        hits = ", ".join(f"{name} {count}" for name, count in sorted(row["hits"].items(), key=lambda hit: -hit[1]))
        numbers = (row["runs"], row["identical"], row["repeated_batches"], len(row["faults"]))
        lines.append(" | ".join(map(str, (row["name"], row["kills"], hits, *numbers))))
    return "".join(f"| {line} |\n" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of trainings, divided among the methods")
    parser.add_argument("--explain-kills", type=int, default=25)
    parser.add_argument("--files", type=int, default=120, help="in the folder that is explained")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # A process with threads of its own must not be forked.
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    sys.argv = ["train.py"]
    draw = random.Random(options.seed)
    cases = [(name, 0) for name in TRAINED] + [(TRAINED[0], 1)]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for index, (name, workers) in enumerate(cases):
            kills = options.kills // len(cases) + (index < options.kills % len(cases))
            rows.append(train_and_kill(folder / f"{name}{workers}", name, workers, kills, draw))
            print(markdown(rows[-1:]).splitlines()[-1], *rows[-1]["faults"], sep="\n  ", flush=True)
        if options.explain_kills:
            checkpoint = folder / "Dxai-all-terms0" / "undisturbed" / "best.ckpt"
            rows.append(explain_and_kill(folder / "in", checkpoint, options.files, options.explain_kills, draw))
            print(markdown(rows[-1:]).splitlines()[-1], *rows[-1]["faults"], sep="\n  ", flush=True)
        if any(row["faults"] for row in rows):
            for log in folder.glob("*/log"):
                sys.stderr.write("".join(log.read_text(errors="replace").splitlines(keepends=True)[-30:]))
    print(f"\n{markdown(rows)}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 1 if any(row["faults"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
