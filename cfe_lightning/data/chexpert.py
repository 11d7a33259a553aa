"""CheXpert: 224,316 chest radiographs with 14 labels; one finding against healthy images, or against all others.

Source: Irvin et al. 2019, arXiv 1901.07031 (the tables); Atad et al. 2022, arXiv 2207.07553 (Positive-vs-Healthy).
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from cfe_lightning.data.base import Split, check_fractions, check_groups, did_you_mean, nearest_names, split_by_group
from cfe_lightning.data.files import Crop, FileData, ImageFiles, LabelledFile, check_unique, open_csv

Uncertain = Literal["zeros", "ones", "ignore"]
Against = Literal["healthy", "rest"]
Views = Literal["frontal", "lateral", "all"]
#: Labels that can be the class: all except No Finding.
PATHOLOGIES = (
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia",
    "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip

_log = logging.getLogger(__name__)
_PATH, _VIEW, _NO_FINDING = "Path", "Frontal/Lateral", "No Finding"
#: A blank means that the report does not mention the finding, which counts as absent.
_VALUES = {"1.0": 1, "1": 1, "0.0": 0, "0": 0, "-1.0": -1, "-1": -1, "": 0}
#: Folders that the archives unpack to, in the order in which they are tried.
_FOLDERS = ("CheXpert-v1.0-small", "CheXpert-v1.0")
#: The part of a path that all layouts share (train/patient00001/study1/...), and the patient in it.
_ADDRESS = re.compile(r"(?:.+?/)??((?:[^/]+/)?(patient\d+)/.+)")
#: Label of a row that is positive and has No Finding.
_CONTRADICTION = -1


class CheXpert(FileData):
    """CheXpert with one finding as the class, split by patient; the classes take turns in every split.

    The rows in class 1 and class 0, where a blank counts as 0.0:

    - Positive-vs-Healthy (``against: healthy``): the pathology is 1.0, or No Finding is 1.0; all others are left out.
      If the pathology is uncertain (-1.0), ``ones`` takes the row as positive, ``zeros`` as not positive (it stays
      only if No Finding is 1.0), and ``ignore`` leaves it out. A row that is positive and has No Finding contradicts
      itself: it is left out, and a warning gives the number of these rows.
    - Positive-vs-Rest (``against: rest``): the pathology is 1.0, or it is 0.0. Uncertain rows are in class 0 with
      ``zeros``, in class 1 with ``ones``, and left out with ``ignore``. No Finding is ignored.

    A patient's split is a hash of the patient's number, so it is the same for every pathology. The name of an image is
    its path from ``train`` or ``valid`` on, wherever it lies. Missing images are left out with a warning. In grey at
    256 pixels the whole set takes 59 GB in a ``cache_folder``.

    Args:
        root: Folder ``CheXpert-v1.0-small``, ``CheXpert-v1.0`` or another one that holds ``train``, or the one above.
        pathology: Finding that is the class, one of ``PATHOLOGIES``: ``Cardiomegaly``, ``Pleural Effusion``, ...; the
            classes are called ``healthy`` or ``no <pathology>``, and ``<pathology>``.
        uncertain: Meaning of the label -1.0: ``zeros`` (absent), ``ones`` (present) or ``ignore`` (row left out). There
            is no neutral choice, so there is no default.
        against: Images of class 0: ``healthy`` (No Finding) or ``rest`` (all without the pathology).
        views: Views that are read, by the column Frontal/Lateral.
        channels: 1 for grey, 3 for RGB.
        table: Table to read and to split, relative to the folder of the tables.
        test_table: Table of the test split, for example ``valid.csv``, which radiologists labelled; None takes the test
            split out of ``table``.
        val_fraction: Share of the patients for validation.
        test_fraction: Share of the patients for testing; not used with a ``test_table``.
        split_seed: Seed of the random split; another seed gives another split.
        crop: Cuts the largest square from the middle before resizing. False squeezes the whole picture into the square,
            as ``explain.py`` does with a folder.
        loading: Options of ``FileData`` and ``ImageData``.

    Raises:
        FileNotFoundError: If a table is missing.
        ValueError: If the pathology is unknown, a table is not CheXpert's or names no existing image, or a patient is
            in two splits.
    """

    def __init__(
        self,
        *,
        root: str,
        pathology: str,
        uncertain: Uncertain,
        against: Against = "healthy",
        views: Views = "frontal",
        channels: int = 1,
        table: str = "train.csv",
        test_table: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        crop: bool = True,
        **loading: Any,
    ) -> None:
        super().__init__(channels=channels, **loading)
        check_fractions(val_fraction, test_fraction)
        task = _Task(pathology, uncertain, against, views)
        task.check()
        self.class_names = ("healthy" if against == "healthy" else f"no {pathology}", pathology)
        self.test_table = test_table

        # Splits.
        files = _read(Path(root), table, task)
        shares: dict[Split, float] = {"val": val_fraction, "test": test_fraction if test_table is None else 0.0}
        shares["train"] = 1.0 - sum(shares.values())
        chosen = list(zip(files, split_by_group([file.group for file in files], shares, split_seed), strict=True))
        splits = {split: [file for file, choice in chosen if choice == split] for split in get_args(Split)}
        if test_table is not None:
            splits["test"] = _read(Path(root), test_table, task)
        check_groups({split: [file.group for file in files] for split, files in splits.items()})

        # Resizing the largest square in the middle keeps the heart's shape.
        square: Crop = "largest" if crop else None
        self._datasets = {split: self.image_files(files, crop=square) for split, files in splits.items()}

    def dataset(self, split: Split) -> ImageFiles:
        """Returns the files of one split; a ValueError names a class without images."""
        labels = self._datasets[split].labels.tolist()
        missing = [name for label, name in enumerate(self.class_names) if label not in labels]
        if missing:
            own_table = split == "test" and self.test_table is not None
            remedy = "take another test_table" if own_table else "add patients, or change the fractions"
            raise ValueError(f"The {split} split of CheXpert has no image of {' or '.join(missing)}: {remedy}.")
        return self._datasets[split]


class _Task(NamedTuple):
    """The classification task: the finding, its uncertain labels, the other class, and the views."""

    pathology: str
    uncertain: Uncertain
    against: Against
    views: Views

    def check(self) -> None:
        """Raises a ValueError at the first unknown value."""
        if self.pathology not in PATHOLOGIES:
            hint = did_you_mean(self.pathology, PATHOLOGIES, f"it has {', '.join(PATHOLOGIES)}.")
            raise ValueError(f"CheXpert has no pathology {self.pathology!r}: {hint}")
        for name, choices in (("uncertain", Uncertain), ("against", Against), ("views", Views)):
            if (value := getattr(self, name)) not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}.")

    @property
    def label_columns(self) -> list[str]:
        return [self.pathology] if self.against == "rest" else [self.pathology, _NO_FINDING]

    def label(self, finding: int, no_finding: int = 0) -> int | None:
        """Returns 0, 1 or ``_CONTRADICTION``, or None if the row is in neither class."""
        if finding == -1 and self.uncertain == "ignore":
            return None
        is_positive = finding == 1 or (finding == -1 and self.uncertain == "ones")
        if self.against == "rest":
            return int(is_positive)
        # Against the healthy: both at once contradict each other, none of both is another disease.
        if is_positive == (no_finding == 1):
            return _CONTRADICTION if is_positive else None
        return int(is_positive)


def _read(root: Path, table: str, task: _Task) -> list[LabelledFile]:
    """Returns the existing images of a table's rows in either class, in the table's order."""
    folders = (root, *(root / name for name in _FOLDERS))
    file = next((folder / table for folder in folders if (folder / table).is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"There is no table {table} in {' or '.join(map(str, folders))}: set root to the folder of CheXpert's "
            "tables, or to the one above it."
        )

    # Images.
    rows = _read_rows(file, task)
    found = []
    for row in rows:
        if path := next((path for path in _places(row, root, file) if path.is_file()), None):
            found.append(row._replace(path=path))

    # Missing images.
    if not found:
        places = " and ".join(map(str, _places(rows[0], root, file)))
        raise ValueError(
            f"None of the {len(rows)} images that {file} names is there, the first was looked for as {places}: set "
            "root to the folder that holds train, or to the one above it."
        )
    if len(found) < len(rows):
        _log.warning("%d of the %d images of %s are missing and left out.", len(rows) - len(found), len(rows), file)
    return found


def _places(row: LabelledFile, root: Path, file: Path) -> list[Path]:
    """Returns the paths at which a row's image may lie, most likely first."""
    return list(dict.fromkeys((root / row.path, root / row.name, file.parent / row.name)))


