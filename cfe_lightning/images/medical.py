"""The door between DICOM and NIfTI files and tensors: one grey slice at a time, its values windowed to [-1, 1].

Both formats need packages of their own (``pip install cfe-lightning[medical]``), which are imported when the first such
file is read. Slices lie as a DICOM viewer shows them: the patient's front is up, the patient's right is on the left.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.images.reading import UnreadableImageError

DICOM_ENDING = ".dcm"
NIFTI_ENDINGS = (".nii", ".nii.gz")
#: Packages that read the files, the decoders that pydicom looks for included; Pillow is one of them, too.
_DICOM_READERS = (
    "pydicom",
    "pylibjpeg",
    "pylibjpeg-libjpeg",
    "pylibjpeg-openjpeg",
    "pylibjpeg-rle",
    "pyjpegls",
    "python-gdcm",
)
_NIFTI_READERS = ("nibabel",)


def is_dicom(path: Path | str) -> bool:
    """Whether the name is that of a DICOM file."""
    return str(path).lower().endswith(DICOM_ENDING)


def is_nifti(path: Path | str) -> bool:
    """Whether the name is that of a NIfTI volume."""
    return str(path).lower().endswith(NIFTI_ENDINGS)


def is_medical(path: Path | str) -> bool:
    """Whether the name is that of one or the other."""
    return is_dicom(path) or is_nifti(path)


def reader_versions(path: Path | str) -> str:
    """Versions of the installed packages that decide on the values in a DICOM or NIfTI file; empty for other files."""
    return _versions(*_DICOM_READERS) if is_dicom(path) else _versions(*_NIFTI_READERS) if is_nifti(path) else ""


def is_slice(name: str) -> bool:
    """Whether a file of this name may hold one slice: a picture or a DICOM file."""
    return images.is_picture(name) or is_dicom(name)


def read_slice(
    path: Path, channels: int, *, size: int, window: tuple[float, float] | None = None, axial: int | None = None
) -> Tensor:
    """Reads one slice of whatever format: a picture, a DICOM file, or an axial slice of a volume.

    Args:
        path: The file.
        channels: 1 for grey, 3 for RGB.
        size: Side of the result.
        window: See ``apply_window``; pictures have no units and are read as they are.
        axial: Which slice of a volume.

    Returns:
        [C, size, size] in [-1, 1].

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
    # Rounding of the resizing filter's weights may leave the range by one unit in the last place.
    return images.resize(image, size).clamp(-1.0, 1.0).expand(channels, -1, -1)


def slice_place(path: Path) -> float | None:
    """Where a DICOM slice lies along the axis it was scanned, in mm; None if the file does not say."""
    try:
        import pydicom
    except ModuleNotFoundError as error:
        raise _missing("pydicom", path) from error
    try:
        tags = ["ImagePositionPatient", "ImageOrientationPatient"]
        file = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
        across, down = np.array(file.ImageOrientationPatient, dtype=float).reshape(2, 3)
        return float(np.cross(across, down) @ np.array(file.ImagePositionPatient, dtype=float))
    # A file that is broken is told when it is read.
    except Exception:
        return None


def count_slices(path: Path) -> int:
    """The number of axial slices of a NIfTI volume.

    Raises:
        ModuleNotFoundError: If nibabel is missing.
        UnreadableImageError: If the file is broken.
    """
    volume, axis, _ = _open_volume(path)
    return int(volume.shape[axis])


