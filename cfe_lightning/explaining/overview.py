"""What the changes of a whole folder have in common: what does the classifier look at, over all its images?

For every pair of classes (predicted, target) the changes that flip the decision on the saved pixels are averaged, read
from the saved pictures. ``write_overview`` puts the result beside the explanations, where the report finds it::

    global.json                  numbers of every pair, the most frequent first
    global/<p>-change.png        mean change of pair p, counted from 0: blue darker, red brighter
    global/<p>-strength.png      mean strength of the change, regardless of its sign
"""

from __future__ import annotations

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
from cfe_lightning.explaining.folder import GLOBAL_PICTURE, GLOBAL_SCHEMA, MAX_PICTURED, OutputFolder, Row
from cfe_lightning.explaining.saved_change import frame_mask, strongest_region
from cfe_lightning.files.atomic import write_json
from cfe_lightning.files.text import significant

#: Images of one pair that enter its means, drawn evenly over the manifest.
MAX_IMAGES = 2000
NUM_TYPICAL = 3
#: Alarm: a pixel of the frame changes more than this many times as strongly as a pixel inside it, in the mean and in
#: at least half of the images. Subjects are mostly inside, and a change without any place has the ratio 1.
FRAME_RATIO = 2.0
#: Fewer images show no pattern.
FEWEST_FOR_ALARM = 5

_READ_AT_ONCE = 64
Pair = tuple[str, str]


def write_overview(output: OutputFolder, *, num_slices: int = 1, max_images: int = MAX_IMAGES) -> None:
    """Writes ``global.json`` and ``global/``; those of an earlier run give way, other files there stay.

    Nothing is written where no saved counterfactual flips. Memory depends on the number of pairs, not of images.

    Args:
        output: The output folder of an explanation run, its rows merged.
        num_slices: Of images that are montages; each slice has its own border and ninths.
        max_images: How many images of a pair enter its means.
    """
    path, folder = output.path / "global.json", output.path / "global"
    # First of all, and written last: whatever kills this, no numbers stand beside the pictures of others.
    path.unlink(missing_ok=True)
    if folder.is_symlink():  # would lead the pictures out of the output folder
        folder.unlink()
    counts = Counter(_pair(row) for row in output.rows() if _is_flip(row))
    ordered = sorted(counts, key=lambda pair: (-counts[pair], pair))
    means = {pair: _Mean(num_slices, pictured=rank < MAX_PICTURED) for rank, pair in enumerate(ordered)}
    for row, change in _changes(output, counts, max_images):
        means[_pair(row)].add(change)
    pictured = Counter({pair: counts[pair] for pair in ordered[:MAX_PICTURED]})
    for row, change in _changes(output, pictured, max_images):
        means[_pair(row)].compare(row["name"], change)
    pairs = [
        {
            **{"predicted": pair[0], "target": pair[1], "num_flipped": counts[pair]},
            **means[pair].summary(),
            **means[pair].save(output.path, rank),
        }
        for rank, pair in enumerate(ordered)
    ]
    _remove_stale(folder, {output.path / picture["file"] for pair in pairs for picture in pair["pictures"].values()})
    if pairs:
        content = {"schema": GLOBAL_SCHEMA, "max_images": max_images, "frame_ratio": FRAME_RATIO, "pairs": pairs}
        write_json(path, content, indent=1)


