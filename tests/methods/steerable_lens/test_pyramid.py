"""Steerable pyramid: perfect reconstruction, tight frame, and shifts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cfe_lightning.methods.steerable_lens.pyramid import (
    FourierTransform,
    PixelTransform,
    SteerablePyramid,
    Transform,
    angular_normaliser,
    default_scales,
    most_scales,
)

IDS = ["224x224", "64x48", "37x50", "33x33", "32x32", "31x31", "30x30", "28x28", "27x28", "17x19", "225x223"]
SIZES = [tuple(map(int, size.split("x"))) for size in IDS]


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def noise_like(tensor: Tensor, seed: int = 1) -> Tensor:
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed), dtype=tensor.dtype)


def transforms(height: int, width: int, dtype: torch.dtype = torch.float64) -> dict[str, Transform]:
    return {
        "pyramid": SteerablePyramid(height, width, dtype=dtype),
        "undecimated": SteerablePyramid(height, width, decimate=False, orientations=3, dtype=dtype),
        "two-sided": SteerablePyramid(height, width, synthesis="two_sided", orientations=5, dtype=dtype),
        "Fourier": FourierTransform(height, width, dtype=dtype),
        "pixel": PixelTransform(),
    }


def energy(parts: list[Tensor]) -> float:
    return sum(float(part.abs().square().sum()) for part in parts)


@pytest.mark.parametrize(("height", "width"), SIZES, ids=IDS)
def test_synthesis_undoes_analysis_and_energy_is_kept(height: int, width: int) -> None:
    for dtype, error, excess in ((torch.float32, 1e-6, 1e-5), (torch.float64, 1e-14, 1e-12)):
        image = random(2, 3, height, width, dtype=dtype)
        for name, transform in transforms(height, width, dtype).items():
            found = transform.analyse(image)
            back = transform.synthesise(found.bands, found.residuals)
            assert back.dtype == dtype
            assert (back - image).abs().max() < error, (name, dtype)
            ratio = energy([*found.bands, *found.residuals]) / float(image.square().sum())
            assert abs(ratio - 1) < excess, (name, dtype)


@pytest.mark.parametrize(("height", "width"), SIZES, ids=IDS)
def test_the_gradient_is_the_adjoint_of_synthesis(height: int, width: int) -> None:
    image = random(2, 3, height, width)
    for name, transform in transforms(height, width).items():
        found = transform.gradient(image)
        assert len(found.residuals) == len(transform.residual_names)
        bands, rest = [noise_like(band) for band in found.bands], [noise_like(part, 2) for part in found.residuals]
        here = float((image * transform.synthesise(bands, rest)).sum())
        there = sum(float((a.conj() * b).real.sum()) for a, b in zip(found.bands, bands, strict=True))
        there += sum(float((a * b).sum()) for a, b in zip(found.residuals, rest, strict=True))
        assert here == pytest.approx(there, rel=1e-10), name


def test_the_adjoint_is_what_autograd_finds() -> None:
    image, pull = random(2, 3, 33, 28), random(2, 3, 33, 28, seed=3)
    for name, transform in transforms(33, 28).items():
        found = transform.analyse(image)
        leaves = [part.clone().requires_grad_() for part in (*found.bands, *found.residuals)]
        image_back = transform.synthesise(leaves[: len(found.bands)], leaves[len(found.bands) :])
        autograd = torch.autograd.grad((image_back * pull).sum(), leaves)
        expected = transform.gradient(pull)
        for one, other in zip(autograd, (*expected.bands, *expected.residuals), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12, msg=name)


def test_bands_of_an_image_do_not_depend_on_the_way_back() -> None:
    image = random(1, 1, 32, 32)
    one, two = (SteerablePyramid(32, 32, synthesis=s, dtype=torch.float64) for s in ("adjoint", "two_sided"))  # type: ignore[arg-type]
    for a, b in zip(one.analyse(image).bands, two.analyse(image).bands, strict=True):
        assert torch.equal(a, b)
    edited = [noise_like(band) for band in one.analyse(image).bands]
    assert (one.synthesise(edited) - two.synthesise(edited)).abs().max() > 0.1


@pytest.mark.parametrize("orientations", [2, 3, 4, 5, 6, 8])
def test_angular_windows_add_up_to_one(orientations: int) -> None:
    angle = torch.linspace(0, 2 * math.pi, 1001, dtype=torch.float64)
    turned = torch.stack([(angle - math.pi * k / orientations).cos() for k in range(orientations)])
    total = (angular_normaliser(orientations) ** 2 * turned.pow(2 * orientations - 2)).sum(dim=0)
    assert (total - 1).abs().max() < 1e-12


def test_masks_add_up_to_one_and_are_one_sided() -> None:
    pyramid = SteerablePyramid(64, 48, decimate=False, dtype=torch.float64)
    rings = [pyramid.get_buffer(f"there{j}").real for j in range(pyramid.scales)]
    total = sum(pyramid.get_buffer(f"residual{index}").real.square() for index in range(2))
    for ring in rings:
        squared = ring.square().sum(dim=0)
        # A frequency and its mirror image share their energy.
        total = total + (squared + squared.flip(0, 1).roll((1, 1), (0, 1))) / 2
        for one in ring:
            assert (one * one.flip(0, 1).roll((1, 1), (0, 1))).abs().max() < 1e-12
    assert isinstance(total, Tensor)
    assert (total - 1).abs().max() < 1e-12


def test_bands_have_the_samples_that_their_frequencies_need() -> None:
    sides = [tuple(band.shape[-2:]) for band in SteerablePyramid(224, 224).analyse(torch.zeros(1, 1, 224, 224)).bands]
    assert sides == [(224, 224), (112, 112), (56, 56), (28, 28), (14, 14)]
    odd = SteerablePyramid(33, 33).analyse(torch.zeros(2, 3, 33, 33)).bands
    assert [tuple(band.shape) for band in odd] == [(2, 3, 4, 33, 33), (2, 3, 4, 18, 18), (2, 3, 4, 10, 10)]
    assert [default_scales(side, side + 9) for side in (8, 28, 32, 64, 224)] == [1, 2, 3, 4, 5]
    assert [most_scales(side, side) for side in (8, 16, 28, 32, 224)] == [1, 2, 3, 3, 6]


@pytest.mark.parametrize("arguments", [{"orientations": 1}, {"scales": 0}, {"scales": 4}])
def test_what_cannot_be_a_pyramid_is_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"orientations, got 1|have 1 to 3 scales, got \d"):
        SteerablePyramid(32, 32, **arguments)  # type: ignore[arg-type]


def grating(shift: tuple[float, float], cycles: tuple[int, int] = (3, 4), size: int = 32) -> Tensor:
    row, column = (torch.arange(size, dtype=torch.float64) for _ in range(2))
    y, x = row[:, None] - shift[0], column[None] - shift[1]
    return (2 * math.pi * (cycles[0] * y + cycles[1] * x) / size).cos()[None, None]


@pytest.mark.parametrize("decimate", [True, False])
def test_a_moved_grating_turns_phases_by_frequency_times_shift(decimate: bool) -> None:
    shift, cycles = (0.7, -1.3), (3, 4)
    pyramid = SteerablePyramid(32, 32, decimate=decimate, dtype=torch.float64)
    before, after = (pyramid.analyse(grating(by, cycles)).bands for by in ((0.0, 0.0), shift))
    strongest = max(range(len(before)), key=lambda j: float(before[j].abs().amax()))
    band = int(before[strongest][0, 0].abs().amax(dim=(1, 2)).argmax())
    turn = (after[strongest][0, 0, band] * before[strongest][0, 0, band].conj()).angle()
    expected = 2 * math.pi * (cycles[0] * shift[0] + cycles[1] * shift[1]) / 32
    assert turn.std() < 1e-6
    assert abs(abs(float(turn.mean())) - abs(expected)) < 1e-9


def test_the_fourier_band_leaves_out_what_has_no_phase() -> None:
    for height, width in ((8, 8), (7, 9), (8, 7)):
        transform = FourierTransform(height, width, dtype=torch.float64)
        assert transform.window[0, 0] == 0
        mean = torch.full((1, 1, height, width), 0.3, dtype=torch.float64)
        found = transform.analyse(mean)
        assert found.bands[0].abs().max() < 1e-12
        torch.testing.assert_close(found.residuals[0], mean)
        # Half of all frequencies but the mean and the Nyquist row and column of even sides.
        sides = [side - (side % 2 == 0) for side in (height, width)]
        assert int((transform.window.abs() > 0).sum()) == (sides[0] * sides[1] - 1) // 2


def test_single_precision_is_kept_inside_autocast() -> None:
    image = random(1, 1, 32, 32, dtype=torch.float32)
    pyramid = SteerablePyramid(32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pyramid.analyse(image)
        back = pyramid.synthesise(found.bands, found.residuals)
    assert (back - image).abs().max() < 1e-6


def test_enlarged_maps_stay_where_they_are() -> None:
    pyramid = SteerablePyramid(64, 64, dtype=torch.float64)
    for side in (32, 16):
        axis = torch.arange(side, dtype=torch.float64) * 64 / side
        fine = torch.arange(64, dtype=torch.float64)
        coarse, expected = (0.5 + (2 * math.pi * 3 * place / 64).sin() for place in (axis, fine))
        torch.testing.assert_close(pyramid.enlarged(coarse[:, None] * coarse), expected[:, None] * expected)


def test_another_size_is_refused() -> None:
    for transform in (SteerablePyramid(32, 32), FourierTransform(32, 32)):
        with pytest.raises(ValueError, match="Images of 32 x 32 pixels are needed, got 30 x 32"):
            transform.analyse(torch.zeros(1, 1, 30, 32))
