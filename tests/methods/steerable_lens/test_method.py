"""Steerable Lens: its invariants, its search and its options."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import toy
from cases import IMAGE_SIZE, NUM_CLASSES, pooled_classifier
from torch import Tensor, nn
from torch.nn import functional as F

from cfe_lightning import images
from cfe_lightning.classifier import ClassifierSpec, FrozenClassifier
from cfe_lightning.methods.steerable_lens import SteerableLens
from cfe_lightning.methods.steerable_lens import course as lens_course
from cfe_lightning.methods.steerable_lens.phases import mean_turn


def lens(*, double: bool = False, channels: int = 3, **options: Any) -> SteerableLens:
    """Builds a lens around a small random convolutional network."""
    made = SteerableLens(pooled_classifier(channels=channels), **options).eval()
    return made.double() if double else made


def pictures(count: int = 4, channels: int = 3, dtype: torch.dtype = torch.float32, size: int = IMAGE_SIZE) -> Tensor:
    """Draws smooth noise that stays away from the ends of the range, [B, C, S, S] in [-1, 1]."""
    coarse = torch.randn(count, channels, 6, 6, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return (0.3 * F.interpolate(coarse, size=size, mode="bicubic")).clamp(-0.9, 0.9)


def loss_of(explainer: SteerableLens, image: Tensor, target: Tensor) -> Tensor:
    """Returns the negative log-likelihood of the targets, [B]."""
    return F.cross_entropy(explainer.classifier(image), target, reduction="none")


TRANSFORMS: list[dict[str, Any]] = [
    {},
    {"phase_rule": "unit"},
    {"phase_rule": "coordinate"},
    {"beta": 1.0},
    {"beta": 0.5, "amplitude_mode": "log", "residual_gain": 0.5},
    {"smoothing": 1.0},
    {"cap": None},
    {"colour": "y", "beta": 1.0, "residual_gain": 1.0},
    {"padding": "circular", "decimate": False},
    {"synthesis": "two_sided"},
    {"transform": "dft"},
    {"transform": "dft", "phase_rule": "coordinate", "beta": 1.0, "residual_gain": 1.0},
    {"transform": "pixel"},
    {"transform": "csp_rect", "scales": 1, "orientations": 3},
]


@pytest.mark.parametrize("options", TRANSFORMS, ids=str)
def test_the_loss_falls_at_first_as_the_slope_says(options: dict[str, Any]) -> None:
    explainer = lens(double=True, eight_bit=False, **options)
    image = pictures(dtype=torch.float64)
    target = torch.tensor([0, 1, 2, 0])
    course, _ = explainer.course(image, target)
    slope = (course.gradient * course.line).flatten(1).sum(dim=1)
    assert (slope < 0).all()
    step = 1e-6
    ends = [explainer.frames(course, torch.full((4, 1), at, dtype=torch.float64)).image[:, 0] for at in (step, -step)]
    measured = (loss_of(explainer, ends[0], target) - loss_of(explainer, ends[1], target)) / (2 * step)
    torch.testing.assert_close(measured, slope, rtol=1e-4, atol=0)


def test_the_margin_leads_the_target_away_from_its_strongest_rival() -> None:
    explainer = lens(double=True, eight_bit=False, loss="margin")
    image, target = pictures(dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    course, _ = explainer.course(image, target)

    def margin(at: float) -> Tensor:
        frames = explainer.frames(course, torch.full((4, 1), at, dtype=torch.float64))
        logits = explainer.classifier(frames.image[:, 0])
        return logits.scatter(1, target[:, None], -torch.inf).amax(dim=1) - logits[torch.arange(4), target]

    slope = (course.gradient * course.line).flatten(1).sum(dim=1)
    assert (slope < 0).all()
    torch.testing.assert_close((margin(1e-6) - margin(-1e-6)) / 2e-6, slope, rtol=1e-4, atol=0)


def test_the_margin_still_leads_where_the_classifier_is_certain() -> None:
    image, target = blobs(22.0), torch.ones(1, dtype=torch.int64)
    slopes = {}
    for loss in ("nll", "margin"):
        course, logits = SteerableLens(edge_classifier(gain=400.0), loss=loss).course(image, target)  # type: ignore[arg-type]
        slopes[loss] = float(course.gradient.norm())
        assert logits.softmax(dim=1)[0, 1] == 1
    assert slopes["nll"] == 0
    assert slopes["margin"] > 1


@pytest.mark.parametrize("options", TRANSFORMS, ids=str)
def test_alpha_zero_gives_the_image_back_bit_for_bit(options: dict[str, Any]) -> None:
    explainer = lens(eight_bit=False, **options)
    image = pictures()
    course, _ = explainer.course(image)
    frames = explainer.frames(course, torch.zeros(4, 2))
    assert torch.equal(frames.image, image[:, None].expand_as(frames.image))
    assert (frames.l2_norm == 0).all()
    assert (frames.clipped == 0).all()


def test_a_rectangular_step_in_the_pyramid_is_a_pixel_step() -> None:
    image = 0.1 * pictures(dtype=torch.float64)
    alpha = torch.tensor([[1e-3, 0.02]], dtype=torch.float64).expand(4, -1)
    found = []
    for transform in ("pixel", "csp_rect"):
        explainer = lens(double=True, transform=transform, eight_bit=False)
        course, _ = explainer.course(image)
        found.append(explainer.frames(course, alpha).image)
    assert (found[0] - found[1]).abs().max() < 1e-10
    # A pixel step goes against the gradient.
    torch.testing.assert_close(
        F.cosine_similarity((found[0][:, 0] - image).flatten(1), course.gradient.flatten(1)),
        torch.full((4,), -1.0, dtype=torch.float64),
    )


def test_joint_extrapolation_is_the_band_passed_pixel_step_to_first_order() -> None:
    image = 0.5 * pictures(dtype=torch.float64)
    explainer = lens(double=True, beta=1.0, eps=0.0, cap=None, eight_bit=False, padding="circular")
    course, _ = explainer.course(image)
    transform = explainer.extrapolator.transform_for(image)
    step = -transform.synthesise(transform.gradient(course.gradient, residuals=False).bands)
    rms = step.flatten(1).square().mean(dim=1).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(course.line, step / rms)
    errors = []
    for alpha in (1e-4, 1e-5):
        moved = explainer.frames(course, torch.full((4, 1), alpha, dtype=torch.float64)).image[:, 0]
        errors.append(float((moved - image - 2 * alpha * course.line).norm()) / alpha)
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize("level", [-1.0, 0.2])
def test_flat_images_stay_as_they_are(level: float) -> None:
    # Amplitudes may grow out of rounding errors; phases have nothing to turn.
    for options in (options for options in TRANSFORMS[:11] if level == -1 or "beta" not in options):
        explanation = lens(**(options | {"residual_gain": 0.0})).explain(
            torch.full((2, 3, IMAGE_SIZE, IMAGE_SIZE), level)
        )
        assert explanation.steps is not None
        assert explanation.steps.isfinite().all()
        assert (images.saved(explanation.steps) - images.saved(explanation.image)[:, None]).abs().max() < 1e-6
        assert all(score.isfinite().all() for score in explanation.scores.values())


def test_a_frame_depends_neither_on_its_neighbours_nor_on_how_many_are_made_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image, target = pictures(6), torch.tensor([0, 1, 2, 0, 1, 2])
    together = lens(beta=1.0, residual_gain=0.3).explain(image, target)
    assert together.steps is not None
    alone = [lens(beta=1.0, residual_gain=0.3).explain(image[i : i + 1], target[i : i + 1]) for i in range(6)]
    monkeypatch.setattr(lens_course, "_CHUNK", 1)
    bit_by_bit = lens(beta=1.0, residual_gain=0.3, eight_bit=False).explain(image, target).steps
    monkeypatch.setattr(lens_course, "_CHUNK", 2**30)
    at_once = lens(beta=1.0, residual_gain=0.3, eight_bit=False).explain(image, target).steps
    assert bit_by_bit is not None
    assert at_once is not None
    torch.testing.assert_close(bit_by_bit, at_once, rtol=0, atol=1e-5)
    for index, one in enumerate(alone):
        assert one.steps is not None
        # Rounding to 8 bits may fall on either side.
        assert (one.steps[0] - together.steps[index]).abs().max() <= 2 / 255 + 1e-6
        torch.testing.assert_close(one.scores["slope"][0], together.scores["slope"][index], rtol=1e-4, atol=1e-6)


def test_moving_phases_alone_changes_an_image_by_no_more_than_twice_its_bands() -> None:
    explainer = lens(double=True, cap=None, eight_bit=False, padding="circular")
    image = 0.2 * pictures(dtype=torch.float64)
    course, _ = explainer.course(image)
    bands = sum(motion.band.abs().square().flatten(1).sum(dim=1) for motion in course.motions)
    assert isinstance(bands, Tensor)
    alpha = torch.logspace(-3, 3, 25, dtype=torch.float64).expand(4, -1)
    frames = explainer.frames(course, alpha)
    assert (frames.clipped == 0).all()
    assert (frames.l2_norm <= 2 * bands.sqrt()[:, None]).all()
    assert (frames.l2_norm.amax(dim=1) > 0.5 * bands.sqrt()).all()


@pytest.mark.parametrize("colour", ["rgb", "y"])
def test_units_of_alpha(colour: str) -> None:
    image = pictures()
    for transform in ("csp", "dft", "pixel"):
        for unit in ("rms", "l2", "raw"):
            course, _ = lens(transform=transform, alpha_unit=unit, colour=colour).course(image)
            norm = course.line.flatten(1).norm(dim=1)
            if unit == "rms":
                torch.testing.assert_close(norm / math.sqrt(course.line[0].numel()), torch.ones(4))
            elif unit == "l2":
                torch.testing.assert_close(norm, torch.ones(4))
            elif transform == "pixel" and colour == "rgb":
                torch.testing.assert_close(course.line, -course.gradient)
    course, _ = lens(alpha_unit="phase", colour=colour).course(image)
    torch.testing.assert_close(mean_turn(course.motions), torch.ones(4))


def test_luminance_alone_changes_all_channels_alike() -> None:
    explainer = lens(colour="y", eight_bit=False)
    image = 0.3 * pictures()
    course, _ = explainer.course(image)
    frames = explainer.frames(course, torch.full((4, 1), 0.05))
    assert (frames.clipped == 0).all()
    change = frames.image[:, 0] - image
    assert change.abs().max() > 0.01
    torch.testing.assert_close(change, change[:, :1].expand_as(change), rtol=0, atol=1e-6)


def test_the_gradient_by_luminance_is_the_sum_over_channels() -> None:
    """Checks the gradient by Y of YIQ: a change of Y changes red, green and blue alike."""
    course, _ = lens(double=True, colour="y", transform="pixel", alpha_unit="raw").course(pictures(dtype=torch.float64))
    torch.testing.assert_close(course.line, -course.gradient.sum(dim=1, keepdim=True).expand(-1, 3, -1, -1))


def test_the_clipped_share_is_that_of_values_beyond_the_range() -> None:
    explainer = lens(transform="pixel", eight_bit=False)
    course, _ = explainer.course(pictures())
    alpha = torch.tensor([[0.1, 0.5]]).expand(4, -1)
    frames = explainer.frames(course, alpha)
    moved = course.image[:, None] + 2 * alpha[:, :, None, None, None] * course.line[:, None]
    torch.testing.assert_close(frames.image, moved.clamp(-1, 1))
    expected = (moved.abs() > 1).float().mean(dim=(2, 3, 4))
    torch.testing.assert_close(frames.clipped, expected, rtol=0, atol=1e-3)
    assert ((expected > 0.001) & (expected < 0.9)).all()


class Edge(nn.Module):
    """Classifies blobs as left or right of column 16 by a linear function of the image, [B, 1, S, S] -> [B, 2]."""

    def __init__(self, gain: float = 20.0, bias: float = 0.0) -> None:
        super().__init__()
        self.gain, self.bias = gain, bias

    def forward(self, image: Tensor) -> Tensor:
        window = blobs(19.0) - blobs(13.0)
        margin = self.gain * (image * window.to(image)).sum(dim=(1, 2, 3)) / window.square().sum() - self.bias
        return torch.stack([torch.zeros_like(margin), margin], dim=1)


def edge_classifier(**arguments: float) -> FrozenClassifier:
    values: dict[str, Any] = {"class_names": ("left", "right"), "image_size": 32, "mean": (0.5,), "std": (0.5,)}
    return FrozenClassifier(Edge(**arguments), ClassifierSpec(class_path="none", init_args={}, head=None, **values))


def blobs(column: float = 13.0) -> Tensor:
    """Draws a bright blob at a column, [1, 1, 32, 32]."""
    place = torch.arange(32.0)
    blob = (-((place[:, None] - 16).square() + (place - column).square()) / 20).exp()
    return (1.6 * blob - 0.8)[None, None]


def column_of(image: Tensor) -> float:
    """Returns the mean column of the bright part of [1, 1, 32, 32]."""
    mass = (image[0, 0] + 0.5).clamp_min(0).sum(dim=0)
    return float((mass * torch.arange(32.0)).sum() / mass.sum())


def test_a_blob_moves_to_the_boundary_and_the_arrows_say_so() -> None:
    explanation = SteerableLens(edge_classifier()).explain(blobs(14.0))
    assert explanation.flipped is not None
    assert explanation.flipped.all()
    assert explanation.counterfactual is not None
    assert explanation.motion is not None
    assert column_of(explanation.image) == pytest.approx(14, abs=0.01)
    assert column_of(explanation.counterfactual) == pytest.approx(16, abs=0.2)
    down, right = explanation.motion[0, :, 12:20, 10:18].mean(dim=(1, 2)).tolist()
    assert 1 < right < 3
    assert abs(down) < 0.1


def test_the_weakest_flip_of_the_first_crossing_is_found() -> None:
    explainer = SteerableLens(edge_classifier(), bisections=12, eight_bit=False)
    image = blobs()
    target = torch.ones(1, dtype=torch.int64)
    explanation = explainer.explain(image, target)
    alpha = explanation.scores["alpha"]
    course, _ = explainer.course(image, target)

    def lead(at: Tensor) -> float:
        p = explainer.classifier(explainer.frames(course, at[:, None]).image[:, 0]).softmax(dim=1)
        return float(p[0, 1] - p[0, 0])

    # A clear decision leads by 0.02, so that no rounding undoes it.
    assert lead(alpha) >= 0.02
    assert lead(alpha * 0.998) < 0.02
    fine = torch.linspace(0.001, float(alpha) * 0.97, 200)
    every = explainer.frames(course, fine[None]).image[0]
    assert (explainer.classifier(every).argmax(dim=1) == 0).all()


def test_what_does_not_flip_is_not_called_a_counterfactual() -> None:
    explanation = SteerableLens(edge_classifier(bias=100.0)).explain(blobs())
    assert explanation.flipped is not None
    assert not explanation.flipped.any()
    assert explanation.scores["reached"].tolist() == [0.0]
    assert explanation.steps is not None
    assert explanation.counterfactual is not None
    said = explanation.logits.new_tensor(
        [float(edge_classifier(bias=100.0)(step[None])[0, 1]) for step in explanation.steps[0]]
    )
    assert torch.equal(explanation.counterfactual[0], explanation.steps[0, said.argmax()])
    holding = [clause for clause, holds in explanation.caveats.items() if bool(holds)]
    assert holding == ["no strength of this direction changes the decision: shown is the frame that comes closest"]


def test_a_frame_that_is_hardly_ahead_is_a_flip_but_not_what_is_looked_for() -> None:
    def hardly(image: Tensor) -> FrozenClassifier:
        """Builds a classifier whose target leads by less than 0.02 in the best frame."""
        best = SteerableLens(edge_classifier(bias=100.0)).explain(image).counterfactual_logits
        assert best is not None
        return edge_classifier(bias=100.0 + float(best[0, 1]) - 0.01)

    explanation = SteerableLens(hardly(blobs())).explain(blobs())
    assert explanation.flipped is not None
    assert explanation.flipped.all()
    assert explanation.scores["reached"].tolist() == [0.0]
    assert not any(bool(holds.any()) for holds in explanation.caveats.values())


def test_where_the_gradient_vanishes_it_says_so() -> None:
    explanation = SteerableLens(edge_classifier(gain=0.0)).explain(blobs())
    holding = [clause for clause, holds in explanation.caveats.items() if bool(holds)]
    assert holding == ["the classifier's gradient vanishes here, so there is nothing to magnify"]
    assert explanation.counterfactual is not None
    assert torch.equal(explanation.counterfactual, images.saved(explanation.image))
    assert all(score.isfinite().all() for score in explanation.scores.values())


def test_the_target_that_is_predicted_already_needs_no_change() -> None:
    image = blobs()
    for options in ({}, {"live_steps": 3}):
        explanation = SteerableLens(edge_classifier(), **options).explain(image, torch.zeros(1, dtype=torch.int64))  # type: ignore[arg-type]
        assert explanation.counterfactual is not None
        assert torch.equal(explanation.counterfactual, image)
        assert [float(explanation.scores[name]) for name in ("alpha", "l2_norm", "reached")] == [0.0, 0.0, 1.0]
        assert explanation.attribution.abs().max() == 0


@pytest.mark.parametrize("live_steps", [1, 6])
def test_a_budget_is_met_or_reported_as_missed(live_steps: int) -> None:
    image = pictures()
    explainer = lens(budget=0.5, bisections=12, live_steps=live_steps, eight_bit=False)
    explanation = explainer.explain(image)
    assert explanation.scores["reached"].tolist() == [1.0] * 4
    torch.testing.assert_close(explanation.scores["l2_norm"], torch.full((4,), 0.5), rtol=1e-3, atol=0)
    assert explanation.counterfactual is not None
    measured = (explanation.counterfactual - image).flatten(1).norm(dim=1) / 2
    torch.testing.assert_close(measured, explanation.scores["l2_norm"])
    missed = lens(budget=500.0, live_steps=live_steps).explain(image)
    assert missed.scores["reached"].tolist() == [0.0] * 4
    (clause,) = (clause for clause, holds in missed.caveats.items() if bool(holds.all()))
    assert clause == "no strength of this direction changes the image by as much as asked"


def test_a_confidence_is_met() -> None:
    weak, strong = (SteerableLens(edge_classifier(), confidence=p).explain(blobs()) for p in (0.4, 0.6))
    for explanation, p in ((weak, 0.4), (strong, 0.6)):
        assert explanation.counterfactual_logits is not None
        assert explanation.counterfactual_logits.softmax(dim=1)[0, 1] >= p
    assert strong.scores["alpha"] > weak.scores["alpha"]
    unmet = SteerableLens(edge_classifier(bias=100.0), confidence=0.9).explain(blobs())
    assert [clause for clause, holds in unmet.caveats.items() if bool(holds)] == [
        "no strength of this direction makes the classifier as sure as asked"
    ]


def test_steps_carry_their_numbers() -> None:
    explainer = lens(num_steps=5, smallest_alpha=0.01, largest_alpha=10.0)
    image = pictures()
    explanation = explainer.explain(image)
    assert explanation.steps is not None
    assert explanation.strengths is not None
    torch.testing.assert_close(explanation.strengths[0], torch.logspace(-2, 1, 5))
    change = (explanation.steps - image[:, None]).flatten(2).norm(dim=2) / 2
    torch.testing.assert_close(explanation.step_scores["l2_norm"], change)
    straight = lens(num_steps=5, smallest_alpha=0.01, largest_alpha=10.0, transform="pixel").explain(image)
    assert (straight.step_scores["clipped"][:, -1] > 0.5).all()
    assert (straight.step_scores["clipped"].diff(dim=1) >= 0).all()


def test_magnified_is_the_strongest_step_in_which_the_image_is_still_seen() -> None:
    explanation = SteerableLens(edge_classifier(), num_steps=24).explain(blobs(15.6))
    assert explanation.steps is not None
    assert explanation.strengths is not None
    decided = edge_classifier()(explanation.steps[0]).argmax(dim=1) == 1
    change = (explanation.steps - explanation.image[:, None])[0].flatten(1).square().mean(dim=1).sqrt()
    small = change <= explanation.image.std() / 2
    assert decided.sum() > (decided & small).sum() > 1
    kept = torch.nonzero(decided & small).squeeze(1)
    assert torch.equal(explanation.parts["magnified"][0], explanation.steps[0, kept[-1]])
    # Where no step is good enough, the answer.
    never = SteerableLens(edge_classifier(bias=100.0)).explain(blobs())
    assert never.counterfactual is not None
    assert torch.equal(never.parts["magnified"], never.counterfactual)


class Between(Edge):
    """Classifies blobs near column 16 as class 1."""

    def forward(self, image: Tensor) -> Tensor:
        margin = super().forward(image)[:, 1]
        return torch.stack([torch.zeros_like(margin), 4 - margin.abs()], dim=1)


def test_a_target_that_is_lost_again_is_marked() -> None:
    spec = edge_classifier().spec
    for network, lost in ((Between(), 1.0), (Edge(), 0.0)):
        explanation = SteerableLens(FrozenClassifier(network, spec), transform="pixel").explain(blobs(14.0))
        assert explanation.flipped is not None
        assert explanation.flipped.all()
        assert explanation.scores["nonmonotone"].tolist() == [lost]


def test_what_is_reported_holds_for_the_saved_pictures() -> None:
    explanation = lens().explain(pictures())
    for picture in (explanation.counterfactual, explanation.steps):
        assert picture is not None
        assert torch.equal(picture, images.saved(picture))


def test_shares_of_the_gradient_and_of_fine_change() -> None:
    image = pictures()
    scores = lens().explain(image).scores
    assert ((scores["gradient_high_pass"] > 0) & (scores["gradient_high_pass"] < 1)).all()
    assert (scores["gradient_high_pass"] + scores["gradient_low_pass"] < 1).all()
    assert lens(transform="pixel").explain(image).scores["gradient_pixels"].tolist() == pytest.approx([1.0] * 4)
    assert ((scores["cosine"] > 0) & (scores["cosine"] < 1)).all()
    assert lens(transform="pixel").explain(image).scores["cosine"].tolist() == pytest.approx([1.0] * 4)
    assert ((scores["fine"] >= 0) & (scores["fine"] <= 1)).all()


def test_a_renewed_gradient_goes_on_where_one_shot_stops() -> None:
    image, target = blobs(), torch.ones(1, dtype=torch.int64)
    classifier = edge_classifier()
    once = SteerableLens(classifier, largest_alpha=0.6, smallest_alpha=0.05).explain(image, target)
    live = SteerableLens(classifier, largest_alpha=0.6, live_steps=12).explain(image, target)
    assert live.steps is not None
    assert live.steps.shape[1] == 12
    assert live.strengths is not None
    torch.testing.assert_close(live.strengths[0], torch.arange(1, 13) * 0.05)
    assert once.steps is not None
    said = [classifier(explanation.steps[:, -1])[0, 1] for explanation in (once, live) if explanation.steps is not None]
    assert said[1] > said[0]
    assert live.motion is None


def test_any_classifier_and_size() -> None:
    image = toy.toy_images(3, NUM_CLASSES, 16)
    for options in TRANSFORMS:
        explanation = SteerableLens(toy.toy_classifier(NUM_CLASSES, 16), **options).explain(image)
        assert explanation.counterfactual is not None
        assert (explanation.motion is None) == (options.get("transform", "csp") != "csp")
    grey = lens(channels=1, colour="y").explain(pictures(2, channels=1))
    assert grey.counterfactual is not None
    larger = lens().explain(pictures(2, size=41))
    assert larger.counterfactual is not None
    assert larger.counterfactual.shape == (2, 3, 41, 41)


def test_gradients_are_found_where_lightning_switches_them_off_and_in_half_precision() -> None:
    explainer, image = lens(), pictures()
    expected = explainer.explain(image)
    with torch.inference_mode():
        assert torch.equal(explainer.explain(image).scores["alpha"], expected.scores["alpha"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = explainer.explain(image)
    # Autocast is off inside.
    assert half.counterfactual is not None
    assert expected.counterfactual is not None
    assert torch.equal(half.counterfactual, expected.counterfactual)
    assert torch.equal(half.scores["slope"], expected.scores["slope"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"smallest_alpha": 2.0}, "smallest_alpha must be positive and below largest_alpha, got 2.0 and 1.5"),
        ({"num_steps": 1}, "num_steps must be at least 2"),
        ({"eps": -0.1}, "must not be negative, got -0.1, 0.0 and 0.0"),
        ({"cap": 0.0}, "cap is a turn in radians"),
        ({"residual_gain": 1.5}, "residual_gain is a share"),
        ({"confidence": 0.5, "budget": 1.0}, "two goals"),
        ({"confidence": 1.5}, "confidence is a probability"),
        ({"budget": 0.0}, "budget is an L2 norm"),
        ({"smoothing": 1.0, "phase_rule": "unit"}, "smoothing needs transform csp"),
        ({"alpha_unit": "phase", "transform": "pixel"}, "transform pixel turns no phases"),
        ({"scales": 7}, "have 1 to 2 scales, got 7"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        lens(**options)
