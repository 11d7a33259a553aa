"""One band of Steerable Lens: a gradient becomes a motion of the coefficients, which is magnified.

Source: "Through a Steerable Lens" (Mahdisoltani et al. 2025, arXiv 2506.02300) for the idea of extrapolating phases;
the exact split of the complex gradient is our own derivation from it, see ``docs/methods/steerable_lens.md``.

Shapes: a band is complex, [B, P, K, h, w] for P planes and K orientations; turns and growths have its shape. Gradients
by a band are dL/dRe + i dL/dIm, as autograd gives them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cfe_lightning.methods.steerable_lens.pyramid import SteerablePyramid

PhaseRule = Literal["cartesian", "coordinate", "unit"]
AmplitudeMode = Literal["linear", "log"]

#: Largest growth of the logarithm of an amplitude in mode "log".
_LARGEST_EXPONENT = 3.0
#: Energy of a coefficient that is invisible in a picture on [0, 1]: a tenth of a grey level.
_INVISIBLE = (0.1 / 255) ** 2
#: Energy far below the rounding errors of single precision.
_NOTHING = 1e-20


@dataclass(frozen=True, kw_only=True, slots=True)
class Motion:
    """The direction in which the coefficients of one band move.

    Attributes:
        band: Coefficients of the band.
        turn: Turn of the phases per unit of alpha, in radians.
        growth: Relative growth of the amplitudes per unit of alpha; None leaves them.
    """

    band: Tensor
    turn: Tensor
    growth: Tensor | None

    def scaled(self, factor: Tensor) -> Motion:
        """Returns the same direction in another unit of alpha, factors [B]."""
        factor = factor.view(-1, *(1,) * (self.turn.ndim - 1))
        growth = None if self.growth is None else self.growth * factor
        return Motion(band=self.band, turn=self.turn * factor, growth=growth)

    def first_order(self, beta: float) -> Tensor:
        """Returns the change of the coefficients c per unit of alpha at alpha 0: c (i turn + beta growth)."""
        growth = torch.zeros_like(self.turn) if self.growth is None else beta * self.growth
        return self.band * torch.complex(growth, self.turn)

    def phase(self, alpha: Tensor, cap: float | None) -> Tensor:
        """Returns the turns at alpha [B, T] in radians, [B, T, ...]: proportional, or approaching ``cap`` as a tanh."""
        alpha = alpha.view(*alpha.shape, *(1,) * (self.turn.ndim - 1))
        if cap is None:
            return alpha * self.turn[:, None]
        return (alpha / cap * self.turn[:, None]).tanh_().mul_(cap)

    def extrapolated(self, alpha: Tensor, *, cap: float | None, beta: float, mode: AmplitudeMode) -> Tensor:
        """Returns the change of the coefficients at alpha [B, T], [B, T, ...].

        A coefficient of zero stays zero, and without growth none changes by more than twice its amplitude. ``beta`` is
        the weight of the growth, which stops at zero in mode "linear" and is positive by construction in mode "log".
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
    """Turns the gradient of a loss into a motion of phases (and amplitudes) along which the loss falls.

    With amplitude A, phase unit u and steepest descent d = -gradient, phases turn by A Im(conj(u) d) times a weight and
    amplitudes grow by A Re(conj(u) d) times the same weight: 1 / (A^2 + e^2) for "cartesian" (the phase of a magnified
    rectangular step), 1 for "coordinate" (the gradient in polar coordinates), 1 / sqrt(A^2 + e^2) for "unit".

    Args:
        band: Coefficients c.
        gradient: Gradient of the loss by the coefficients.
        rule: Name of the weight.
        eps: Guard e relative to the root mean square of A over the band, for each image, channel and orientation.
        smoothing: Standard deviation of a circular Gaussian over turns, in samples of the band; "cartesian" only.
        amplitudes: Also computes the growth.
    """
    # Guarded energy, against 0 / 0 and overflow: empty places do not move.
    energy = _energy(band)
    guard = eps**2 * energy.mean(dim=(-2, -1), keepdim=True)
    guarded = (energy + guard).clamp_min(_NOTHING)

    # Weighted turn and growth.
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
    """Returns the root mean square of the turns of all bands, weighted by the coefficients' energy, [B]."""
    turned = torch.stack([(_energy(m.band) * m.turn.square()).flatten(1).sum(dim=1) for m in motions]).sum(dim=0)
    total = torch.stack([_energy(m.band).flatten(1).sum(dim=1) for m in motions]).sum(dim=0)
    return (turned / total.clamp_min(torch.finfo(total.dtype).tiny)).sqrt()


def motion_field(motions: Sequence[Motion], alpha: Tensor, pyramid: SteerablePyramid, *, cap: float | None) -> Tensor:
    """Returns the displacements that would turn the phases of the bands as the motions do, [B, 2, H, W] in pixels.

    A displacement turns the phases of a band by -frequency . displacement. These equations are solved in each pixel by
    least squares, weighted by energy. The finest scale is left out, because its phases wrap soonest, unless it is the
    only one. Displacements are (row, column), and zero where there is no structure.

    ``motions`` are those of the pyramid's scales, finest first, at alpha [B]; ``cap`` is that of ``Motion.phase``.
    """
    # Normal equations.
    maps = []
    for scale, motion in list(enumerate(motions))[1:] or [(0, motions[0])]:
        omega = pyramid.frequency(scale).to(motion.turn)
        energy, turn = _energy(motion.band), motion.phase(alpha[:, None], cap)[:, 0]
        outer = torch.stack([omega[:, 0] ** 2, omega[:, 0] * omega[:, 1], omega[:, 1] ** 2], dim=1)
        left = torch.einsum("bpkhw,kn->bnhw", energy, outer)
        right = -torch.einsum("bpkhw,kn->bnhw", energy * turn, omega)
        maps.append(pyramid.enlarged(torch.cat([left, right], dim=1)))

    # Solution, with a ridge of a hundredth of the mean energy, or of a tenth of a grey level for empty images.
    yy, yx, xx, y, x = functools.reduce(torch.add, maps).unbind(dim=1)
    ridge = 0.01 * (yy + xx).mean(dim=(1, 2), keepdim=True) + _INVISIBLE
    yy, xx = yy.clamp_min(0) + ridge, xx.clamp_min(0) + ridge
    determinant = (yy * xx - yx.square()).clamp_min(ridge.square())
    return torch.stack([xx * y - yx * x, yy * x - yx * y], dim=1) / determinant[:, None]


def _energy(band: Tensor) -> Tensor:
    return band.real.square() + band.imag.square()


def _blurred(values: Tensor, deviation: float) -> Tensor:
    """Blurs by a circular Gaussian over the last two dimensions; positive semidefinite, so descent stays descent."""
    f_y, f_x = (torch.fft.fftfreq(n, device=values.device, dtype=values.dtype) for n in values.shape[-2:])
    window = (-2 * (math.pi * deviation) ** 2 * (f_y[:, None].square() + f_x.square())).exp()
    return torch.fft.ifft2(torch.fft.fft2(values) * window).real