def read_dicom(path: Path, window: tuple[float, float] | None = None) -> Tensor:
    """Reads a DICOM file of one grey image; its slope and intercept are applied, MONOCHROME1 is inverted.

    Args:
        path: The file.
        window: Level and width in the file's units (Hounsfield units for CT), see ``apply_window``.

    Returns:
        The slice, [1, H, W] in [-1, 1].

    Raises:
        ModuleNotFoundError: If pydicom is missing.
        UnreadableImageError: If the file is broken, or no single grey image. The message does not repeat the path.
    """
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut
    except ModuleNotFoundError as error:
        raise _missing("pydicom", path) from error
    try:
        file = pydicom.dcmread(path)
        photometric = str(file.PhotometricInterpretation)
        values = apply_modality_lut(file.pixel_array, file)
    # pydicom and the decoders it finds raise nearly anything on broken files.
    except Exception as error:
        raise _unreadable("DICOM", error) from error
    if values.ndim != 2 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise UnreadableImageError(
            f"The DICOM file holds {photometric} pixels of the shape {list(values.shape)}, but one grey image is "
            "needed."
        )
    image = apply_window(values, window)
    # MONOCHROME1 shows low values bright.
    return -image if photometric == "MONOCHROME1" else image


def read_nifti(path: Path, index: int, window: tuple[float, float] | None = None) -> Tensor:
    """Reads one axial slice of a NIfTI volume, stored in whatever orientation.

    Of an unpacked ``.nii`` only the slice itself is read; a ``.nii.gz`` has to be unpacked up to it every time.

    Args:
        path: The volume, [X, Y, Z] or [X, Y, Z, 1].
        index: Which slice, counted from 0 at the patient's feet (Z of the volume in RAS orientation).
        window: Level and width in the file's units, see ``apply_window``.

    Returns:
        The slice, [1, H, W] in [-1, 1].

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
    # The one slice is cut out before the volume is turned, so that the others need not be read.
    stored = index if orientation[axis, 1] > 0 else shape[axis] - 1 - index
    cut = [slice(stored, stored + 1) if i == axis else slice(None) for i in range(3)] + [0] * (len(shape) - 3)
    import nibabel

    try:
        part = nibabel.apply_orientation(np.asanyarray(volume.dataobj[tuple(cut)]), orientation)
    except Exception as error:
        raise _unreadable("NIfTI", error) from error
    # [X to the right, Y to the front] becomes [down from the front, from the patient's right].
    return apply_window(part[::-1, ::-1, 0].T, window)


def _open_volume(path: Path) -> tuple[Any, int, np.ndarray]:
    """A volume whose values are not read yet, which of its axes is the body's, and how all lie in the body."""
    try:
        import nibabel
    except ModuleNotFoundError as error:
        raise _missing("nibabel", path) from error
    try:
        volume: Any = nibabel.load(path)
        shape = volume.shape
        orientation = nibabel.io_orientation(volume.affine)
        axis = orientation[:, 0].tolist().index(2)
    except Exception as error:
        raise _unreadable("NIfTI", error) from error
    if len(shape) < 3 or any(size != 1 for size in shape[3:]):
        raise UnreadableImageError(f"The NIfTI file has the shape {list(shape)}, but one volume [X, Y, Z] is needed.")
    return volume, axis, orientation


def check_window(window: Sequence[float] | None) -> tuple[float, float] | None:
    """Level and width as the readers take them.

    Raises:
        ValueError: If these are not two finite numbers, the width positive.
    """
    if window is None:
        return None
    if len(window) != 2 or not all(map(math.isfinite, window)) or window[1] <= 0:
        raise ValueError(
            f"window must be a level and a positive width in the files' units, as in [-600, 1500], got {window}."
        )
    return window[0], window[1]


def apply_window(values: np.ndarray, window: tuple[float, float] | None) -> Tensor:
    """Clips values to a window and scales it to [-1, 1].

    Args:
        values: [H, W] in any units.
        window: Level (the middle) and width; None takes the smallest and the largest finite value.

    Returns:
        [1, H, W] in [-1, 1]; -1 where the value is not a number, and everywhere if None meets a slice of one value.
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


@cache
def _versions(*packages: str) -> str:
    """Of those that are installed; asked once, because they are looked up on the disk."""
    found = []
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return " ".join(found)


def _missing(package: str, path: Path) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"{path} can be read only with the package {package}: pip install {package}.")


def _unreadable(kind: str, error: Exception) -> UnreadableImageError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return UnreadableImageError(f"Not a readable {kind} file: {' '.join(reason.split()) or type(error).__name__}")
