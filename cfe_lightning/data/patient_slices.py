"""Several slices per patient and one label: a patient's slices are tiled into one square image.

The rest of the package sees images as usual. Source: DiffExplainer, sections 4.4, 7.1 and 7.2.
"""

from __future__ import annotations

import csv
import logging
import math
import os
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cfe_lightning import images, medical_files
from cfe_lightning.data.folder import Entry, assign_splits, choose_classes, read_split
from cfe_lightning.data.image_data import Augmentation, ImageData, Sample, Split, check_fractions
from cfe_lightning.data.image_files import LabelledImages, take_turns

_log = logging.getLogger(__name__)
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


class PatientSlices(ImageData):
    """Patients from a CSV with one row for each slice; a patient is one image, a montage of ``num_slices`` slices.

    The slices of a patient are ordered by the slice column, or by their paths as a person would (``2`` before ``10``),
    and tiled row by row. Validation and test take the slices at the quantiles (2k - 1) / (2S) of the stack. Training
    takes a random slice from every S-th part of it, others in every epoch; they depend on seed and epoch only. Whoever
    has fewer than S slices shows the nearest ones repeatedly.

    A patient is in one split only, by the CSV or by a hash of the name, so adding patients moves no other. The classes
    take turns in every split. The name of an image is the patient's.

    Pictures are read like those of a folder. DICOM files (``.dcm``) need pydicom, NIfTI volumes (``.nii``, ``.nii.gz``)
    nibabel. An axial slice of a volume is written ``volume.nii.gz#17`` (from 0 at the feet), or its index stands in the
    slice column.

    Args:
        root: The folder that relative paths start from.
        labels: The CSV file, as given or below ``root``.
        slice_size: Side of one slice in the montage, in pixels; the images' side is sqrt(S) times as much.
        num_slices: Slices per patient, S: 1, 4, 9, 16 or another square number.
        channels: 1 for grey, 3 for RGB.
        batch_size: Patients per batch and process.
        num_workers: Loader processes.
        patient_column: The CSV's column of patients.
        path_column: The CSV's column of files.
        label_column: The CSV's column of class names.
        slice_column: The CSV's column of places in the stack, numbers; used if there is one.
        split_column: The CSV's column of splits (train, val, test); used if there is one.
        class_names: The classes to read, in the order of the classifier's logits; None takes all, sorted as text.
        window: Level and width of the values shown of DICOM and NIfTI files, in the file's units: [-600, 1500] are
            lungs in Hounsfield units. None takes the smallest and the largest value of each slice.
        val_fraction: Share of the patients for validation where there is no such split.
        test_fraction: Share of the patients for testing where there is no such split.
        split_seed: Another seed splits otherwise.
        cache: Keep slices in memory after their first reading, where all of a split take less than 1 GiB.
        balanced: See ``ImageData``.
        horizontal_flip: See ``ImageData``; every slice is flipped in its place, all of a patient alike.
        vertical_flip: As ``horizontal_flip``, upside down.
        quarter_turns: As ``horizontal_flip``, rotated.

    Raises:
        FileNotFoundError: If the folder, the CSV or a file that it names does not exist.
        ValueError: If ``num_slices`` is no square number, the window has no width or nothing to apply to, or the CSV
            lacks columns or rows, names a slice twice, or gives a patient two labels or two splits.
    """

    def __init__(
        self,
        *,
        root: str,
        labels: str,
        slice_size: int,
        num_slices: int = 4,
        channels: int = 1,
        batch_size: int = 32,
        num_workers: int = 0,
        patient_column: str = "patient",
        path_column: str = "path",
        label_column: str = "label",
        slice_column: str = "slice",
        split_column: str = "split",
        class_names: list[str] | None = None,
        window: list[float] | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        cache: bool = True,
        balanced: bool = False,
        horizontal_flip: bool = False,
        vertical_flip: bool = False,
        quarter_turns: bool = False,
    ) -> None:
        super().__init__(
            image_size=images.montage_side(num_slices) * slice_size,
            channels=channels,
            batch_size=batch_size,
            num_workers=num_workers,
            balanced=balanced,
            horizontal_flip=horizontal_flip,
            vertical_flip=vertical_flip,
            quarter_turns=quarter_turns,
        )
        self.root = Path(root)
        self.slice_size = slice_size
        self.num_slices = num_slices
        self.cache = cache
        self.window = _check_window(window)
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"There is no folder {self.root}: set root to the folder that the paths start from."
            )
        check_fractions(val_fraction, test_fraction)
        columns = _Columns(patient_column, path_column, label_column, slice_column, split_column)
        patients = _read_patients(self.root, Path(labels), columns)
        if window is not None and not any(
            medical_files.is_medical(one.path) for p in patients.values() for one in p.slices
        ):
            raise ValueError(
                f"window is for DICOM and NIfTI files, but {labels} names none: leave window out, other pictures are "
                "read with the grey levels they have."
            )
        entries = [Entry(patient.name, patient.label, patient.split, None) for patient in patients.values()]
        self.class_names = choose_classes(entries, class_names, Path(labels))
        splits = assign_splits(entries, {"val": val_fraction, "test": test_fraction}, split_seed)
        members: dict[Split, list[Patient]] = {
            split: [patients[entry.name] for entry in chosen if entry.label in self.class_names]
            for split, chosen in splits.items()
        }
        self._warn_of_few([patient for chosen in members.values() for patient in chosen])
        self._datasets = {split: self._montages(split, chosen) for split, chosen in members.items()}

    def dataset(self, split: Split) -> PatientMontages:
        """The patients of one split.

        Raises:
            ValueError: If the split holds no patient.
        """
        if not len(self._datasets[split]):
            remedy = "there is nothing to train on" if split == "train" else f"add patients, or raise {split}_fraction"
            raise ValueError(f"The {split} split of {self.root} is empty: {remedy}.")
        return self._datasets[split]

    def _montages(self, split: Split, patients: list[Patient]) -> PatientMontages:
        label_indices = [self.class_names.index(patient.label) for patient in patients]
        order = take_turns(label_indices)
        stacks = [patients[i].slices for i in order]
        if split != "train":  # the other slices are never shown: they need no place in memory
            stacks = [[stack[i] for i in middle_slices(len(stack), self.num_slices)] for stack in stacks]
        return PatientMontages(
            names=[patients[i].name for i in order],
            labels=torch.tensor([label_indices[i] for i in order], dtype=torch.int64),
            stacks=stacks,
            num_slices=self.num_slices,
            slice_size=self.slice_size,
            channels=self.channels,
            window=self.window,
            num_copies=max(self.num_workers, 1) if self.cache else 0,
        )

    def _warn_of_few(self, patients: list[Patient]) -> None:
        counts = [len(patient.slices) for patient in patients if len(patient.slices) < self.num_slices]
        if counts:
            _log.warning(
                "%d of %d patients have fewer than %d slices (the fewest: %d), so some of theirs are shown repeatedly.",
                len(counts), len(patients), self.num_slices, min(counts),
            )  # fmt: skip


