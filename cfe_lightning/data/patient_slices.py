"""Several slices per patient and one label: a patient's slices are tiled into one square image.

The rest of the package sees images as usual. Source: DiffExplainer, sections 4.4, 7.1 and 7.2.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cfe_lightning import images
from cfe_lightning.data.base import Augmentation, ImageData, Sample, Split, check_fractions
from cfe_lightning.data.cache import ImageCache
from cfe_lightning.data.files import LabelledImages, take_turns
from cfe_lightning.data.folder import Entry, assign_splits, choose_classes
from cfe_lightning.data.patient_table import CsvColumns, Patient, Slice, find_stack, read_patients
from cfe_lightning.images import medical as medical_files

_log = logging.getLogger(__name__)


class PatientSlices(ImageData):
    """Patients from a CSV with one row for each slice; a patient is one image, a montage of ``num_slices`` slices.

    The slices of a patient are ordered by the slice column; without one DICOM files by their place in the patient, and
    others by their paths as a person would (``2`` before ``10``). They are tiled row by row. Validation and test take
    the slices at the quantiles (2k - 1) / (2S) of the stack. Training takes a random slice from every S-th part of it,
    others in every epoch; they depend on seed and epoch only. Whoever has fewer than S slices shows the nearest ones
    repeatedly.

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
        cache_folder: As in ``ImageFolder``, for slices: one of a compressed volume is otherwise read with all of it.
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
        cache_folder: str | None = None,
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
        self.image_cache = None if cache_folder is None else ImageCache(Path(cache_folder))
        self.window = medical_files.check_window(window)
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"There is no folder {self.root}: set root to the folder that the paths start from."
            )
        check_fractions(val_fraction, test_fraction)
        columns = CsvColumns(patient_column, path_column, label_column, slice_column, split_column)
        patients = read_patients(self.root, Path(labels), columns)
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
        names: The patients, [N].
        labels: Their classes, [N] int64.
        stacks: Their slices in order, [N] lists of any length above 0.
        num_slices: Slices in a montage, S.
        slice_size: Side of one slice, s.
        channels: 1 for grey, 3 for RGB.
        window: See ``medical_files.apply_window``.
        num_copies: See ``LabelledImages``.
        image_cache: See ``LabelledImages``.

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
        image_cache: ImageCache | None = None,
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
            image_cache=image_cache,
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
        image_cache: ImageCache | None,
    ) -> None:
        names = [file.name for file in files]
        super().__init__(
            names, labels, image_size=size, channels=channels, num_copies=num_copies, image_cache=image_cache
        )
        self.files = files
        self.window = window

    def load(self, index: int) -> Tensor:
        file = self.files[index]
        return self._cached(file.path, f"slice {file.axial}, window {self.window}", lambda: self._read(file))

    def _read(self, file: Slice) -> Tensor:
        try:
            return medical_files.read_slice(
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
    """The montage of one patient who stands in no CSV: a folder of slices, or a NIfTI volume.

    Args:
        place: The folder or the volume.
        num_slices: S; the slices are those that validation and test show of a patient.
        image_size: Side of the montage.
        channels: 1 for grey, 3 for RGB.
        window: See ``medical_files.apply_window``.

    Returns:
        [C, image_size, image_size] in [-1, 1].

    Raises:
        UnreadableImageError: If there is no slice, or one that is shown cannot be read.
    """
    stack = find_stack(place)
    slices = []
    for index in middle_slices(len(stack), num_slices):
        one = stack[index]
        try:
            size = image_size // images.montage_side(num_slices)
            slices.append(medical_files.read_slice(one.path, channels, size=size, window=window, axial=one.axial))
        except images.UnreadableImageError as error:
            raise images.UnreadableImageError(f"{one.name}: {error}") from error
    return images.tile_montage(torch.stack(slices)[None])[0]


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
