"""Tests of ``cfe_lightning.methods.steerable_lens.phases`` on motions and gradients with a known answer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cfe_lightning.methods.steerable_lens.phases import Motion, PhaseRule, descent, mean_turn, motion_field
from cfe_lightning.methods.steerable_lens.pyramid import SteerablePyramid

RULES: list[PhaseRule] = ["cartesian", "coordinate", "unit"]


def shifted(image: Tensor, shift: tuple[float, float]) -> Tensor:
    """Moves a periodic image [..., H, W] by a fraction of pixels."""
    f_y, f_x = (torch.fft.fftfreq(n, dtype=torch.float64) for n in image.shape[-2:])
    turn = -2j * math.pi * (f_y[:, None] * shift[0] + f_x * shift[1])
    return torch.fft.ifft2(torch.fft.fft2(image) * turn.exp()).real


def texture(size: int = 64, seed: int = 0) -> Tensor:
    """Draws a 1/f image, [1, 1, S, S]."""
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    f = torch.fft.fftfreq(size, dtype=torch.float64)
    radius = (f[:, None].square() + f.square()).sqrt()
    radius[0, 0] = torch.inf
    return torch.fft.ifft2(torch.fft.fft2(noise) / radius).real[None, None]


def turned(pyramid: SteerablePyramid, before: Tensor, after: Tensor) -> list[Motion]:
    """Returns the phase differences of two images as motions."""
    pairs = zip(pyramid.analyse(before).bands, pyramid.analyse(after).bands, strict=True)
    return [Motion(band=one, turn=(other * one.conj()).angle(), growth=None) for one, other in pairs]


def extrapolated(pyramid: SteerablePyramid, image: Tensor, motions: list[Motion], alpha: float) -> Tensor:
    strength = torch.full((1, 1), alpha, dtype=torch.float64)
    change = [motion.extrapolated(strength, cap=None, beta=0, mode="linear") for motion in motions]
    return image + pyramid.synthesise(change)[:, 0]


def error(found: Tensor, expected: Tensor) -> float:
    mean = expected.mean()
    return float((found - expected).norm() / (expected - mean).norm())


def test_a_shift_of_a_grating_is_magnified_a_hundred_times() -> None:
    place = torch.arange(32, dtype=torch.float64)
    image = (2 * math.pi * (3 * place[:, None] + 4 * place) / 32).cos()[None, None]
    little, far = shifted(image, (0.02, 0.0)), shifted(image, (2.0, 0.0))
    pyramid = SteerablePyramid(32, 32, dtype=torch.float64)
    found = extrapolated(pyramid, image, turned(pyramid, image, little), 100.0)
    assert error(found, far) < 1e-6
    # A linear extrapolation of pixels fails.
    assert error(image + 100 * (little - image), far) > 0.3


def test_a_blob_is_moved_rather_than_blended() -> None:
    place = torch.arange(64, dtype=torch.float64) - 32
    blob = (-(place[:, None].square() + place.square()) / 50).exp()[None, None]
    little, far = shifted(blob, (0.1, 0.0)), shifted(blob, (5.0, 0.0))
    pyramid = SteerablePyramid(64, 64, dtype=torch.float64)
    by_phase = error(extrapolated(pyramid, blob, turned(pyramid, blob, little), 50.0), far)
    assert by_phase < error(blob + 50 * (little - blob), far) < error(blob, far)


@pytest.mark.parametrize("decimate", [True, False])
@pytest.mark.parametrize("shift", [(0.5, 0.3), (1.0, -0.7)])
def test_the_motion_of_a_texture_is_found_again(shift: tuple[float, float], decimate: bool) -> None:
    image = texture()
    pyramid = SteerablePyramid(64, 64, decimate=decimate, dtype=torch.float64)
    field = motion_field(
        turned(pyramid, image, shifted(image, shift)), torch.ones(1, dtype=torch.float64), pyramid, cap=None
    )
    found = field[0].flatten(1).median(dim=1).values
    largest = max(map(abs, shift))
    assert (found - torch.tensor(shift, dtype=torch.float64)).abs().max() < 0.2 * largest


def test_motion_is_where_the_structure_moved() -> None:
    image = texture()
    moved = image.clone()
    moved[..., :32] = shifted(image, (0.0, 1.0))[..., :32]
    pyramid = SteerablePyramid(64, 64, dtype=torch.float64)
    (field,) = motion_field(turned(pyramid, image, moved), torch.ones(1, dtype=torch.float64), pyramid, cap=None)
    assert field[1, :, 8:24].median() > 0.7
    assert field[1, :, 40:56].abs().median() < 0.15


def test_without_structure_nothing_moves() -> None:
    pyramid = SteerablePyramid(32, 32, dtype=torch.float64)
    flat = torch.full((1, 3, 32, 32), 0.4, dtype=torch.float64)
    pull = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    motions = [
        descent(band, gradient, rule="cartesian", eps=0.1)
        for band, gradient in zip(pyramid.analyse(flat).bands, pyramid.gradient(pull).bands, strict=True)
    ]
    field = motion_field(motions, torch.ones(1, dtype=torch.float64), pyramid, cap=math.pi / 2)
    assert field.isfinite().all()
    assert field.abs().max() < 1e-6


def coefficients(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 1, 3, 6, 6, generator=generator, dtype=torch.complex128) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_descends_as_its_formula_says(rule: PhaseRule) -> None:
    band, gradient = coefficients()
    motion = descent(band, gradient, rule=rule, eps=0.1, amplitudes=True)
    amplitude = band.abs()
    unit = band / amplitude
    tangential, radial = ((unit.conj() * -gradient).imag, (unit.conj() * -gradient).real)
    guarded = amplitude.square() + 0.01 * amplitude.square().mean(dim=(-2, -1), keepdim=True)
    weight = {"cartesian": 1 / guarded, "coordinate": torch.ones_like(guarded), "unit": guarded.rsqrt()}[rule]
    torch.testing.assert_close(motion.turn, amplitude * tangential * weight)
    torch.testing.assert_close(motion.growth, amplitude * radial * weight)
    # The slope of any loss with this gradient.
    slope = float((gradient.conj() * motion.first_order(0.7)).real.sum())
    expected = -(amplitude.square() * weight * (tangential.square() + 0.7 * radial.square())).sum()
    assert slope == pytest.approx(float(expected))
    assert slope < 0


def test_the_gradient_in_polar_coordinates_is_the_coordinate_rule() -> None:
    """Checks the derivatives by phase and logarithmic amplitude against autograd."""
    band, pull = coefficients()
    phase = torch.zeros(band.shape, dtype=torch.float64, requires_grad=True)
    growth = torch.zeros(band.shape, dtype=torch.float64, requires_grad=True)
    loss = (pull.conj() * band * torch.exp(torch.complex(growth, phase))).real.sum()
    by_phase, by_growth = torch.autograd.grad(loss, (phase, growth))
    motion = descent(band, pull, rule="coordinate", eps=0.1, amplitudes=True)
    torch.testing.assert_close(motion.turn, -by_phase)
    torch.testing.assert_close(motion.growth, -by_growth)


def test_smoothing_keeps_descent_and_no_smoothing_is_the_plain_rule() -> None:
    band, gradient = coefficients()
    plain = descent(band, gradient, rule="cartesian", eps=0.1)
    barely = descent(band, gradient, rule="cartesian", eps=0.1, smoothing=1e-6)
    torch.testing.assert_close(plain.turn, barely.turn)
    smooth = descent(band, gradient, rule="cartesian", eps=0.1, smoothing=1.5)
    assert smooth.turn.square().mean() < plain.turn.square().mean()
    assert float((gradient.conj() * smooth.first_order(0)).real.sum()) < 0


def test_a_coefficient_of_zero_stays_zero_and_finite() -> None:
    band, gradient = coefficients()
    band[:, :, 0] = 0
    band[1] = 0
    strength = torch.full((2, 1), 3.0, dtype=torch.float64)
    for rule in RULES:
        for eps in (0.0, 0.1):
            motion = descent(band, gradient, rule=rule, eps=eps, amplitudes=True)
            for beta in (0.0, 1.0):
                change = motion.extrapolated(strength, cap=None, beta=beta, mode="linear")
                assert change.isfinite().all(), (rule, eps)
                assert (change[:, :, :, 0] == 0).all()
                assert (change[1] == 0).all()


def test_turns_are_capped_and_amplitudes_keep_their_sign() -> None:
    band = torch.full((1, 1, 1, 1, 1), 2.0 + 0j, dtype=torch.complex128)
    motion = Motion(band=band, turn=torch.full(band.shape, 1.0).double(), growth=torch.full(band.shape, -1.0).double())
    alpha = torch.tensor([[0.0, 0.1, 100.0]], dtype=torch.float64)
    phase_only = Motion(band=band, turn=motion.turn, growth=None)
    new = (band[:, None] + phase_only.extrapolated(alpha, cap=math.pi / 2, beta=0, mode="linear")).flatten()
    torch.testing.assert_close(new.abs(), torch.full((3,), 2.0).double())
    expected = [0.0, math.pi / 2 * math.tanh(0.1 / (math.pi / 2)), math.pi / 2]
    torch.testing.assert_close(new.angle(), torch.tensor(expected, dtype=torch.float64))
    straight = (band[:, None] + phase_only.extrapolated(alpha, cap=None, beta=0, mode="linear")).flatten()
    torch.testing.assert_close(straight, 2 * torch.exp(1j * alpha.flatten()))
    for mode, amplitudes in (("linear", [2.0, 1.8, 0.0]), ("log", [2.0, 2 * math.exp(-0.1), 2 * math.exp(-3)])):
        grown = (band[:, None] + motion.extrapolated(alpha, cap=None, beta=1.0, mode=mode)).flatten()  # type: ignore[arg-type]
        torch.testing.assert_close(grown.abs(), torch.tensor(amplitudes, dtype=torch.float64))


def test_the_mean_turn_weighs_by_energy() -> None:
    band = torch.tensor([3.0 + 0j, 1.0]).view(1, 1, 1, 1, 2)
    motion = Motion(band=band, turn=torch.tensor([0.1, 0.5]).view(band.shape), growth=None)
    expected = math.sqrt((9 * 0.01 + 0.25) / 10)
    assert mean_turn([motion]).item() == pytest.approx(expected)
    assert mean_turn([motion.scaled(torch.tensor([2.0]))]).item() == pytest.approx(2 * expected)
