"""What Steerable Lens does to one band of coefficients: read a gradient as a motion, and magnify it.

Source: "Through a Steerable Lens" (Mahdisoltani et al. 2025, arXiv 2506.02300) for the idea of extrapolating phases;
the exact split of the complex gradient is our own derivation from it, see ``docs/methods/steerable_lens.md``.

Shapes: a band is complex, [B, P, K, h, w] for P planes and K orientations, and what belongs to a band has its shape.
Gradients with respect to it are dL/dRe + i dL/dIm, as autograd gives them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cfe_lightning.methods.steerable_lens.pyramid import SteerablePyramid

PhaseRule = Literal["cartesian", "coordinate", "unit"]
AmplitudeMode = Literal["linear", "log"]

#: Amplitudes grow or shrink by at most e to this power in the logarithmic mode.
_LARGEST_EXPONENT = 3.0
#: Energy of a coefficient that no picture shows, on [0, 1].
_INVISIBLE = (0.1 / 255) ** 2
#: Energy far below the rounding errors of single precision.
_NOTHING = 1e-20


@dataclass(frozen=True, kw_only=True, slots=True)
class Motion:
    """In which direction the coefficients of one band move.

    Attributes:
        band: The coefficients.
        turn: By how much their phases turn per unit of alpha, in radians.
        growth: By which share their amplitudes grow per unit of alpha; None leaves them.
    """

    band: Tensor
    turn: Tensor
    growth: Tensor | None

    def scaled(self, factor: Tensor) -> Motion:
        """The same direction with another unit of alpha, factors [B]."""
        factor = factor.view(-1, *(1,) * (self.turn.ndim - 1))
        growth = None if self.growth is None else self.growth * factor
        return Motion(band=self.band, turn=self.turn * factor, growth=growth)

    def first_order(self, beta: float) -> Tensor:
        """The change of the coefficients per unit of alpha at alpha 0: c (i turn + beta growth)."""
        growth = torch.zeros_like(self.turn) if self.growth is None else beta * self.growth
        return self.band * torch.complex(growth, self.turn)

    @property
    def energy(self) -> Tensor:
        """Of the coefficients."""
        return _energy(self.band)

    def phase(self, alpha: Tensor, cap: float | None) -> Tensor:
        """By how much phases turn at alpha [B, T], in radians: in proportion, or approaching the cap, [B, T, ...]."""
        alpha = alpha.view(*alpha.shape, *(1,) * (self.turn.ndim - 1))
        if cap is None:
            return alpha * self.turn[:, None]
        return (alpha / cap * self.turn[:, None]).tanh_().mul_(cap)

    def extrapolated(self, alpha: Tensor, *, cap: float | None, beta: float, mode: AmplitudeMode) -> Tensor:
        """The change of the coefficients at alpha.

        A coefficient of zero stays zero, and without growth none changes by more than twice its amplitude.

        Args:
            alpha: How far, [B, T].
            cap: As for ``phase``.
            beta: Weight of the amplitudes' growth.
            mode: How amplitudes grow: "linear" stops at zero, "log" is positive by construction.

        Returns:
            [B, T, ...].
        """
        phase = self.phase(alpha, cap)
        if self.growth is None:
            factor = torch.complex(phase.cos().sub_(1), phase.sin())
        else:
            grown = alpha.view(*alpha.shape, *(1,) * (self.growth.ndim - 1)) * beta * self.growth[:, None]
            if mode == "log":
                gain = grown.clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT).exp()
            else:
                gain = (1 + grown).clamp_min(0)
            factor = torch.complex(gain * phase.cos() - 1, gain * phase.sin())
        return factor.mul_(self.band[:, None])


def descent(
    band: Tensor, gradient: Tensor, *, rule: PhaseRule, eps: float, smoothing: float = 0.0, amplitudes: bool = False
) -> Motion:
    """The gradient of a loss as a motion of phases (and amplitudes) along which the loss falls.

    With amplitude A, phase unit u and steepest descent d = -gradient, phases turn by A Im(conj(u) d) times a weight and
    amplitudes grow by A Re(conj(u) d) times the same weight: 1 / (A^2 + e^2) for "cartesian" (the phase of a magnified
    rectangular step), 1 for "coordinate" (the gradient in polar coordinates), 1 / sqrt(A^2 + e^2) for "unit".

    Args:
        band: Coefficients c.
        gradient: Of the loss with respect to them.
        rule: The weight.
        eps: e relative to the root mean square of A over the band, for each image, channel and orientation.
        smoothing: Standard deviation of a circular Gaussian over turns, in samples of the band; "cartesian" only.
        amplitudes: Also give the growth.
    """
    energy = _energy(band)
    guard = eps**2 * energy.mean(dim=(-2, -1), keepdim=True)
    # Keeps 0 / 0 and overflow away: where nothing is, nothing moves.
    guarded = (energy + guard).clamp_min(_NOTHING)
    turn = band.imag * gradient.real - band.real * gradient.imag
    growth = -(band.real * gradient.real + band.imag * gradient.imag) if amplitudes else None
    if rule == "coordinate":
        return Motion(band=band, turn=turn, growth=growth)
    if rule == "cartesian" and smoothing > 0:
        root = guarded.rsqrt()
        turn = root * _blurred(root * turn, smoothing)
        return Motion(band=band, turn=turn, growth=None if growth is None else growth / guarded)
    weight = guarded.reciprocal() if rule == "cartesian" else guarded.rsqrt()
    return Motion(band=band, turn=turn * weight, growth=None if growth is None else growth * weight)


def mean_turn(motions: Sequence[Motion]) -> Tensor:
    """Root mean square of the turns of all bands, weighted by the coefficients' energy, [B]."""
    energies = [motion.energy for motion in motions]
    turned = torch.stack(
        [(e * m.turn.square()).flatten(1).sum(dim=1) for e, m in zip(energies, motions, strict=True)]
    ).sum(dim=0)
    total = torch.stack([energy.flatten(1).sum(dim=1) for energy in energies]).sum(dim=0)
    return (turned / total.clamp_min(torch.finfo(total.dtype).tiny)).sqrt()


