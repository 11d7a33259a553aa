"""Steerable Lens: the motion by which the classifier would change its decision, magnified; nothing to train.

Paper: "Through a Steerable Lens: Magnifying Neural Network Interpretability via Phase-Based Extrapolation"
(Mahdisoltani et al. 2025, arXiv 2506.02300). One gradient of the classifier is read as an infinitesimal motion of the
phases of a complex steerable pyramid, and extrapolated.

The paper's exact update, its strengths and its number of scales are not public. Ours are derived in
``docs/methods/steerable_lens.md`` and compared in ``docs/results.md``. Numbers are in units of [0, 1] images.

Shapes: B images, C channels, H, W pixels, K classes, T strengths.
"""

import math
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cfe_lightning import images
from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.compute.precision import full_precision, to_float32
from cfe_lightning.compute.rows import rows_of
from cfe_lightning.compute.search import first_interval, refine
from cfe_lightning.decisions import decides_for, lead, probability, sure_enough
from cfe_lightning.explainer import ExplainerModule
from cfe_lightning.explanation import Explanation
from cfe_lightning.methods.steerable_lens.course import AlphaUnit, Colour, Course, Extrapolator, Frames, Padding
from cfe_lightning.methods.steerable_lens.phases import AmplitudeMode, PhaseRule
from cfe_lightning.methods.steerable_lens.pyramid import Synthesis, TransformName

#: Pixels that the classifier judges at a time.
_PIXELS_AT_ONCE = 2**20


class _Found(NamedTuple):
    """The result of a search: the examined frames, and the one that answers."""

    course: Course  # of the first gradient
    steps: Frames
    logits: Tensor  # of the steps, [B, T, K]
    strengths: Tensor  # of the steps, [B, T]
    answer: Frames  # the weakest frame that meets the goal, or the one that comes closest, [B, C, H, W]
    alpha: Tensor  # strength of the answer, [B]
    reached: Tensor  # the answer meets the goal, [B] bool


