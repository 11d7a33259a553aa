"""Labelled images in folders: ``train/val/test/<class>``, ``<class>`` split by us, or files with a CSV of labels."""

import logging
import re
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, get_args

from cfe_lightning.data.base import Split, check_fractions, check_groups, split_by_group
from cfe_lightning.data.files import FileData, ImageFiles, LabelledFile, check_columns, check_unique, open_csv
from cfe_lightning.images import find_images, is_picture

_log = logging.getLogger(__name__)
#: Folder names and CSV entries that mean a split, in lower case.
SPLIT_NAMES: dict[str, Split] = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip


class Entry(NamedTuple):
    """One labelled file before its class is numbered; with ``split`` None the split is chosen by a hash."""

    name: str
    label: str
    split: Split | None
    group: str | None


class ImageFolder(FileData):
    """Images from a folder, in one of three layouts.

    - Split folders: ``root/train/<class>/...`` and likewise ``val`` and ``test``. A missing ``val`` or ``test`` is
      taken out of ``train``, never out of the other.
    - Class folders: ``root/<class>/...``, divided into splits here.
    - A CSV (``labels``): any files below ``root``, one row each, with columns for name, label and maybe group, split.

    Class folders are read with their subfolders; hidden files and folders are ignored. All images of a group, such as a
    patient (``group_pattern``, or the CSV's group column), are in one split. The split is chosen by a hash of the
    group, so added files move no other file. The classes take turns in every split. Pictures are resized to a square
    without keeping their aspect ratio.

    Args:
        root: Folder of the images.
        labels: CSV file of labels, as given or below ``root``; None reads the classes from the folders.
        name_column: CSV column of file names relative to ``root``, with or without their ending.
        label_column: CSV column of class names.
        group_column: CSV column of groups; used if the file has it.
        split_column: CSV column of splits (train, val, test); used if the file has it.
        class_names: Classes to read, in the order of the classifier's logits; None takes all, sorted as text.
        group_pattern: Regular expression, searched in the name relative to ``root``; its first bracket is the group:
            ``"(patient\\d+)_"``. None makes every file its own group.
        val_fraction: Share of the groups for validation if the data have no such split.
        test_fraction: Share of the groups for testing if the data have no such split.
        split_seed: Seed of the random split; another seed gives another split.
        loading: Options of ``FileData`` and ``ImageData``.

    Raises:
        FileNotFoundError: If the folder or the CSV does not exist.
        ValueError: If there are no images, fewer than two classes, a group in two splits, or a CSV that does not fit.
    """

    def __init__(
        self,
        *,
        root: str,
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
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"There is no folder {self.root}: set root to the folder that holds the images.")
        check_fractions(val_fraction, test_fraction)

        # Labelled names.
        if labels is None:
            entries = _read_folders(self.root, group_pattern)
        else:
            columns = LabelColumns(name_column, label_column, group_column, split_column)
            entries = _read_csv(self.root, Path(labels), columns, group_pattern)

        # Classes and splits.
        self.class_names = choose_classes(entries, class_names, self.root)
        splits = assign_splits(entries, {"val": val_fraction, "test": test_fraction}, split_seed)

        # Files; groups are checked last, because unreadable files do not count.
        names = self.class_names
        self._datasets = {s: self.image_files(_number(found, names, self.root)) for s, found in splits.items()}
        check_groups({split: [file.group for file in files.files] for split, files in self._datasets.items()})

    def dataset(self, split: Split) -> ImageFiles:
        """Returns the files of one split."""
        if not self._datasets[split].files:
            remedy = "there is nothing to train on" if split == "train" else f"add images, or raise {split}_fraction"
            raise ValueError(f"The {split} split of {self.root} is empty: {remedy}.")
        return self._datasets[split]