def motion_field(motions: Sequence[Motion], alpha: Tensor, pyramid: SteerablePyramid, *, cap: float | None) -> Tensor:
    """Where structure moves: the displacement of which the bands' turns would be the phase shifts.

    Phase shifts are -frequency . displacement for every band; they are solved for the displacement in each pixel by
    least squares, weighted by energy. The finest scale is left out, where phases wrap soonest. Where there is no
    structure the displacement is zero.

    Args:
        motions: Of the pyramid's scales, finest first.
        alpha: How far, [B].
        pyramid: It.
        cap: As for ``Motion.phase``.

    Returns:
        Displacements in pixels, (row, column), [B, 2, H, W]; zero for a pyramid of one scale.
    """
    normal: Tensor | None = None
    for scale, motion in enumerate(motions):
        if scale == 0 and len(motions) > 1:
            continue
        omega = pyramid.frequency(scale).to(motion.turn)
        energy, turn = motion.energy, motion.phase(alpha[:, None], cap)[:, 0]
        outer = torch.stack([omega[:, 0] ** 2, omega[:, 0] * omega[:, 1], omega[:, 1] ** 2], dim=1)
        left = torch.einsum("bpkhw,kn->bnhw", energy, outer)
        right = -torch.einsum("bpkhw,kn->bnhw", energy * turn, omega)
        maps = pyramid.enlarged(torch.cat([left, right], dim=1))
        normal = maps if normal is None else normal + maps
    assert normal is not None, "a pyramid has a scale"
    yy, yx, xx, y, x = normal.unbind(dim=1)
    # A ridge of a hundredth of the mean energy, or of a tenth of a grey level: where nothing is seen, nothing moves.
    ridge = 0.01 * (yy + xx).mean(dim=(1, 2), keepdim=True) + _INVISIBLE
    yy, xx = yy.clamp_min(0) + ridge, xx.clamp_min(0) + ridge
    determinant = (yy * xx - yx.square()).clamp_min(ridge.square())
    return torch.stack([xx * y - yx * x, yy * x - yx * y], dim=1) / determinant[:, None]


def _energy(band: Tensor) -> Tensor:
    return band.real.square() + band.imag.square()


def _blurred(values: Tensor, deviation: float) -> Tensor:
    """Circular Gaussian blur over the last two dimensions; positive semidefinite, so descent stays descent."""
    f_y, f_x = (torch.fft.fftfreq(n, device=values.device, dtype=values.dtype) for n in values.shape[-2:])
    window = (-2 * (math.pi * deviation) ** 2 * (f_y[:, None].square() + f_x.square())).exp()
    return torch.fft.ifft2(torch.fft.fft2(values) * window).real
