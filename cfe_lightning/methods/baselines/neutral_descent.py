"""The naive baseline: descent from the image to one that leaves the classifier undecided."""

import torch
from torch import Tensor

from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.decisions import kl_from_uniform, runner_up
from cfe_lightning.explanation import Explanation
from cfe_lightning.metrics.decomposition import STRENGTHS


class NeutralDescent:
    """The naive solution of DXAI's Definition 2 (arXiv 2401.00320, appendix E): descent until C is undecided.

    z <- z - step * gradient of KL(uniform || C(z)); distinct = image - z. It ends in noise-like, adversarial patterns,
    so it serves as a sanity check.

    Args:
        classifier: The classifier to be explained, C.
        num_steps: Largest number of steps.
        step_size: Length of a step in [-1, 1] units per unit gradient.
        tolerance: Divergence below which an image stops moving.
    """

    # Paper: direction of the divergence and step size are not given; here KL(uniform || C) and 0.1.
    def __init__(
        self, classifier: FrozenClassifier, *, num_steps: int = 200, step_size: float = 0.1, tolerance: float = 1e-4
    ) -> None:
        self.classifier = classifier
        self.num_steps = num_steps
        self.step_size = step_size
        self.tolerance = tolerance

    def distinct(self, image: Tensor, source: Tensor) -> Tensor:
        """Returns images minus their neutral neighbours, [B, C, H, W]; ``source`` plays no role."""
        # Also inside prediction loops, which switch gradients off.
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
        """Explains with the moved distance as attribution; the target plays no role in the descent."""
        with torch.no_grad():
            logits = self.classifier(image)
        target = runner_up(logits) if target is None else target
        distinct = self.distinct(image, logits.argmax(dim=1))
        return decomposed(image, logits, target, distinct.abs().mean(dim=1, keepdim=True), distinct)


def decomposed(image: Tensor, logits: Tensor, target: Tensor, attribution: Tensor, distinct: Tensor) -> Explanation:
    """Makes an explanation by the parts agnostic and distinct, with their sweep but without a counterfactual."""
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