class _Mean:
    """The changes of one pair, added up image by image.

    Args:
        num_slices: Of a montage.
        pictured: Whether maps are kept, or numbers only.
    """

    def __init__(self, num_slices: int, *, pictured: bool) -> None:
        self.num_slices = num_slices
        self.pictured = pictured
        self.num_used = self.num_left_out = self.num_framed = 0
        self.total = self.near = 0.0
        self.shape: torch.Size | None = None  # of the first change, [C, H, W]
        self.frame: Tensor | None = None  # [H, W] bool
        self.change: Tensor | None = None  # sum of changes, [C, H, W] float64
        self.strength: Tensor | None = None  # sum of their magnitudes, [H, W] float64
        self.typical: list[tuple[float, int, str]] = []
        self.num_compared = 0

    def add(self, change: Tensor | None) -> None:
        """Counts a change [C, H, W] on [0, 1] units in; None for one that cannot be read."""
        if change is None or (self.shape is not None and change.shape != self.shape):
            self.num_left_out += 1
            return
        if self.frame is None:
            self.shape = change.shape
            self.frame = frame_mask(change.shape[1], change.shape[2], self.num_slices)
            if self.pictured:
                self.change = torch.zeros_like(change, dtype=torch.float64)
                self.strength = self.change.sum(dim=0)
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
        # Of equally similar ones the first stays: the counter decides, not the last digit nor the name.
        self.num_compared += 1
        heapq.heappush(self.typical, (significant(similarity), -self.num_compared, name))
        if len(self.typical) > NUM_TYPICAL:
            heapq.heappop(self.typical)

    def summary(self) -> dict[str, Any]:
        """The pair's numbers in global.json."""
        area = 1.0 if self.frame is None else float(self.frame.double().mean())
        measured = self.total > 0 and area < 1
        num_pixels = 0 if self.frame is None else self.num_used * self.frame.numel()
        where, where_share = None, None
        if self.strength is not None:
            ((where, where_share),) = strongest_region(self.strength[None, None], self.num_slices)
        return {
            "num_used": self.num_used,
            "num_left_out": self.num_left_out,
            "mean_strength": significant(self.total / num_pixels) if num_pixels else None,
            "where": where,
            "where_share": None if where_share is None else significant(where_share),
            "frame_share": significant(self.near / self.total) if measured else None,
            "frame_area": significant(area) if measured else None,
            "num_framed": self.num_framed,
            "alarm": self.num_used >= FEWEST_FOR_ALARM
            and self._is_framed(self.near, self.total)
            and 2 * self.num_framed >= self.num_used,
            "typical": [
                {"name": name, "similarity": similarity} for similarity, _, name in sorted(self.typical, reverse=True)
            ],
        }

    def save(self, output: Path, index: int) -> dict[str, Any]:
        """Saves the pictures and returns their files and scales; counted, because class names may hold anything."""
        if self.change is None or self.strength is None:
            return {"pictures": {}}
        change, strength = (value.float() / self.num_used for value in (self.change, self.strength))
        drawn = {
            "change": (images.signed_difference(change[None])[0], change.abs().max()),
            "strength": (images.heat_map(strength[None, None])[0], strength.max()),
        }
        pictures = {}
        for kind, (picture, scale) in drawn.items():
            file = f"global/{index}-{kind}.png"
            images.save_image(picture, output / file)
            pictures[kind] = {"file": file, "scale": significant(float(scale))}
        return {"pictures": pictures}

    def _is_framed(self, near: float, total: float) -> bool:
        """Whether pixels of the frame change more than ``FRAME_RATIO`` times as strongly as those inside."""
        area = 1.0 if self.frame is None else float(self.frame.double().mean())
        return area < 1 and near * (1 - area) > FRAME_RATIO * (total - near) * area


def _pair(row: Row) -> Pair:
    return row["predicted"], row["target"]


def _is_flip(row: Row) -> bool:
    return row["status"] == "ok" and bool(row.get("flipped_saved")) and "counterfactual" in row.get("files", {})


def _chosen(rows: Iterator[Row], counts: Counter[Pair], max_images: int) -> Iterator[Row]:
    """Flips of the counted pairs, at most ``max_images`` of each, evenly spaced."""
    met: Counter[Pair] = Counter()
    for row in rows:
        if not _is_flip(row) or (pair := _pair(row)) not in counts:
            continue
        place, total = met[pair], counts[pair]
        met[pair] += 1
        wanted = min(total, max_images)
        if (place + 1) * wanted // total > place * wanted // total:
            yield row


def _changes(output: OutputFolder, counts: Counter[Pair], max_images: int) -> Iterator[tuple[Row, Tensor | None]]:
    """Chosen rows with their change as saved, [C, H, W] on [0, 1] units; None where a picture cannot be read."""
    root = output.path.resolve()
    rows = _chosen(output.rows(), counts, max_images)
    with ThreadPoolExecutor(max_workers=4) as pool:
        while some := list(islice(rows, _READ_AT_ONCE)):
            yield from zip(some, pool.map(lambda row: _change(row, root), some), strict=True)


def _change(row: Row, root: Path) -> Tensor | None:
    try:
        before, after = (
            images.read_saved(root / row["folder"] / row["files"][key], root)[0] for key in ("image", "counterfactual")
        )
    except images.UnreadableImageError:
        return None
    return (after - before) / 2 if before.shape == after.shape else None


def _remove_stale(folder: Path, written: set[Path]) -> None:
    if not folder.is_dir():
        return
    for path in set(folder.iterdir()) - written:
        if GLOBAL_PICTURE.fullmatch(path.name):
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
