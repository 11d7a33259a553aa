"""Slices of patients, from a CSV with one row for each slice, or from one folder for each patient."""

import math
import os
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from cfe_lightning import images
from cfe_lightning.data.base import Split
from cfe_lightning.data.files import check_columns, open_csv
from cfe_lightning.data.folder import read_split
from cfe_lightning.images import medical

#: Name of a volume, and the index of the axial slice behind it.
_ADDRESSED_VOLUME = re.compile(r"(.+\.nii(?:\.gz)?)#(.*)", re.IGNORECASE | re.DOTALL)


class Slice(NamedTuple):
    """One slice: its file, its name in the CSV, the number that orders it, and its index in a volume."""

    path: Path
    name: str
    position: float | None
    axial: int | None


class Patient(NamedTuple):
    """One patient: name, class, split (None leaves it to a hash) and the slices."""

    name: str
    label: str
    split: Split | None
    slices: list[Slice]


class SliceColumns(NamedTuple):
    """Names of the columns in a CSV of slices; ``position`` orders the slices of a patient."""

    patient: str
    path: str
    label: str
    position: str
    split: str


def read_patients(root: Path, labels: Path, columns: SliceColumns) -> dict[str, Patient]:
    """Returns the patients of a CSV by name, in the order of the file, each with its slices in order."""
    file = labels if labels.is_file() else root / labels
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no CSV {labels}, neither as given nor below {root}: set labels to the table of the slices."
        )

    # Rows.
    patients: dict[str, Patient] = {}
    places: dict[tuple[str, int | None], str] = {}
    with open_csv(file) as reader:
        remedy = "set patient_column, path_column and label_column to the columns of patients, files and classes"
        check_columns(file, reader, (columns.patient, columns.path, columns.label), remedy)
        for row in reader:
            place = f"{file}, line {reader.line_num}"
            patient = _row_patient(row, place, columns, root)
            (added,) = patient.slices
            # A slice of two patients is refused too: it would be in two splits.
            first = places.setdefault((os.path.normpath(added.path), added.axial), place)
            if first != place:
                raise ValueError(f"{place}: {added.name!r} stands in {first} too: one row for each slice is needed.")
            known = patients.setdefault(patient.name, patient)
            if known is not patient:
                _check_same(known, patient, place, columns)
                known.slices.append(added)

    # Order.
    if not patients:
        raise ValueError(f"{file} has no rows: one row for each slice is needed.")
    for patient in patients.values():
        _sort(patient, file, columns)
    return patients


def _row_patient(row: dict[str, str], place: str, columns: SliceColumns, root: Path) -> Patient:
    """Returns one row as a patient with one slice; ``place`` is named in errors."""
    fields = {column: (row[column] or "").strip() for column in columns if column in row}
    for column, field in fields.items():
        if not field:
            raise ValueError(f"{place}: the field in the column {column!r} is empty: fill it, or remove the row.")
    split = read_split(fields[columns.split], place, columns.split) if columns.split in fields else None
    position = _number(fields[columns.position], place, columns) if columns.position in fields else None

    # File.
    name = fields[columns.path]
    addressed = _ADDRESSED_VOLUME.fullmatch(name)
    path = root / (addressed[1] if addressed else name)
    if not path.is_file():
        raise FileNotFoundError(
            f"{place}: there is no file {path}: correct the column {columns.path!r}, or set root to the folder that "
            "its paths start from."
        )

    # Index in a volume.
    axial = None
    if medical.is_nifti(path):
        axial = _volume_index(addressed[2] if addressed else None, position)
        if axial is None:
            raise ValueError(
                f"{place}: {name!r} is a volume and needs the index of one axial slice: write {path.name}#17, or give "
                f"whole numbers in the column {columns.position!r}."
            )
    return Patient(fields[columns.patient], fields[columns.label], split, [Slice(path, name, position, axial)])


