"""Small DICOM and NIfTI files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest


def write_dicom(path: Path, pixels: np.ndarray, **tags: Any) -> None:
    """[H, W] integers (or [N, H, W], [H, W, 3] with the tags that say so) as an uncompressed DICOM file."""
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    file = pydicom.dataset.Dataset()
    file.file_meta = meta
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    defaults = {
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 8 * pixels.itemsize,
        "BitsStored": 8 * pixels.itemsize,
        "HighBit": 8 * pixels.itemsize - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
    }
    for tag, value in (defaults | tags).items():
        setattr(file, tag, value)
    file.PixelData = pixels.tobytes()
    pydicom.dcmwrite(path, file, enforce_file_format=True)


def write_nifti(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> None:
    nibabel = pytest.importorskip("nibabel")
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), path)
