"""The base of every data source: the batch contract, loaders and splits by group.

A batch is a dictionary with ``image`` [B, C, H, W] in [-1, 1], ``label`` [B] int64 and ``name``, a list of unique and
stable strings. Where the truth is known, it also has ``mask`` [B, 1, H, W] in {0, 1} and ``counterfactual``
[B, C, H, W], the same scene as class (label + 1) % K. Where the source plants a mark beside the cause, ``mark``
[B, 1, H, W] in {0, 1} covers all places where marks can sit.
"""

import difflib
import hashlib
import itertools
import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

Split = Literal["train", "val", "test"]
Sample = dict[str, Any]


class ImageData(pl.LightningDataModule):
    """Loaders over one data source; a source implements ``dataset`` and sets ``class_names``.

    Args:
        image_size: Side of the square images in pixels.
        channels: 1 for grey, 3 for RGB.
        batch_size: Images per batch and process.
        num_workers: Loader processes per training process; 0 reads images in the training process itself.
        balanced: Draws training images with replacement so that every class is equally frequent.
        horizontal_flip: Mirrors training images left to right half of the time. Only where a mirrored image keeps its
            class: radiographs would show the heart on the wrong side.
        vertical_flip: Mirrors training images top to bottom half of the time. Only where this keeps the class.
        quarter_turns: Rotates training images by 0, 90, 180 or 270 degrees at random. Only where this keeps the class.
    """

    class_names: tuple[str, ...]

    # Sources pass these on as ``**loading: Any``. jsonargparse follows ``super().__init__(**loading)``, so help, YAML
    # and --print_config know each argument with its default. ``Unpack[TypedDict]`` would hide the defaults in the help.
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
        self.augmentation = Augmentation(horizontal_flip, vertical_flip, quarter_turns)

    @abstractmethod
    def dataset(self, split: Split) -> Dataset[Sample]:
        """Returns the samples of one split: dictionaries of the batch contract, without the batch dimension.

        A data set with ``labels: Tensor`` ([N] int64) can be drawn class-balanced. One with ``draw(index, generator,
        augmentation)`` makes its training samples itself, with random numbers of the generator only.

        Raises:
            ValueError: If the split is empty.
        """

    def train_dataloader(self) -> DataLoader[Sample]:
        """Loads training images shuffled (or class-balanced) and augmented; an incomplete last batch is dropped.

        Order and augmentation depend on global seed, epoch and process only, so a resumed run sees the same images.

        Raises:
            ValueError: If the split holds fewer images than one batch per process.
        """
        # Class weights.
        dataset = self.dataset("train")
        weights = None
        if self.balanced:
            labels = torch.as_tensor(dataset.labels)  # type: ignore[attr-defined]
            weights = 1.0 / labels.bincount(minlength=len(self.class_names)).clamp_min(1)[labels]

        # Order of this process.
        num_processes, process = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        sampler = _EpochSampler(dataset, num_processes, process, weights)
        if len(sampler) < self.batch_size:
            raise ValueError(
                f"The training split has {len(dataset)} images for {num_processes} process(es), fewer than one batch "  # type: ignore[arg-type]
                f"of {self.batch_size} each: lower batch_size or add images."
            )

        # Loader.
        return _ResumableLoader(
            dataset=_Drawn(dataset, self.augmentation if any(self.augmentation) else None),
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            drop_last=True,
            generator=torch.Generator(),
        )

    def val_dataloader(self) -> DataLoader[Sample]:
        """Loads the validation split in its own order, not augmented; each image goes to exactly one process.

        Raises:
            ValueError: If there are fewer images than processes.
        """
        return self._ordered("val")

    def test_dataloader(self) -> DataLoader[Sample]:
        """Loads the test split in its own order, not augmented; each image goes to exactly one process."""
        return self._ordered("test")

    def _ordered(self, split: Split) -> DataLoader[Sample]:
        dataset = self.dataset(split)
        sampler, batch_size = None, self.batch_size
        if self.trainer and self.trainer.world_size > 1:
            sampler = _ShareSampler(dataset, self.trainer.world_size, self.trainer.global_rank)
            batch_size = sampler.batch_size(self.batch_size)
        return DataLoader(
            dataset=dataset,
            batch_size=batch_size,
            sampler=sampler,
            shuffle=False,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            # New processes for every validation would start slowly and lose the images they keep in memory.
            persistent_workers=self.num_workers > 0,
            # A loader without its own generator draws from the global random state in every pass.
            generator=torch.Generator(),
        )


