"""Explains a folder of many small images and watches the memory of the process: does it stay flat, is nobody lost?

    python benchmarks/many_images.py --count 100000 --output checkpoints/many_images

The images are drawn here, by number. The explainer is a small untrained DXAI: it writes all kinds of pictures and its
weights do not matter for memory. The command is killed once on the way if ``--kill`` says after how many images.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from PIL import Image

from cfe_lightning.classifier import ClassifierSpec, FrozenClassifier
from cfe_lightning.classifier.networks import SimpleCnn
from cfe_lightning.methods.dxai import Dxai

ROOT = Path(__file__).resolve().parent.parent
SIZE = 16
#: Widths of the small network.
SMALL = {
    **{"num_branches": 2, "branch_width": 4, "max_branch_width": 4, "min_resolution": 8, "blocks_per_stage": 1},
    **{"style_dim": 4, "latent_dim": 4, "mapping_width": 8, "mapping_shared": 1, "mapping_unshared": 1},
    **{"critic_width": 4, "critic_max_width": 8, "strength": "full"},
}


def draw(folder: Path, count: int) -> None:
    """Draws images of one bright blob each into subfolders of a thousand; what is there stays."""
    rows, columns = np.mgrid[:SIZE, :SIZE]

    def draw_one(index: int) -> None:
        path = folder / f"{index // 1000:03d}" / f"{index:06d}.png"
        if path.exists():
            return
        generator = np.random.default_rng(index)
        row, column = generator.uniform(2, SIZE - 2, 2)
        blob = np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / 6)
        picture = 255 * np.clip(generator.uniform(0, 0.3, (SIZE, SIZE, 3)) + 0.7 * blob[:, :, None], 0, 1)
        Image.fromarray(picture.astype(np.uint8)).save(path)

    for part in range((count + 999) // 1000):
        (folder / f"{part:03d}").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(draw_one, range(count), chunksize=1000):
            pass


def save_explainer(path: Path) -> None:
    """A checkpoint as train.py writes it, untrained."""
    torch.manual_seed(0)
    arguments = {"num_classes": 2, "channels": 3, "image_size": SIZE}
    spec = ClassifierSpec(
        class_path="cfe_lightning.classifier.networks.SimpleCnn",
        init_args=arguments,
        head=None,
        class_names=("a", "b"),
        image_size=SIZE,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(Dxai(FrozenClassifier(SimpleCnn(**arguments), spec), **SMALL))
    trainer.save_checkpoint(path)


def memory(process: int) -> float:
    """Resident memory of a process in MiB; 0 where it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS")), 0.0)


def done(out: Path) -> int:
    """Images recorded so far, counted from the end of what is written: cheap enough to ask often."""
    return sum(int(path.stat().st_size) for path in out.glob("manifest.[0-9]*.jsonl"))


def watch(command: list[str], out: Path, bytes_per_image: float, kill_after: int | None) -> list[tuple[float, float]]:
    """Runs the command and returns (images recorded, MiB) of every second."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    samples = []
    while process.poll() is None:
        recorded = done(out) / bytes_per_image
        if used := memory(process.pid):
            samples.append((recorded, used))
        if kill_after is not None and recorded > kill_after:
            process.send_signal(signal.SIGKILL)
        time.sleep(1)
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"explain.py ended with {process.returncode}")
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=1000, help="images after which memory must stay as it is")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--kill", type=int, help="kill -9 after so many images and start the same command again")
    parser.add_argument("--output", type=Path, default=ROOT / "checkpoints" / "many_images")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    photos, out = options.output / "photos", options.output / "explained"
    draw(photos, options.count)
    checkpoint = options.output / "best.ckpt"
    save_explainer(checkpoint)
    shutil.rmtree(out, ignore_errors=True)
    command = [
        *(sys.executable, "explain.py", "--checkpoint", str(checkpoint), "--input", str(photos)),
        *("--output", str(out), "--batch-size", str(options.batch_size), "--accelerator", "cpu"),
    ]
    # The length of a row is known from the first few.
    subprocess.run([*command, "--limit", str(options.batch_size)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    bytes_per_image = (out / "manifest.jsonl").stat().st_size / options.batch_size
    shutil.rmtree(out)
    start = time.perf_counter()
    runs = [watch(command, out, bytes_per_image, options.kill)]
    if options.kill:
        runs.append(watch(command, out, bytes_per_image, None))
    seconds = time.perf_counter() - start
    with (out / "manifest.csv").open(newline="") as file:
        status = {row["name"]: row["status"] for row in csv.DictReader(file)}
    found = {"images": options.count, "rows": len(status), "ok": sum(one == "ok" for one in status.values())}
    growth = []
    for samples in runs:
        # At the end the rows are merged, and nothing is recorded any more: that counts as later.
        begins = next(index for index, (recorded, _) in enumerate(samples) if recorded > options.first)
        later = [used for _, used in samples[begins:]]
        growth.append({"after first [MiB]": later[0], "highest later [MiB]": max(later)})
    report = {**found, "seconds": round(seconds), "threads": os.environ.get("OMP_NUM_THREADS"), "memory": growth}
    report["growth [MiB]"] = max(one["highest later [MiB]"] - one["after first [MiB]"] for one in growth)
    report["report.html [MiB]"] = (out / "report.html").stat().st_size / 2**20
    (options.output / "memory.json").write_text(json.dumps(report | {"samples": runs}) + "\n")
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
