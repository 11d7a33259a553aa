"""Does reading images keep up with training? Images per second of the loaders, and of every method's training step.

    python benchmarks/data_loading.py --json data_loading.json     about 15 minutes on a CPU
    python benchmarks/data_loading.py --quick                      small counts, no steps of the slow methods
    python benchmarks/data_loading.py --device cuda                with the steps of a GPU

The pictures are made by the script: JPEG files of enlarged random blocks with noise, of CelebA's size (178 x 218) and
of 1024 x 1024 pixels, read by ``ImageFolder`` at 256 pixels from the files, from a warm ``cache_folder`` and from
memory. The first table says where the time of one image goes, in processor time of one thread. The last says how many
loader processes a training step needs: as many as its images per second are of those that a core reads, in processor
time of a loader process, which another program on the machine does not lengthen. Steps on a CPU are timed the same way
on one core, and count for a device that is 100 times as fast as all cores together.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders import METHODS, Contender, build, shapes, untrained_classifier
from PIL import Image
from torch.nn import functional as F

from cfe_lightning import images
from cfe_lightning.data.folder import ImageFolder

SIZE = 256
BATCH = 8
PICTURES = {"178 x 218": (178, 218), "1024 x 1024": (1024, 1024)}
MODES = ("files", "cache folder", "memory")
WORKERS = (0, 1, 2, 4)
FASTER = 100


def make_pictures(root: Path, size: tuple[int, int], count: int) -> int:
    """Writes ``count`` pictures of two classes, and returns their mean size in bytes."""
    generator = np.random.default_rng(0)
    width, height = size
    for number in range(count):
        blocks = generator.integers(0, 256, (max(height // 16, 2), max(width // 16, 2), 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
        pixels = smooth + generator.normal(0, 8, smooth.shape)
        path = root / "ab"[number % 2] / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return sum(path.stat().st_size for path in root.rglob("*.jpg")) // count


def processor_ms(work: Callable[[], Any], repetitions: int) -> float:
    """The median processor time of this thread."""
    work()
    seconds = []
    for _ in range(repetitions):
        started = time.thread_time()
        work()
        seconds.append(time.thread_time() - started)
    return statistics.median(seconds) * 1000


def profile(root: Path, repetitions: int) -> dict[str, float]:
    """Where the time of an image goes, in milliseconds of one thread."""
    path = next(root.rglob("*.jpg"))

    def decode() -> np.ndarray:
        with Image.open(path) as picture:
            return np.asarray(picture)

    values = decode()
    with tempfile.TemporaryDirectory() as folder:
        cached = whole(root, cache=False, cache_folder=folder).dataset("train")
        return {
            "decode": processor_ms(decode, repetitions),
            "to [-1, 1] and 256 pixels": processor_ms(
                lambda: images.from_pil(Image.fromarray(values), 3, size=SIZE), repetitions
            ),
            "all": processor_ms(lambda: images.read_image(path, 3, size=SIZE), repetitions),
            "from the cache folder": processor_ms(lambda: cached.load(0), repetitions),
        }


def whole(root: Path, **options: Any) -> ImageFolder:
    """All pictures in the training split."""
    return ImageFolder(
        root=str(root), image_size=SIZE, batch_size=BATCH, val_fraction=0.0, test_fraction=0.0, **options
    )


def throughput(root: Path, mode: str, workers: int, cache_folder: Path, seconds: float) -> dict[str, float]:
    """Images per second of the training loader over whole epochs, warm, and those of a core that reads them."""
    data = whole(
        root,
        num_workers=workers,
        cache=mode == "memory",
        cache_folder=str(cache_folder) if mode == "cache folder" else None,
    )
    loader = data.train_dataloader()
    # Every process fills a memory of its own, with the images that happen to be drawn there.
    epochs = itertools.count()
    for _ in range(1 if mode != "memory" or workers < 2 else 6 * workers):
        run_epoch(loader, next(epochs))
    started, count, before = time.perf_counter(), 0, processor_seconds(loader)
    while time.perf_counter() - started < seconds:
        count += run_epoch(loader, next(epochs))
    return {
        "images_per_second": count / (time.perf_counter() - started),
        "images_per_core_second": count / (processor_seconds(loader) - before),
    }


def processor_seconds(loader: Any) -> float:
    """Of whoever reads: the loader's processes, or this one."""
    if loader.num_workers == 0:
        return time.process_time()
    # The fields 14 and 15 of Linux's table; the name in brackets before them may hold blanks.
    stats = [Path(f"/proc/{worker.pid}/stat").read_text() for worker in loader._iterator._workers]
    ticks = sum(int(value) for stat in stats for value in stat.rpartition(")")[2].split()[11:13])
    return ticks / os.sysconf("SC_CLK_TCK")