class Augmentation(NamedTuple):
    """Label-preserving random changes; apart from the data module, so that loader processes can pickle them.

    Attributes:
        horizontal_flip: Mirrors left to right half of the time.
        vertical_flip: Mirrors top to bottom half of the time.
        quarter_turns: Rotates by 0, 90, 180 or 270 degrees.
    """

    horizontal_flip: bool
    vertical_flip: bool
    quarter_turns: bool

    def apply(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """Changes one image [C, H, W], or all slices of a stack [S, C, H, W] alike."""
        # All three numbers are always drawn, so switching one change on or off leaves the others as they are.
        turns, horizontal, vertical = torch.randint(4, (3,), generator=generator).tolist()
        if self.quarter_turns:
            image = torch.rot90(image, turns, dims=(-2, -1))
        if self.horizontal_flip and horizontal % 2:
            image = image.flip(-1)
        if self.vertical_flip and vertical % 2:
            image = image.flip(-2)
        return image


class _Drawn(Dataset[Sample]):
    """Training samples by (index, random number); augmented samples lose the truth fields, which are not augmented."""

    def __init__(self, dataset: Dataset[Sample], augmentation: Augmentation | None) -> None:
        self.dataset = dataset
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, draw: tuple[int, int] | int) -> Sample:
        # Trainer(overfit_batches=...) replaces our sampler by one that yields plain indices.
        index, seed = draw if isinstance(draw, tuple) else (draw, 0)
        generator = torch.Generator().manual_seed(seed)
        if hasattr(self.dataset, "draw"):
            return self.dataset.draw(index, generator, self.augmentation)
        sample = self.dataset[index]
        if self.augmentation is None:
            return sample
        image = self.augmentation.apply(sample["image"], generator)
        return {key: sample[key] for key in ("label", "name")} | {"image": image}


class _EpochSampler(DistributedSampler[tuple[int, int]]):
    """Draws (index, random number) pairs, a part of the epoch per process; Lightning calls its ``set_epoch``.

    With ``weights`` [N] it draws with replacement, with None it shuffles.
    """

    def __init__(self, dataset: Dataset[Sample], num_processes: int, process: int, weights: Tensor | None) -> None:
        # Lightning passes the seed of ``seed_everything`` to all processes in this variable.
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        super().__init__(dataset, num_replicas=num_processes, rank=process, seed=seed, drop_last=True)
        self.weights = weights
        self.skip = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        # All processes draw the whole epoch alike.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.weights is None:
            order = torch.randperm(len(self.dataset), generator=generator)  # type: ignore[arg-type]
        else:
            order = self.weights.multinomial(len(self.weights), replacement=True, generator=generator)
        seeds = torch.randint(2**62, (len(order),), generator=generator)
        # Each keeps its own part, without the images that a resumed epoch has already seen.
        mine = slice(self.rank, self.total_size, self.num_replicas)
        skip, self.skip = self.skip, 0
        return zip(order[mine][skip:].tolist(), seeds[mine][skip:].tolist(), strict=True)


