"""Medical files are read with the right units, windows and orientations, or refused in one sentence."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from medical import write_dicom, write_nifti

from cfe_lightning.images import UnreadableImageError
from cfe_lightning.images import medical as medical_files
from cfe_lightning.images.medical import (
    apply_window,
    is_dicom,
    is_medical,
    is_nifti,
    read_dicom,
    read_nifti,
)

RNG = np.random.default_rng(0)
CT = RNG.integers(-1000, 1000, (5, 7)).astype(np.int16)


def windowed(values: np.ndarray, level: float, width: float) -> torch.Tensor:
    return torch.from_numpy(((values - level) / (width / 2)).clip(-1, 1).astype(np.float32))[None]


@pytest.mark.parametrize(
    ("name", "dicom", "nifti"),
    [
        ("a.dcm", True, False),
        ("A.DCM", True, False),
        ("a.nii", False, True),
        ("a.NII.gz", False, True),
        ("a.gz", False, False),
        ("dcm.png", False, False),
    ],
)
def test_names_tell_the_format(name: str, dicom: bool, nifti: bool) -> None:
    assert (is_dicom(Path(name)), is_nifti(Path(name))) == (dicom, nifti)
    assert is_medical(Path(name)) == (dicom or nifti)


class TestWindow:
    def test_lungs(self) -> None:
        # Level -600, width 1500: from -1350 (and air outside the body) to 150 (and bone).
        image = apply_window(np.array([[-3000, -1350, -975, -600, 150, 900]]), (-600, 1500))
        assert image.shape == (1, 1, 6)
        assert image.dtype == torch.float32
        torch.testing.assert_close(image, torch.tensor([[[-1.0, -1.0, -0.5, 0.0, 1.0, 1.0]]]))

    def test_none_takes_the_range_of_the_slice(self) -> None:
        torch.testing.assert_close(apply_window(np.array([[3, 4, 7]]), None), torch.tensor([[[-1.0, -0.5, 1.0]]]))

    def test_a_slice_of_one_value_is_black(self) -> None:
        assert apply_window(np.full((2, 2), 7), None).tolist() == [[[-1, -1], [-1, -1]]]

    @pytest.mark.parametrize("window", [None, (0.5, 1.0)])
    def test_what_is_not_finite_takes_the_nearest_end(self, window: tuple[float, float] | None) -> None:
        image = apply_window(np.array([[np.nan, -np.inf, 0, 1, np.inf]]), window)
        assert image.tolist() == [[[-1, -1, -1, 1, 1]]]

    def test_nothing_finite_is_black(self) -> None:
        assert apply_window(np.full((1, 2), np.nan), None).tolist() == [[[-1, -1]]]


class TestDicom:
    def test_values_are_rescaled_then_windowed(self, tmp_path: Path) -> None:
        write_dicom(tmp_path / "a.dcm", (CT + 1000).astype(np.uint16), RescaleSlope=2, RescaleIntercept=-2000)
        image = read_dicom(tmp_path / "a.dcm", (-600, 1500))
        assert image.shape == (1, 5, 7)
        torch.testing.assert_close(image, windowed(CT * 2.0, -600, 1500))

    def test_values_without_a_scale_are_as_stored(self, tmp_path: Path) -> None:
        write_dicom(tmp_path / "a.dcm", CT)
        torch.testing.assert_close(read_dicom(tmp_path / "a.dcm", (40, 800)), windowed(CT, 40, 800))

    def test_no_window(self, tmp_path: Path) -> None:
        write_dicom(tmp_path / "a.dcm", CT)
        image = read_dicom(tmp_path / "a.dcm")
        middle, width = (int(CT.max()) + int(CT.min())) / 2, int(CT.max()) - int(CT.min())
        torch.testing.assert_close(image, windowed(CT, middle, width))

    @pytest.mark.parametrize("window", [None, (40.0, 800.0)])
    def test_monochrome1_is_inverted(self, tmp_path: Path, window: tuple[float, float] | None) -> None:
        write_dicom(tmp_path / "a.dcm", CT)
        write_dicom(tmp_path / "b.dcm", CT, PhotometricInterpretation="MONOCHROME1")
        assert torch.equal(read_dicom(tmp_path / "b.dcm", window), -read_dicom(tmp_path / "a.dcm", window))

    def test_colours_and_many_frames_are_refused(self, tmp_path: Path) -> None:
        colours = np.zeros((5, 7, 3), dtype=np.uint8)
        tags = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
        write_dicom(tmp_path / "a.dcm", colours, **tags)
        frames = np.zeros((2, 5, 7), dtype=np.uint8)
        write_dicom(tmp_path / "b.dcm", frames, Rows=5, Columns=7, NumberOfFrames=2)
        for name, words in (("a.dcm", "RGB pixels of the shape [5, 7, 3]"), ("b.dcm", "of the shape [2, 5, 7]")):
            with pytest.raises(UnreadableImageError, match=re.escape(words) + ", but one grey image is needed"):
                read_dicom(tmp_path / name)

    def test_a_broken_file(self, tmp_path: Path) -> None:
        pytest.importorskip("pydicom")
        (tmp_path / "a.dcm").write_bytes(b"no dicom")
        with pytest.raises(UnreadableImageError, match=r"^Not a readable DICOM file: File is missing DICOM File Meta"):
            read_dicom(tmp_path / "a.dcm")
        with pytest.raises(UnreadableImageError, match=r"^Not a readable DICOM file: No such file or directory$"):
            read_dicom(tmp_path / "b.dcm")

    def test_a_truncated_file(self, tmp_path: Path) -> None:
        write_dicom(tmp_path / "a.dcm", CT)
        (tmp_path / "a.dcm").write_bytes((tmp_path / "a.dcm").read_bytes()[:-20])
        with pytest.raises(UnreadableImageError, match=r"^Not a readable DICOM file: "):
            read_dicom(tmp_path / "a.dcm")

    def test_without_pydicom(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pydicom", None)
        with pytest.raises(
            ModuleNotFoundError, match=r"a.dcm can be read only with the package pydicom: pip install pydicom\.$"
        ):
            read_dicom(tmp_path / "a.dcm")


class TestNifti:
    #: [X to the right, Y to the front, Z to the head].
    VOLUME = RNG.normal(size=(4, 5, 6)).astype(np.float32)

    @staticmethod
    def as_shown(volume: np.ndarray, z: int) -> torch.Tensor:
        """Returns a slice from the front down and from the patient's right to the left, with the window [-4, 4]."""
        return windowed(volume[::-1, ::-1, z].T, 0, 8)

    @pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
    def test_an_axial_slice_as_a_viewer_shows_it(self, tmp_path: Path, ending: str) -> None:
        write_nifti(tmp_path / f"a{ending}", self.VOLUME)
        for z in range(6):
            image = read_nifti(tmp_path / f"a{ending}", z, (0, 8))
            assert image.shape == (1, 5, 4)
            torch.testing.assert_close(image, self.as_shown(self.VOLUME, z))
        # A corner: the last X is the patient's right edge, the last Y the front.
        corner = read_nifti(tmp_path / f"a{ending}", 2, (0, 8))[0, 0, 0]
        assert corner == pytest.approx(self.VOLUME[3, 4, 2] / 4)

    @pytest.mark.parametrize("codes", ["LPS", "RAS", "LAI", "SRA", "PIR", "ASL"])
    def test_the_stored_orientation_does_not_matter(self, tmp_path: Path, codes: str) -> None:
        orientations = pytest.importorskip("nibabel.orientations")
        to_codes = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(codes))
        stored = orientations.apply_orientation(self.VOLUME, to_codes)
        write_nifti(tmp_path / "a.nii", stored, orientations.inv_ornt_aff(to_codes, self.VOLUME.shape))
        for z in (0, 4):
            torch.testing.assert_close(read_nifti(tmp_path / "a.nii", z, (0, 8)), self.as_shown(self.VOLUME, z))

    def test_slope_and_intercept_are_applied(self, tmp_path: Path) -> None:
        nibabel = pytest.importorskip("nibabel")
        stored = RNG.integers(0, 2000, (3, 3, 2)).astype(np.int16)
        volume = nibabel.Nifti1Image(stored, np.eye(4))
        volume.header.set_slope_inter(1, -1024)
        nibabel.save(volume, tmp_path / "a.nii.gz")
        on_disk = nibabel.load(tmp_path / "a.nii.gz")
        values = stored * 1.0 - 1024
        np.testing.assert_allclose(on_disk.get_fdata(), values, err_msg="the file does not say what the test needs")
        image = read_nifti(tmp_path / "a.nii.gz", 1, (-600, 1500))
        torch.testing.assert_close(image, windowed(values[::-1, ::-1, 1].T, -600, 1500))

    def test_a_series_of_one_volume(self, tmp_path: Path) -> None:
        write_nifti(tmp_path / "a.nii", self.VOLUME[..., None])
        torch.testing.assert_close(read_nifti(tmp_path / "a.nii", 3, (0, 8)), self.as_shown(self.VOLUME, 3))

    @pytest.mark.parametrize("shape", [(4, 5), (4, 5, 6, 2)])
    def test_what_is_no_volume(self, tmp_path: Path, shape: tuple[int, ...]) -> None:
        write_nifti(tmp_path / "a.nii", np.zeros(shape, dtype=np.float32))
        message = f"The NIfTI file has the shape {list(shape)}, but one volume [X, Y, Z] is needed."
        with pytest.raises(UnreadableImageError, match=re.escape(message)):
            read_nifti(tmp_path / "a.nii", 0)

    @pytest.mark.parametrize("index", [6, -1])
    def test_a_slice_that_is_not_there(self, tmp_path: Path, index: int) -> None:
        write_nifti(tmp_path / "a.nii", self.VOLUME)
        with pytest.raises(
            UnreadableImageError, match=rf"Slice {index} was asked for, but the volume has 6 axial slices, 0 to 5\."
        ):
            read_nifti(tmp_path / "a.nii", index)

    def test_a_broken_file(self, tmp_path: Path) -> None:
        write_nifti(tmp_path / "a.nii", self.VOLUME)
        whole = (tmp_path / "a.nii").read_bytes()
        for name, content in (("b.nii", b"no volume"), ("c.nii", whole[:-100]), ("d.nii.gz", b"not packed")):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(UnreadableImageError, match=r"^Not a readable NIfTI file: "):
                read_nifti(tmp_path / name, 5)

    def test_without_nibabel(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "nibabel", None)
        with pytest.raises(
            ModuleNotFoundError, match=r"a.nii can be read only with the package nibabel: pip install nibabel\.$"
        ):
            read_nifti(tmp_path / "a.nii", 0)


def test_the_packages_are_imported_only_when_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pydicom", "nibabel"):
        monkeypatch.setitem(sys.modules, name, None)
    again = runpy.run_path(medical_files.__file__)
    assert again["is_dicom"](Path("a.dcm"))
