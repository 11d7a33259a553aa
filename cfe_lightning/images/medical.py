"""Reading of DICOM and NIfTI files into tensors: one grey slice at a time, with a window of values scaled to [-1, 1].

Both formats need extra packages (``pip install ".[medical]"``), imported when the first such file is read.
Slices are oriented as in a DICOM viewer: the patient's front is up, the patient's right is on the left.
"""

import contextlib
import importlib.metadata
import math
import os
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.images.reading import UnreadableImageError, beginning, unreadable

#: Packages that decide on the values read, with the decoders that pydicom looks for; Pillow is one of them, too.
_DICOM_READERS = (
    "pydicom", "pylibjpeg", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg", "pylibjpeg-rle", "pyjpegls", "python-gdcm",
)  # fmt: skip


def is_dicom(path: Path | str) -> bool:
    """Tells whether a file has the ending of a DICOM file, or the mark that DICOM files have at byte 128."""
    ends = str(path).lower().endswith((".dcm", ".dicom", ".ima"))
    return ends or (not _names_another_format(path) and beginning(path)[128:] == b"DICM")


def _names_another_format(path: Path | str) -> bool:
    # Spares opening each picture twice.
    return is_nifti(path) or os.path.splitext(path)[1].lower() in images.EXTENSIONS


def is_nifti(path: Path | str) -> bool:
    """Tells whether a name has the ending of a NIfTI volume."""
    return str(path).lower().endswith((".nii", ".nii.gz"))


def is_medical(path: Path | str) -> bool:
    """Tells whether a file is a DICOM file or a NIfTI volume."""
    return is_dicom(path) or is_nifti(path)


def reader_versions(path: Path | str) -> str:
    """Returns the versions of the installed packages that read a DICOM or NIfTI file; empty for other files."""
    return _versions(*_DICOM_READERS) if is_dicom(path) else _versions("nibabel") if is_nifti(path) else ""


def is_slice(path: Path | str) -> bool:
    """Tells whether a file may hold one slice, as a picture or a DICOM file."""
    return images.is_picture(path) or is_dicom(path)


@cache
def _versions(*packages: str) -> str:
    # Cached, because every look-up reads the disk.
    found = []
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return " ".join(found)


def read_slice(
    path: Path, channels: int, *, size: int, window: tuple[float, float] | None = None, axial: int | None = None
) -> Tensor:
    """Reads a picture, a DICOM file, or slice ``axial`` of a NIfTI volume, resized to [C, size, size] in [-1, 1].

    ``channels`` is 1 for grey or 3 for RGB; ``window`` is that of ``apply_window`` and does not apply to pictures.

    Raises:
        ModuleNotFoundError: If the format's package is missing.
        UnreadableImageError: If the file cannot be read.
    """
    if is_dicom(path):
        image = read_dicom(path, window)
    elif axial is not None:
        image = read_nifti(path, axial, window)
    else:
        return images.read_image(path, channels, size=size)
    # Rounded weights of the resizing filter may leave the range by one unit in the last place.
    return images.resize(image, size).clamp(-1.0, 1.0).expand(channels, -1, -1)


def slice_place(path: Path) -> float | None:
    """Returns the position of a DICOM slice along the axis of its scan, in mm; None if the file does not give it."""
    pydicom = _package("pydicom", path)
    try:
        tags = ["ImagePositionPatient", "ImageOrientationPatient"]
        file = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
        across, down = np.array(file.ImageOrientationPatient, dtype=float).reshape(2, 3)
        return float(np.cross(across, down) @ np.array(file.ImagePositionPatient, dtype=float))
    # A broken file is reported when its pixels are read.
    except Exception:
        return None


def count_slices(path: Path) -> int:
    """Counts the axial slices of a NIfTI volume.

    Raises:
        ModuleNotFoundError: If nibabel is missing.
        UnreadableImageError: If the file is broken.
    """
    volume, axis, _ = _open_volume(path)
    return int(volume.shape[axis])


