"""Which slices a patient has: read from a CSV with one row for each slice, or from one folder for each patient.

Source: DiffExplainer's specification, section 7.2.
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from cfe_lightning import images
from cfe_lightning.data.base import Split
from cfe_lightning.data.folder import read_split
from cfe_lightning.images import medical as medical_files

#: A volume, and the axial slice behind its name.
_ADDRESSED_VOLUME = re.compile(r"(.+\.nii(?:\.gz)?)#(.*)", re.IGNORECASE | re.DOTALL)


class Slice(NamedTuple):
    """One slice: its file, how the CSV calls it, its place in the patient's stack, and which one of a volume it is."""

    path: Path
    name: str
    position: float | None
    axial: int | None


class Patient(NamedTuple):
    """One patient: name, class, split (None means that we choose) and the slices."""

    name: str
    label: str
    split: Split | None
    slices: list[Slice]


class CsvColumns(NamedTuple):
    """What the CSV's columns are called."""

    patient: str
    path: str
    label: str
    position: str
    split: str


def read_patients(root: Path, labels: Path, columns: CsvColumns) -> dict[str, Patient]:
    """The patients of the CSV by name, in its order, each with the slices in theirs."""
    file = labels if labels.is_file() else root / labels
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no CSV {labels}, neither as given nor below {root}: set labels to the table of the slices."
        )
    patients: dict[str, Patient] = {}
    places: dict[tuple[str, int | None], str] = {}
    try:
        # utf-8-sig: spreadsheets put a mark before the first column's name.
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            _check_header(file, reader.fieldnames or [], columns)
            for row in reader:
                place = f"{file}, line {reader.line_num}"
                patient = _row_patient(row, place, columns, root)
                (added,) = patient.slices
                # Also a slice of two patients is refused: it would be in two splits.
                first = places.setdefault((os.path.normpath(added.path), added.axial), place)
                if first != place:
                    raise ValueError(
                        f"{place}: {added.name!r} stands in {first} too: one row for each slice is needed."
                    )
                known = patients.setdefault(patient.name, patient)
                if known is not patient:
                    _check_same(known, patient, place, columns)
                    known.slices.append(added)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no CSV file in UTF-8: {error}.") from error
    if not patients:
        raise ValueError(f"{file} has no rows: one row for each slice is needed.")
    for patient in patients.values():
        _sort(patient, file, columns)
    return patients


def _check_header(file: Path, header: Sequence[str], columns: CsvColumns) -> None:
    missing = [column for column in (columns.patient, columns.path, columns.label) if column not in header]
    if missing:
        raise ValueError(
            f"{file} has no column {' and no column '.join(map(repr, missing))} but {list(header)}: set "
            "patient_column, path_column and label_column to the columns of patients, files and classes (the separator "
            "must be a comma)."
        )


def _row_patient(row: dict[str, str], place: str, columns: CsvColumns, root: Path) -> Patient:
    """One row as a patient with one slice."""
    fields = {column: (row[column] or "").strip() for column in columns if column in row}
    for column, field in fields.items():
        if not field:
            raise ValueError(f"{place}: the field in the column {column!r} is empty: fill it, or remove the row.")
    split = read_split(fields[columns.split], place, columns.split) if columns.split in fields else None
    position = _number(fields[columns.position], place, columns) if columns.position in fields else None
    name = fields[columns.path]
    addressed = _ADDRESSED_VOLUME.fullmatch(name)
    path = root / (addressed[1] if addressed else name)
    if not path.is_file():
        raise FileNotFoundError(
            f"{place}: there is no file {path}: correct the column {columns.path!r}, or set root to the folder that "
            "its paths start from."
        )
    axial = None
    if medical_files.is_nifti(path):
        axial = _volume_index(addressed[2] if addressed else None, position)
        if axial is None:
            raise ValueError(
                f"{place}: {name!r} is a volume and needs the index of one axial slice: write {path.name}#17, or give "
                f"whole numbers in the column {columns.position!r}."
            )
    return Patient(
        fields[columns.patient],
        fields[columns.label],
        split,
        [Slice(path, name, position, axial)],
    )


def _number(text: str, place: str, columns: CsvColumns) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"{place}: {text!r} in the column {columns.position!r} is no number: slices are ordered by it."
        )
    return number


def _volume_index(address: str | None, position: float | None) -> int | None:
    """The index behind the volume's name, else the slice column's; None if there is no whole number from 0 on."""
    if address is not None:
        return int(address) if address.isdecimal() else None
    return int(position) if position is not None and position >= 0 and position == int(position) else None


def _check_same(known: Patient, patient: Patient, place: str, columns: CsvColumns) -> None:
    for column, before, now in (
        (columns.label, known.label, patient.label),
        (columns.split, known.split, patient.split),
    ):
        if before != now:
            raise ValueError(
                f"{place}: patient {patient.name!r} has {now!r} in the column {column!r}, but {before!r} in an earlier "
                "row: all rows of a patient need the same."
            )


def _sort(patient: Patient, file: Path, columns: CsvColumns) -> None:
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
    """By their place in the patient where all are DICOM files that tell it, else by name as a person would."""
    named = sorted(slices, key=lambda one: _natural(one.name))
    if not all(medical_files.is_dicom(one.path) for one in named):
        return named
    places = [medical_files.slice_place(one.path) for one in named]
    known = [place for place in places if place is not None]
    if len(known) < len(named):
        return named
    # The sort is stable: slices at the same place stay ordered by name.
    return [named[index] for index in sorted(range(len(named)), key=lambda index: known[index])]


def find_patients(folder: Path) -> Iterator[str]:
    """Every folder below one that holds slices itself, and every NIfTI volume: each is one patient.

    Names are relative to ``folder``, in the order of ``images.find_images``.

    Raises:
        FileNotFoundError: If there is no such folder.
        NotADirectoryError: If it is a file.
        ValueError: If the folder holds slices itself.
    """
    met = set[str]()
    for name in images.find_images(folder, _is_slice_or_volume):
        parent = name.rpartition("/")[0]
        if not parent and not medical_files.is_nifti(name):
            raise ValueError(
                f"{folder} holds slices itself ({name!r}): give the folder that holds one folder for each patient."
            )
        patient = name if medical_files.is_nifti(name) else parent
        if patient not in met:
            met.add(patient)
            yield patient


def find_stack(place: Path) -> list[Slice]:
    """The slices of a patient of ``find_patients`` in their order.

    Raises:
        UnreadableImageError: If there are none, or the volume is broken.
    """
    try:
        if medical_files.is_nifti(place):
            number = medical_files.count_slices(place)
            return [Slice(place, f"{place.name}#{index}", None, index) for index in range(number)]
        names = [
            path.name for path in place.iterdir() if medical_files.is_slice(path.name) and not path.name.startswith(".")
        ]
    except OSError as error:
        raise images.UnreadableImageError(f"The patient cannot be read: {error.strerror}.") from error
    if not names:
        raise images.UnreadableImageError("The folder holds no slices.")
    return in_order([Slice(place / name, name, None, None) for name in names])


def _is_slice_or_volume(name: str) -> bool:
    return medical_files.is_slice(name) or medical_files.is_nifti(name)


def _natural(name: str) -> tuple[list[str | int], str]:
    """Orders names by the numbers in them; what differs only in leading zeros by the text."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name
