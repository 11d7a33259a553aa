"""CheXpert: 224,316 chest radiographs with 14 labels, one finding of which is told from health, or from all the rest.

Source: Irvin et al. 2019 (the tables); StylEx's specification, sections 7.1 and 7.2 (the two set-ups).
"""

from __future__ import annotations

import csv
import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from cfe_lightning.data.base import ImageData, Split, check_fractions, check_groups, nearest_names, split_by_group
from cfe_lightning.data.cache import ImageCache
from cfe_lightning.data.files import ImageFiles, LabelledFile, drop_unreadable, take_turns

Uncertain = Literal["zeros", "ones", "ignore"]
Against = Literal["healthy", "rest"]
Views = Literal["frontal", "lateral", "all"]
#: The labels that can be the class: all but No Finding.
PATHOLOGIES = (
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia",
    "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip

_log = logging.getLogger(__name__)
_PATH, _VIEW, _NO_FINDING = "Path", "Frontal/Lateral", "No Finding"
#: Blank means that the report does not mention it, which counts as absent.
_VALUES = {"1.0": 1, "1": 1, "0.0": 0, "0": 0, "-1.0": -1, "-1": -1, "": 0}
#: What the archives unpack to, the one looked at first in front.
_FOLDERS = ("CheXpert-v1.0-small", "CheXpert-v1.0")
#: The folder above, the name that all layouts share (train/patient00001/study1/...), and the patient in it.
_ADDRESS = re.compile(r"(?:(.+?)/)??((?:[^/]+/)?(patient\d+)/.+)")
_CONTRADICTION = -1


class CheXpert(ImageData):
    """CheXpert with one finding as the class, split by patient; the classes take turns in every split.

    Which rows are in class 1 and class 0, a blank counting as 0.0:

    - Positive-vs-Healthy (``against: healthy``): the pathology is 1.0, or No Finding is 1.0; all others are left out.
      Where the pathology is uncertain (-1.0), ``ones`` takes the row as positive, ``zeros`` as not positive (it stays
      only if No Finding is 1.0), and ``ignore`` leaves it out. A row that is positive and has No Finding contradicts
      itself: it is left out, and a warning says how many there are.
    - Positive-vs-Rest (``against: rest``): the pathology is 1.0, or it is 0.0. Uncertain rows are in class 0 with
      ``zeros``, in class 1 with ``ones``, and left out with ``ignore``. No Finding is not looked at.

    A patient's split is a hash of the number, so it is the same for every pathology, and a picture's name is its path
    from ``train`` or ``valid`` on, wherever it lies. Wanted images that are missing are left out with a warning.

    Args:
        root: The folder ``CheXpert-v1.0-small`` (or ``CheXpert-v1.0``, or another that holds ``train``), or the one
            above it.
        pathology: The class, one of ``PATHOLOGIES``: ``Cardiomegaly``, ``Pleural Effusion``, ...; the classes are
            ``healthy`` and it, or ``no <pathology>`` and it.
        uncertain: What -1.0 means, see above; there is no neutral choice, so there is no default.
        image_size: Side of the square images, in pixels.
        against: What the pathology is told from, see above.
        views: Which pictures are read, by the column Frontal/Lateral.
        channels: 1 for grey, 3 for RGB.
        batch_size: Images per batch and process.
        num_workers: Loader processes.
        table: The table to read and to split, below ``root``.
        test_table: A table that is the test split, for example ``valid.csv``, which radiologists labelled; None takes
            the test split out of ``table``.
        val_fraction: Share of the patients for validation.
        test_fraction: Share of the patients for testing; not used with a ``test_table``.
        split_seed: Another seed splits otherwise.
        crop: Cut the largest square from the middle before resizing; False squeezes the whole picture into the square,
            as ``explain.py`` does with a folder.
        skip_unreadable: See ``ImageFolder``.
        cache: See ``ImageFolder``.
        cache_folder: See ``ImageFolder``; 59 GB for the whole set in grey at 256 pixels.
        balanced: See ``ImageData``.
        horizontal_flip: See ``ImageData``; not for radiographs, whose heart would be on the wrong side.
        vertical_flip: See ``ImageData``; not for radiographs.
        quarter_turns: See ``ImageData``; not for radiographs.

    Raises:
        FileNotFoundError: If a table is missing.
        ValueError: If there is no such pathology, a table is not CheXpert's or names none of the images that are
            there, or a patient is in two splits.
    """

    def __init__(
        self,
        *,
        root: str,
        pathology: str,
        uncertain: Uncertain,
        image_size: int,
        against: Against = "healthy",
        views: Views = "frontal",
        channels: int = 1,
        batch_size: int = 32,
        num_workers: int = 0,
        table: str = "train.csv",
        test_table: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        crop: bool = True,
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
        check_fractions(val_fraction, test_fraction)
        task = _Task(pathology, uncertain, against, views)
        task.check()
        self.class_names = ("healthy" if against == "healthy" else f"no {pathology}", pathology)
        self.test_table = test_table
        self.crop = crop
        self.num_copies = max(num_workers, 1) if cache else 0
        self.image_cache = None if cache_folder is None else ImageCache(Path(cache_folder))
        shares: dict[Split, float] = {"val": val_fraction, "test": test_fraction if test_table is None else 0.0}
        splits = _divide(_read(Path(root), table, task), shares, split_seed)
        if test_table is not None:
            splits["test"] = _read(Path(root), test_table, task)
        check_groups({split: [file.group for file in files] for split, files in splits.items()})
        self._datasets: dict[Split, ImageFiles] = {}
        for split, files in splits.items():
            self._datasets[split] = self._image_files(drop_unreadable(files, channels) if skip_unreadable else files)

    def dataset(self, split: Split) -> ImageFiles:
        """The files of one split.

        Raises:
            ValueError: If it does not hold both classes.
        """
        labels = self._datasets[split].labels.tolist()
        missing = [name for label, name in enumerate(self.class_names) if label not in labels]
        if missing:
            own_table = split == "test" and self.test_table is not None
            remedy = "take another test_table" if own_table else "add patients, or change the fractions"
            raise ValueError(f"The {split} split of CheXpert has no image of {' or '.join(missing)}: {remedy}.")
        return self._datasets[split]

    def _image_files(self, files: list[LabelledFile]) -> ImageFiles:
        return ImageFiles(
            [files[index] for index in take_turns([file.label for file in files])],
            image_size=self.image_size,
            channels=self.channels,
            # Resizing the largest square in the middle keeps the heart's shape.
            crop="largest" if self.crop else None,
            num_copies=self.num_copies,
            image_cache=self.image_cache,
        )


class _Task(NamedTuple):
    """What is told from what, on which pictures."""

    pathology: str
    uncertain: Uncertain
    against: Against
    views: Views

    def check(self) -> None:
        """Raises a ValueError at the first option that is none."""
        if self.pathology not in PATHOLOGIES:
            near = nearest_names(self.pathology, PATHOLOGIES, 3)
            raise ValueError(
                f"CheXpert has no pathology {self.pathology!r}: "
                + (f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(PATHOLOGIES)}.")
            )
        for name, value, known in (
            ("uncertain", self.uncertain, get_args(Uncertain)),
            ("against", self.against, get_args(Against)),
            ("views", self.views, get_args(Views)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")

    @property
    def label_columns(self) -> list[str]:
        return [self.pathology] if self.against == "rest" else [self.pathology, _NO_FINDING]

    def label(self, finding: int, no_finding: int = 0) -> int | None:
        """0, 1 or ``_CONTRADICTION``; None where the row is in neither class."""
        if finding == -1 and self.uncertain == "ignore":
            return None
        is_positive = finding == 1 or (finding == -1 and self.uncertain == "ones")
        if self.against == "rest":
            return int(is_positive)
        if is_positive == (no_finding == 1):
            return _CONTRADICTION if is_positive else None
        return int(is_positive)


class _Row(NamedTuple):
    above: str
    name: str
    patient: str
    label: int


def _read(root: Path, table: str, task: _Task) -> list[LabelledFile]:
    """The images of a table's rows in either class, in its order."""
    folders = (root, *(root / name for name in _FOLDERS))
    file = next((folder / table for folder in folders if (folder / table).is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"There is no table {table} in {' or '.join(map(str, folders))}: set root to the folder of CheXpert's "
            "tables, or to the one above it."
        )
    rows = _read_rows(file, task)
    found = []
    for row in rows:
        path = next((path for path in _places(row, root, file) if path.is_file()), None)
        if path is not None:
            found.append(LabelledFile(path, row.name, row.label, row.patient))
    if not found:
        places = " and ".join(map(str, _places(rows[0], root, file)))
        raise ValueError(
            f"None of the {len(rows)} images that {file} names is there, the first was looked for as {places}: set "
            "root to the folder that holds train, or to the one above it."
        )
    if len(found) < len(rows):
        _log.warning("%d of the %d images of %s are missing and left out.", len(rows) - len(found), len(rows), file)
    return found


def _divide(files: list[LabelledFile], shares: dict[Split, float], seed: int) -> dict[Split, list[LabelledFile]]:
    splits: dict[Split, list[LabelledFile]] = {split: [] for split in get_args(Split)}
    chosen = split_by_group([file.group for file in files], {"train": 1.0 - sum(shares.values()), **shares}, seed)
    for file, split in zip(files, chosen, strict=True):
        splits[split].append(file)
    return splits


def _places(row: _Row, root: Path, file: Path) -> list[Path]:
    return list(dict.fromkeys(folder / row.name for folder in (root / row.above, root, file.parent)))


def _read_rows(file: Path, task: _Task) -> list[_Row]:
    """The rows of a table in either class."""
    try:
        # utf-8-sig: spreadsheets put a mark before the first column's name.
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, restval="(nothing)")
            _check_header(file, reader.fieldnames or [], task)
            read = [_read_row(fields, f"{file}, line {reader.line_num}", task) for fields in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no CSV file in UTF-8: {error}.") from error
    rows = [row for row in read if row is not None and row.label != _CONTRADICTION]
    num_contradictions = sum(row is not None for row in read) - len(rows)
    if num_contradictions:
        _log.warning(
            "%d rows of %s have both No Finding and %s and are left out.", num_contradictions, file, task.pathology
        )
    if not rows:
        raise ValueError(
            f"{file} has no row for this task: {task.pathology} against {task.against}, {task.views} views."
        )
    name, number = Counter(row.name for row in rows).most_common(1)[0]
    if number > 1:
        raise ValueError(f"{file} names {name!r} {number} times: one row for each image is needed.")
    return rows


def _check_header(file: Path, header: Sequence[str], task: _Task) -> None:
    missing = []
    for column in (_PATH, _VIEW, *task.label_columns):
        if column not in header:
            near = nearest_names(column, header, 1)
            missing.append(f"no column {column!r}" + (f" (but {near[0]!r})" if near else ""))
    if missing:
        raise ValueError(
            f"{file} is not CheXpert's table, it has {' and '.join(missing)}: the first line must name the columns as "
            "CheXpert does, separated by commas."
        )


def _read_row(fields: dict[str, str], place: str, task: _Task) -> _Row | None:
    """One row, contradictions included; None if its view is not wanted or it is in neither class."""
    view = fields[_VIEW].strip().lower()
    if view not in ("frontal", "lateral"):
        raise ValueError(f"{place}: {_VIEW!r} is {fields[_VIEW]!r}, which is neither Frontal nor Lateral.")
    if task.views not in (view, "all"):
        return None
    values = []
    for column in task.label_columns:
        if fields[column].strip() not in _VALUES:
            raise ValueError(f"{place}: {column!r} is {fields[column]!r}, which is none of 1.0, 0.0, -1.0 and empty.")
        values.append(_VALUES[fields[column].strip()])
    label = task.label(*values)
    if label is None:
        return None
    address = _ADDRESS.fullmatch(fields[_PATH].strip())
    if address is None:
        raise ValueError(f"{place}: the path {fields[_PATH]!r} holds no patient's folder such as patient00001.")
    above, name, patient = address.groups(default="")
    return _Row(above, name, patient, label)
