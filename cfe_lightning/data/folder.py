"""Labelled images in folders: ``train/val/test/<class>``, ``<class>`` split by us, or files with a CSV of labels."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple, get_args

from cfe_lightning.data.base import ImageData, Split, check_fractions, check_groups, split_by_group
from cfe_lightning.data.cache import ImageCache
from cfe_lightning.data.files import ImageFiles, LabelledFile, drop_unreadable, take_turns
from cfe_lightning.images import EXTENSIONS, find_images

_log = logging.getLogger(__name__)
#: Folder names and CSV entries that mean a split, in lower case.
SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


class Entry(NamedTuple):
    """One labelled file as found, before classes are numbered; ``split`` None means that we choose."""

    name: str
    label: str
    split: Split | None
    group: str | None


class ImageFolder(ImageData):
    """Images from a folder, in one of three layouts.

    - Split folders: ``root/train/<class>/...`` and likewise ``val`` and ``test``. A missing ``val`` or ``test`` is
      taken out of ``train``, never out of the other.
    - Class folders: ``root/<class>/...``, split by us.
    - A CSV of labels (``labels``): any files below ``root``, one row each, with columns for name, label and, if
      there are such columns, group and split.

    Class folders are read with everything below them; hidden files and folders are ignored. Whoever is shown in
    several images (``group_pattern``, or the CSV's group column) is in one split only. The split is chosen by a hash of
    the group, so adding files moves no other file. The classes take turns in every split.

    Args:
        root: The folder.
        image_size: Side of the square images, in pixels; the aspect ratio is not kept.
        channels: 1 for grey, 3 for RGB.
        batch_size: Images per batch and process.
        num_workers: Loader processes.
        labels: The CSV file of labels, as given or below ``root``; None reads the classes from the folders.
        name_column: The CSV's column of file names relative to ``root``, with or without their ending.
        label_column: The CSV's column of class names.
        group_column: The CSV's column of groups; used if there is one.
        split_column: The CSV's column of splits (train, val, test); used if there is one.
        class_names: The classes to read, in the order of the classifier's logits; None takes all, sorted as text.
        group_pattern: A regular expression, searched in the name relative to ``root``, whose first bracket is the
            group: ``"(patient\\d+)_"``. None makes every file its own group.
        val_fraction: Share of the groups for validation where there is no such split.
        test_fraction: Share of the groups for testing where there is no such split.
        split_seed: Another seed splits otherwise.
        skip_unreadable: Read every file at the start and leave out what cannot be read, with a logged count. False
            stops at the first unreadable file with its name.
        cache: Keep images in memory after their first reading, where all of a split take less than 1 GiB.
        cache_folder: A folder in which resized images are kept for later epochs, runs and processes, with exactly the
            values that reading gives: 4 bytes each, 786 kB for an RGB image of 256 pixels; see ``ImageCache``. Worth it
            for large pictures and slow disks. None keeps none.
        balanced: See ``ImageData``.
        horizontal_flip: See ``ImageData``.
        vertical_flip: See ``ImageData``.
        quarter_turns: See ``ImageData``.

    Raises:
        FileNotFoundError: If the folder or the CSV does not exist.
        ValueError: If there are no images, no classes or one, classes that differ between split folders, a group in two
            splits, or a CSV that does not fit the folder.
    """

    def __init__(
        self,
        *,
        root: str,
        image_size: int,
        channels: int = 3,
        batch_size: int = 32,
        num_workers: int = 0,
        labels: str | None = None,
        name_column: str = "name",
        label_column: str = "label",
        group_column: str = "group",
        split_column: str = "split",
        class_names: list[str] | None = None,
        group_pattern: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        skip_unreadable: bool = False,
        cache: bool = True,
        cache_folder: str | None = None,
        balanced: bool = False,
        horizontal_flip: bool = False,
        vertical_flip: bool = False,
        quarter_turns: bool = False,
    ) -> None:
        super().__init__(
            image_size=image_size,
            channels=channels,
            batch_size=batch_size,
            num_workers=num_workers,
            balanced=balanced,
            horizontal_flip=horizontal_flip,
            vertical_flip=vertical_flip,
            quarter_turns=quarter_turns,
        )
        self.root = Path(root)
        self.cache = cache
        self.image_cache = None if cache_folder is None else ImageCache(Path(cache_folder))
        if not self.root.is_dir():
            raise FileNotFoundError(f"There is no folder {self.root}: set root to the folder that holds the images.")
        check_fractions(val_fraction, test_fraction)
        if labels is None:
            entries = _read_folders(self.root, group_pattern)
        else:
            columns = CsvColumns(name_column, label_column, group_column, split_column)
            entries = _read_csv(self.root, Path(labels), columns, group_pattern)
        self.class_names = choose_classes(entries, class_names, self.root)
        splits = assign_splits(entries, {"val": val_fraction, "test": test_fraction}, split_seed)
        self._datasets: dict[Split, ImageFiles] = {}
        for split, members in splits.items():
            files = _number(members, self.class_names, self.root)
            self._datasets[split] = self._image_files(drop_unreadable(files, channels) if skip_unreadable else files)
        check_groups({split: [file.group for file in files.files] for split, files in self._datasets.items()})

    def dataset(self, split: Split) -> ImageFiles:
        """The files of one split.

        Raises:
            ValueError: If the split holds no image.
        """
        if not self._datasets[split].files:
            remedy = "there is nothing to train on" if split == "train" else f"add images, or raise {split}_fraction"
            raise ValueError(f"The {split} split of {self.root} is empty: {remedy}.")
        return self._datasets[split]

    def _image_files(self, files: list[LabelledFile]) -> ImageFiles:
        return ImageFiles(
            [files[index] for index in take_turns([file.label for file in files])],
            image_size=self.image_size,
            channels=self.channels,
            num_copies=max(self.num_workers, 1) if self.cache else 0,
            image_cache=self.image_cache,
        )


def _read_folders(root: Path, group_pattern: str | None) -> list[Entry]:
    folders = [path.name for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    named = [name for name in folders if name.lower() in SPLIT_NAMES]
    others = [name for name in folders if name.lower() not in SPLIT_NAMES]
    # A class may be called "test"; only a folder for training, or nothing but split names, makes split folders.
    is_split = any(SPLIT_NAMES[name.lower()] == "train" for name in named) or (named and not others)
    if not is_split:
        return _read_classes(root, "", None, group_pattern)
    if others:
        _log.warning("%s has split folders, so these folders are left out: %s.", root, ", ".join(others))
    entries: list[Entry] = []
    classes: dict[str, set[str]] = {}
    for name in named:
        found = _read_classes(root, f"{name}/", SPLIT_NAMES[name.lower()], group_pattern)
        classes[name] = {entry.label for entry in found}
        entries += found
    every_class = set().union(*classes.values())
    for name, own in classes.items():
        if own != every_class:
            missing = ", ".join(sorted(every_class - own))
            _log.warning("%s has no images of these classes: %s.", root / name, missing)
    return entries


def _read_classes(root: Path, prefix: str, split: Split | None, group_pattern: str | None) -> list[Entry]:
    """The images of the class folders in ``root/prefix``; names are relative to ``root``."""
    parent = root / prefix
    loose = 0
    entries = []
    for path in sorted(parent.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            names = [f"{prefix}{path.name}/{inner}" for inner in find_images(path)]
            entries += [Entry(name, path.name, split, _group_of(name, group_pattern)) for name in names]
        else:
            loose += path.suffix.lower() in EXTENSIONS
    if not entries:
        raise ValueError(
            f"{parent} has no class folders with images: put the images of each class into a folder with the class's "
            "name, give a CSV of labels with labels=<file>, or move away what is not labelled."
        )
    if loose:
        _log.warning("%d images lie in %s outside any class folder and are left out.", loose, parent)
    return entries


class CsvColumns(NamedTuple):
    """The columns of a CSV file that hold file names, labels, splits and groups."""

    name: str
    label: str
    group: str
    split: str


def _read_csv(root: Path, labels: Path, columns: CsvColumns, group_pattern: str | None) -> list[Entry]:
    file = labels if labels.is_file() else root / labels
    if not file.is_file():
        raise FileNotFoundError(f"There is no CSV of labels {labels}, neither as given nor below {root}.")
    by_name: dict[str, list[str]] = {}
    for name in find_images(root):
        for key in (name, str(PurePosixPath(name).with_suffix(""))):
            by_name.setdefault(key, []).append(name)
    try:
        # utf-8-sig: spreadsheets put a mark before the first column's name.
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            _check_header(file, reader.fieldnames or [], columns, group_pattern)
            entries = [
                _row_entry(row, f"{file}, line {reader.line_num}", by_name, columns, group_pattern, root)
                for row in reader
            ]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no CSV file in UTF-8: {error}.") from error
    if not entries:
        raise ValueError(f"{file} has no rows.")
    repeated = _first_repeated(entry.name for entry in entries)
    if repeated is not None:
        raise ValueError(f"{file} names {repeated!r} twice: one row for each image is needed.")
    return entries


def _check_header(file: Path, header: Sequence[str], columns: CsvColumns, group_pattern: str | None) -> None:
    for column in (columns.name, columns.label):
        if column not in header:
            raise ValueError(
                f"{file} has no column {column!r} but {list(header)}: set name_column and label_column to the columns "
                "of file names and classes (the separator must be a comma)."
            )
    if group_pattern is not None and columns.group in header:
        raise ValueError(
            f"{file} has a column {columns.group!r} and group_pattern is given too: groups can come from one of them "
            "only, so leave group_pattern out or set group_column to another name."
        )


def _row_entry(
    row: dict[str, str],
    place: str,
    by_name: dict[str, list[str]],
    columns: CsvColumns,
    group_pattern: str | None,
    root: Path,
) -> Entry:
    name, label = (row[columns.name] or "").strip(), (row[columns.label] or "").strip()
    name = name.removeprefix("./")
    files = by_name.get(name, [])
    if not files:
        raise ValueError(f"{place}: there is no image {name!r} below {root}.")
    if len(files) > 1 and name not in files:
        raise ValueError(f"{place}: {name!r} fits {' and '.join(files)}: write it with its ending.")
    found = name if name in files else files[0]
    if not label:
        raise ValueError(f"{place}: {name!r} has no label in the column {columns.label!r}.")
    split = (row.get(columns.split) or "").strip()
    found_split = read_split(split, place, columns.split) if split else None
    group = (row.get(columns.group) or "").strip()
    for column, value in ((columns.split, split), (columns.group, group)):
        if column in row and not value:
            raise ValueError(f"{place}: {name!r} has an empty field in the column {column!r}.")
    return Entry(found, label, found_split, group or _group_of(found, group_pattern))


def read_split(text: str, place: str, column: str) -> Split:
    """What a CSV's field means; a ValueError that names the ``place`` and the column if it is no split."""
    if text.lower() not in SPLIT_NAMES:
        raise ValueError(f"{place}: {text!r} in the column {column!r} is none of train, val, test.")
    return SPLIT_NAMES[text.lower()]


def _group_of(name: str, group_pattern: str | None) -> str | None:
    if group_pattern is None:
        return None
    try:
        found = re.search(group_pattern, name)
    except re.error as error:
        raise ValueError(f"group_pattern {group_pattern!r} is no regular expression: {error}.") from error
    if found is None or not found.groups() or found.group(1) is None:
        raise ValueError(f"group_pattern {group_pattern!r} finds no group in {name!r}: its first bracket must match.")
    return found.group(1)


def _first_repeated(names: Iterable[str]) -> str | None:
    seen = set[str]()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def choose_classes(entries: list[Entry], wanted: list[str] | None, root: Path) -> tuple[str, ...]:
    """The classes wanted, or all that were found, in the order of the logits; fewer than two are refused."""
    found = sorted({entry.label for entry in entries})
    for name in wanted or ():
        if name not in found:
            raise ValueError(f"class_names asks for {name!r}, but {root} has the classes {', '.join(found[:20])}.")
    chosen = tuple(wanted if wanted is not None else found)
    if len(chosen) < 2 or len(set(chosen)) < len(chosen):
        raise ValueError(f"At least two different classes are needed, got {list(chosen)} from {root}.")
    return chosen


def assign_splits(entries: list[Entry], fractions: dict[Split, float], seed: int) -> dict[Split, list[Entry]]:
    """The split of every entry: its own, or by the hash of its group where it has none or a split is missing."""
    given = {entry.split for entry in entries if entry.split is not None}
    carved: dict[Split, float] = {split: share for split, share in fractions.items() if split not in given}
    shares: dict[Split, float] = {"train": 1.0 - sum(carved.values()), **carved}
    splits: dict[Split, list[Entry]] = {split: [] for split in get_args(Split)}
    # Also the entries of other splits are hashed, and not used: simpler than taking the training entries apart.
    chosen = split_by_group([entry.group or entry.name for entry in entries], shares, seed)
    for entry, choice in zip(entries, chosen, strict=True):
        splits[choice if entry.split in (None, "train") else entry.split].append(entry)
    return splits


def _number(entries: list[Entry], class_names: tuple[str, ...], root: Path) -> list[LabelledFile]:
    """Files with class numbers; entries of other classes are left out."""
    index = {name: number for number, name in enumerate(class_names)}
    return [
        LabelledFile(root / entry.name, entry.name, index[entry.label], entry.group or entry.name)
        for entry in entries
        if entry.label in index
    ]
