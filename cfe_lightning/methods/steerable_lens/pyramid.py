"""Coordinates in which an image's structure can move: a complex steerable pyramid by FFT, and two for comparison.

Source: Simoncelli and Freeman, ICIP 1995; Portilla and Simoncelli, IJCV 2000. Here in the Fourier domain and normalised
to a tight frame: synthesis is the adjoint of analysis, and undoes it at every size.

Shapes: [..., H, W] images, real; K orientations, J scales, h, w samples of a band.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from cfe_lightning.compute.precision import full_precision

Synthesis = Literal["adjoint", "two_sided"]
TransformName = Literal["csp", "dft", "pixel", "csp_rect"]


class Decomposition(NamedTuple):
    """An image in other coordinates.

    Attributes:
        bands: Complex coefficients with an amplitude and a phase, [..., K, h, w] per scale, finest first.
        residuals: Real images [..., H, W] of the rest, in the order of ``Transform.residual_names``.
    """

    bands: list[Tensor]
    residuals: list[Tensor]


class Transform(nn.Module, ABC):
    """A tight frame: synthesis undoes analysis and, with ``synthesis="adjoint"``, is its adjoint.

    Therefore energy is kept, and the gradient by the coefficients is the analysis of the gradient by pixels.

    Attributes:
        residual_names: Names of the residuals, in their order.
    """

    residual_names: tuple[str, ...] = ()

    @abstractmethod
    def analyse(self, image: Tensor, residuals: bool = True) -> Decomposition:
        """Turns images [..., H, W] into coefficients; without ``residuals`` only into those of the bands."""

    @abstractmethod
    def synthesise(self, bands: Sequence[Tensor], residuals: Sequence[Tensor] = ()) -> Tensor:
        """Turns coefficients into images [..., H, W]; missing residuals count as zero."""

    def gradient(self, gradient: Tensor, residuals: bool = True) -> Decomposition:
        """Turns the gradient by pixels, [..., H, W], into the gradient by the coefficients."""
        return self.analyse(gradient, residuals)


class PixelTransform(Transform):
    """No bands: the image is its own residual."""

    residual_names = ("pixels",)

    def analyse(self, image: Tensor, residuals: bool = True) -> Decomposition:
        """Returns the image itself."""
        return Decomposition([], [image] if residuals else [])

    def synthesise(self, bands: Sequence[Tensor], residuals: Sequence[Tensor] = ()) -> Tensor:
        """Returns the sum of the residuals."""
        return torch.stack([*residuals]).sum(dim=0)


class SteerablePyramid(Transform):
    """The complex steerable pyramid: one-sided bands one octave wide, at K orientations and J scales.

    Args:
        height: Height of the images, H.
        width: Width of the images, W.
        scales: Number of scales, J; None takes ``default_scales``.
        orientations: Number of orientations, K, at least 2: a single ring has no half plane.
        decimate: Keeps only the samples that the frequencies of a scale need.
        synthesis: "adjoint", or "two_sided": the synthesis of pyramids that take the real part of two-sided bands
            (plenoptic's), which differs only on edited coefficients.
        dtype: Number type of the images; the coefficients have its complex counterpart.

    Raises:
        ValueError: If the coarsest scale would have fewer than 8 samples a side, or K is below 2.
    """

    residual_names = ("high_pass", "low_pass")

    def __init__(
        self,
        height: int,
        width: int,
        *,
        scales: int | None = None,
        orientations: int = 4,
        decimate: bool = True,
        synthesis: Synthesis = "adjoint",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        scales = default_scales(height, width) if scales is None else scales
        if orientations < 2:
            raise ValueError(f"A complex pyramid needs at least 2 orientations, got {orientations}.")
        if not 1 <= scales <= most_scales(height, width):
            raise ValueError(
                f"Images of {height} x {width} pixels have 1 to {most_scales(height, width)} scales, got {scales}."
            )
        self.height, self.width, self.scales, self.orientations = height, width, scales, orientations

        # Angular windows.
        f_y, f_x = _frequencies(height, width)
        angle = torch.atan2(f_y, f_x)
        turned = torch.stack([angle - math.pi * k / orientations for k in range(orientations)]).cos()
        peak = angular_normaliser(orientations)
        one_sided = peak * turned.clamp_min(0).pow(orientations - 1)
        back = peak * turned.pow(orientations - 1) if synthesis == "two_sided" else one_sided

        # Radial windows and masks. They are complex, or every product would convert them again.
        radius = (f_y.square() + f_x.square()).sqrt()
        radius[0, 0] = 1e-12
        octave, kind = radius.log2(), _complex(dtype)
        for j in range(scales):
            # sqrt(2) replaces the missing half plane.
            ring = math.sqrt(2) * _low(octave, j) * _high(octave, j + 1)
            sides = (_kept(height, j), _kept(width, j)) if decimate else (height, width)
            for name, window in (("there", one_sided), ("back", back)):
                self.register_buffer(f"{name}{j}", _crop(ring * window, *sides).to(kind), persistent=False)
        for index, window in enumerate((_high(octave, 0), _low(octave, scales))):
            self.register_buffer(f"residual{index}", window.to(kind), persistent=False)

    def analyse(self, image: Tensor, residuals: bool = True) -> Decomposition:
        """Turns images [..., H, W] into bands [..., K, h, w] and residuals [..., H, W]."""
        return self._analyse(image, "there", residuals)

    def gradient(self, gradient: Tensor, residuals: bool = True) -> Decomposition:
        """Applies the adjoint of ``synthesise``, [..., H, W] to the shapes of ``analyse``."""
        return self._analyse(gradient, "back", residuals)

    def synthesise(self, bands: Sequence[Tensor], residuals: Sequence[Tensor] = ()) -> Tensor:
        """Turns bands [..., K, h, w] and residuals [..., H, W] into images [..., H, W]."""
        # Here and below: the CPU has no FFT in half precision, and phases need the digits.
        with full_precision(bands[0]):
            spectrum = bands[0].new_zeros((*bands[0].shape[:-3], self.height, self.width))
            for j, band in enumerate(bands):
                weights = getattr(self, f"back{j}")
                transformed = torch.fft.fft2(band, norm="ortho")
                # One orientation after the other, to save the memory of all products.
                total = transformed[..., 0, :, :] * weights[0]
                for k in range(1, self.orientations):
                    total.addcmul_(transformed[..., k, :, :], weights[k])
                _embed_and_add(spectrum, total)
            for index, residual in enumerate(residuals):
                spectrum += torch.fft.fft2(residual, norm="ortho") * getattr(self, f"residual{index}")
            return torch.fft.ifft2(spectrum, norm="ortho").real

    def frequency(self, scale: int) -> Tensor:
        """Returns the centres of the bands of a scale in radians per pixel, (row, column), [K, 2]."""
        turn = torch.arange(self.orientations, dtype=torch.float64) * math.pi / self.orientations
        return math.pi * 2.0 ** (-scale - 1) * torch.stack([turn.sin(), turn.cos()], dim=1)

    def enlarged(self, maps: Tensor) -> Tensor:
        """Interpolates real maps with one value per sample of a scale without aliasing, [..., h, w] -> [..., H, W]."""
        with full_precision(maps):
            part = torch.fft.fft2(maps)
            spectrum = part.new_zeros((*maps.shape[:-2], self.height, self.width))
            _embed_and_add(spectrum, part)
            factor = self.height * self.width / (maps.shape[-2] * maps.shape[-1])
            return torch.fft.ifft2(spectrum).real * factor

    def _analyse(self, image: Tensor, masks: str, residuals: bool) -> Decomposition:
        _check_size(image, self.height, self.width)
        with full_precision(image):
            spectrum = torch.fft.fft2(image, norm="ortho")
            bands = []
            for j in range(self.scales):
                weights = getattr(self, f"{masks}{j}")
                kept = _crop(spectrum, *weights.shape[1:])
                bands.append(torch.fft.ifft2(kept.unsqueeze(-3) * weights, norm="ortho"))
            windows = (self.get_buffer(f"residual{index}") for index in range(2 if residuals else 0))
            return Decomposition(bands, [torch.fft.ifft2(spectrum * window, norm="ortho").real for window in windows])


class FourierTransform(Transform):
    """The whole spectrum as one band: every coefficient is a wave over the whole image.

    The mean and the frequencies that are their own mirror image have no phase to move; they are the residual. The
    arguments are those of ``SteerablePyramid``.
    """

    residual_names = ("fixed",)

    def __init__(self, height: int, width: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        f_y, f_x = _frequencies(height, width)
        half = ((f_y > 0) | ((f_y == 0) & (f_x > 0))) & (f_y.abs() < 1) & (f_x.abs() < 1)
        # Index n - i mirrors index i.
        mirrored = half.flip(0, 1).roll((1, 1), (0, 1))
        self.register_buffer("window", (math.sqrt(2) * half.double()).to(_complex(dtype)), persistent=False)
        self.register_buffer("fixed", (~(half | mirrored)).to(_complex(dtype)), persistent=False)

    window: Tensor
    fixed: Tensor

    def analyse(self, image: Tensor, residuals: bool = True) -> Decomposition:
        """Turns images [..., H, W] into the band [..., 1, H, W] of Fourier coefficients and a residual [..., H, W]."""
        _check_size(image, *self.fixed.shape)
        with full_precision(image):
            spectrum = torch.fft.fft2(image, norm="ortho")
            rest = [torch.fft.ifft2(spectrum * self.fixed, norm="ortho").real] if residuals else []
            return Decomposition([(spectrum * self.window).unsqueeze(-3)], rest)

    def synthesise(self, bands: Sequence[Tensor], residuals: Sequence[Tensor] = ()) -> Tensor:
        """Turns the band [..., 1, H, W] and the residual [..., H, W] into images [..., H, W]."""
        with full_precision(bands[0]):
            spectrum = bands[0].squeeze(-3) * self.window
            for residual in residuals:
                spectrum = spectrum + torch.fft.fft2(residual, norm="ortho") * self.fixed
            return torch.fft.ifft2(spectrum, norm="ortho").real


def default_scales(height: int, width: int) -> int:
    """Returns the default of J: 2 for 28 pixels, 3 for 32, 4 for 64, 5 for 224."""
    return max(1, int(math.log2(min(height, width))) - 2)


def most_scales(height: int, width: int) -> int:
    """Returns the largest J with at least 8 samples a side at every scale."""
    scales = 1
    while scales < 30 and 8 <= _kept(min(height, width), scales) < min(height, width):
        scales += 1
    return scales


def angular_normaliser(orientations: int) -> float:
    """Returns the height of the angular windows cos^(K-1) at which their squares add up to 1."""
    order = orientations - 1
    return 2**order * math.factorial(order) / math.sqrt(orientations * math.factorial(2 * order))


def _low(octave: Tensor, i: int) -> Tensor:
    """Returns the low pass that falls from 1 to 0 over the octave below 2^-i of Nyquist, at log2 frequencies."""
    return (math.pi / 2 * (octave + i + 1).clamp(0, 1)).cos()


def _high(octave: Tensor, i: int) -> Tensor:
    """Returns the complement of ``_low`` of the same i: their squares add up to 1."""
    return (math.pi / 2 * (octave + i).clamp(-1, 0)).cos()


def _kept(side: int, scale: int) -> int:
    """Returns the samples a side of a scale, enough for all frequencies of its ring."""
    return side if scale == 0 else min(side, 2 * math.ceil(side / 2 ** (scale + 1)))


def _crop(spectrum: Tensor, height: int, width: int) -> Tensor:
    """Cuts out the lowest frequencies of a spectrum [..., H, W] in ``fftfreq`` order; an even number a side, or all."""
    for dim, kept in ((-2, height), (-1, width)):
        size = spectrum.shape[dim]
        if kept < size:
            half = kept // 2
            spectrum = torch.cat([spectrum.narrow(dim, 0, half), spectrum.narrow(dim, size - half, half)], dim=dim)
    return spectrum


def _embed_and_add(spectrum: Tensor, part: Tensor) -> None:
    """Adds the lowest frequencies to a spectrum in place: the transpose of ``_crop``."""
    (height, width), (rows, columns) = spectrum.shape[-2:], part.shape[-2:]
    for there_y, here_y in _halves(height, rows):
        for there_x, here_x in _halves(width, columns):
            spectrum[..., there_y, there_x] += part[..., here_y, here_x]


def _halves(size: int, kept: int) -> list[tuple[slice, slice]]:
    """Pairs the places of the kept frequencies in the whole spectrum and in the part, along one side."""
    if kept == size:
        return [(slice(None), slice(None))]
    half = kept // 2
    return [(slice(0, half), slice(0, half)), (slice(size - half, size), slice(half, kept))]


def _frequencies(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Returns vertical and horizontal frequency of every bin, [H, W] twice; 1 is Nyquist. Odd sizes are exact."""
    row, column = (2 * torch.fft.fftfreq(n, dtype=torch.float64) for n in (height, width))
    f_y, f_x = torch.broadcast_tensors(row[:, None], column[None])
    return f_y.clone(), f_x.clone()


def _check_size(image: Tensor, height: int, width: int) -> None:
    if image.shape[-2:] != (height, width):
        raise ValueError(f"Images of {height} x {width} pixels are needed, got {image.shape[-2]} x {image.shape[-1]}.")


def _complex(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype == torch.float64 else torch.complex64
