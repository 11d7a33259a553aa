"""Steerable Lens: how the classifier would move this image, magnified; nothing to train.

Paper: "Through a Steerable Lens: Magnifying Neural Network Interpretability via Phase-Based Extrapolation"
(Mahdisoltani et al. 2025, arXiv 2506.02300). One gradient of the classifier is read as an infinitesimal motion of the
phases of a complex steerable pyramid, and extrapolated.

The paper's exact update, its strengths and its number of scales are not public: ours are derived, and how they compare
is measured in ``docs/results.md``. Numbers are in units of [0, 1] images; see ``docs/methods/steerable_lens.md``.

Shapes: B images, C channels, H, W pixels, K classes, T strengths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cfe_lightning import images
from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.compute.precision import full_precision, to_float32
from cfe_lightning.compute.search import first_interval, refine
from cfe_lightning.decisions import decides_for, probability_along, sure_enough
from cfe_lightning.explainer import ExplainerModule
from cfe_lightning.explanation import Explanation
from cfe_lightning.methods.steerable_lens.course import (
    AlphaUnit,
    Colour,
    Course,
    Extrapolator,
    Frames,
    Padding,
    TransformName,
)
from cfe_lightning.methods.steerable_lens.phases import AmplitudeMode, PhaseRule
from cfe_lightning.methods.steerable_lens.pyramid import Synthesis

#: Pixels that the classifier is shown at a time.
_SHOWN = 2**20


@dataclass(kw_only=True, slots=True)
class _Found:
    """Frames along the way and the one that answers; what ``explain`` reports."""

    course: Course  # the first, if it was renewed
    steps: Frames
    logits: Tensor  # of the steps, [B, T, K]
    strengths: Tensor  # [B, T]
    alpha: Tensor  # [B]
    answer: Tensor  # [B, C, H, W]
    l2_norm: Tensor  # of its change, [B]
    clipped: Tensor  # share of its values, [B]
    reached: Tensor  # [B] bool


class SteerableLens(ExplainerModule):
    """Extrapolates the classifier's gradient in the phases of a complex steerable pyramid.

    Args:
        classifier: The classifier to be explained; gradients must reach the image.
        transform: "csp", the complex steerable pyramid; "dft", phases of the whole spectrum; "pixel", the gradient step
            to compare with; "csp_rect", a rectangular step in the pyramid, which equals "pixel" (a check).
        orientations: Of the pyramid.
        scales: Of the pyramid; None for as many as the image size gives.
        synthesis: "adjoint", or "two_sided" for comparison with pyramids such as plenoptic's.
        decimate: Keep only the samples that a scale needs.
        phase_rule: How the gradient turns phases, see ``phase_extrapolation.descent``.
        eps: Guard of small amplitudes, relative to a band's root mean square.
        cap: Largest turn in radians: beyond a quarter of a wave a phase is no motion; None for none.
        smoothing: Standard deviation of a blur over turns, in samples of a band; phase_rule "cartesian" only.
        beta: Weight of the amplitudes' growth: 0 moves phases only, 1 both.
        amplitude_mode: How amplitudes grow, "linear" or "log".
        residual_gain: How much of the gradient step the residuals take, 0 to 1: with 0 mean colours cannot change.
        loss: "nll" of the target, or "margin", the largest other logit minus the target's.
        colour: "rgb", every channel by itself, or "y", luminance only.
        padding: "reflect" around the image, or "circular" for none.
        alpha_unit: What alpha 1 is to first order: a "rms" change of pixels of 1, an "l2" norm of the change of 1, a
            mean turn ("phase") of 1 radian, or the "raw" gradient step.
        smallest_alpha: First of the strengths that are looked at.
        largest_alpha: Last of them.
        num_steps: How many, spaced evenly on a logarithmic scale; they are the steps of the explanation.
        bisections: Halvings between the first strength that meets the goal and the one before it.
        confidence: Look for this probability of the target instead of the decision.
        budget: Look for this L2 norm of the change instead, on [0, 1]; for comparisons.
        live_steps: 1 is the method; more renew the gradient so often on the way to ``largest_alpha``, in equal steps.
        eight_bit: Round frames to the levels of an 8-bit file before the classifier judges them: what is reported then
            holds for the saved pictures.

    Raises:
        ValueError: If an argument is out of range, or options contradict each other.
    """

    needs_training: ClassVar[bool] = False
    caution: ClassVar[str | None] = (
        "These pictures show what the classifier is sensitive to. A risen probability of the target is no evidence of "
        "a recognisable change: look at the picture before you believe the number."
    )

    def __init__(
        self,
        classifier: FrozenClassifier,
        *,
        transform: TransformName = "csp",
        orientations: int = 4,
        scales: int | None = None,
        synthesis: Synthesis = "adjoint",
        decimate: bool = True,
        phase_rule: PhaseRule = "cartesian",
        eps: float = 0.1,
        cap: float | None = math.pi / 2,
        smoothing: float = 0.0,
        beta: float = 0.0,
        amplitude_mode: AmplitudeMode = "linear",
        residual_gain: float = 0.0,
        loss: Literal["nll", "margin"] = "nll",
        colour: Colour = "rgb",
        padding: Padding = "reflect",
        alpha_unit: AlphaUnit = "rms",
        smallest_alpha: float = 1e-3,
        largest_alpha: float = 1.5,
        num_steps: int = 12,
        bisections: int = 7,
        confidence: float | None = None,
        budget: float | None = None,
        live_steps: int = 1,
        eight_bit: bool = True,
    ) -> None:
        super().__init__(classifier)
        if not 0 < smallest_alpha < largest_alpha:
            raise ValueError(
                f"smallest_alpha must be positive and below largest_alpha, got {smallest_alpha} and {largest_alpha}."
            )
        if num_steps < 2 or bisections < 0 or live_steps < 1:
            raise ValueError(
                "num_steps must be at least 2, bisections at least 0 and live_steps at least 1, got "
                f"{num_steps}, {bisections} and {live_steps}."
            )
        if confidence is not None and budget is not None:
            raise ValueError("confidence and budget are two goals: give one of them.")
        if confidence is not None and not 0 < confidence < 1:
            raise ValueError(f"confidence is a probability between 0 and 1, got {confidence}.")
        if budget is not None and budget <= 0:
            raise ValueError(f"budget is an L2 norm and must be positive, got {budget}.")
        self.extrapolator = Extrapolator(
            transform=transform,
            orientations=orientations,
            scales=scales,
            synthesis=synthesis,
            decimate=decimate,
            phase_rule=phase_rule,
            eps=eps,
            cap=cap,
            smoothing=smoothing,
            beta=beta,
            amplitude_mode=amplitude_mode,
            residual_gain=residual_gain,
            colour=colour,
            padding=padding,
            alpha_unit=alpha_unit,
        )
        # A number of scales that does not fit the images is refused now.
        self.extrapolator.transform_for(torch.empty(0, 1, self.image_size, self.image_size))
        self.loss = loss
        self.smallest_alpha = smallest_alpha
        self.largest_alpha = largest_alpha
        self.num_steps = num_steps
        self.bisections = bisections
        self.confidence = confidence
        self.budget = budget
        self.live_steps = live_steps
        self.eight_bit = eight_bit

    def course(
        self, image: Tensor, target: Tensor | None = None, origin: Tensor | None = None
    ) -> tuple[Course, Tensor]:
        """Reads the classifier's gradient at images as a direction.

        Args:
            image: [B, C, H, W] in [-1, 1].
            target: Classes to lead to, [B]; None asks for ``default_target``.
            origin: What changes are measured from, [B, C, H, W]; None for the images themselves.

        Returns:
            The course, and the classifier's logits of the images, [B, K].
        """
        # Lightning predicts without gradients, and its batches may be of inference mode.
        with torch.inference_mode(False), torch.enable_grad():
            leaf = image.detach().clone().requires_grad_()
            logits = self.classifier(leaf)
            target = self.default_target(logits.detach()) if target is None else target.clone()
            if self.loss == "nll":
                loss = F.cross_entropy(logits, target, reduction="sum")
            else:
                asked = logits.gather(1, target[:, None])
                # Where the target is predicted already its lead over the runner-up grows.
                loss = (logits.scatter(1, target[:, None], -torch.inf).amax(dim=1, keepdim=True) - asked).sum()
            (gradient,) = torch.autograd.grad(loss, leaf)
        # A step of 2 on [-1, 1] is one of 1 on [0, 1].
        course = self.extrapolator.course(image, 2 * gradient, image if origin is None else origin)
        return course, logits.detach().float()

    def frames(self, course: Course, alpha: Tensor) -> Frames:
        """Images at strengths [B, T] of their course, as they are shown to the classifier."""
        return self.extrapolator.frames(course, alpha, rounded=self.eight_bit)

    @torch.no_grad()
    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        """Magnifies the direction towards the target until the classifier decides for it.

        Args:
            image: [B, C, H, W] in [-1, 1].
            target: Classes asked for, [B]; None asks for the runner-up. Where a target is predicted already the answer
                is the image itself.

        Returns:
            An explanation with the strengths that were looked at as steps, each with ``l2_norm`` of its change and the
            share ``clipped`` of its values; the counterfactual is the weakest frame that meets the goal, or, where none
            does, the one with the highest probability of the target (which then is no flip). Part ``magnified`` is
            the strongest step that the classifier still takes for the target and in which the image is still seen
            (changed by at most half its contrast). Scores: ``reached`` (1 where the goal is
            met), ``alpha``, ``l2_norm`` and ``clipped`` of the counterfactual, ``slope`` (derivative of the loss by
            alpha at 0), ``cosine`` (of the first-order change and steepest descent in pixels), the shares of the
            gradient's energy that the bands do not hold, ``fine`` (share of the change's energy above half the Nyquist
            frequency) and ``nonmonotone`` (1 where the last step's probability is below half of the largest).
        """
        image = to_float32(image)
        # There is no FFT in half precision, and a rounded classifier has other gradients and other ties.
        with full_precision(image):
            return self._explained(image, target)

    def _explained(self, image: Tensor, target: Tensor | None) -> Explanation:
        course, logits = self.course(image, target)
        target = self.default_target(logits) if target is None else target
        found = self._one_shot(course, logits, target) if self.live_steps == 1 else self._live(course, logits, target)
        answer, course = found.answer, found.course
        answered = self.classifier(answer).float()
        change = images.to_unit(answer) - images.to_unit(image)
        p_target = probability_along(found.logits, target)
        return Explanation(
            image=image,
            logits=logits,
            target=target,
            attribution=change.abs().mean(dim=1, keepdim=True),
            counterfactual=answer,
            counterfactual_logits=answered,
            steps=found.steps.image,
            strengths=found.strengths,
            step_scores={"l2_norm": found.steps.l2_norm, "clipped": found.steps.clipped},
            parts={"magnified": _magnified(found, image, target)},
            # Of several steps each has its own.
            motion=self.extrapolator.motion(course, found.alpha) if self.live_steps == 1 else None,
            scores={
                "reached": found.reached.to(image.dtype),
                "alpha": found.alpha,
                "l2_norm": found.l2_norm,
                "clipped": found.clipped,
                "slope": (course.gradient * course.line).flatten(1).sum(dim=1),
                "cosine": -F.cosine_similarity(course.gradient.flatten(1), course.line.flatten(1)),
                **{f"gradient_{name}": share for name, share in course.shares.items()},
                "fine": _share_of_fine(change),
                "nonmonotone": (p_target[:, -1] < p_target.amax(dim=1) / 2).to(image.dtype),
            },
            caveats=self._caveats(found, decides_for(answered, target)),
        )

    def _caveats(self, found: _Found, flipped: Tensor) -> dict[str, Tensor]:
        still = (found.course.line == 0).flatten(1).all(dim=1)
        missing = ~found.reached & ~still
        if self.budget is not None:
            missed = "no strength of this direction changes the image by as much as asked"
        elif self.confidence is not None:
            missed = "no strength of this direction makes the classifier as sure as asked"
        else:
            missed = "no strength of this direction changes the decision: shown is the frame that comes closest"
            # A frame that is hardly ahead is not what was looked for, but it is a flip.
            missing = missing & ~flipped
        return {
            "the classifier's gradient vanishes here, so there is nothing to magnify": still,
            missed: missing,
        }

    def _one_shot(self, course: Course, logits: Tensor, target: Tensor) -> _Found:
        """All strengths at once, then bisection before the first that meets the goal."""
        image = course.image
        low, high = math.log(self.smallest_alpha), math.log(self.largest_alpha)
        grid = torch.linspace(low, high, self.num_steps, device=image.device, dtype=image.dtype).exp()
        strengths = grid.expand(len(image), -1).contiguous()
        steps = self.frames(course, strengths)
        said = self._judge(steps.image)
        met = self._meets_goal(F.pad(steps.l2_norm, (1, 0)), torch.cat([logits[:, None], said], dim=1), target)
        below, above, reached = first_interval(F.pad(strengths, (1, 0)), met)
        self._refine(course, target, below, above, torch.nonzero(reached & (above > 0)).squeeze(1))
        alpha = torch.where(reached, above, strengths.gather(1, _likeliest(said, target)).squeeze(1))
        answer = self.frames(course, alpha[:, None])
        # An image that needs no change is given back as it is, not rounded.
        picture = torch.where((alpha == 0).view(-1, 1, 1, 1), image, answer.image[:, 0])
        return _Found(
            course=course,
            steps=steps,
            logits=said,
            strengths=strengths,
            alpha=alpha,
            answer=picture,
            l2_norm=torch.where(alpha == 0, 0, answer.l2_norm[:, 0]),
            clipped=answer.clipped[:, 0],
            reached=reached,
        )

    def _live(self, course: Course, logits: Tensor, target: Tensor) -> _Found:
        """Equal steps, each along the gradient where the last one ended; the one that meets the goal is bisected."""
        image, first = course.image, course
        size = self.largest_alpha / self.live_steps
        step = image.new_full((len(image), 1), size)
        zero = torch.zeros_like(step[:, 0])
        reached = self._meets_goal(zero[:, None], logits[:, None], target)[:, 0]
        alpha, answer = zero, Frames(image.clone(), zero.clone(), zero.clone())
        path: list[Frames] = []
        judged: list[Tensor] = []
        for index in range(self.live_steps):
            if index:
                # From where the last step ended, not from its rounded picture: small steps would be lost.
                moved = self.extrapolator.frames(course, step).image[:, 0]
                course, _ = self.course(moved, target, image)
            path.append(self.frames(course, step))
            judged.append(self._judge(path[-1].image))
            met = self._meets_goal(path[-1].l2_norm, judged[-1], target)[:, 0] & ~reached
            rows = torch.nonzero(met).squeeze(1)
            high = step[:, 0].clone()
            self._refine(course, target, torch.zeros_like(high), high, rows)
            for whole, part in zip(answer, self.frames(course.rows(rows), high[rows, None]), strict=True):
                whole[rows] = part[:, 0]
            alpha = torch.where(met, index * size + high, alpha)
            reached = reached | met
        steps = Frames(*(torch.cat(values, dim=1) for values in zip(*path, strict=True)))
        said = torch.cat(judged, dim=1)
        strengths = size * torch.arange(1, self.live_steps + 1, device=image.device, dtype=image.dtype)
        closest = _likeliest(said, target).squeeze(1)
        # Where nothing was found, the step that comes closest stands for it.
        every = torch.arange(len(image), device=image.device)
        for whole, part in zip(answer, steps, strict=True):
            whole[~reached] = part[every, closest][~reached]
        return _Found(
            course=first,
            steps=steps,
            logits=said,
            strengths=strengths.expand(len(image), -1).contiguous(),
            alpha=torch.where(reached, alpha, strengths[closest]),
            answer=answer.image,
            l2_norm=answer.l2_norm,
            clipped=answer.clipped,
            reached=reached,
        )

    def _refine(self, course: Course, target: Tensor, low: Tensor, high: Tensor, rows: Tensor) -> None:
        """Bisects, in place, the strengths between which the images ``rows`` meet the goal."""

        def reached(alpha: Tensor, rows: Tensor) -> Tensor:
            frames = self.frames(course.rows(rows), alpha)
            return self._meets_goal(frames.l2_norm, self._judge(frames.image), target[rows])

        refine(reached, low, high, rows, points=1, rounds=self.bisections)

    def _judge(self, frames: Tensor) -> Tensor:
        """The classifier's logits of frames, [B, T, C, H, W] -> [B, T, K]."""
        return self.classifier.along(frames, max(1, _SHOWN // frames[0, 0, 0].numel())).float()

    def _meets_goal(self, l2_norm: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        """Whether frames with changes [B, T] and logits [B, T, K] are what is looked for, [B, T]."""
        if self.budget is not None:
            return l2_norm >= self.budget
        return sure_enough(logits, target, self.confidence)


def _likeliest(logits: Tensor, target: Tensor) -> Tensor:
    """The step at which the target is most probable, [B, T, K] -> [B, 1]."""
    return probability_along(logits, target).argmax(dim=1, keepdim=True)


def _magnified(found: _Found, image: Tensor, target: Tensor) -> Tensor:
    """The strongest step that is decided for the target and in which the image is still seen, [B, C, H, W].

    It changes the image by no more than half its contrast. The answer where none is.
    """
    contrast = images.to_unit(image).flatten(1).std(dim=1)
    change = found.steps.l2_norm / math.sqrt(image[0].numel())
    kept = (
        (found.logits.argmax(dim=2) == target[:, None])
        & (change <= contrast[:, None] / 2)
        & (found.strengths > found.alpha[:, None])
    )
    last = kept.shape[1] - 1 - kept.flip(1).to(torch.int8).argmax(dim=1)
    strongest = found.steps.image[torch.arange(len(kept), device=kept.device), last]
    return torch.where(kept.any(dim=1).view(-1, 1, 1, 1), strongest, found.answer)


def _share_of_fine(change: Tensor) -> Tensor:
    """Share of the energy above half the Nyquist frequency, [B, C, H, W] -> [B]; 0 without change."""
    energy = torch.fft.fft2(change).abs().square().sum(dim=1)
    f_y, f_x = (2 * torch.fft.fftfreq(n, device=change.device) for n in change.shape[-2:])
    fine = (f_y[:, None].square() + f_x.square()).sqrt() > 0.5
    total = energy.flatten(1).sum(dim=1)
    return (energy * fine).flatten(1).sum(dim=1) / total.clamp_min(torch.finfo(total.dtype).tiny)
