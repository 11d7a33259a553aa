"""The training of DXAI (arXiv 2401.00320): random numbers of a batch, losses, published weights.

Shapes: B images, C channels, H, W pixels, K classes, N branches, Z latent numbers.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.compute.losses import adversarial_loss, r1_penalty
from cfe_lightning.compute.precision import double_backward
from cfe_lightning.decisions import kl_between_logits, kl_from_uniform
from cfe_lightning.methods.dxai.blending import Blend, distance, masked_distance
from cfe_lightning.methods.dxai.critic import ResidualCritic

Objective = Literal["paper", "neutral"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """Images of a batch with all random choices of their renderings, batch first, so that ``rows_of`` selects some.

    Attributes:
        image: Images, [B, C, H, W] in [-1, 1].
        label: Class of each image's own rendering, [B].
        alternative: Class of each image's other rendering, [B].
        logits: The classifier's logits, [B, K]; None if no loss needs them.
        latent: Latents of the styles in both classes, [B, 2, Z].
        alpha: Share that each agnostic branch keeps in the blending, [B, N - 1, 1, 1, 1] in [0, 1).
    """

    image: Tensor
    label: Tensor
    alternative: Tensor
    logits: Tensor | None
    latent: Tensor
    alpha: Tensor

    def __len__(self) -> int:
        return len(self.image)


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """The losses of critic and generator by their weights; the defaults are the preset "paper".

    ``Dxai`` describes the term of each weight under the same name.
    """

    # True for one head per class, False for one head in all.
    per_class_critic: bool = True
    # "kl" imitates the classifier (equation 11), "cross_entropy" learns the labels.
    critic_class_term: Literal["kl", "cross_entropy", "none"] = "kl"
    objective: Objective = "paper"
    adversarial_weight: float = 2.0
    class_weight: float = 2.0
    reconstruction_weight: float = 4.0
    masked_weight: float = 4.0
    r1_weight: float = 1.0
    orthogonality_weight: float = 0.0
    neutral_weight: float = 0.0
    sparsity_weight: float = 0.0
    counterfactual_weight: float = 0.0

    def of_critic(self, critic: ResidualCritic, images: Slice, rendered: Blend, r1_weight: float) -> dict[str, Tensor]:
        """Returns the critic's terms and, as "critic", their weighted sum; an ``r1_weight`` of 0 leaves R1 out."""
        # Real images.
        with_r1 = r1_weight > 0
        real = images.image.detach().requires_grad_(with_r1)
        with double_backward(real) if with_r1 else nullcontext():
            judged = critic(real)
            real_logits = self.judgement(judged, images.label)
            penalty = r1_penalty(real_logits, real) if with_r1 else None
        # Renderings.
        fake_logits = self._judge_renderings(critic, images, rendered, detach=True)
        terms = {
            "critic_real": adversarial_loss(real_logits, real=True),
            "critic_fake": adversarial_loss(fake_logits, real=False),
        }
        total = terms["critic_real"] + terms["critic_fake"]
        # Class term and penalty.
        if self.critic_class_term == "kl":
            assert images.logits is not None, "the imitated logits are computed when the slice is drawn"
            terms["critic_class"] = kl_between_logits(images.logits, judged)
        elif self.critic_class_term == "cross_entropy":
            terms["critic_class"] = F.cross_entropy(judged, images.label)
        total = total + terms.get("critic_class", 0)
        if penalty is not None:
            terms["r1"] = penalty
            total = total + r1_weight * penalty
        return terms | {"critic": total}

    def of_generator(
        self, critic: ResidualCritic, classifier: FrozenClassifier, images: Slice, rendered: Blend
    ) -> dict[str, Tensor]:
        """Returns the generator's terms and, as "generator", their weighted sum (equation 13)."""
        # Published terms.
        image = images.image
        fooled = self._judge_renderings(critic, images, rendered, detach=False)
        terms = {
            "adversarial": adversarial_loss(fooled, real=True),
            "class": self._class_loss(classifier, images, rendered),
            "reconstruction": 0.5 * (distance(image, rendered.own) + distance(image, rendered.alternative)),
            "masked": masked_distance(rendered.distinct, rendered.own, image),
            "distinct_magnitude": rendered.distinct.abs().mean(),
        }
        total = (
            self.adversarial_weight * terms["adversarial"]
            + self.class_weight * terms["class"]
            + self.reconstruction_weight * terms["reconstruction"]
            + self.masked_weight * terms["masked"]
            + self.sparsity_weight * terms["distinct_magnitude"]
        )
        # Optional terms.
        if rendered.orthogonality is not None:
            terms["orthogonality"] = rendered.orthogonality
            total = total + self.orthogonality_weight * terms["orthogonality"]
        if rendered.counterfactual is not None:
            terms["counterfactual"] = F.cross_entropy(classifier(rendered.counterfactual), images.alternative)
            total = total + self.counterfactual_weight * terms["counterfactual"]
            total = total + self.sparsity_weight * rendered.distinct_alternative.abs().mean()
        if self.objective == "neutral" and self.neutral_weight:
            terms["neutral"] = kl_from_uniform(classifier(image - rendered.distinct)).mean()
            total = total + self.neutral_weight * terms["neutral"]
        return terms | {"generator": total}

    def _class_loss(self, classifier: FrozenClassifier, images: Slice, rendered: Blend) -> Tensor:
        """Averages the classifier's loss over both renderings, []."""
        logits = classifier(torch.cat([rendered.own, rendered.alternative]))
        if self.objective == "paper":
            return F.cross_entropy(logits, torch.cat([images.label, images.alternative]))
        own, other = logits.chunk(2)
        return 0.5 * (F.cross_entropy(own, images.label) + kl_from_uniform(other).mean())

    def _judge_renderings(self, critic: ResidualCritic, images: Slice, rendered: Blend, *, detach: bool) -> Tensor:
        """Returns the critic's logits of all renderings, [2 B], or [3 B] with counterfactuals."""
        counterfactual = [] if rendered.counterfactual is None else [rendered.counterfactual]
        together = torch.cat([rendered.own, rendered.alternative, *counterfactual])
        judged = critic(together.detach() if detach else together)
        own, other, *moved = judged.chunk(2 + len(counterfactual))
        logits = [self.judgement(each, images.alternative) for each in (other, *moved)]
        if self.objective == "neutral":
            # A rendering that should leave the classifier undecided belongs to no class: all heads judge it alike.
            logits[0] = other.mean(dim=1)
        return torch.cat([self.judgement(own, images.label), *logits])

    def judgement(self, judged: Tensor, label: Tensor) -> Tensor:
        """Selects the critic's logit for membership in ``label`` [B], [B, heads] -> [B]."""
        return judged.gather(1, label[:, None]).squeeze(1) if self.per_class_critic else judged.squeeze(1)


#: The published combinations of critic and weights; see ``docs/methods/dxai.md``.
PRESETS = {
    "paper": Losses(),
    "final": Losses(per_class_critic=False, critic_class_term="none", adversarial_weight=1.0, class_weight=4.0),
    "first": Losses(orthogonality_weight=1.0),
    "joint_d": Losses(critic_class_term="cross_entropy", adversarial_weight=1.0, class_weight=4.0),
}
