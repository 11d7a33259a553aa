"""The naive baseline: walk from the image to the nearest one that leaves the classifier undecided."""

from __future__ import annotations

import torch
from torch import Tensor

from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.decisions import kl_from_uniform, runner_up
from cfe_lightning.explanation import Explanation
from cfe_lightning.metrics.faithfulness import STRENGTHS


class NeutralDescent:
    """The naive answer to DXAI's Definition 2: walk from the image until the classifier is undecided (appendix E).

    z <- z - step * gradient of KL(uniform || C(z)); distinct = image - z. It ends in noise-like, adversarial patterns,
    which is why it is a sanity baseline.

    Args:
        classifier: The classifier to be explained.
        num_steps: Steps at most.
        step_size: Of each step, in [-1, 1] units per unit gradient.
        tolerance: An image stops moving once its divergence is below this.
    """

    # Paper: direction of the divergence and step size are unknown; here as in the specification, section 5.6.
    def __init__(
        self, classifier: FrozenClassifier, *, num_steps: int = 200, step_size: float = 0.1, tolerance: float = 1e-4
    ) -> None:
        self.classifier = classifier
        self.num_steps = num_steps
        self.step_size = step_size
        self.tolerance = tolerance

    def distinct(self, image: Tensor, source: Tensor) -> Tensor:
        """Image minus its neutral neighbour, [B, C, H, W]; the same for every ``source``."""
        del source
        with torch.inference_mode(False), torch.enable_grad():
            image = image.detach().clone()
            neutral = image.clone()
            for _ in range(self.num_steps):
                neutral.requires_grad_(True)
                divergence = kl_from_uniform(self.classifier(neutral))
                moving = (divergence > self.tolerance)[:, None, None, None]
                if not moving.any():
                    break
                (gradient,) = torch.autograd.grad(divergence.sum(), neutral)
                neutral = neutral.detach() - self.step_size * gradient * moving
        return image - neutral.detach()

    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        """Explains with the distance moved as attribution; the target plays no role on the way."""
        with torch.no_grad():
            logits = self.classifier(image)
        target = runner_up(logits) if target is None else target
        distinct = self.distinct(image, logits.argmax(dim=1))
        return decomposed(image, logits, target, distinct.abs().mean(dim=1, keepdim=True), distinct)


def decomposed(image: Tensor, logits: Tensor, target: Tensor, attribution: Tensor, distinct: Tensor) -> Explanation:
    """An explanation by parts and their sweep, without a counterfactual."""
    strengths = torch.tensor(STRENGTHS, device=image.device, dtype=image.dtype)
    return Explanation(
        image=image,
        logits=logits,
        target=target,
        attribution=attribution,
        steps=image[:, None] - strengths.view(1, -1, 1, 1, 1) * distinct[:, None],
        strengths=strengths.expand(len(image), -1),
        parts={"agnostic": image - distinct, "distinct": distinct, "residual": torch.zeros_like(image)},
    )
