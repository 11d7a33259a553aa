"""Trains and judges DXAI on data with a known answer and on real image folders: the tables of docs/measured/dxai.md.

    python benchmarks/dxai.py --set lesion colour texture --seeds 0 1 2 --output checkpoints/bench
    python benchmarks/dxai.py --set mnist tomatoes --root FOLDER --output checkpoints/bench

For every set: one classifier, then one run per objective and seed, then one ``cfe-evaluate`` over all of them and the
baselines on the same test images. What is already there is not done again. ``--root`` holds the unpacked data sets.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
BASELINES = "integrated_gradients,gradient_shap,internal_influence,guided_grad_cam,grad_cam,lrp,random"
COLUMNS = (
    "psnr",
    "dxai_auc_label",
    "correlation",
    "mask_mass",
    "amplitude",
    "max_p_removed",
    "max_p_agnostic",
    "kl_removed",
    "flip_rate",
    "l1",
    "l1_truth",
)
#: The published objective, the same run explained at the strength that leaves the classifier undecided, and a run
#: trained towards an undecided agnostic part.
OBJECTIVES = {
    "paper": ["--model.strength", "full"],
    "calibrated": [],
    "neutral": ["--model.objective", "neutral", "--model.neutral_weight", "1"],
}


def folder(name: str, classes: str, size: int, channels: int) -> list[str]:
    """Command-line arguments that replace the synthetic data of a config by a folder below ``--root``."""
    return [
        *("--data.class_path", "cfe_lightning.data.folder.ImageFolder", "--data.root", f"{{root}}/{name}"),
        *("--data.class_names", classes, "--data.image_size", str(size), "--data.channels", str(channels)),
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A data set as command-line arguments, and the training epochs that suit its number of images."""

    data: list[str]
    classifier_epochs: int = 4
    epochs: int = 3

    def below(self, root: str) -> Task:
        """The same with the folder that holds the data filled in."""
        return replace(self, data=[argument.format(root=root) for argument in self.data])


TOMATOES = '["tomato_cherry_maroon", "tomato_cherry_orange", "tomato_cherry_red", "tomato_cherry_yellow"]'
SETS = {
    "lesion": Task(data=["--data.cue", "lesion"]),
    "colour": Task(data=["--data.cue", "colour"]),
    "texture": Task(data=["--data.cue", "texture"], epochs=6),
    "mnist": Task(data=folder("mnist", '["3", "8"]', 32, 1), classifier_epochs=30, epochs=16),
    "tomatoes": Task(data=folder("fruits360_colour", TOMATOES, 64, 3), classifier_epochs=30, epochs=14),
}


def run(*command: str) -> float:
    """Runs one of our commands and returns its seconds."""
    start = time.perf_counter()
    print("$", *command, flush=True)
    environment = os.environ | {"WANDB_MODE": os.environ.get("WANDB_MODE", "disabled")}
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def calibrate(source: Path, destination: Path) -> None:
    """Copies a checkpoint that then explains with the neutral strength."""
    checkpoint = torch.load(source, map_location="cpu", weights_only=True)
    checkpoint["hyper_parameters"]["strength"] = "neutral"
    destination.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, destination)


def train_classifier(task: Task, output: Path, *options: str) -> Path:
    """Trains the classifier of a set unless it is there; returns its file."""
    classifier = output / "classifier.pt"
    if not classifier.exists():
        run(
            *("train.py", "--config", "classifier_synthetic.yaml", *task.data, "--output", str(output), "--overwrite"),
            *("--model.output", str(classifier), "--trainer.max_epochs", str(task.classifier_epochs), *options),
        )
    return classifier


def train_dxai(task: Task, output: Path, label: str, classifier: Path, seed: int, options: list[str]) -> Path:
    """Trains one DXAI run unless it is there; returns its last checkpoint."""
    done = output / f"{label}.seconds"
    if not done.exists():
        seconds = run(
            *("train.py", "--config", "dxai_synthetic.yaml", *task.data, "--output", str(output), "--run", label),
            *("--overwrite", "--seed_everything", str(seed), "--trainer.max_epochs", str(task.epochs), *options),
            *("--model.classifier.init_args.path", str(classifier)),
        )
        done.write_text(f"{seconds:.0f}\n")
    return output / label / "last.ckpt"


def evaluate(checkpoints: list[Path], output: Path, limit: int, *options: str) -> list[dict]:
    """Measures checkpoints on the test images of the first one's data; returns the rows of metrics.json."""
    main = "import sys; from cfe_lightning.cli.evaluate import main; sys.exit(main())"
    data = checkpoints[0].parent / "config.yaml"
    run(
        *("-c", main, "--checkpoint", *map(str, checkpoints), "--data", str(data), "--output", str(output)),
        *("--limit", str(limit), "--curve-steps", "0", *options),
    )
    return json.loads((output / "metrics.json").read_text())["rows"]


def judge(name: str, options: argparse.Namespace) -> list[str]:
    """Trains what is missing of one set, evaluates everything and returns Markdown rows."""
    task = SETS[name].below(options.root)
    output = options.output / name
    classifier = train_classifier(task, output)
    checkpoints = []
    # The published objective first: its data section is the one that the evaluation reads.
    for objective in sorted(options.objectives, key=list(OBJECTIVES).index):
        for seed in options.seeds:
            label = f"{objective}_{seed}"
            if objective == "calibrated":
                checkpoints.append(output / label / "last.ckpt")
                calibrate(output / f"paper_{seed}" / "last.ckpt", checkpoints[-1])
            else:
                arguments = [*OBJECTIVES[objective], *options.train]
                checkpoints.append(train_dxai(task, output, label, classifier, seed, arguments))
    rows = evaluate(checkpoints, output / "evaluated", options.limit, "--baselines", BASELINES)
    return summarise(name, rows, options.objectives)


def summarise(name: str, rows: list[dict], objectives: list[str]) -> list[str]:
    """One Markdown row per objective (mean and range over seeds) and per baseline."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        objective = row["name"].split("_")[0]
        groups.setdefault(objective if objective in objectives else row["name"], []).append(row["metrics"])
    lines = []
    for label, group in groups.items():
        cells = []
        for column in COLUMNS:
            values = [row[column]["value"] for row in group if row.get(column, {}).get("status") == "ok"]
            if not values:
                cells.append("")
            elif len(values) == 1:
                cells.append(f"{values[0]:.3f}")
            else:
                cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f}–{max(values):.3f})")
        lines.append(f"| {name} | {label} | {len(group)} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", nargs="+", choices=SETS, default=["lesion", "colour", "texture"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=["paper", "calibrated", "neutral"])
    parser.add_argument("--root", default="data", help="folder of the unpacked real data sets")
    parser.add_argument("--limit", type=int, default=256, help="test images")
    parser.add_argument("--output", type=Path, default=ROOT / "checkpoints" / "bench")
    parser.add_argument("train", nargs="*", help="further arguments of every train.py of DXAI, after --")
    options = parser.parse_args()
    table = [
        "| set | explainer | runs | " + " | ".join(COLUMNS) + " |",
        "| --- " * (len(COLUMNS) + 3) + "|",
    ]
    for name in options.set:
        table += judge(name, options)
        (options.output / "table.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
