"""Judges explanations as they are saved: decisions, measurements and pictures of every image, for its row."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.compute.rows import rows_of
from cfe_lightning.decisions import decides_for
from cfe_lightning.explaining.saved_change import SavedChange, measure
from cfe_lightning.explanation import Explanation, draw_part


@dataclass(kw_only=True, slots=True)
class Findings:
    """Everything known about explained images, on the CPU; None where there is no counterfactual or no path.

    The shapes are those of a batch. ``rows_of`` selects one image, without the B, for which the properties hold.
    """

    # Decisions.
    predicted: Tensor  # [B] int64
    target: Tensor  # [B] int64
    before: Tensor  # probabilities of the image, [B, K]
    after: Tensor | None  # probabilities of the counterfactual as computed, [B, K]
    flipped: Tensor | None  # [B] bool
    saved: Tensor | None = None  # probabilities of the counterfactual as saved, [B, K]
    flipped_saved: Tensor | None = None  # [B] bool
    # Sizes of the change.
    distance: Tensor | None = None  # mean absolute change on [0, 1], [B]
    scale: Tensor | None = None  # the change in full colour on the difference picture, on [0, 1], [B]
    motion: Tensor | None = None  # length of the longest arrow in pixels, [B]
    # Steps.
    path: Tensor | None = None  # probabilities of the saved steps, [B, T, K]
    strengths: Tensor | None  # [B, T]
    intended: Tensor | None  # probabilities that the method meant the steps to have, [B, T, K]
    step_scores: dict[str, Tensor]  # [B, T] each
    # Named numbers and pictures.
    scores: dict[str, Tensor]  # [B] each
    caveats: dict[str, Tensor]  # [B] bool each
    pictures: dict[str, Tensor] = field(default_factory=dict)  # by key of a row's files, [B, C, H, W] in [-1, 1]
    gains: dict[str, Tensor] = field(default_factory=dict)  # amplification of parts that are differences, [B] each
    # One image.
    change: SavedChange = field(default_factory=SavedChange)
    class_names: Sequence[str] = ()  # K names

    @property
    def is_target(self) -> bool:
        """True for an image that is predicted as the target already."""
        return bool(self.predicted == self.target)

    @property
    def note(self) -> str | None:
        """Clauses that a reader of the image's explanation has to know."""
        same = ["already predicted as the target: nothing to flip"] if self.is_target else []
        return "; ".join(same + [clause for clause, holds in self.caveats.items() if bool(holds)]) or None

    @property
    def curve(self) -> dict[str, Any] | None:
        """Strengths, probabilities and scores of the steps, [T] each; None without a path."""
        if self.path is None:
            return None
        path, meant, predicted, target = self.path, self.intended, self.predicted, self.target
        curve: dict[str, Any] = {"strength": self.strengths, "predicted": path[:, predicted], "target": path[:, target]}
        if meant is not None:
            curve |= {"intended_predicted": meant[:, predicted], "intended_target": meant[:, target]}
        return curve | ({"scores": self.step_scores} if self.step_scores else {})


@torch.no_grad()
def examine(explanation: Explanation, classifier: FrozenClassifier, num_slices: int) -> list[Findings]:
    """Judges, measures and draws every image of a batch; everything that needs memory of the device.

    Args:
        explanation: The batch's explanation.
        classifier: Judges the saved pixels.
        num_slices: Number of slices in an image that is a montage, otherwise 1.
    """
    found = _judge(explanation, classifier)
    # Images that are the target already have nothing to flip.
    flips = None if found.flipped_saved is None else found.flipped_saved & (found.predicted != found.target)
    changes = measure(explanation, classifier, flips, num_slices)
    found.pictures, found.gains = _pictures(explanation)
    return [
        replace(rows_of(found, torch.tensor(index)), change=change, class_names=classifier.class_names)
        for index, change in enumerate(changes)
    ]


def _judge(explanation: Explanation, classifier: FrozenClassifier) -> Findings:
    # Decisions and numbers of the method. Numbers of any type go to the CPU, where every device has float64.
    logits_after, flipped, motion = explanation.counterfactual_logits, explanation.flipped, explanation.motion
    found = Findings(
        predicted=explanation.predicted.cpu(),
        target=explanation.target.cpu(),
        before=_probabilities(explanation.logits),
        after=None if logits_after is None else _probabilities(logits_after),
        flipped=None if flipped is None else flipped.cpu(),
        motion=None if motion is None else images.arrows(motion).norm(dim=1).amax(dim=(1, 2)).cpu(),
        strengths=None if explanation.strengths is None else explanation.strengths.cpu().double(),
        intended=None if explanation.intended is None else _probabilities(explanation.intended),
        step_scores={name: score.cpu().double() for name, score in explanation.step_scores.items()},
        scores={name: score.cpu().double() for name, score in explanation.scores.items()},
        caveats={clause: holds.cpu() for clause, holds in explanation.caveats.items()},
    )

    # Decisions about the saved pixels: the image that is judged is the image that is saved.
    if explanation.counterfactual is not None:
        saved = classifier(images.saved(explanation.counterfactual.float())).float()
        change = images.visible_change(explanation.image, explanation.counterfactual).abs()
        found.saved, found.flipped_saved = _probabilities(saved), decides_for(saved, explanation.target).cpu()
        found.distance, found.scale = change.mean(dim=(1, 2, 3)).cpu(), change.amax(dim=(1, 2, 3)).cpu()
    if explanation.steps is not None:
        # One step of all images at a time: the classifier then needs no more memory than for the images.
        judged = [classifier(images.saved(step.float())).softmax(dim=1) for step in explanation.steps.unbind(dim=1)]
        found.path = torch.stack(judged, dim=1).cpu()
    return found


def _probabilities(logits: Tensor) -> Tensor:
    return logits.float().softmax(dim=-1).cpu()


def _pictures(explanation: Explanation) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draws every picture to be saved, [B, C, H, W] in [-1, 1], and returns the gains of the differences, [B], too."""
    pictures, gains = {"image": explanation.image}, dict[str, Tensor]()
    if explanation.counterfactual is not None:
        change = images.visible_change(explanation.image, explanation.counterfactual)
        pictures |= {"counterfactual": explanation.counterfactual, "difference": images.signed_difference(change)}
    pictures["attribution"] = images.heat_map(explanation.attribution.float())
    if explanation.steps is not None:
        # One strip, first step on the left: a file per step would make folders of a million files.
        pictures["steps"] = torch.cat(explanation.steps.unbind(dim=1), dim=3)
    if explanation.motion is not None:
        pictures["motion"] = images.draw_motion(explanation.image, explanation.motion)
    for name, part in explanation.parts.items():
        pictures[f"part_{name}"], gain = draw_part(name, part)
        gains |= {} if gain is None else {name: gain.cpu()}
    return {key: picture.float().cpu() for key, picture in pictures.items()}, gains


def finite_images(explanation: Explanation) -> Tensor:
    """Tells which images have explanations of finite numbers throughout, [B] bool."""
    given = [explanation.logits, explanation.attribution, explanation.counterfactual, explanation.steps]
    given += [explanation.counterfactual_logits, explanation.strengths, explanation.intended, explanation.motion]
    given += [*explanation.parts.values(), *explanation.scores.values(), *explanation.step_scores.values()]
    finite = [value.isfinite().reshape(len(value), -1).all(dim=1).cpu() for value in given if value is not None]
    return torch.stack(finite).all(dim=0)
