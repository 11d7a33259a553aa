"""Classification sets of torchvision by name: MNIST, FashionMNIST, CIFAR10, STL10, EuroSAT, ..."""

import inspect
import re
from collections.abc import Sequence
from contextlib import suppress
from numbers import Integral
from pathlib import Path
from typing import Any, get_args

import torch
import torchvision.datasets
from PIL import Image
from torch import Tensor
from torchvision.datasets import VisionDataset

from cfe_lightning import images
from cfe_lightning.data.base import ImageData, Split, check_fractions, did_you_mean, split_by_group
from cfe_lightning.data.files import LabelledImages, take_turns
from cfe_lightning.files.text import one_line

#: Names of the splits in torchvision's sets, best first.
_WORDS: dict[Split, tuple[str, ...]] = {"train": ("train", "trainval"), "val": ("val", "valid"), "test": ("test",)}
#: Attributes in which torchvision's sets keep their labels.
_LABEL_ATTRIBUTES = ("targets", "labels", "_labels", "y")


class TorchvisionData(ImageData):
    """A classification set of torchvision; missing splits are taken out of its training images by a hash.

    Args:
        name: Name of the class in ``torchvision.datasets``, for example ``MNIST``.
        root: Folder in which torchvision keeps the set.
        class_names: Classes to read, in the order of the classifier's logits; None takes all in the set's own order.
            Digits are called "0" to "9"; classes without names are called by their numbers.
        options: Further arguments of the torchvision class, for example ``{split: letters}`` for EMNIST.
        val_fraction: Share of the training images for validation if the set has no such split.
        test_fraction: Share of the training images for testing if the set has no such split.
        split_seed: Seed of the random split; another seed gives another split.
        download: Lets torchvision download missing files.
        cache: Keeps images in memory after their first reading, if all images of a split take less than 1 GiB.
        loading: Options of ``ImageData``.

    Raises:
        ValueError: If the set is unknown, is missing and not downloaded, is no classification set, or lacks a class.
    """

    def __init__(
        self,
        *,
        name: str,
        root: str,
        class_names: list[str] | None = None,
        options: dict[str, Any] | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        download: bool = False,
        cache: bool = True,
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        check_fractions(val_fraction, test_fraction)
        self.set_name = name
        self.cache = cache
        sources = _open(_find_class(name), Path(root), download, options or {})

        # Classes.
        every_class = _class_names(sources["train"])
        self.class_names = tuple(class_names if class_names is not None else every_class)
        for wanted in self.class_names:
            if wanted not in every_class:
                raise ValueError(f"class_names asks for {wanted!r}, but {name} has {', '.join(every_class[:30])}.")
        if len(set(self.class_names)) < max(len(self.class_names), 2):
            raise ValueError(f"At least two different classes are needed, got {list(self.class_names)}.")
        numbers = [every_class.index(wanted) for wanted in self.class_names]

        # Splits.
        shares: dict[Split, float] = {"val": val_fraction, "test": test_fraction}
        carved = {split: share for split, share in shares.items() if split not in sources}
        self._datasets = self._divide(sources, numbers, carved, split_seed)

    def dataset(self, split: Split) -> LabelledImages:
        """Returns the images of one split."""
        if len(self._datasets[split]) == 0:
            raise ValueError(f"The {split} split of {self.set_name} is empty: raise {split}_fraction.")
        return self._datasets[split]

    def _divide(
        self, sources: dict[Split, VisionDataset], numbers: list[int], carved: dict[Split, float], seed: int
    ) -> dict[Split, LabelledImages]:
        """Divides images into splits and numbers their classes.

        ``numbers`` are the set's numbers of the wanted classes, in the order of the logits; ``carved`` are the shares
        of the splits that are taken out of the training images.
        """
        # Indices of the wanted images.
        indices: dict[Split, list[int]] = {split: [] for split in get_args(Split)}
        labels = {split: _labels(source, self.set_name) for split, source in sources.items()}
        shares: dict[Split, float] = {"train": 1.0 - sum(carved.values()), **carved}
        for split, values in labels.items():
            wanted = torch.isin(values, torch.tensor(numbers)).nonzero()[:, 0].tolist()
            chosen = [split] * len(wanted)
            if split == "train":
                chosen = split_by_group([f"{i:06d}" for i in wanted], shares, seed)
            for index, choice in zip(wanted, chosen, strict=True):
                indices[choice].append(index)

        # Class numbers in the order of the logits; -1 marks the others.
        renumber = torch.full((max(numbers) + 1,), -1)
        renumber[torch.tensor(numbers)] = torch.arange(len(numbers))

        # The classes take turns.
        datasets: dict[Split, LabelledImages] = {}
        for split, found in indices.items():
            origin: Split = "train" if split in carved else split
            order = take_turns(renumber[labels[origin][found]].tolist())
            members = [found[position] for position in order]
            datasets[split] = _Members(
                sources[origin],
                members,
                [f"{origin}_{index:06d}" for index in members],
                renumber[labels[origin][members]],
                image_size=self.image_size,
                channels=self.channels,
                num_copies=max(self.num_workers, 1) if self.cache else 0,
            )
        return datasets


class _Members(LabelledImages):
    """The images of a torchvision set with the indices ``members``."""

    def __init__(
        self, source: VisionDataset, members: Sequence[int], names: Sequence[str], labels: Tensor, **options: Any
    ) -> None:
        super().__init__(names, labels, **options)
        self.source = source
        self.members = members

    def load(self, index: int) -> Tensor:
        picture = self.source[self.members[index]][0]
        return images.from_pil(picture, self.channels, size=self.image_size)


def _find_class(name: str) -> type[VisionDataset]:
    found = getattr(torchvision.datasets, name, None) if name in torchvision.datasets.__all__ else None
    if not (isinstance(found, type) and issubclass(found, VisionDataset)):
        hint = did_you_mean(name, torchvision.datasets.__all__, "its documentation lists the names.")
        raise ValueError(f"torchvision has no data set {name!r}: {hint}")
    return found


def _open(kind: type[VisionDataset], root: Path, download: bool, options: dict[str, Any]) -> dict[Split, VisionDataset]:
    """Returns the splits that the set has; a set without splits is all training."""
    parameters = _parameters(kind)
    if unknown := [option for option in options if option not in parameters]:
        raise ValueError(f"torchvision's {kind.__name__} takes no option {unknown[0]!r} but {', '.join(parameters)}.")
    common = {"root": str(root), **({"download": download} if "download" in parameters else {}), **options}

    # Sets with an argument ``train``, and sets without splits.
    if "train" in parameters:
        return {"train": _build(kind, common | {"train": True}), "test": _build(kind, common | {"train": False})}
    if "split" not in parameters or "split" in options:
        return {"train": _build(kind, common)}

    # Sets with an argument ``split``, whose words are tried.
    sources: dict[Split, VisionDataset] = {}
    for split, words in _WORDS.items():
        for word in words:
            with suppress(_NoSuchSplitError):
                sources[split] = _build(kind, common | {"split": word})
                break
    if "train" not in sources:
        raise ValueError(f"torchvision's {kind.__name__} has no training split: name one with options={{split: ...}}.")
    return sources


def _parameters(kind: type[VisionDataset]) -> list[str]:
    """Returns the names of a class's arguments, with those it passes on to its base class (EMNIST to MNIST)."""
    names: list[str] = []
    for base in kind.__mro__:
        own = list(inspect.signature(base).parameters.values())
        names += [parameter.name for parameter in own if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in own):
            break
    return list(dict.fromkeys(names))


class _NoSuchSplitError(ValueError):
    """A set does not know the word for a split."""


def _build(kind: type[VisionDataset], arguments: dict[str, Any]) -> VisionDataset:
    """Builds a set; its errors become a ValueError that says what to do."""
    try:
        return kind(**arguments)
    except (ValueError, TypeError) as error:
        # torchvision refuses an unknown split with a ValueError that names the argument.
        refused = _NoSuchSplitError if "argument split" in str(error) else ValueError
        raise refused(f"torchvision's {kind.__name__}: {error}; further arguments go into options.") from error
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"{kind.__name__} is not complete below {arguments['root']} ({one_line(error)}): set download=true, or put "
            "its files there as torchvision expects them."
        ) from error


