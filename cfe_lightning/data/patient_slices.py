"""Several slices per patient and one label: a patient's slices are tiled into one square image.

The rest of the package sees images as usual. See docs/methods/diff_explainer.md, "Several slices of a patient".
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cfe_lightning import images
from cfe_lightning.data.base import Augmentation, Sample, Split, check_fractions
from cfe_lightning.data.files import FileData, LabelledImages, take_turns
from cfe_lightning.data.folder import Entry, assign_splits, choose_classes
from cfe_lightning.data.patient_table import Patient, Slice, SliceColumns, find_stack, read_patients
from cfe_lightning.images import medical

_log = logging.getLogger(__name__)


class PatientSlices(FileData):
    """Patients from a CSV with one row for each slice; a patient is one image, a montage of ``num_slices`` slices.

    The slices of a patient are ordered by the slice column. Without one, DICOM files are ordered by their position in
    the patient, and others by their paths with numbers as numbers (``2`` before ``10``). They are tiled row by row.
    Validation and test show the slices at the quantiles (2k - 1) / (2S) of the stack. Training shows a random slice
    from each of S equal parts of it, which changes with the epoch and depends on seed and epoch only. For a patient
    with fewer than S slices the nearest ones are repeated. Flips and turns change all slices alike, each in its place.

    A patient is in one split only, by the CSV or by a hash of the name, so added patients move no other. The classes
    take turns in every split. The name of an image is the patient's.

    Pictures are read like those of a folder. DICOM files (``.dcm``) need pydicom, NIfTI volumes (``.nii``, ``.nii.gz``)
    nibabel. An axial slice of a volume is written ``volume.nii.gz#17`` (from 0 at the feet), or its index stands in the
    slice column. Without a ``cache_folder`` each slice of a compressed volume is read with all of it.

    Args:
        root: Folder that relative paths start from.
        labels: CSV file, as given or below ``root``.
        slice_size: Side of one slice in the montage in pixels; the side of the image is sqrt(S) times as large.
        num_slices: Slices per patient, S: 1, 4, 9, 16 or another square number.
        channels: 1 for grey, 3 for RGB.
        patient_column: CSV column of patients.
        path_column: CSV column of files.
        label_column: CSV column of class names.
        slice_column: CSV column of numbers that order the slices; used if the file has it.
        split_column: CSV column of splits (train, val, test); used if the file has it.
        class_names: Classes to read, in the order of the classifier's logits; None takes all, sorted as text.
        window: Level and width of the shown values of DICOM and NIfTI files, in the file's units: [-600, 1500] shows
            lungs in Hounsfield units. None shows the range from the smallest to the largest value of each slice.
        val_fraction: Share of the patients for validation if the CSV has no such split.
        test_fraction: Share of the patients for testing if the CSV has no such split.
        split_seed: Seed of the random split; another seed gives another split.
        loading: Options of ``FileData`` and ``ImageData``, except ``skip_unreadable`` and ``image_size``.

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
        **loading: Any,
    ) -> None:
        image_size = images.montage_side(num_slices) * slice_size
        # skip_unreadable is no option here: leaving a slice out would change the patient's image.
        super().__init__(image_size=image_size, channels=channels, skip_unreadable=False, **loading)
        self.root = Path(root)
        self.slice_size = slice_size
        self.num_slices = num_slices
        self.window = medical.check_window(window)
        if not self.root.is_dir():
            raise FileNotFoundError(f"There is no folder {self.root}: set root to the folder that paths start from.")
        check_fractions(val_fraction, test_fraction)

        # Patients.
        columns = SliceColumns(patient_column, path_column, label_column, slice_column, split_column)
        patients = read_patients(self.root, Path(labels), columns)
        paths = [one.path for patient in patients.values() for one in patient.slices]
        if window is not None and not any(map(medical.is_medical, paths)):
            raise ValueError(
                f"window is for DICOM and NIfTI files, but {labels} names none: leave window out, other pictures are "
                "read with the grey levels they have."
            )

        # Classes and splits.
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
        """Returns the patients of one split."""
        if not len(self._datasets[split]):
            remedy = "there is nothing to train on" if split == "train" else f"add patients, or raise {split}_fraction"
            raise ValueError(f"The {split} split of {self.root} is empty: {remedy}.")
        return self._datasets[split]

    def _montages(self, split: Split, patients: list[Patient]) -> PatientMontages:
        """Returns patients as montages; the classes take turns."""
        label_indices = [self.class_names.index(patient.label) for patient in patients]
        order = take_turns(label_indices)
        stacks = [patients[i].slices for i in order]
        if split != "train":
            # The other slices are never shown, so they take no place in memory.
            stacks = [[stack[i] for i in middle_slices(len(stack), self.num_slices)] for stack in stacks]
        return PatientMontages(
            names=[patients[i].name for i in order],
            labels=torch.tensor([label_indices[i] for i in order], dtype=torch.int64),
            stacks=stacks,
            num_slices=self.num_slices,
            image_size=self.slice_size,
            channels=self.channels,
            window=self.window,
            num_copies=self.num_copies,
            image_cache=self.image_cache,
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
        names: Names of the patients, [N].
        labels: Class of each patient, [N] int64; ``ImageData`` needs them for class-balanced drawing.
        stacks: Slices of each patient in order, [N] lists of any length above 0.
        num_slices: Slices in a montage, S.
        options: Options of ``LabelledImages`` for the slices, of side s, and ``window``: level and width of the shown
            values of DICOM and NIfTI files, or None.
    """

    def __init__(
        self,
        *,
        names: Sequence[str],
        labels: Tensor,
        stacks: Sequence[Sequence[Slice]],
        num_slices: int,
        **options: Any,
    ) -> None:
        self.names = names
        self.labels = labels
        self.stacks = stacks
        self.num_slices = num_slices
        # All slices in one data set, and the index of each patient's first one.
        lengths = torch.tensor([len(stack) for stack in stacks], dtype=torch.int64)
        self._first = (lengths.cumsum(0) - lengths).tolist()
        slices = [one for stack in stacks for one in stack]
        self._slices = _SliceFiles(slices, labels.repeat_interleave(lengths), **options)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        """Returns image [C, sqrt(S) s, sqrt(S) s], label and name."""
        return self._sample(index, self._read(index, middle_slices(len(self.stacks[index]), self.num_slices)))

    def draw(self, index: int, generator: torch.Generator, augmentation: Augmentation | None) -> Sample:
        """Returns a sample with random slices, all augmented alike."""
        slices = self._read(index, draw_slices(len(self.stacks[index]), self.num_slices, generator))
        return self._sample(index, slices if augmentation is None else augmentation.apply(slices, generator))

    def _read(self, index: int, chosen: Sequence[int]) -> Tensor:
        """Returns the slices with these places in the patient's stack, [S, C, s, s]."""
        return torch.stack([self._slices[self._first[index] + number]["image"] for number in chosen])

    def _sample(self, index: int, slices: Tensor) -> Sample:
        image = images.tile_montage(slices[None])[0]
        return {"image": image, "label": int(self.labels[index]), "name": self.names[index]}


class _SliceFiles(LabelledImages):
    """Slices of all patients, one after the other; ``window`` is None, or level and width of the shown values."""

    def __init__(
        self, files: Sequence[Slice], labels: Tensor, *, window: tuple[float, float] | None, **options: Any
    ) -> None:
        super().__init__([file.name for file in files], labels, **options)
        self.files = files
        self.window = window

    def load(self, index: int) -> Tensor:
        file = self.files[index]
        return self._cached(file.path, f"slice {file.axial}, window {self.window}", lambda: self._read(file))

    def _read(self, file: Slice) -> Tensor:
        try:
            return medical.read_slice(
                file.path, self.channels, size=self.image_size, window=self.window, axial=file.axial
            )
        except images.UnreadableImageError as error:
            raise images.UnreadableImageError(
                f"The slice {file.name} ({file.path}) cannot be used ({str(error).rstrip('.')}): repair the file, or "
                "remove its row from the CSV."
            ) from error


def read_montage(
    place: Path, *, num_slices: int, image_size: int, channels: int, window: tuple[float, float] | None = None
) -> Tensor:
    """Reads a patient's folder of slices or NIfTI volume as a montage, [C, image_size, image_size] in [-1, 1].

    Args:
        place: Folder of slices, or volume.
        num_slices: Slices in the montage, S; they are those that validation and test show of a patient.
        image_size: Side of the montage in pixels.
        channels: 1 for grey, 3 for RGB.
        window: Level and width of the shown values of DICOM and NIfTI files; None shows the whole range of each slice.

    Raises:
        UnreadableImageError: If there is no slice, or a shown one cannot be read.
    """
    stack, slices = find_stack(place), []
    size = image_size // images.montage_side(num_slices)
    for one in [stack[index] for index in middle_slices(len(stack), num_slices)]:
        try:
            slices.append(medical.read_slice(one.path, channels, size=size, window=window, axial=one.axial))
        except images.UnreadableImageError as error:
            raise images.UnreadableImageError(f"{one.name}: {error}") from error
    return images.tile_montage(torch.stack(slices)[None])[0]


def middle_slices(num_found: int, num_slices: int) -> list[int]:
    """Returns the indices of the slices at the quantiles (2k - 1) / (2S) of the stack, k = 1 ... S."""
    return [(2 * part + 1) * num_found // (2 * num_slices) for part in range(num_slices)]


def draw_slices(num_found: int, num_slices: int, generator: torch.Generator) -> list[int]:
    """Draws the index of one slice from each of S equal parts of the stack; an empty part takes the nearest slice.

    A slice belongs to the part that contains its middle, so a stack of S slices or more shows none twice.
    """
    edges = [(2 * part * num_found + num_slices - 1) // (2 * num_slices) for part in range(num_slices + 1)]
    draws = torch.rand(num_slices, generator=generator).tolist()
    parts = zip(pairwise(edges), draws, middle_slices(num_found, num_slices), strict=True)
    return [low + int(draw * (high - low)) if low < high else middle for (low, high), draw, middle in parts]
