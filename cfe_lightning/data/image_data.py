"""The base of every data source: the batch contract, loaders and splits by group.

Batch contract: a dictionary with ``image`` [B, C, H, W] in [-1, 1], ``label`` [B] int64, ``name`` (list of unique,
stable strings) and, where the truth is known, ``mask`` [B, 1, H, W] in {0, 1} and ``counterfactual`` [B, C, H, W].
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

Split = Literal["train", "val", "test"]
Sample = dict[str, Any]


class ImageData(pl.LightningDataModule):
    """Loaders over one data source; a source implements ``dataset`` and sets ``class_names``.

    Args:
        image_size: Side of the square images, in pixels.
        channels: 1 for grey, 3 for RGB.
        batch_size: Images per batch and process.
        num_workers: Loader processes.
        balanced: Draw training images with replacement so that every class is equally frequent.
        horizontal_flip: Flip training images at random; only where a mirrored image keeps its class.
        vertical_flip: As ``horizontal_flip``, upside down.
        quarter_turns: Rotate training images by 0, 90, 180 or 270 degrees at random.
    """

    class_names: tuple[str, ...]

    def __init__(
        self,
        *,
        image_size: int,
        channels: int = 3,
        batch_size: int = 32,
        num_workers: int = 0,
        balanced: bool = False,
        horizontal_flip: bool = False,
        vertical_flip: bool = False,
        quarter_turns: bool = False,
    ) -> None:
        super().__init__()
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels}.")
        if batch_size < 1 or image_size < 1:
            raise ValueError(f"batch_size and image_size must be positive, got {batch_size} and {image_size}.")
        self.image_size = image_size
        self.channels = channels
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.balanced = balanced
        self.horizontal_flip = horizontal_flip
        self.vertical_flip = vertical_flip
        self.quarter_turns = quarter_turns

    @abstractmethod
    def dataset(self, split: Split) -> Dataset[Sample]:
        """The samples of one split as dictionaries of the batch contract, without the batch dimension.

        A data set with ``labels: Tensor`` ([N] int64) can be drawn class-balanced.
        """

    def train_dataloader(self) -> DataLoader[Sample]:
        """Shuffled (or class-balanced) and augmented; the last incomplete batch is dropped."""
        dataset = self.dataset("train")
        sampler = None
        if self.balanced:
            labels = torch.as_tensor(dataset.labels)  # type: ignore[attr-defined]
            weights = 1.0 / labels.bincount(minlength=len(self.class_names)).clamp_min(1)[labels]
            sampler = WeightedRandomSampler(weights.tolist(), num_samples=len(labels), replacement=True)
        return DataLoader(
            dataset=_Augmented(dataset, self._augment) if self._augments else dataset,
            batch_size=self.batch_size,
            shuffle=sampler is None,
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            drop_last=True,
        )

    def val_dataloader(self) -> DataLoader[Sample]:
        """The validation split in its own order, never augmented."""
        return self._ordered("val")

    def test_dataloader(self) -> DataLoader[Sample]:
        """The test split in its own order, never augmented."""
        return self._ordered("test")

    def _ordered(self, split: Split) -> DataLoader[Sample]:
        return DataLoader(
            dataset=self.dataset(split),
            batch_size=self.batch_size,
            shuffle=False,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    @property
    def _augments(self) -> bool:
        return self.horizontal_flip or self.vertical_flip or self.quarter_turns

    def _augment(self, image: Tensor) -> Tensor:
        if self.quarter_turns:
            image = torch.rot90(image, int(torch.randint(4, ())), dims=(-2, -1))
        if self.horizontal_flip and torch.rand(()) < 0.5:
            image = image.flip(-1)
        if self.vertical_flip and torch.rand(()) < 0.5:
            image = image.flip(-2)
        return image


class _Augmented(Dataset[Sample]):
    """Applies one label-preserving change to the image only; truth fields are dropped because they would not match."""

    def __init__(self, dataset: Dataset[Sample], augment: Callable[[Tensor], Tensor]) -> None:
        self.dataset = dataset
        self.augment = augment

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Sample:
        sample = self.dataset[index]
        return {key: sample[key] for key in ("label", "name")} | {"image": self.augment(sample["image"])}


def split_by_group(groups: Sequence[str], fractions: dict[Split, float], seed: int = 0) -> list[Split]:
    """Assigns every group (patient, identity, file) to one split by a hash, so adding files moves no other file.

    Args:
        groups: The group of each image.
        fractions: Share of the groups per split; must sum to 1.
        seed: Another seed gives another split.

    Returns:
        The split of each image.
    """
    if abs(sum(fractions.values()) - 1) > 1e-6:
        raise ValueError(f"The split fractions must sum to 1, got {fractions}.")
    chosen: dict[str, Split] = {}
    for group in set(groups):
        draw = int.from_bytes(hashlib.sha256(f"{seed}/{group}".encode()).digest()[:8], "big") / 2**64
        edge = 0.0
        for split in get_args(Split):
            edge += fractions.get(split, 0.0)
            if draw < edge:
                chosen[group] = split
                break
        else:
            chosen[group] = "test"
    return [chosen[group] for group in groups]


def check_groups(groups: dict[Split, Sequence[str]]) -> None:
    """Raises a ValueError if a group (patient, identity) occurs in two splits."""
    seen: dict[str, Split] = {}
    for split, names in groups.items():
        for name in set(names):
            if seen.setdefault(name, split) != split:
                raise ValueError(f"Group {name!r} is in both the {seen[name]} and the {split} split: split by group.")