def _read_folders(root: Path, group_pattern: str | None) -> list[Entry]:
    """Returns the images of split folders, or else of class folders."""
    folders = [path.name for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    named = [name for name in folders if name.lower() in SPLIT_NAMES]
    others = [name for name in folders if name.lower() not in SPLIT_NAMES]

    # A class may be called "test": only a training folder, or split names alone, make split folders.
    is_split = any(SPLIT_NAMES[name.lower()] == "train" for name in named) or (named and not others)
    if not is_split:
        return _read_classes(root, "", None, group_pattern)
    if others:
        _log.warning("%s has split folders, so these folders are left out: %s.", root, ", ".join(others))

    # Images of every split.
    entries: list[Entry] = []
    classes: dict[str, set[str]] = {}
    for name in named:
        found = _read_classes(root, f"{name}/", SPLIT_NAMES[name.lower()], group_pattern)
        classes[name] = {entry.label for entry in found}
        entries += found

    # A class may be missing in a split, but the log says so.
    every_class = set().union(*classes.values())
    for name, own in classes.items():
        if missing := every_class - own:
            _log.warning("%s has no images of these classes: %s.", root / name, ", ".join(sorted(missing)))
    return entries


def _read_classes(root: Path, prefix: str, split: Split | None, group_pattern: str | None) -> list[Entry]:
    """Returns the images of the class folders in ``root/prefix``; names are relative to ``root``."""
    parent = root / prefix
    paths = [path for path in sorted(parent.iterdir()) if not path.name.startswith(".")]
    entries = []
    for label in [path.name for path in paths if path.is_dir()]:
        names = [f"{prefix}{label}/{inner}" for inner in find_images(parent / label)]
        entries += [Entry(name, label, split, _group_of(name, group_pattern)) for name in names]

    # Images outside of all folders.
    if not entries:
        raise ValueError(
            f"{parent} has no class folders with images: put the images of each class into a folder with the class's "
            "name, give a CSV of labels with labels=<file>, or move away what is not labelled."
        )
    if loose := sum(not path.is_dir() and is_picture(path) for path in paths):
        _log.warning("%d images lie in %s outside any class folder and are left out.", loose, parent)
    return entries


class LabelColumns(NamedTuple):
    """Names of the columns in a CSV of labelled files."""

    name: str
    label: str
    group: str
    split: str


def _read_csv(root: Path, labels: Path, columns: LabelColumns, group_pattern: str | None) -> list[Entry]:
    file = labels if labels.is_file() else root / labels
    if not file.is_file():
        raise FileNotFoundError(f"There is no CSV of labels {labels}, neither as given nor below {root}.")

    # Every image by its name with and without ending.
    by_name: dict[str, list[str]] = {}
    for name in find_images(root):
        for key in (name, str(PurePosixPath(name).with_suffix(""))):
            by_name.setdefault(key, []).append(name)

    # Rows.
    with open_csv(file) as reader:
        remedy = "set name_column and label_column to the columns of file names and classes"
        check_columns(file, reader, (columns.name, columns.label), remedy)
        if group_pattern is not None and columns.group in (reader.fieldnames or []):
            raise ValueError(
                f"{file} has a column {columns.group!r} and group_pattern is given too: groups can come from one of "
                "them only, so leave group_pattern out or set group_column to another name."
            )
        entries = [
            _row_entry(row, f"{file}, line {reader.line_num}", by_name, columns, group_pattern, root) for row in reader
        ]
    if not entries:
        raise ValueError(f"{file} has no rows.")
    check_unique(file, [entry.name for entry in entries])
    return entries


def _row_entry(
    row: dict[str, str],
    place: str,
    by_name: dict[str, list[str]],
    columns: LabelColumns,
    group_pattern: str | None,
    root: Path,
) -> Entry:
    """Returns one row as an entry; ``place`` is named in errors."""
    name, label = (row[columns.name] or "").strip(), (row[columns.label] or "").strip()
    name = name.removeprefix("./")
    files = by_name.get(name, [])
    if not files:
        raise ValueError(f"{place}: there is no image {name!r} below {root}.")
    if len(files) > 1 and name not in files:
        raise ValueError(f"{place}: {name!r} fits {' and '.join(files)}: write it with its ending.")
    found = name if name in files else files[0]

    # Class, split and group.
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
    """Returns the split that a CSV field names; raises a ValueError with ``place`` and column if it is none."""
    if text.lower() not in SPLIT_NAMES:
        raise ValueError(f"{place}: {text!r} in the column {column!r} is none of train, val, test.")
    return SPLIT_NAMES[text.lower()]


def _group_of(name: str, group_pattern: str | None) -> str | None:
    """Returns what the pattern's first bracket finds in a name, or None without a pattern."""
    if group_pattern is None:
        return None
    try:
        found = re.search(group_pattern, name)
    except re.error as error:
        raise ValueError(f"group_pattern {group_pattern!r} is no regular expression: {error}.") from error
    if found is None or not found.groups() or found.group(1) is None:
        raise ValueError(f"group_pattern {group_pattern!r} finds no group in {name!r}: its first bracket must match.")
    return found.group(1)


def choose_classes(entries: list[Entry], wanted: list[str] | None, root: Path) -> tuple[str, ...]:
    """Returns the wanted classes, or all found ones, in the order of the logits.

    Raises:
        ValueError: If a wanted class is not there, is wanted twice, or there are fewer than two.
    """
    found = sorted({entry.label for entry in entries})
    for name in wanted or ():
        if name not in found:
            raise ValueError(f"class_names asks for {name!r}, but {root} has the classes {', '.join(found[:20])}.")
    chosen = tuple(wanted if wanted is not None else found)
    if len(chosen) < 2 or len(set(chosen)) < len(chosen):
        raise ValueError(f"At least two different classes are needed, got {list(chosen)} from {root}.")
    return chosen


def assign_splits(entries: list[Entry], fractions: dict[Split, float], seed: int) -> dict[Split, list[Entry]]:
    """Divides entries into splits: by their own split, or by a hash of the group if they have none.

    A split that no entry names is taken out of the training entries.
    """
    given = {entry.split for entry in entries}
    carved: dict[Split, float] = {split: share for split, share in fractions.items() if split not in given}
    shares: dict[Split, float] = {"train": 1.0 - sum(carved.values()), **carved}
    splits: dict[Split, list[Entry]] = {split: [] for split in get_args(Split)}

    # The hash of validation and test entries is not used; computing it is simpler than selecting.
    chosen = split_by_group([entry.group or entry.name for entry in entries], shares, seed)
    for entry, choice in zip(entries, chosen, strict=True):
        splits[choice if entry.split in (None, "train") else entry.split].append(entry)
    return splits


def _number(entries: list[Entry], class_names: tuple[str, ...], root: Path) -> list[LabelledFile]:
    """Returns files with class numbers, without the entries of other classes."""
    index = {name: number for number, name in enumerate(class_names)}
    return [
        LabelledFile(root / entry.name, entry.name, index[entry.label], entry.group or entry.name)
        for entry in entries
        if entry.label in index
    ]
