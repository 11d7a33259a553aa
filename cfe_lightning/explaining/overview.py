"""Averages the changes of a whole folder, which shows what the classifier looks at over all its images.

For every pair of classes (predicted, target) the changes that flip the decision on the saved pixels are averaged, read
from the saved pictures. ``write_overview`` puts the result beside the explanations, where the report finds it::

    global.json                  numbers of every pair, the most frequent first
    global/<p>-change.png        mean change of pair p, counted from 0: blue darker, red brighter
    global/<p>-strength.png      mean strength of the change, regardless of its sign
"""

import heapq
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.explaining.folder import OutputFolder
from cfe_lightning.explaining.names import MAX_PICTURED, OVERVIEW
from cfe_lightning.explaining.row import Row
from cfe_lightning.explaining.saved_change import Place, frame_mask, strongest_region
from cfe_lightning.explaining.values import plain
from cfe_lightning.files.atomic import write_json
from cfe_lightning.files.text import significant

#: Largest number of images of one pair that enter its means, drawn evenly over the manifest.
MAX_IMAGES = 2000
#: Number of examples of each pair.
NUM_TYPICAL = 3
#: Alarm: a pixel of the frame changes more than this many times as strongly as a pixel inside it, in the mean and in
#: at least half of the images. Subjects are mostly inside, and a change without any place has the ratio 1.
FRAME_RATIO = 2.0
#: Smallest number of images that shows a pattern.
FEWEST_FOR_ALARM = 5

_READ_AT_ONCE = 64
Pair = tuple[str, str]


def write_overview(output: OutputFolder, *, num_slices: int = 1, max_images: int = MAX_IMAGES) -> None:
    """Writes ``global.json`` and ``global/``; those of an earlier run give way, other files there stay.

    Nothing is written where no saved counterfactual flips. Memory grows with the number of pairs, not of images.

    Args:
        output: The output folder of an explanation run, its rows merged.
        num_slices: Number of slices in a montage, each with its own border and ninths; 1 for plain images.
        max_images: Largest number of images of a pair that enter its means.
    """
    # The numbers go first and come last: a kill never leaves numbers beside the pictures of others.
    OVERVIEW.remove(output.path)

    # Means of every pair.
    counts = Counter(_pair(row) for row in output.rows() if _is_flip(row))
    ordered = sorted(counts, key=lambda pair: (-counts[pair], pair))
    means = {pair: _Mean(num_slices, pictured=rank < MAX_PICTURED) for rank, pair in enumerate(ordered)}
    for row, change in _changes(output, counts, max_images):
        means[_pair(row)].add(change)

    # Examples, which need the finished means.
    pictured = Counter({pair: counts[pair] for pair in ordered[:MAX_PICTURED]})
    for row, change in _changes(output, pictured, max_images):
        means[_pair(row)].compare(row.name, change)

    # Files.
    pairs = [
        {"predicted": pair[0], "target": pair[1], "num_flipped": counts[pair]}
        | means[pair].summary()
        | {"pictures": means[pair].save(output.path, rank)}
        for rank, pair in enumerate(ordered)
    ]
    if pairs:
        content = {"schema": OVERVIEW.schema, "max_images": max_images, "frame_ratio": FRAME_RATIO, "pairs": pairs}
        write_json(output.path / OVERVIEW.file, plain(content), indent=1)