class SteerableLens(ExplainerModule):
    """Extrapolates the classifier's gradient in the phases of a complex steerable pyramid.

    Args:
        classifier: The classifier to be explained; gradients must reach the image.
        transform: Coordinates of the step: "csp", the complex steerable pyramid; "dft", phases of the whole spectrum;
            "pixel", a plain gradient step; "csp_rect", a rectangular step in the pyramid, which equals "pixel".
        orientations: Number of orientations of the pyramid.
        scales: Number of scales of the pyramid; None takes as many as the image size allows.
        synthesis: "adjoint", or "two_sided" for comparison with pyramids such as plenoptic's.
        decimate: Keeps only the samples that the frequencies of a scale need.
        phase_rule: How the gradient turns phases: "cartesian" as a magnified gradient step would, "coordinate" strong
            structure only, "unit" smoothly in between.
        eps: Guard against small amplitudes, relative to the root mean square of a band.
        cap: Largest turn in radians, because beyond a quarter of a wave a turn is no motion; None for none.
        smoothing: Standard deviation of a blur over turns, in samples of a band; phase_rule "cartesian" only.
        beta: Weight of the growth of amplitudes: 0 moves phases only, 1 both.
        amplitude_mode: How amplitudes grow, "linear" or "log".
        residual_gain: Share of the gradient step that the residuals take, 0 to 1; with 0, mean colours cannot change.
        loss: "nll", the target's negative log-likelihood, or "margin", the largest other logit minus the target's.
        colour: "rgb", every channel by itself, or "y", luminance only.
        padding: "reflect" around the image, or "circular" for none.
        alpha_unit: Change that strength 1 makes to first order: a root mean square of the pixels of 1 ("rms"), an L2
            norm of 1 ("l2"), a mean turn of 1 radian ("phase"), or the gradient step ("raw").
        smallest_alpha: Smallest strength of the search.
        largest_alpha: Largest strength of the search.
        num_steps: Number of strengths, evenly spaced on a logarithmic scale; they are the steps of the explanation.
        bisections: Halvings between the first strength that meets the goal and the one before it.
        confidence: Probability that the target must reach; None stops at a clear decision for the target.
        budget: L2 norm on [0, 1] that the change must reach, for comparisons; None leaves the goal to ``confidence``.
        live_steps: Number of gradients: 1 is the method; more renew the gradient on the way to ``largest_alpha``, in
            equal steps.
        eight_bit: Rounds frames to the levels of an 8-bit file before the classifier judges them, so that all reported
            numbers hold for the saved pictures.

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
        # Ranges.
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

        # Direction.
        # fmt: off
        self.extrapolator = Extrapolator(
            transform=transform, orientations=orientations, scales=scales, synthesis=synthesis, decimate=decimate,
            phase_rule=phase_rule, eps=eps, cap=cap, smoothing=smoothing, beta=beta, amplitude_mode=amplitude_mode,
            residual_gain=residual_gain, colour=colour, padding=padding, alpha_unit=alpha_unit,
        )
        # fmt: on
        # Refuses a number of scales that does not fit the images now, not in the first explanation.
        self.extrapolator.transform_for(torch.empty(0, 1, self.image_size, self.image_size))

        # Search.
        self.loss = loss
        self.smallest_alpha, self.largest_alpha = smallest_alpha, largest_alpha
        self.num_steps, self.bisections, self.live_steps = num_steps, bisections, live_steps
        self.confidence, self.budget = confidence, budget
        self.eight_bit = eight_bit

    def course(
        self, image: Tensor, target: Tensor | None = None, origin: Tensor | None = None
    ) -> tuple[Course, Tensor]:
        """Turns the classifier's gradient at images [B, C, H, W] into a course towards target classes [B].

        Changes are measured from ``origin``, [B, C, H, W]; None takes the images themselves.

        Returns:
            The course, and the classifier's logits of the images, [B, K].
        """
        # Lightning predicts without gradients, and its batches may be in inference mode.
        with torch.inference_mode(False), torch.enable_grad():
            leaf = image.detach().clone().requires_grad_()
            logits = self.classifier(leaf)
            target = self.default_target(logits.detach()) if target is None else target.clone()
            if self.loss == "nll":
                loss = F.cross_entropy(logits, target, reduction="sum")
            else:
                # Where the target is already predicted, its lead over the runner-up grows.
                loss = (-lead(logits, target)).sum()
            (gradient,) = torch.autograd.grad(loss, leaf)
        # A step of 2 on [-1, 1] is one of 1 on [0, 1].
        course = self.extrapolator.course(image, 2 * gradient, image if origin is None else origin)
        return course, logits.detach().float()

    def frames(self, course: Course, alpha: Tensor) -> Frames:
        """Makes images at strengths [B, T] of their course, as the classifier sees them."""
        return self.extrapolator.frames(course, alpha, rounded=self.eight_bit)

    @torch.no_grad()
    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        """Magnifies the direction from images [B, C, H, W] towards targets [B] until the classifier decides for them.

        Where a target is already predicted, the answer is the image itself.

        Returns:
            An explanation. Its steps are the examined strengths, each with the ``l2_norm`` of its change and the share
            of ``clipped`` values. The counterfactual is the weakest frame that meets the goal; where none does, it is
            the frame with the highest probability of the target, which then is no flip. Part ``magnified`` is the
            strongest step that is decided for the target and changes the image by at most half its contrast. Scores:
            ``reached`` (1 where the goal is met), ``alpha``, ``l2_norm`` and ``clipped`` of the counterfactual,
            ``slope`` (derivative of the loss by alpha at 0), ``cosine`` (of the first-order change and steepest descent
            in pixels), ``gradient_<residual>`` (share of the gradient's energy outside the bands), ``fine`` (share of
            the change's energy above half the Nyquist frequency) and ``nonmonotone`` (1 where the last step's
            probability is below half of the largest).
        """
        image = to_float32(image)
        # Half precision has no FFT, and a rounded classifier has other gradients and other ties.
        with full_precision(image):
            return self._explained(image, target)

    def _explained(self, image: Tensor, target: Tensor | None) -> Explanation:
        # Search.
        course, logits = self.course(image, target)
        target = self.default_target(logits) if target is None else target
        found = self._one_shot(course, logits, target) if self.live_steps == 1 else self._live(course, logits, target)

        # Answer.
        answer, course = found.answer.image, found.course
        answered = self.classifier(answer).float()
        change = images.to_unit(answer) - images.to_unit(image)
        p_target = probability(found.logits, target)
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
            # Several live steps have no common motion.
            motion=self.extrapolator.motion(course, found.alpha) if self.live_steps == 1 else None,
            scores={
                "reached": found.reached.to(image.dtype),
                "alpha": found.alpha,
                "l2_norm": found.answer.l2_norm,
                "clipped": found.answer.clipped,
                "slope": (course.gradient * course.line).flatten(1).sum(dim=1),
                "cosine": -F.cosine_similarity(course.gradient.flatten(1), course.line.flatten(1)),
                **{f"gradient_{name}": share for name, share in course.shares.items()},
                "fine": _share_of_fine(change),
                "nonmonotone": (p_target[:, -1] < p_target.amax(dim=1) / 2).to(image.dtype),
            },
            caveats=self._caveats(found, decides_for(answered, target)),
        )

    def _caveats(self, found: _Found, flipped: Tensor) -> dict[str, Tensor]:
        # Without a gradient there is no goal to miss.
        still = (found.course.line == 0).flatten(1).all(dim=1)
        missing = ~found.reached & ~still
        if self.budget is not None:
            missed = "no strength of this direction changes the image by as much as asked"
        elif self.confidence is not None:
            missed = "no strength of this direction makes the classifier as sure as asked"
        else:
            missed = "no strength of this direction changes the decision: shown is the frame that comes closest"
            # A frame with a small lead misses the goal, but it is a flip.
            missing = missing & ~flipped
        return {"the classifier's gradient vanishes here, so there is nothing to magnify": still, missed: missing}

    def _one_shot(self, course: Course, logits: Tensor, target: Tensor) -> _Found:
        """Examines all strengths at once, then bisects before the first that meets the goal."""
        # Grid.
        image = course.image
        low, high = math.log(self.smallest_alpha), math.log(self.largest_alpha)
        grid = torch.linspace(low, high, self.num_steps, device=image.device, dtype=image.dtype).exp()
        strengths = grid.expand(len(image), -1).contiguous()
        steps = self.frames(course, strengths)
        answers = self._judge(steps.image)

        # First strength that meets the goal. The image itself stands before the grid.
        met = self._meets_goal(F.pad(steps.l2_norm, (1, 0)), torch.cat([logits[:, None], answers], dim=1), target)
        below, above, reached = first_interval(F.pad(strengths, (1, 0)), met)
        self._refine(course, target, below, above, torch.nonzero(reached & (above > 0)).squeeze(1))
        alpha = torch.where(reached, above, strengths.gather(1, _likeliest(answers, target)).squeeze(1))

        # Answer. An image that needs no change is returned as it is, not rounded.
        still = alpha == 0
        picture, clipped, l2_norm = (values[:, 0] for values in self.frames(course, alpha[:, None]))
        picture = torch.where(still.view(-1, 1, 1, 1), image, picture)
        answer = Frames(image=picture, clipped=clipped, l2_norm=torch.where(still, 0, l2_norm))
        return _Found(course, steps, answers, strengths, answer, alpha, reached)

    def _live(self, course: Course, logits: Tensor, target: Tensor) -> _Found:
        """Takes equal steps, each along the gradient at the end of the last; bisects the first that meets the goal."""
        # Start.
        image, first, size = course.image, course, self.largest_alpha / self.live_steps
        step = image.new_full((len(image), 1), size)
        zero = torch.zeros_like(step[:, 0])
        reached = self._meets_goal(zero[:, None], logits[:, None], target)[:, 0]
        alpha, answer = zero, Frames(image.clone(), zero.clone(), zero.clone())
        path: list[Frames] = []
        judged: list[Tensor] = []

        # Steps.
        for index in range(self.live_steps):
            if index:
                # From the unrounded end of the last step: rounding would lose small steps.
                moved = self.extrapolator.frames(course, step).image[:, 0]
                course, _ = self.course(moved, target, image)
            path.append(self.frames(course, step))
            judged.append(self._judge(path[-1].image))
            met = self._meets_goal(path[-1].l2_norm, judged[-1], target)[:, 0] & ~reached
            rows, high = torch.nonzero(met).squeeze(1), step[:, 0].clone()
            self._refine(course, target, zero.clone(), high, rows)
            for whole, part in zip(answer, self.frames(rows_of(course, rows), high[rows, None]), strict=True):
                whole[rows] = part[:, 0]
            alpha = torch.where(met, index * size + high, alpha)
            reached = reached | met

        # Answer. Where nothing was found, it is the step that comes closest.
        steps = Frames(*(torch.cat(values, dim=1) for values in zip(*path, strict=True)))
        answers = torch.cat(judged, dim=1)
        strengths = size * torch.arange(1, self.live_steps + 1, device=image.device, dtype=image.dtype)
        closest = _likeliest(answers, target).squeeze(1)
        for whole, part in zip(answer, steps, strict=True):
            whole[~reached] = part[~reached, closest[~reached]]
        alpha = torch.where(reached, alpha, strengths[closest])
        return _Found(first, steps, answers, strengths.expand(len(image), -1).contiguous(), answer, alpha, reached)

    def _refine(self, course: Course, target: Tensor, low: Tensor, high: Tensor, rows: Tensor) -> None:
        """Bisects, in place, the strengths between which the images ``rows`` come to meet the goal."""

        def reached(alpha: Tensor, rows: Tensor) -> Tensor:
            frames = self.frames(rows_of(course, rows), alpha)
            return self._meets_goal(frames.l2_norm, self._judge(frames.image), target[rows])

        refine(reached, low, high, rows, points=1, rounds=self.bisections)

    def _judge(self, frames: Tensor) -> Tensor:
        """Returns the classifier's logits of frames, [B, T, C, H, W] -> [B, T, K]."""
        return self.classifier.along(frames, max(1, _PIXELS_AT_ONCE // frames[0, 0, 0].numel())).float()

    def _meets_goal(self, l2_norm: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        """Tells whether frames with changes [B, T] and logits [B, T, K] meet the goal, [B, T]."""
        if self.budget is not None:
            return l2_norm >= self.budget
        return sure_enough(logits, target, self.confidence)


def _likeliest(logits: Tensor, target: Tensor) -> Tensor:
    """Returns the step at which the target is most probable, [B, T, K] -> [B, 1]."""
    return probability(logits, target).argmax(dim=1, keepdim=True)


def _magnified(found: _Found, image: Tensor, target: Tensor) -> Tensor:
    """Returns the strongest step decided for the target that changes the image by at most half its contrast.

    Where there is no such step beyond the answer, it returns the answer, [B, C, H, W].
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
    return torch.where(kept.any(dim=1).view(-1, 1, 1, 1), strongest, found.answer.image)


def _share_of_fine(change: Tensor) -> Tensor:
    """Returns the share of energy above half the Nyquist frequency, [B, C, H, W] -> [B]; 0 without change."""
    energy = torch.fft.fft2(change).abs().square().sum(dim=1)
    f_y, f_x = (2 * torch.fft.fftfreq(n, device=change.device) for n in change.shape[-2:])
    fine = (f_y[:, None].square() + f_x.square()).sqrt() > 0.5
    total = energy.flatten(1).sum(dim=1)
    return (energy * fine).flatten(1).sum(dim=1) / total.clamp_min(torch.finfo(total.dtype).tiny)