class PatientMontages(Dataset[Sample]):
    """One montage per patient: ``[index]`` shows the middle of every part of the stack, ``draw`` any slice of it.

    Args:
        names: The patients, [N].
        labels: Their classes, [N] int64.
        stacks: Their slices in order, [N] lists of any length above 0.
        num_slices: Slices in a montage, S.
        slice_size: Side of one slice, s.
        channels: 1 for grey, 3 for RGB.
        window: See ``medical_files.apply_window``.
        num_copies: See ``LabelledImages``.

    Attributes:
        names: As given.
        labels: As given; ``ImageData`` needs it for class-balanced drawing.
        stacks: As given.
    """

    def __init__(
        self,
        *,
        names: Sequence[str],
        labels: Tensor,
        stacks: Sequence[Sequence[Slice]],
        num_slices: int,
        slice_size: int,
        channels: int,
        window: tuple[float, float] | None = None,
        num_copies: int = 0,
    ) -> None:
        self.names = names
        self.labels = labels
        self.stacks = stacks
        self.num_slices = num_slices
        lengths = torch.tensor([len(stack) for stack in stacks], dtype=torch.int64)
        self._first = (lengths.cumsum(0) - lengths).tolist()
        self._slices = _SliceFiles(
            [one for stack in stacks for one in stack],
            labels.repeat_interleave(lengths),
            size=slice_size,
            channels=channels,
            window=window,
            num_copies=num_copies,
        )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        """Image [C, sqrt(S) s, sqrt(S) s], label and name."""
        return self._sample(index, self._read(index, middle_slices(len(self.stacks[index]), self.num_slices)))

    def draw(self, index: int, generator: torch.Generator, augmentation: Augmentation | None) -> Sample:
        """As ``[index]``, with random slices and with the same augmentation for all of them."""
        slices = self._read(index, draw_slices(len(self.stacks[index]), self.num_slices, generator))
        return self._sample(index, slices if augmentation is None else augmentation.apply(slices, generator))

    def _read(self, index: int, chosen: Sequence[int]) -> Tensor:
        """[S, C, s, s]."""
        return torch.stack([self._slices[self._first[index] + number]["image"] for number in chosen])

    def _sample(self, index: int, slices: Tensor) -> Sample:
        image = images.tile_montage(slices[None])[0]
        return {"image": image, "label": int(self.labels[index]), "name": self.names[index]}