class _ShareSampler(DistributedSampler[int]):
    """Every W-th image of a split for W processes: Lightning's own sampler repeats some, which would count twice."""

    def __init__(self, dataset: Dataset[Sample], num_processes: int, process: int) -> None:
        super().__init__(dataset, num_replicas=num_processes, rank=process, shuffle=False)
        self.count = len(dataset)  # type: ignore[arg-type]
        if self.count < num_processes:
            raise ValueError(
                f"There are {self.count} images to validate or test for {num_processes} processes: use at most "
                f"{self.count} processes, or more images."
            )

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.count, self.num_replicas))

    def __len__(self) -> int:
        return len(range(self.rank, self.count, self.num_replicas))

    def batch_size(self, wanted: int) -> int:
        """Returns the smallest batch size from ``wanted`` on that gives all processes equally many batches.

        Some processes have one image more than others. With one batch more they would wait for the others for ever.
        """
        fewest, extra = divmod(self.count, self.num_replicas)
        return wanted if not extra else next(size for size in itertools.count(wanted) if fewest % size)


class _ResumableLoader(DataLoader[Sample]):
    """Counts its delivered batches, so that a checkpoint in mid-epoch continues with the next one.

    Lightning stores and restores the state of any loader with a ``state_dict``.
    """

    delivered = 0

    def __iter__(self) -> Iterator[Sample]:  # type: ignore[override]
        self.delivered = getattr(self.sampler, "skip", 0) // self.batch_size  # type: ignore[operator]
        for batch in super().__iter__():
            self.delivered += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of delivered batches of the current epoch; after a finished epoch it is 0.

        An epoch that ``limit_train_batches`` has ended is handled by ``LastCheckpoint``, not here.
        """
        return {"delivered": self.delivered % len(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Starts the next pass after the delivered batches; until then ``state_dict`` returns the same number."""
        self.delivered = state["delivered"]
        self.sampler.skip = state["delivered"] * self.batch_size  # type: ignore[attr-defined, operator]


def nearest_names(word: str, known: Iterable[str], count: int) -> list[str]:
    """Returns up to ``count`` known names that a misspelt word may mean, best first, ignoring case."""
    lower = {name.lower(): name for name in known}
    return [lower[name] for name in difflib.get_close_matches(word.lower(), list(lower), n=count, cutoff=0.5)]


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """Returns the end of an error message about an unknown name: up to three similar ones, or else ``otherwise``."""
    near = nearest_names(word, known, 3)
    return f"did you mean {' or '.join(near)}?" if near else otherwise


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Raises a ValueError unless both are shares from 0 on that leave something for training."""
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise ValueError(
            f"val_fraction and test_fraction must be shares that leave something for training, got {val_fraction} "
            f"and {test_fraction}."
        )


def split_by_group(groups: Sequence[str], fractions: dict[Split, float], seed: int = 0) -> list[Split]:
    """Returns each image's split by a hash of its group (patient, identity, file): added files move no other file.

    Args:
        groups: Group of each image.
        fractions: Share of the groups per split; the shares must sum to 1.
        seed: Seed of the hash; another seed gives another split.

    Raises:
        ValueError: If the shares do not sum to 1.
    """
    if abs(sum(fractions.values()) - 1) > 1e-6:
        raise ValueError(f"The split fractions must sum to 1, got {fractions}.")
    splits: tuple[Split, ...] = get_args(Split)
    edges = list(itertools.accumulate(fractions.get(split, 0.0) for split in splits))
    chosen: dict[str, Split] = {}
    for group in set(groups):
        # A number in [0, 1) that depends on the seed and the group alone.
        draw = int.from_bytes(hashlib.sha256(f"{seed}/{group}".encode()).digest()[:8], "big") / 2**64
        # The split whose interval holds it; rounded shares may sum to less than 1.
        chosen[group] = next((split for split, edge in zip(splits, edges, strict=True) if draw < edge), "test")
    return [chosen[group] for group in groups]


def check_groups(groups: dict[Split, Sequence[str]]) -> None:
    """Raises a ValueError that names the first group (patient, identity) that occurs in two splits."""
    seen: dict[str, Split] = {}
    for split, names in groups.items():
        for name in set(names):
            if seen.setdefault(name, split) != split:
                raise ValueError(f"Group {name!r} is in both the {seen[name]} and the {split} split: split by group.")