def _number(text: str, place: str, columns: SliceColumns) -> float:
    """Returns the finite number of a field that orders slices."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{place}: {text!r} in the column {columns.position!r} is no number, but it orders slices.")
    return number


def _volume_index(address: str | None, position: float | None) -> int | None:
    """Returns the index behind the volume's name, else the slice column's; None unless a whole number from 0 on."""
    if address is not None:
        return int(address) if address.isdecimal() else None
    return int(position) if position is not None and position >= 0 and position == int(position) else None


def _check_same(known: Patient, patient: Patient, place: str, columns: SliceColumns) -> None:
    """Raises a ValueError if a row gives a known patient another label or split."""
    labels, splits = (columns.label, known.label, patient.label), (columns.split, known.split, patient.split)
    for column, before, now in (labels, splits):
        if before != now:
            raise ValueError(
                f"{place}: patient {patient.name!r} has {now!r} in the column {column!r}, but {before!r} in an earlier "
                "row: all rows of a patient need the same."
            )


def _sort(patient: Patient, file: Path, columns: SliceColumns) -> None:
    """Sorts a patient's slices by the slice column, which must not give two of them the same number."""
    if all(one.position is None for one in patient.slices):
        patient.slices[:] = in_order(patient.slices)
        return
    patient.slices.sort(key=lambda one: (one.position or 0.0, _natural(one.name)))
    for one, other in pairwise(patient.slices):
        if one.position is not None and one.position == other.position:
            raise ValueError(
                f"{file} gives {one.name!r} and {other.name!r} of patient {patient.name!r} the same number "
                f"{one.position:g} in the column {columns.position!r}: every slice of a patient needs its own."
            )


def in_order(slices: Sequence[Slice]) -> list[Slice]:
    """Sorts slices by their position in the patient if all are DICOM files that hold it, else by name.

    Numbers in names count as numbers: ``2`` comes before ``10``.
    """
    named = sorted(slices, key=lambda one: _natural(one.name))
    if not all(medical.is_dicom(one.path) for one in named):
        return named
    known = [place for one in named if (place := medical.slice_place(one.path)) is not None]
    if len(known) < len(named):
        return named
    # The sort is stable: slices at the same position stay ordered by name.
    return [named[index] for index in sorted(range(len(named)), key=known.__getitem__)]


def find_patients(folder: Path) -> Iterator[str]:
    """Yields every folder of slices below ``folder`` and every NIfTI volume: each is one patient.

    Names are relative to ``folder``, in the order of ``images.find_images``.

    Raises:
        FileNotFoundError: If there is no such folder.
        NotADirectoryError: If ``folder`` is a file.
        ValueError: If ``folder`` itself holds slices.
    """
    met = set[str]()
    for name in images.find_images(folder, lambda path: medical.is_slice(path) or medical.is_nifti(path)):
        patient = name if medical.is_nifti(name) else name.rpartition("/")[0]
        if not patient:
            raise ValueError(
                f"{folder} holds slices itself ({name!r}): give the folder that holds one folder for each patient."
            )
        if patient not in met:
            met.add(patient)
            yield patient


def find_stack(place: Path) -> list[Slice]:
    """Returns the slices of a patient of ``find_patients`` in their order.

    Raises:
        UnreadableImageError: If there are none, or the folder or volume cannot be read.
    """
    try:
        if medical.is_nifti(place):
            number = medical.count_slices(place)
            return [Slice(place, f"{place.name}#{index}", None, index) for index in range(number)]
        names = [path.name for path in place.iterdir() if not path.name.startswith(".") and medical.is_slice(path)]
    except OSError as error:
        raise images.UnreadableImageError(f"The patient cannot be read: {error.strerror}.") from error
    if not names:
        raise images.UnreadableImageError("The folder holds no slices.")
    return in_order([Slice(place / name, name, None, None) for name in names])


def _natural(name: str) -> tuple[list[str | int], str]:
    """Returns a sorting key by the numbers in a name; names that differ only in leading zeros are sorted as text."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name
