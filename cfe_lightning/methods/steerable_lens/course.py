"""From the gradient at an image to images along it: the direction of Steerable Lens and how it is extrapolated.

Numbers are in units of [0, 1] images. Sources: as for ``phase_extrapolation``.

Shapes: B images, C channels, P planes (C, or 1 for luminance), H, W pixels, T strengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from cfe_lightning import images
from cfe_lightning.compute.precision import full_precision
from cfe_lightning.methods.steerable_lens.phases import (
    AmplitudeMode,
    Motion,
    PhaseRule,
    descent,
    mean_turn,
    motion_field,
)
from cfe_lightning.methods.steerable_lens.pyramid import (
    FourierTransform,
    PixelTransform,
    SteerablePyramid,
    Synthesis,
    Transform,
    default_scales,
)

TransformName = Literal["csp", "dft", "pixel", "csp_rect"]
AlphaUnit = Literal["rms", "l2", "phase", "raw"]
Colour = Literal["rgb", "y"]
Padding = Literal["reflect", "circular"]

#: Luminance of ITU-R 601, the Y of YIQ; adding to it adds the same to red, green and blue.
_LUMINANCE = (0.299, 0.587, 0.114)
#: Real numbers that the largest band of all frames in work may hold. On a CPU more is slower, because memory is; on
#: other devices every call costs, and less would leave them idle.
_CHUNK = 2**21
_CHUNK_ELSEWHERE = 2**26


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """In which direction images go; alpha is in the unit that was asked for.

    Attributes:
        image: Where they start, [B, C, H, W] in [-1, 1].
        origin: The images that the changes are measured from: ``image`` unless it was moved before, [B, C, H, W].
        gradient: Of the loss with respect to them on [0, 1], [B, C, H, W].
        motions: Of the bands, of images with the padding around them; empty where coefficients are not turned.
        constant: What is added in proportion to alpha besides, [B, P, H, W]; None for nothing.
        line: The change per unit of alpha at alpha 0, [B, C, H, W]; zero where there is no gradient.
        shares: Shares of the gradient's energy that the transform's residuals hold, [B] each.
    """

    image: Tensor
    origin: Tensor
    gradient: Tensor
    motions: list[Motion]
    constant: Tensor | None
    line: Tensor
    shares: dict[str, Tensor]

    def rows(self, rows: Tensor | slice) -> Course:
        """The course of some of the images."""
        return Course._each(lambda parts: parts[0][rows], [self])

    @staticmethod
    def joined(parts: Sequence[Course]) -> Course:
        """The course of the images of several."""
        return Course._each(lambda values: torch.cat([*values]), parts) if len(parts) > 1 else parts[0]

    @staticmethod
    def _each(change: Callable[[Sequence[Tensor]], Tensor], parts: Sequence[Course]) -> Course:
        """What becomes of every tensor of courses that are alike."""
        first = parts[0]
        motions = [
            Motion(
                band=change([motion.band for motion in each]),
                turn=change([motion.turn for motion in each]),
                growth=None if each[0].growth is None else change([cast(Tensor, motion.growth) for motion in each]),
            )
            for each in zip(*(part.motions for part in parts), strict=True)
        ]
        return Course(
            image=change([part.image for part in parts]),
            origin=change([part.origin for part in parts]),
            gradient=change([part.gradient for part in parts]),
            motions=motions,
            constant=None if first.constant is None else change([cast(Tensor, part.constant) for part in parts]),
            line=change([part.line for part in parts]),
            shares={name: change([part.shares[name] for part in parts]) for name in first.shares},
        )


class Frames(NamedTuple):
    """Images on their course.

    Attributes:
        image: [R, T, C, H, W] in [-1, 1].
        clipped: Share of their values that left the range and were clipped, [R, T].
        l2_norm: L2 norm on [0, 1] of their difference from the image that the course is about, [R, T].
    """

    image: Tensor
    clipped: Tensor
    l2_norm: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Extrapolator:
    """What the options of ``SteerableLens`` of the same names say about the direction.

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
        """Whether images move along a straight line instead of turning phases."""
        return self.transform in ("pixel", "csp_rect")

    @torch.no_grad()
    def course(self, image: Tensor, gradient: Tensor, origin: Tensor) -> Course:
        """Reads a gradient as a direction.

        Args:
            image: [B, C, H, W] in [-1, 1].
            gradient: Of the loss with respect to the image on [0, 1], [B, C, H, W].
            origin: What changes are measured from, [B, C, H, W] in [-1, 1].
        """
        # Some at a time, like frames.
        transform = self.transform_for(image)
        padded = self._pad(image) * 2
        held = 2 * image.shape[1] * (image.shape[2] + padded) * (image.shape[3] + padded) * self.orientations
        at_once = _at_once(held, image.device)
        parts = [
            self._some_course(transform, *some)
            for some in zip(image.split(at_once), gradient.split(at_once), origin.split(at_once), strict=True)
        ]
        return Course.joined(parts)

    def _some_course(self, transform: Transform, image: Tensor, gradient: Tensor, origin: Tensor) -> Course:
        pad = self._pad(image)
        planes, slope = (self._planes(images.to_unit(image)), self._planes(gradient, add_up=True))
        if pad:
            # Zeros around the gradient are the adjoint of the crop, so descent stays descent.
            planes = F.pad(planes, (pad, pad, pad, pad), mode="reflect")
            slope = F.pad(slope, (pad, pad, pad, pad))
        there = transform.gradient(slope)
        energy = slope.flatten(1).square().sum(dim=1).clamp_min(torch.finfo(slope.dtype).tiny)
        shares = {
            name: part.flatten(1).square().sum(dim=1) / energy
            for name, part in zip(transform.residual_names, there.residuals, strict=True)
        }
        motions: list[Motion] = []
        constant: Tensor | None = None
        if self.is_straight:
            constant = -transform.synthesise(there.bands, there.residuals)
            line = constant
        else:
            motions = [
                descent(
                    band,
                    pull,
                    rule=self.phase_rule,
                    eps=self.eps,
                    smoothing=self.smoothing,
                    amplitudes=self.beta > 0,
                )
                for band, pull in zip(transform.analyse(planes, residuals=False).bands, there.bands, strict=True)
            ]
            bands = [motion.first_order(self.beta) for motion in motions]
            if self.residual_gain > 0:
                zeros = [torch.zeros_like(band) for band in bands]
                constant = -self.residual_gain * transform.synthesise(zeros, there.residuals)
            line = transform.synthesise(bands)
            line = line if constant is None else line + constant
        line = self._crop(line, pad)
        scale = self._unit(line, motions, image.shape[1])
        by_image = scale.view(-1, 1, 1, 1)
        return Course(
            image=image,
            origin=origin,
            gradient=gradient,
            motions=[motion.scaled(scale) for motion in motions],
            constant=None if constant is None else constant * by_image,
            line=(line * by_image).expand_as(image),
            shares=shares,
        )

    def _unit(self, line: Tensor, motions: list[Motion], channels: int) -> Tensor:
        """What alpha is multiplied by, [B]; zero where nothing moves."""
        # Luminance is added to all channels: the mean over one plane is that over all, the norm is not.
        copies = channels / line.shape[1]
        norm = (line.flatten(1).square().sum(dim=1) * copies).sqrt()
        if self.alpha_unit == "phase":
            size = mean_turn(motions)
        elif self.alpha_unit == "raw":
            size = torch.ones_like(norm)
        else:
            size = norm if self.alpha_unit == "l2" else norm / math.sqrt(copies * line[0].numel())
        return torch.where(size > 0, 1 / size, 0.0) * (norm > 0)

    @torch.no_grad()
    def frames(self, course: Course, alpha: Tensor, rounded: bool = False) -> Frames:
        """Images at some strengths of their course.

        Args:
            course: Of R images.
            alpha: [R, T].
            rounded: To the levels of an 8-bit file.
        """
        num_rows, num_steps = alpha.shape
        found = Frames(
            course.image.new_empty((num_rows, num_steps, *course.image.shape[1:])),
            torch.empty_like(alpha),
            torch.empty_like(alpha),
        )
        # A part at a time, so that what it needs stays in memory that is at hand.
        held = 2 * max(
            (motion.band.shape[1:].numel() for motion in course.motions), default=course.image.shape[1:].numel()
        )
        at_once = _at_once(held, alpha.device)
        wide = min(num_steps, at_once)
        tall = max(1, at_once // wide)
        for top in range(0, num_rows, tall):
            rows = slice(top, top + tall)
            some = course.rows(rows)
            for left in range(0, num_steps, wide):
                columns = slice(left, left + wide)
                for whole, part in zip(found, self._some_frames(some, alpha[rows, columns], rounded), strict=True):
                    whole[rows, columns] = part
        return found

    def _some_frames(self, course: Course, alpha: Tensor, rounded: bool) -> Frames:
        transform = self.transform_for(course.image)
        # The change alone is synthesised: at alpha 0 the image comes back bit for bit.
        change = course.image.new_zeros(())
        if course.motions:
            change = transform.synthesise(
                [
                    motion.extrapolated(alpha, cap=self.cap, beta=self.beta, mode=self.amplitude_mode)
                    for motion in course.motions
                ]
            )
        if course.constant is not None:
            change = change + alpha[:, :, None, None, None] * course.constant[:, None]
        # A change of 1 on [0, 1] is one of 2 on [-1, 1].
        moved = torch.add(course.image[:, None], self._crop(change, self._pad(course.image)), alpha=2)
        clipped = (moved.abs() > 1).flatten(2).to(moved.dtype).mean(dim=2)
        moved = images.saved(moved) if rounded else moved.clamp_(-1, 1)
        norm = (moved - course.origin[:, None]).flatten(2).square_().sum(dim=2).sqrt() / 2
        return Frames(moved, clipped, norm)

    def _pad(self, image: Tensor) -> int:
        """Pixels of padding on every side: filters by FFT wrap round."""
        side = min(image.shape[-2:])
        if self.padding == "circular" or self.transform == "pixel":
            return 0
        return min(max(4, side // 8), side - 1)

    def _crop(self, image: Tensor, pad: int) -> Tensor:
        return image[..., pad : image.shape[-2] - pad, pad : image.shape[-1] - pad] if pad else image

    def _planes(self, image: Tensor, add_up: bool = False) -> Tensor:
        """What is transformed, [B, C, H, W] -> [B, P, H, W]; gradients by luminance add channels up."""
        if self.colour == "rgb" or image.shape[1] == 1:
            return image
        if add_up:
            return image.sum(dim=1, keepdim=True)
        return (image * image.new_tensor(_LUMINANCE).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)

    def transform_for(self, image: Tensor) -> Transform:
        """The transform of padded images of this size, made once."""
        pad = self._pad(image)
        height, width = image.shape[-2] + 2 * pad, image.shape[-1] + 2 * pad
        key = (height, width, image.dtype, image.device)
        if key not in self._transforms:
            made: Transform
            if self.transform == "pixel":
                made = PixelTransform()
            elif self.transform == "dft":
                made = FourierTransform(height, width, dtype=image.dtype)
            else:
                made = SteerablePyramid(
                    height,
                    width,
                    scales=default_scales(*image.shape[-2:]) if self.scales is None else self.scales,
                    orientations=self.orientations,
                    decimate=self.decimate,
                    synthesis=self.synthesis,
                    dtype=image.dtype,
                )
            self._transforms[key] = made.to(image.device)
        return self._transforms[key]

    def motion(self, course: Course, alpha: Tensor) -> Tensor | None:
        """Where structure moves, alpha [B] -> [B, 2, H, W] in pixels; None of a transform that knows no places."""
        transform = self.transform_for(course.image)
        if not course.motions or not isinstance(transform, SteerablePyramid):
            return None
        with full_precision(alpha):
            field = motion_field(course.motions, alpha, transform, cap=self.cap)
        return self._crop(field, self._pad(course.image))


def _at_once(held: int, device: torch.device) -> int:
    """How many images with bands of so many numbers are worked on together."""
    return max(1, (_CHUNK if device.type == "cpu" else _CHUNK_ELSEWHERE) // held)