class _SliceFiles(LabelledImages):
    """The slices of all patients, one after the other."""

    def __init__(
        self,
        files: Sequence[Slice],
        labels: Tensor,
        *,
        size: int,
        channels: int,
        window: tuple[float, float] | None,
        num_copies: int,
    ) -> None:
        names = [file.name for file in files]
        super().__init__(names, labels, image_size=size, channels=channels, num_copies=num_copies)
        self.files = files
        self.window = window

    def load(self, index: int) -> Tensor:
        file = self.files[index]
        try:
            if medical_files.is_dicom(file.path):
                image = medical_files.read_dicom(file.path, self.window)
            elif file.axial is not None:
                image = medical_files.read_nifti(file.path, file.axial, self.window)
            else:
                return images.read_image(file.path, self.channels, size=self.image_size)
        except images.UnreadableImageError as error:
            raise images.UnreadableImageError(
                f"The slice {file.name} ({file.path}) cannot be used ({str(error).rstrip('.')}): repair the file, or "
                "remove its row from the CSV."
            ) from error
        # Rounding of the resizing filter's weights may leave the range by one unit in the last place.
        return images.resize(image, self.image_size).clamp(-1.0, 1.0).expand(self.channels, -1, -1)


def middle_slices(num_found: int, num_slices: int) -> list[int]:
    """Which of the slices found lie at the quantiles (2k - 1) / (2S) of the stack, k = 1 ... S."""
    return [(2 * part + 1) * num_found // (2 * num_slices) for part in range(num_slices)]


def draw_slices(num_found: int, num_slices: int, generator: torch.Generator) -> list[int]:
    """One random slice from each of S equal parts of the stack; a part without any takes the nearest one.

    A slice belongs to the part that its middle lies in, so nobody with S slices or more shows one twice.
    """
    edges = [(2 * part * num_found + num_slices - 1) // (2 * num_slices) for part in range(num_slices + 1)]
    draws = torch.rand(num_slices, generator=generator).tolist()
    return [
        low + int(draw * (high - low)) if low < high else middle
        for low, high, draw, middle in zip(
            edges[:-1], edges[1:], draws, middle_slices(num_found, num_slices), strict=True
        )
    ]


class _Columns(NamedTuple):
    patient: str
    path: str
    label: str
    position: str
    split: str


def _read_patients(root: Path, labels: Path, columns: _Columns) -> dict[str, Patient]:
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


def _check_header(file: Path, header: Sequence[str], columns: _Columns) -> None:
    missing = [column for column in (columns.patient, columns.path, columns.label) if column not in header]
    if missing:
        raise ValueError(
            f"{file} has no column {' and no column '.join(map(repr, missing))} but {list(header)}: set "
            "patient_column, path_column and label_column to the columns of patients, files and classes (the separator "
            "must be a comma)."
        )


def _row_patient(row: dict[str, str], place: str, columns: _Columns, root: Path) -> Patient:
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


def _number(text: str, place: str, columns: _Columns) -> float:
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


def _check_same(known: Patient, patient: Patient, place: str, columns: _Columns) -> None:
    for column, before, now in (
        (columns.label, known.label, patient.label),
        (columns.split, known.split, patient.split),
    ):
        if before != now:
            raise ValueError(
                f"{place}: patient {patient.name!r} has {now!r} in the column {column!r}, but {before!r} in an earlier "
                "row: all rows of a patient need the same."
            )


def _sort(patient: Patient, file: Path, columns: _Columns) -> None:
    patient.slices.sort(key=lambda one: (one.position or 0.0, _natural(one.name)))
    for one, other in pairwise(patient.slices):
        if one.position is not None and one.position == other.position:
            raise ValueError(
                f"{file} gives {one.name!r} and {other.name!r} of patient {patient.name!r} the same number "
                f"{one.position:g} in the column {columns.position!r}: every slice of a patient needs its own."
            )


def _natural(name: str) -> tuple[list[str | int], str]:
    """Orders names by the numbers in them; what differs only in leading zeros by the text."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def _check_window(window: list[float] | None) -> tuple[float, float] | None:
    if window is None:
        return None
    if len(window) != 2 or not all(map(math.isfinite, window)) or window[1] <= 0:
        raise ValueError(
            f"window must be a level and a positive width in the files' units, as in [-600, 1500], got {window}."
        )
    return window[0], window[1]
