"""Patients without a CSV: their slices, and the order of DICOM slices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from medical import write_dicom, write_nifti

from cfe_lightning import images
from cfe_lightning.data.patient_slices import read_montage
from cfe_lightning.data.patient_table import Slice, find_patients, find_stack, in_order
from cfe_lightning.images import UnreadableImageError
from cfe_lightning.images.medical import slice_place

ACROSS_AND_DOWN = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]


def slices(*paths: Path) -> list[Slice]:
    return [Slice(path, path.name, None, None) for path in paths]


def write_ct(path: Path, height: float | None, value: int = 0) -> Path:
    tags = {"ImagePositionPatient": [-3.0, 5.0, height], "ImageOrientationPatient": ACROSS_AND_DOWN}
    write_dicom(path, np.full((4, 4), value, dtype=np.int16), **({} if height is None else tags))
    return path


def test_dicom_slices_lie_by_their_place_in_the_patient(tmp_path: Path) -> None:
    first, second, third = (write_ct(tmp_path / f"{i}.dcm", height) for i, height in enumerate((7.5, -2.0, 0.0)))
    assert slice_place(first) == 7.5
    assert [one.name for one in in_order(slices(first, second, third))] == ["1.dcm", "2.dcm", "0.dcm"]


def test_the_place_is_along_the_axis_of_the_scan(tmp_path: Path) -> None:
    """A coronal scan moves along y, whatever its z is."""
    tags = {"ImagePositionPatient": [0.0, 4.0, 9.0], "ImageOrientationPatient": [1.0, 0.0, 0.0, 0.0, 0.0, -1.0]}
    write_dicom(tmp_path / "a.dcm", np.zeros((4, 4), dtype=np.int16), **tags)
    assert slice_place(tmp_path / "a.dcm") == 4.0


def test_one_slice_without_a_place_leaves_all_to_their_names(tmp_path: Path) -> None:
    named = slices(write_ct(tmp_path / "10.dcm", -5.0), write_ct(tmp_path / "9.dcm", 5.0))
    assert [one.name for one in in_order(named)] == ["10.dcm", "9.dcm"]
    named.append(*slices(write_ct(tmp_path / "2.dcm", None)))
    assert [one.name for one in in_order(named)] == ["2.dcm", "9.dcm", "10.dcm"]
    (tmp_path / "1.dcm").write_bytes(b"broken")
    assert slice_place(tmp_path / "1.dcm") is None


def test_every_folder_of_slices_and_every_volume_is_a_patient(tmp_path: Path) -> None:
    picture = torch.zeros(1, 4, 4)
    for name in ("b/2.png", "b/10.png", "a/deep/1.png", "a/deep/deeper/1.png", ".hidden/1.png"):
        images.save_image(picture, tmp_path / name)
    write_nifti(tmp_path / "c.nii.gz", np.zeros((4, 4, 3), dtype=np.int16))
    (tmp_path / "b" / "notes.txt").write_text("")
    (tmp_path / "empty").mkdir()

    # Patients and their slices.
    assert list(find_patients(tmp_path)) == ["a/deep", "a/deep/deeper", "b", "c.nii.gz"]
    assert [one.name for one in find_stack(tmp_path / "b")] == ["2.png", "10.png"]
    assert [one.axial for one in find_stack(tmp_path / "c.nii.gz")] == [0, 1, 2]

    # Refusals.
    with pytest.raises(UnreadableImageError, match="holds no slices"):
        find_stack(tmp_path / "empty")
    with pytest.raises(UnreadableImageError, match="No such file"):
        find_stack(tmp_path / "gone")
    images.save_image(picture, tmp_path / "loose.png")
    with pytest.raises(ValueError, match="give the folder that holds one folder for each patient"):
        list(find_patients(tmp_path))


def test_a_montage_shows_the_middle_of_every_part(tmp_path: Path) -> None:
    for height in range(8):
        write_ct(tmp_path / f"{7 - height}.dcm", float(height), value=height)
    montage = read_montage(tmp_path, num_slices=4, image_size=8, channels=1, window=(4.0, 8.0))
    seen = images.cut_montage(montage[None], 4)[0, :, 0, 1, 1]
    torch.testing.assert_close(seen, (torch.tensor([1.0, 3.0, 5.0, 7.0]) - 4) / 4)
    (tmp_path / "7.dcm").write_bytes(b"broken")
    (tmp_path / "6.dcm").write_bytes(b"broken")
    with pytest.raises(UnreadableImageError, match=r"^[67]\.dcm: Not a readable DICOM file"):
        read_montage(tmp_path, num_slices=4, image_size=8, channels=1)