def run_epoch(loader: Any, number: int) -> int:
    """Reads an epoch, and returns its number of images."""
    loader.sampler.set_epoch(number)
    return sum(len(batch["image"]) for batch in loader)


def now(device: str) -> float:
    """Seconds that pass on a GPU, and those that this process computes on a CPU."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def steps(device: str, quick: bool) -> Iterator[tuple[str, int, float]]:
    """Every trained method and a classifier: name, batch, and images per second of its training step."""
    yield "classifier (ResNet-18)", 8, classifier_rate(8, device)
    for name, method in METHODS.items():
        if "train" not in method.works or (quick and device == "cpu" and name != "MirrorCFE"):
            continue
        batch = 2
        contender = Contender(build(name, SIZE, small=False), "train", shapes(batch, SIZE), device)
        # On a GPU kernels are loaded when they are first needed.
        for iteration in [iteration for iteration, _ in contender.phases()] if device == "cuda" else [1]:
            contender(iteration)
        seconds = 0.0
        for iteration, share in contender.phases():
            started = now(device)
            contender(iteration)
            seconds += share * (now(device) - started)
        yield name, batch, batch / seconds


def classifier_rate(batch: int, device: str) -> float:
    """Images per second of a step of AdamW, as ``ClassifierTraining`` takes it."""
    network = untrained_classifier("ResNet18", SIZE).network.to(device).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters())
    data = {name: value.to(device) for name, value in shapes(batch, SIZE).items()}
    seconds = []
    for _ in range(4):
        started = now(device)
        loss = F.cross_entropy(network(data["image"]), data["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(now(device) - started)
    return batch / statistics.median(seconds[1:])


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def markdown(result: dict[str, Any]) -> str:
    """The three tables."""
    cuts = list(next(iter(result["profile"].values())))
    profiles = [[name, *(f"{cut[key]:.2f}" for key in cuts)] for name, cut in result["profile"].items()]
    rates = [
        [
            *(name, mode),
            *(f"{each['images_per_second']:.0f}" for each in by_workers.values()),
            f"{by_workers['1']['images_per_core_second']:.0f}",
        ]
        for name, by_mode in result["images_per_second"].items()
        for mode, by_workers in by_mode.items()
    ]
    one = {
        f"{name}, {mode}": by_workers["1"]["images_per_core_second"]
        for name, by_mode in result["images_per_second"].items()
        for mode, by_workers in by_mode.items()
        if mode != "memory"
    }
    factor = FASTER * result["cores"] if result["device"] == "cpu" else 1
    needs = [
        [name, f"{step['images_per_second']:.3g}"]
        + [f"{math.ceil(factor * step['images_per_second'] / rate)}" for rate in one.values()]
        for name, step in result["steps"].items()
    ]
    on = f"for {FASTER} such CPUs" if factor > 1 else "for this GPU"
    return "\n".join(
        [
            table(["ms per image", *cuts], profiles),
            table(["images/s", "from", *(f"{workers} workers" for workers in WORKERS), "a core"], rates),
            table(["training step", "images/s", *(f"workers {on}: {name}" for name in one)], needs),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    seconds = 1.0 if options.quick else 4.0
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*worker processes in total.*")
    result: dict[str, Any] = {"device": options.device, "cores": os.cpu_count(), "torch": torch.__version__}
    result |= {"jpeg_bytes": {}, "profile": {}, "images_per_second": {}, "steps": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, size in PICTURES.items():
            root = Path(folder) / f"pictures_{size[0]}"
            count = 32 if options.quick else 160 if size[0] < 1000 else 64
            result["jpeg_bytes"][name] = make_pictures(root, size, count)
            result["profile"][name] = profile(root, 10 if options.quick else 60)
            cache = Path(folder) / f"cache_{size[0]}"
            result["images_per_second"][name] = {
                mode: {str(workers): throughput(root, mode, workers, cache, seconds) for workers in WORKERS}
                for mode in MODES
            }
    for name, batch, rate in steps(options.device, options.quick):
        result["steps"][name] = {"batch": batch, "images_per_second": rate}
        print(f"{name}: {rate:.3g} images/s", file=sys.stderr)
    print(markdown(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