def read_dicom(path: Path, window: tuple[float, float] | None = None) -> Tensor:
    """Reads one grey image from a DICOM file, [1, H, W] in [-1, 1], with its slope and intercept applied.

    ``window`` is that of ``apply_window`` in the file's units (Hounsfield units for CT).

    Raises:
        ModuleNotFoundError: If pydicom is missing.
        UnreadableImageError: If the file is broken, or no single grey image. The message does not repeat the path.
    """
    pydicom, pixels = _package("pydicom", path), _package("pydicom.pixels", path)
    try:
        file = pydicom.dcmread(path)
        photometric = str(file.PhotometricInterpretation)
        values = pixels.apply_modality_lut(file.pixel_array, file)
    # pydicom and its decoders raise nearly anything on broken files.
    except Exception as error:
        raise unreadable("DICOM file", error) from error
    if values.ndim != 2 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise UnreadableImageError(
            f"The DICOM file holds {photometric} pixels of the shape {list(values.shape)}, but one grey image is "
            "needed."
        )
    image = apply_window(values, window)
    # MONOCHROME1 displays low values as bright.
    return -image if photometric == "MONOCHROME1" else image


def read_nifti(path: Path, index: int, window: tuple[float, float] | None = None) -> Tensor:
    """Reads an axial slice of a NIfTI volume [X, Y, Z] or [X, Y, Z, 1] in any orientation, [1, H, W] in [-1, 1].

    ``index`` counts from 0 at the patient's feet (Z of the volume in RAS orientation); ``window`` is that of
    ``apply_window``. Of an uncompressed ``.nii`` only the slice is read; a ``.nii.gz`` is decompressed up to the slice
    every time.

    Raises:
        ModuleNotFoundError: If nibabel is missing.
        UnreadableImageError: If the file is broken, no single volume, or has no such slice. The message does not repeat
            the path.
    """
    volume, axis, orientation = _open_volume(path)
    shape = volume.shape
    if not 0 <= index < shape[axis]:
        raise UnreadableImageError(
            f"Slice {index} was asked for, but the volume has {shape[axis]} axial slices, 0 to {shape[axis] - 1}."
        )
    # Cut out the slice before turning the volume, so that the others are not read.
    stored = index if orientation[axis, 1] > 0 else shape[axis] - 1 - index
    cut = [slice(stored, stored + 1) if i == axis else slice(None) for i in range(3)] + [0] * (len(shape) - 3)
    try:
        part = _package("nibabel", path).apply_orientation(np.asanyarray(volume.dataobj[tuple(cut)]), orientation)
    except Exception as error:
        raise unreadable("NIfTI file", error) from error
    # From [X to the right, Y to the front] to [down from the front, from the patient's right].
    return apply_window(part[::-1, ::-1, 0].T, window)


def _open_volume(path: Path) -> tuple[Any, int, np.ndarray]:
    """Opens a volume without reading its values: the volume, its axis from feet to head, and its orientation [3, 2]."""
    nibabel = _package("nibabel", path)
    try:
        volume: Any = nibabel.load(path)
        shape = volume.shape
        orientation = nibabel.io_orientation(volume.affine)
        axis = orientation[:, 0].tolist().index(2)
    except Exception as error:
        raise unreadable("NIfTI file", error) from error
    if len(shape) < 3 or any(size != 1 for size in shape[3:]):
        raise UnreadableImageError(f"The NIfTI file has the shape {list(shape)}, but one volume [X, Y, Z] is needed.")
    return volume, axis, orientation


def _package(name: str, path: Path) -> Any:
    """Imports the package that reads a file, or says how to install it."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        package, _, _ = name.partition(".")
        raise ModuleNotFoundError(
            f"{path} can be read only with the package {package}: pip install {package}."
        ) from error


def check_window(window: Sequence[float] | None) -> tuple[float, float] | None:
    """Returns level and width of a window as a pair, or None.

    Raises:
        ValueError: If they are not two finite numbers with a positive width.
    """
    if window is None:
        return None
    if len(window) != 2 or not all(map(math.isfinite, window)) or window[1] <= 0:
        raise ValueError(
            f"window must be a level and a positive width in the files' units, as in [-600, 1500], got {window}."
        )
    return window[0], window[1]


def apply_window(values: np.ndarray, window: tuple[float, float] | None) -> Tensor:
    """Clips values [H, W] in any units to a window and scales it to [-1, 1], [1, H, W].

    A window is a level (its middle) and a width; None takes the smallest and the largest finite value. The result is -1
    where a value is not a number, and everywhere if ``window`` is None and all values are equal.
    """
    values = values.astype(np.float64)
    if window is None:
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    else:
        level, width = window
        low, high = level - width / 2, level + width / 2
    clipped = np.nan_to_num(values, nan=low).clip(low, high)
    scaled = (clipped - low) / max(high - low, np.finfo(np.float64).tiny) * 2 - 1
    return torch.from_numpy(np.ascontiguousarray(scaled, dtype=np.float32))[None]
