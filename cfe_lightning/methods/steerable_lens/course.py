"""From the gradient at an image to images along it: the direction of Steerable Lens and its extrapolation.

Numbers are in units of [0, 1] images. Sources: those of ``phases``.

Shapes: B images, C channels, P planes (C, or 1 for luminance), H, W pixels, T strengths.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cfe_lightning import images
from cfe_lightning.compute.precision import full_precision
from cfe_lightning.compute.rows import joined, rows_of
from cfe_lightning.methods.steerable_lens import phases, pyramid
from cfe_lightning.methods.steerable_lens.phases import AmplitudeMode, Motion, PhaseRule, descent
from cfe_lightning.methods.steerable_lens.pyramid import SteerablePyramid, Synthesis, Transform, TransformName

AlphaUnit = Literal["rms", "l2", "phase", "raw"]
Colour = Literal["rgb", "y"]
Padding = Literal["reflect", "circular"]

#: Weights of red, green and blue in the luminance of ITU-R 601, the Y of YIQ; adding to Y adds the same to all three.
_LUMINANCE = (0.299, 0.587, 0.114)
#: Real numbers that the largest band of a chunk of frames may hold. On a CPU, larger chunks are slower because memory
#: is; on other devices every call costs, and smaller chunks would leave them idle.
_CHUNK = 2**21
_CHUNK_ELSEWHERE = 2**26


class Course(NamedTuple):
    """The direction in which images move; alpha is in the chosen unit.

    Attributes:
        image: Images where the course starts, [B, C, H, W] in [-1, 1].
        origin: Images from which changes are measured, [B, C, H, W]: ``image``, unless it was moved before.
        gradient: Gradient of the loss by images on [0, 1], [B, C, H, W].
        motions: Motions of the bands of the padded images; empty where coefficients are not turned.
        constant: Change that is added in proportion to alpha, [B, P, H, W]; None for no such change.
        line: Change per unit of alpha at alpha 0, [B, C, H, W]; zero where there is no gradient.
        shares: Shares of the gradient's energy in the residuals of the transform, [B] each.
    """

    image: Tensor
    origin: Tensor
    gradient: Tensor
    motions: list[Motion]
    constant: Tensor | None
    line: Tensor
    shares: dict[str, Tensor]


class Frames(NamedTuple):
    """Images on their course.

    Attributes:
        image: Frames in [-1, 1], [R, T, C, H, W].
        clipped: Share of the values that left the range and were clipped, [R, T].
        l2_norm: L2 norm on [0, 1] of the difference from the course's origin, [R, T].
    """

    image: Tensor
    clipped: Tensor
    l2_norm: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Extrapolator:
    """Turns gradients into courses and courses into frames; ``SteerableLens`` explains the options.

    Raises:
        ValueError: If an option is out of range, or options contradict each other.
    """

    transform: TransformName = "csp"
    orientations: int = 4
    scales: int | None = None
    synthesis: Synthesis = "adjoint"
    decimate: bool = True
    phase_rule: PhaseRule = "cartesian"
    eps: float = 0.1
    cap: float | None = math.pi / 2
    smoothing: float = 0.0
    beta: float = 0.0
    amplitude_mode: AmplitudeMode = "linear"
    residual_gain: float = 0.0
    colour: Colour = "rgb"
    padding: Padding = "reflect"
    alpha_unit: AlphaUnit = "rms"
    _transforms: dict[tuple[Any, ...], Transform] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if min(self.eps, self.smoothing, self.beta) < 0:
            raise ValueError(
                f"eps, smoothing and beta must not be negative, got {self.eps}, {self.smoothing} and {self.beta}."
            )
        if self.cap is not None and self.cap <= 0:
            raise ValueError(f"cap is a turn in radians and must be positive, or null for none, got {self.cap}.")
        if not 0 <= self.residual_gain <= 1:
            raise ValueError(f"residual_gain is a share from 0 to 1, got {self.residual_gain}.")
        if self.smoothing > 0 and (self.phase_rule != "cartesian" or self.transform != "csp"):
            raise ValueError("smoothing needs transform csp and phase_rule cartesian.")
        if self.alpha_unit == "phase" and self.is_straight:
            raise ValueError(f"transform {self.transform} turns no phases: choose another alpha_unit than phase.")

    @property
    def is_straight(self) -> bool:
        """Tells whether images move along a straight line instead of turning phases."""
        return self.transform in ("pixel", "csp_rect")

    @torch.no_grad()
    def course(self, image: Tensor, gradient: Tensor, origin: Tensor) -> Course:
        """Turns the gradient of a loss by images on [0, 1] into a direction from images in [-1, 1], all [B, C, H, W].

        Changes are measured from ``origin``.
        """
        # In chunks, like frames.
        transform, padded = self.transform_for(image), 2 * self._pad(image)
        held = 2 * image.shape[1] * (image.shape[2] + padded) * (image.shape[3] + padded) * self.orientations
        chunks = (values.split(_at_once(held, image.device)) for values in (image, gradient, origin))
        return joined([self._course(transform, *chunk) for chunk in zip(*chunks, strict=True)])

    def _course(self, transform: Transform, image: Tensor, gradient: Tensor, origin: Tensor) -> Course:
        # Planes.
        pad = self._pad(image)
        planes, slope = self._planes(images.to_unit(image)), self._planes(gradient, add_up=True)
        if pad:
            # Zeros around the gradient are the adjoint of the crop, so descent stays descent.
            planes = F.pad(planes, (pad, pad, pad, pad), mode="reflect")
            slope = F.pad(slope, (pad, pad, pad, pad))

        # Energy outside the bands.
        pull = transform.gradient(slope)
        energy = slope.flatten(1).square().sum(dim=1).clamp_min(torch.finfo(slope.dtype).tiny)
        shares = {
            name: part.flatten(1).square().sum(dim=1) / energy
            for name, part in zip(transform.residual_names, pull.residuals, strict=True)
        }

        # Direction, in the unit of alpha.
        motions, constant, line = self._descent(transform, planes, pull)
        line = self._crop(line, pad)
        scale = self._unit(line, motions, image.shape[1])
        by_image = scale.view(-1, 1, 1, 1)
        motions = [motion.scaled(scale) for motion in motions]
        constant = None if constant is None else constant * by_image
        return Course(image, origin, gradient, motions, constant, (line * by_image).expand_as(image), shares)

    def _descent(
        self, transform: Transform, planes: Tensor, pull: pyramid.Decomposition
    ) -> tuple[list[Motion], Tensor | None, Tensor]:
        """Returns motions, constant and line of a course for planes [B, P, H, W] and the gradient of coefficients."""
        if self.is_straight:
            line = -transform.synthesise(pull.bands, pull.residuals)
            return [], line, line
        motions = [
            descent(band, slope, rule=self.phase_rule, eps=self.eps, smoothing=self.smoothing, amplitudes=self.beta > 0)
            for band, slope in zip(transform.analyse(planes, residuals=False).bands, pull.bands, strict=True)
        ]
        changes = [motion.first_order(self.beta) for motion in motions]
        line = transform.synthesise(changes)
        if self.residual_gain == 0:
            return motions, None, line
        zeros = [torch.zeros_like(change) for change in changes]
        constant = -self.residual_gain * transform.synthesise(zeros, pull.residuals)
        return motions, constant, line + constant

    def _unit(self, line: Tensor, motions: list[Motion], channels: int) -> Tensor:
        """Returns the factor of alpha, [B]; zero where nothing moves."""
        # Luminance is added to all channels: its mean square over one plane is that over all, its norm is not.
        copies = channels / line.shape[1]
        norm = (line.flatten(1).square().sum(dim=1) * copies).sqrt()
        if self.alpha_unit == "phase":
            size = phases.mean_turn(motions)
        elif self.alpha_unit == "raw":
            size = torch.ones_like(norm)
        else:
            size = norm if self.alpha_unit == "l2" else norm / math.sqrt(copies * line[0].numel())
        return torch.where(size > 0, 1 / size, 0.0) * (norm > 0)

    @torch.no_grad()
    def frames(self, course: Course, alpha: Tensor, rounded: bool = False) -> Frames:
        """Makes frames of R images at strengths [R, T] of their course; ``rounded`` to the levels of an 8-bit file."""
        # Chunks, so that their bands stay in fast memory.
        num_rows, num_steps = alpha.shape
        size = course.image.shape[1:]
        found = Frames(course.image.new_empty((*alpha.shape, *size)), torch.empty_like(alpha), torch.empty_like(alpha))
        held = 2 * max((motion.band.shape[1:].numel() for motion in course.motions), default=size.numel())
        at_once = _at_once(held, alpha.device)
        wide = min(num_steps, at_once)
        tall = max(1, at_once // wide)

        # Frames.
        for top in range(0, num_rows, tall):
            rows = slice(top, top + tall)
            part = rows_of(course, rows)
            for left in range(0, num_steps, wide):
                columns = slice(left, left + wide)
                for whole, values in zip(found, self._frames(part, alpha[rows, columns], rounded), strict=True):
                    whole[rows, columns] = values
        return found

    def _frames(self, course: Course, alpha: Tensor, rounded: bool) -> Frames:
        # Change. It alone is synthesised: at alpha 0 the image comes back bit for bit.
        change = course.image.new_zeros(())
        if course.motions:
            cap, beta, mode = self.cap, self.beta, self.amplitude_mode
            bands = [motion.extrapolated(alpha, cap=cap, beta=beta, mode=mode) for motion in course.motions]
            change = self.transform_for(course.image).synthesise(bands)
        if course.constant is not None:
            change = change + alpha[:, :, None, None, None] * course.constant[:, None]

        # Image. A change of 1 on [0, 1] is one of 2 on [-1, 1].
        moved = torch.add(course.image[:, None], self._crop(change, self._pad(course.image)), alpha=2)
        clipped = (moved.abs() > 1).flatten(2).to(moved.dtype).mean(dim=2)
        moved = images.saved(moved) if rounded else moved.clamp_(-1, 1)
        norm = (moved - course.origin[:, None]).flatten(2).square_().sum(dim=2).sqrt() / 2
        return Frames(moved, clipped, norm)

    def _pad(self, image: Tensor) -> int:
        """Returns the pixels of padding on every side, needed because filters by FFT wrap round."""
        side = min(image.shape[-2:])
        return 0 if self.padding == "circular" or self.transform == "pixel" else min(max(4, side // 8), side - 1)

    def _crop(self, image: Tensor, pad: int) -> Tensor:
        return image[..., pad : image.shape[-2] - pad, pad : image.shape[-1] - pad] if pad else image

    def _planes(self, image: Tensor, add_up: bool = False) -> Tensor:
        """Returns the planes to be transformed, [B, C, H, W] -> [B, P, H, W]; ``add_up`` is for gradients."""
        if self.colour == "rgb" or image.shape[1] == 1:
            return image
        # The gradient by luminance, which is added to all channels, is the sum over channels.
        if add_up:
            return image.sum(dim=1, keepdim=True)
        return (image * image.new_tensor(_LUMINANCE).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)

    def transform_for(self, image: Tensor) -> Transform:
        """Returns the transform of padded images of this size; it is made once."""
        pad = self._pad(image)
        height, width = image.shape[-2] + 2 * pad, image.shape[-1] + 2 * pad
        key = (height, width, image.dtype, image.device)
        if key not in self._transforms:
            made: Transform
            if self.transform == "pixel":
                made = pyramid.PixelTransform()
            elif self.transform == "dft":
                made = pyramid.FourierTransform(height, width, dtype=image.dtype)
            else:
                # The scales follow from the size without padding.
                made = SteerablePyramid(
                    height,
                    width,
                    scales=pyramid.default_scales(*image.shape[-2:]) if self.scales is None else self.scales,
                    orientations=self.orientations,
                    decimate=self.decimate,
                    synthesis=self.synthesis,
                    dtype=image.dtype,
                )
            self._transforms[key] = made.to(image.device)
        return self._transforms[key]

    def motion(self, course: Course, alpha: Tensor) -> Tensor | None:
        """Returns the displacements at alpha [B] in pixels, [B, 2, H, W]; None for transforms without positions."""
        transform = self.transform_for(course.image)
        if not course.motions or not isinstance(transform, SteerablePyramid):
            return None
        with full_precision(alpha):
            field = phases.motion_field(course.motions, alpha, transform, cap=self.cap)
        return self._crop(field, self._pad(course.image))


def _at_once(held: int, device: torch.device) -> int:
    """Returns the number of images per chunk, if the largest band of one image holds ``held`` real numbers."""
    return max(1, (_CHUNK if device.type == "cpu" else _CHUNK_ELSEWHERE) // held)