def _class_names(source: VisionDataset) -> list[str]:
    """Returns the names of all classes, short where torchvision gives several words."""
    names = getattr(source, "classes", None)
    if not names:
        return [str(number) for number in range(int(_labels(source, type(source).__name__).max()) + 1)]
    # ImageNet gives several words for a class, MNIST "3 - three".
    words = [name if isinstance(name, str) else name[0] for name in names]
    short = [re.sub(r"^(\d+) - .*", r"\1", word) for word in words]
    return short if len(set(short)) == len(short) else words


def _labels(source: VisionDataset, name: str) -> Tensor:
    """Returns the class number of every image, [N] int64, without decoding images if the set stores the numbers."""
    if len(source) == 0:
        raise ValueError(f"torchvision's {name} is empty.")
    picture, first = source[0]
    if not isinstance(picture, Image.Image) or not isinstance(first, Integral):
        raise ValueError(f"torchvision's {name} is no classification set: it yields no image and class number.")

    # Stored labels that agree with the first image's.
    for attribute in _LABEL_ATTRIBUTES:
        values = getattr(source, attribute, None)
        if values is not None and len(values) == len(source) and int(values[0]) == first:
            return torch.as_tensor(values).to(torch.int64)
    return torch.tensor([label for _, label in source], dtype=torch.int64)