def _read_rows(file: Path, task: _Task) -> list[LabelledFile]:
    """Returns the rows of a table in either class, with the paths as the table writes them."""
    with open_csv(file, filling="(nothing)") as reader:
        _check_header(file, reader.fieldnames or [], task)
        read = [_read_row(fields, f"{file}, line {reader.line_num}", task) for fields in reader]

    # Contradictions.
    rows = [row for row in read if row is not None and row.label != _CONTRADICTION]
    if number := sum(row is not None for row in read) - len(rows):
        _log.warning("%d rows of %s have both No Finding and %s and are left out.", number, file, task.pathology)

    # Usable rows.
    if not rows:
        raise ValueError(f"{file} has no row for the task {task.pathology} against {task.against}, {task.views} views.")
    check_unique(file, [row.name for row in rows])
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


def _read_row(fields: dict[str, str], place: str, task: _Task) -> LabelledFile | None:
    """Returns one row, also a contradictory one; None if its view is not wanted or it is in neither class."""
    view = fields[_VIEW].strip().lower()
    if view not in ("frontal", "lateral"):
        raise ValueError(f"{place}: {_VIEW!r} is {fields[_VIEW]!r}, which is neither Frontal nor Lateral.")
    if task.views not in (view, "all"):
        return None

    # Label.
    values = []
    for column in task.label_columns:
        if fields[column].strip() not in _VALUES:
            raise ValueError(f"{place}: {column!r} is {fields[column]!r}, which is none of 1.0, 0.0, -1.0 and empty.")
        values.append(_VALUES[fields[column].strip()])
    if (label := task.label(*values)) is None:
        return None

    # Image and patient.
    if (address := _ADDRESS.fullmatch(fields[_PATH].strip())) is None:
        raise ValueError(f"{place}: the path {fields[_PATH]!r} holds no patient's folder such as patient00001.")
    return LabelledFile(path=Path(address[0]), name=address[1], label=label, group=address[2])
