"""Trains and judges DXAI on data with a known answer and on real image folders: the tables of docs/results.md.

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
    "paper": [],
    "calibrated": [],
    "neutral": ["--model.objective", "neutral", "--model.neutral_weight", "1", "--model.strength", "neutral"],
}


def folder(name: str, classes: str, size: int, channels: int) -> list[str]:
    """Command-line arguments that replace the synthetic data of a config by a folder below ``--root``."""
    return [
        *("--data.class_path", "cfe_lightning.data.folder.ImageFolder", "--data.root", f"{{root}}/{name}"),
        *("--data.class_names", classes, "--data.image_size", str(size), "--data.channels", str(channels)),
    ]


SETS = {
    "lesion": ["--data.cue", "lesion"],
    "colour": ["--data.cue", "colour"],
    "texture": ["--data.cue", "texture"],
    "mnist": folder("mnist", '["3", "8"]', 32, 1),
    "tomatoes": folder(
        "fruits360_colour",
        '["tomato_cherry_maroon", "tomato_cherry_orange", "tomato_cherry_red", "tomato_cherry_yellow"]',
        64,
        3,
    ),
}
#: Epochs of classifier and DXAI where the sets are small: about as many iterations as for the synthetic ones.
EPOCHS = {"mnist": (30, 16), "tomatoes": (30, 14)}


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


def judge(name: str, options: argparse.Namespace) -> list[str]:
    """Trains what is missing of one set, evaluates everything and returns Markdown rows."""
    data = [argument.format(root=options.root) for argument in SETS[name]]
    output = options.output / name
    classifier = output / "classifier.pt"
    if not classifier.exists():
        run(
            *("train.py", "--config", "classifier_synthetic.yaml", *data, "--output", str(output), "--overwrite"),
            *("--model.output", str(classifier), "--trainer.max_epochs", str(EPOCHS.get(name, (4, 3))[0])),
        )
    checkpoints = []
    for objective in options.objectives:
        for seed in options.seeds:
            label = f"{objective}_{seed}"
            checkpoints.append(output / label / "last.ckpt")
            done = output / f"{label}.seconds"
            if objective == "calibrated":
                calibrate(output / f"paper_{seed}" / "last.ckpt", checkpoints[-1])
            if objective == "calibrated" or done.exists():
                continue
            seconds = run(
                *("train.py", "--config", "dxai_synthetic.yaml", *data, "--output", str(output), "--run", label),
                *("--overwrite", "--seed_everything", str(seed), *OBJECTIVES[objective]),
                *("--trainer.max_epochs", str(EPOCHS.get(name, (4, 3))[1]), *options.train),
                *("--model.classifier.init_args.path", str(classifier)),
            )
            done.write_text(f"{seconds:.0f}\n")
    result = output / "evaluated"
    run(
        *(
            "-c",
            "import sys; from cfe_lightning.cli.evaluate import main; sys.exit(main())",
            "--checkpoint",
            *map(str, checkpoints),
            "--output",
            str(result),
        ),
        *("--data", str(output / checkpoints[0].parent.name / "config.yaml"), "--baselines", BASELINES),
        *("--limit", str(options.limit), "--curve-steps", "0"),
    )
    return summarise(name, json.loads((result / "metrics.json").read_text()), options.objectives)


def summarise(name: str, metrics: dict, objectives: list[str]) -> list[str]:
    """One Markdown row per objective (mean and range over seeds) and per baseline."""
    groups: dict[str, list[dict]] = {}
    for row in metrics["rows"]:
        objective = row["name"].split("_")[0]
        groups.setdefault(objective if objective in objectives else row["name"], []).append(row["metrics"])
    lines = []
    for label, rows in groups.items():
        cells = []
        for column in COLUMNS:
            values = [row[column]["value"] for row in rows if row.get(column, {}).get("status") == "ok"]
            if not values:
                cells.append("")
            elif len(values) == 1:
                cells.append(f"{values[0]:.3f}")
            else:
                cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f}–{max(values):.3f})")
        lines.append(f"| {name} | {label} | {len(rows)} | " + " | ".join(cells) + " |")
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