class _Mean:
    """The changes of one pair, added up image by image: numbers, and maps if the pair is to be ``pictured``."""

    def __init__(self, num_slices: int, *, pictured: bool) -> None:
        self.num_slices, self.pictured = num_slices, pictured
        self.num_used = self.num_left_out = self.num_framed = self.num_compared = 0
        self.total = self.near = 0.0
        self.shape: torch.Size | None = None  # of the first change, [C, H, W]
        self.frame = torch.ones(1, 1, dtype=torch.bool)  # [H, W]
        self.area = 1.0  # the frame's share of the picture
        self.change: Tensor | None = None  # sum of changes, [C, H, W] float64
        self.strength: Tensor | None = None  # sum of their magnitudes, [H, W] float64
        self.typical: list[tuple[float, int, str]] = []

    def add(self, change: Tensor | None) -> None:
        """Counts a change [C, H, W] on [0, 1] units in; None for one that cannot be read."""
        # Only changes of the first one's shape have a common mean.
        if change is None or self.shape not in (None, change.shape):
            self.num_left_out += 1
            return
        if self.shape is None:
            self.shape = change.shape
            self.frame = frame_mask(change.shape[1], change.shape[2], self.num_slices)
            self.area = float(self.frame.double().mean())
            if self.pictured:
                self.change = torch.zeros_like(change, dtype=torch.float64)
                self.strength = self.change.sum(dim=0)

        # Sums.
        strength = change.double().abs().mean(dim=0)
        total, near = float(strength.sum()), float(strength[self.frame].sum())
        self.num_used += 1
        self.num_framed += self._is_framed(near, total)
        self.total += total
        self.near += near
        if self.change is not None and self.strength is not None:
            self.change += change
            self.strength += strength

    def compare(self, name: str, change: Tensor | None) -> None:
        """Keeps the image if its change is among those most similar to the mean."""
        if change is None or self.strength is None or change.shape != self.shape:
            return
        strength = change.double().abs().mean(dim=0)
        length = float(strength.norm() * self.strength.norm())
        similarity = float((strength * self.strength).sum()) / length if length else 0.0
        # The first of equally similar images stays: the counter decides, not the last digit nor the name.
        self.num_compared += 1
        heapq.heappush(self.typical, (significant(similarity), -self.num_compared, name))
        if len(self.typical) > NUM_TYPICAL:
            heapq.heappop(self.typical)

    def summary(self) -> dict[str, Any]:
        """Returns the pair's numbers in global.json."""
        # Shares need a change, and a frame that leaves something inside.
        measured = self.total > 0 and self.area < 1
        num_pixels = self.num_used * self.frame.numel()
        found: Place = (None, None)
        if self.strength is not None:
            (found,) = strongest_region(self.strength[None, None], self.num_slices)

        # Alarm and examples.
        often_framed = self.num_used >= FEWEST_FOR_ALARM and 2 * self.num_framed >= self.num_used
        typical = sorted(self.typical, reverse=True)
        return {
            "num_used": self.num_used,
            "num_left_out": self.num_left_out,
            "mean_strength": self.total / num_pixels if num_pixels else None,
            "where": found[0],
            "where_share": found[1],
            "frame_share": self.near / self.total if measured else None,
            "frame_area": self.area if measured else None,
            "num_framed": self.num_framed,
            "alarm": often_framed and self._is_framed(self.near, self.total),
            "typical": [{"name": name, "similarity": similarity} for similarity, _, name in typical],
        }

    def save(self, output: Path, index: int) -> dict[str, Any]:
        """Saves the pictures and returns their files and scales; numbered, because class names may hold anything."""
        if self.change is None or self.strength is None:
            return {}
        change, strength = self.change.float() / self.num_used, self.strength.float() / self.num_used
        drawn = {
            "change": (images.signed_difference(change[None])[0], change.abs().max()),
            "strength": (images.heat_map(strength[None, None])[0], strength.max()),
        }
        files = {kind: f"{OVERVIEW.name}/{index}-{kind}.png" for kind in drawn}
        for kind, (picture, _) in drawn.items():
            images.save_image(picture, output / files[kind])
        return {kind: {"file": files[kind], "scale": scale} for kind, (_, scale) in drawn.items()}

    def _is_framed(self, near: float, total: float) -> bool:
        """Tells whether pixels of the frame change more than ``FRAME_RATIO`` times as strongly as those inside."""
        return self.area < 1 and near * (1 - self.area) > FRAME_RATIO * (total - near) * self.area


def _pair(row: Row) -> Pair:
    return row.predicted, row.target


def _is_flip(row: Row) -> bool:
    return row.status == "ok" and bool(row.flipped_saved) and "counterfactual" in (row.files or {})


def _chosen(rows: Iterator[Row], counts: Counter[Pair], max_images: int) -> Iterator[Row]:
    """Yields flips of the counted pairs, at most ``max_images`` of each, evenly spaced."""
    met: Counter[Pair] = Counter()
    for row in rows:
        if not _is_flip(row) or (pair := _pair(row)) not in counts:
            continue
        place, total, wanted = met[pair], counts[pair], min(counts[pair], max_images)
        met[pair] += 1
        if (place + 1) * wanted // total > place * wanted // total:
            yield row


def _changes(output: OutputFolder, counts: Counter[Pair], max_images: int) -> Iterator[tuple[Row, Tensor | None]]:
    """Yields chosen rows with their saved change, [C, H, W] on [0, 1] units; None where a picture cannot be read."""
    root = output.path.resolve()
    rows = _chosen(output.rows(), counts, max_images)
    with ThreadPoolExecutor(max_workers=4) as pool:
        while some := list(islice(rows, _READ_AT_ONCE)):
            yield from zip(some, pool.map(lambda row: _change(row, root), some), strict=True)


def _change(row: Row, root: Path) -> Tensor | None:
    files = [root / row.folder / row.files[key] for key in ("image", "counterfactual")]
    try:
        before, after = (images.read_saved(file, root)[0] for file in files)
    except images.UnreadableImageError:
        return None
    return (after - before) / 2 if before.shape == after.shape else None
