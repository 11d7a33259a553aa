"""DXAI: an image as a class-agnostic plus a class-distinct part.

Paper: "DXAI: Explaining Classification by Image Decomposition", arXiv 2401.00320. A generator of N branches renders the
image in a class's style; blending the other branches between two classes drives everything that the classes share out
of branch 0, which is left with what makes the class.

Deviations, each with its reason in ``docs/methods/dxai.md``: the image's level can pass the generator (``stem_norm``,
``head_norm``), explanations use the mean style of a class and the predicted class, and take away only as much as leaves
the classifier undecided (the paper's Definition 1), where all of it, or the published loss, leads to another class.

Shapes: B images, C channels, H, W pixels, K classes, N branches, T steps.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.compute.losses import adversarial_loss, psnr, r1_penalty
from cfe_lightning.compute.micro_batches import FUSED, accumulate_and_step, check_micro_batches, parts_of, render_twice
from cfe_lightning.compute.precision import double_backward, full_precision
from cfe_lightning.compute.processes import log_training, log_validation
from cfe_lightning.decisions import alternative_class, kl_between_logits, kl_from_uniform, runner_up
from cfe_lightning.explainer import ExplainerModule
from cfe_lightning.explanation import Explanation
from cfe_lightning.files.trust import public_path
from cfe_lightning.methods.dxai.blending import (
    PRESETS,
    Blend,
    blend,
    branch_orthogonality,
    distance,
    masked_distance,
    neutral_strength,
)
from cfe_lightning.methods.dxai.critic import ResidualCritic
from cfe_lightning.methods.dxai.generator import MappingNetwork, MultiBranchGenerator, Norm, single_branch

Objective = Literal["paper", "neutral"]
Strength = Literal["full", "neutral"]
#: Strengths of the sweep ``image - strength * distinct`` (Eq. 9).
SWEEP = tuple(i / 10 for i in range(11))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """Images of a batch and all that is random about their renderings.

    Attributes:
        image: [B, C, H, W].
        label: The class each is rendered in, [B].
        alternative: And the other one, [B].
        logits: The classifier's, [B, K]; None where nothing asks for them.
        latent: Noise of the styles in both classes, [2, B, Z].
        alpha: Shares of the blending, [B, N - 1, 1, 1, 1].
    """

    image: Tensor
    label: Tensor
    alternative: Tensor
    logits: Tensor | None
    latent: Tensor
    alpha: Tensor

    def __len__(self) -> int:
        return len(self.image)

    def rows(self, rows: slice) -> _Part:
        """Some of the images."""
        return _Part(
            image=self.image[rows],
            label=self.label[rows],
            alternative=self.alternative[rows],
            logits=None if self.logits is None else self.logits[rows],
            latent=self.latent[:, rows],
            alpha=self.alpha[rows],
        )


class Dxai(ExplainerModule):
    """Trains the multi-branch decomposition against a frozen classifier and explains with it.

    Args:
        classifier: The classifier to be explained. With ``preset="joint_d"`` only its class names and size are used:
            the critic itself is trained as the classifier and explained.
        preset: Critic and loss weights as published: "paper" (per-class critic that also imitates the classifier),
            "final" (the authors' last code, single-head critic), "first" (with the orthogonality loss), "joint_d".
        objective: What the classifier should say to a rendering without distinct part: "paper" asks for the
            alternative class, "neutral" for no decision (uniform output).
        strength: How much of branch 0 an explanation calls distinct: "neutral" the share that leaves the classifier
            undecided on this very image (Definition 1, see ``neutral_strength``), "full" all of it, as published.
        num_branches: N >= 2; branch 0 becomes the distinct part.
        branch_width: Channels per branch at full resolution. Paper: 7; here 8 because it vectorises.
        max_branch_width: Upper limit of the channels per branch.
        min_resolution: Side of the innermost feature maps, a power of two, at most half the image.
        blocks_per_stage: Residual blocks before each of the first three down-samplings.
        stem_norm: "instance" as published: the explanation then ignores brightness and contrast.
        head_norm: As ``stem_norm``, for the last layer.
        image_skip: Let the image itself enter the agnostic branches, so that the network learns what to take out.
        style_dim: Length of the style of one block.
        latent_dim: Length of the random latent.
        mapping_width: Hidden width of the mapping network.
        mapping_shared: Its shared hidden layers.
        mapping_unshared: Its hidden layers per class.
        critic_width: The critic's channels at full resolution; None takes 2^14 / image size.
        critic_max_width: Upper limit of the critic's channels.
        adversarial_weight: None takes the preset's; so for the next five.
        class_weight: Weight of the classifier's loss on the renderings.
        reconstruction_weight: Weight of Eq. 8.
        masked_weight: Weight of Eq. 12.
        r1_weight: Weight of the gradient penalty on real images.
        orthogonality_weight: Weight of the correlation between branches.
        neutral_weight: Weight of KL(uniform || classifier(image - distinct)); acts with objective "neutral".
        sparsity_weight: Weight of the mean magnitude of the distinct part.
        counterfactual_weight: Weight of the class loss of ``image - distinct + distinct of the alternative``, which the
            critic then judges too. Only the alternative's distinct part learns from it; the published loss never
            trains that part on images of other classes.
        r1_interval: Apply R1 in every n-th iteration, n times as strong.
        learning_rate: Adam step size of the generator.
        critic_learning_rate: Adam step size of the critic.
        mapping_learning_rate: Adam step size of the mapping network.
        weight_decay: Coupled L2 decay of all three.
        source: Class an image is rendered in during training: its "label", or what the "classifier" predicts.
        micro_batches: Parts that a batch is computed in, one after the other: the same gradient in less memory, for
            one more pass of the generator. The mean of the masked loss (Eq. 12) is that over a part.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        classifier: FrozenClassifier,
        *,
        preset: Literal["paper", "final", "first", "joint_d"] = "paper",
        objective: Objective = "paper",
        strength: Strength = "neutral",
        num_branches: int = 5,
        branch_width: int = 8,
        max_branch_width: int = 64,
        min_resolution: int = 16,
        blocks_per_stage: int = 3,
        stem_norm: Norm = "none",
        head_norm: Norm = "none",
        image_skip: bool = False,
        style_dim: int = 64,
        latent_dim: int = 16,
        mapping_width: int = 512,
        mapping_shared: int = 4,
        mapping_unshared: int = 3,
        critic_width: int | None = None,
        critic_max_width: int = 512,
        adversarial_weight: float | None = None,
        class_weight: float | None = None,
        reconstruction_weight: float | None = None,
        masked_weight: float | None = None,
        r1_weight: float | None = None,
        orthogonality_weight: float | None = None,
        neutral_weight: float = 0.0,
        sparsity_weight: float = 0.0,
        counterfactual_weight: float = 0.0,
        r1_interval: int = 1,
        learning_rate: float = 1e-4,
        critic_learning_rate: float = 1e-4,
        mapping_learning_rate: float = 1e-6,
        weight_decay: float = 1e-4,
        source: Literal["label", "classifier"] = "label",
        micro_batches: int = 1,
    ) -> None:
        super().__init__(classifier)
        if num_branches < 2:
            raise ValueError(f"num_branches must be at least 2 (one distinct, one agnostic), got {num_branches}.")
        if r1_interval < 1:
            raise ValueError(f"r1_interval must be at least 1, got {r1_interval}.")
        self.automatic_optimization = False
        given: dict[str, Any] = {
            "adversarial_weight": adversarial_weight,
            "class_weight": class_weight,
            "reconstruction_weight": reconstruction_weight,
            "masked_weight": masked_weight,
            "r1_weight": r1_weight,
            "orthogonality_weight": orthogonality_weight,
        }
        self.weights = replace(PRESETS[preset], **{k: v for k, v in given.items() if v is not None})
        self.neutral_weight = neutral_weight
        self.sparsity_weight = sparsity_weight
        self.counterfactual_weight = counterfactual_weight
        self.objective = objective
        self.strength = strength
        self.r1_interval = r1_interval
        self.learning_rates = (learning_rate, mapping_learning_rate, critic_learning_rate)
        self.weight_decay = weight_decay
        self.source = source
        self.micro_batches = check_micro_batches(micro_batches)

        self.generator = MultiBranchGenerator(
            image_size=self.image_size,
            channels=self.channels,
            num_branches=num_branches,
            branch_width=branch_width,
            max_branch_width=max_branch_width,
            min_resolution=min_resolution,
            blocks_per_stage=blocks_per_stage,
            style_dim=style_dim,
            stem_norm=stem_norm,
            head_norm=head_norm,
            image_skip=image_skip,
        )
        self.mapping = MappingNetwork(
            num_classes=classifier.num_classes,
            num_styles=self.generator.num_styles,
            latent_dim=latent_dim,
            style_dim=style_dim,
            width=mapping_width,
            num_shared=mapping_shared,
            num_unshared=mapping_unshared,
        )
        critic_args: dict[str, Any] = {
            "image_size": self.image_size,
            "channels": self.channels,
            "num_heads": classifier.num_classes if self.weights.per_class_critic else 1,
            "base_width": critic_width,
            "max_width": critic_max_width,
        }
        # Its dense convolutions train about a sixth faster in this layout; the grouped ones of the generator do not.
        self.critic = ResidualCritic(**critic_args).to(memory_format=torch.channels_last)
        if preset == "joint_d":
            self.classifier = _critic_as_classifier(self.critic, critic_args, classifier)
        self._mean_styles: Tensor | None = None

    def blocks(self) -> list[nn.Module]:
        """Of generator and critic."""
        return [*self.generator.blocks(), *self.critic.blocks()]

    # Explaining

    @torch.no_grad()
    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        """Decomposes images for their predicted class and moves them to the target's distinct part.

        Args:
            image: [B, C, H, W] in [-1, 1].
            target: Classes asked for, [B]; None asks for the runner-up.

        Returns:
            An explanation with parts ``agnostic`` (generated), ``distinct`` and ``residual``, which sum to the image,
            and ``reconstruction``; steps ``image - strength * distinct``; as counterfactual, the image with its
            distinct part exchanged for the target's (both at the neutral strength if that is asked for and enough to
            reach the target).
        """
        return self._explained(image, target)[0]

    def _explained(self, image: Tensor, target: Tensor | None) -> tuple[Explanation, Tensor]:
        """The explanation, and the branches in the predicted class that it is made of, [B, N, C, H, W]."""
        logits = self.classifier(image)
        predicted = logits.argmax(dim=1)
        target = self.default_target(logits) if target is None else target
        styles = self.mean_styles()
        maps = self.generator.encode(image)
        own, other = self.generator.decode(maps, torch.cat([styles[predicted], styles[target]]), image).chunk(2)
        reconstruction = own.sum(dim=1)
        # Each is neutral at its own strength: what the rendering misses can be enough to move a steep classifier.
        share = self._share(image, own[:, 0])
        distinct = share * own[:, 0]
        agnostic = reconstruction - self._share(reconstruction, own[:, 0]) * own[:, 0]
        removed = image - distinct
        counterfactual = (removed + share * other[:, 0]).clamp(-1, 1)
        counterfactual_logits = self.classifier(counterfactual)
        if self.strength == "neutral":
            # Half a change may stop short of the target, where the whole one arrives.
            arrived = counterfactual_logits.argmax(dim=1) == target
            whole = (image - own[:, 0] + other[:, 0]).clamp(-1, 1)
            counterfactual = torch.where(arrived.view(-1, 1, 1, 1), counterfactual, whole)
            counterfactual_logits = self.classifier(counterfactual)
        strengths = image.new_tensor(SWEEP)
        steps = image[:, None] - strengths.view(1, -1, 1, 1, 1) * distinct[:, None]
        undecided = self.classifier(removed).softmax(dim=1)
        explanation = Explanation(
            image=image,
            logits=logits,
            target=target,
            attribution=distinct.abs().mean(dim=1, keepdim=True),
            counterfactual=counterfactual,
            counterfactual_logits=counterfactual_logits,
            steps=steps,
            strengths=strengths.expand(len(image), -1),
            parts={
                "reconstruction": reconstruction,
                "agnostic": agnostic,
                "distinct": distinct,
                "residual": image - agnostic - distinct,
            },
            scores={
                "reconstruction_psnr": psnr(image, reconstruction),
                "confidence_without_distinct": undecided.gather(1, predicted[:, None]).squeeze(1),
                "distinct_strength": share.view(-1).expand(len(image)),
            },
        )
        return explanation, own

    @torch.no_grad()
    def distinct(self, image: Tensor, source: Tensor) -> Tensor:
        """The distinct part of images [B, C, H, W] rendered as class ``source`` [B] (Definition 2)."""
        distinct = self.generator(image, self.mean_styles()[source])[:, 0]
        return self._share(image, distinct) * distinct

    def _share(self, image: Tensor, distinct: Tensor) -> Tensor:
        """The strength of the distinct part that an explanation takes out of images, [B or 1, 1, 1, 1]."""
        if self.strength == "full":
            return image.new_ones(1, 1, 1, 1)
        return neutral_strength(self.classifier, image, distinct).view(-1, 1, 1, 1)

    def distinct_generator(self) -> MultiBranchGenerator:
        """The generator of the distinct part alone: about 1 / N of the cost when nothing else is wanted."""
        return single_branch(self.generator)

    @torch.no_grad()
    def mean_styles(self, num_samples: int = 1024) -> Tensor:
        """The mean style of every class over fixed latents, [K, S, style_dim]; makes explanations deterministic.

        Paper: a fresh random latent per image; here: the mean, because an explanation must not depend on chance.
        """
        # Lightning goes back from a validation to training without a call of ``train``: what is kept is then of the
        # averaged weights.
        kept = None if self.training else self._mean_styles
        if kept is not None and kept.device == self.device:
            return kept
        latent = torch.randn(num_samples, self.mapping.latent_dim, generator=torch.Generator().manual_seed(0))
        latent = latent.to(self.device)
        classes = torch.arange(self.classifier.num_classes, device=self.device)
        # What is kept must not depend on the precision that was asked for first.
        with full_precision(latent):
            styles = torch.stack([self.mapping(latent, k.expand(num_samples)).mean(dim=0) for k in classes])
        self._mean_styles = None if self.training else styles
        return styles

    def train(self, mode: bool = True) -> Dxai:
        """Forgets the cached styles: the weights may change after this call."""
        self._mean_styles = None
        return super().train(mode)

    def on_fit_end(self) -> None:
        """Forgets the styles of the last validation, whose averaged weights are put away again."""
        self._mean_styles = None

    # Training

    def setup(self, stage: str) -> None:
        """Lets the critic learn: a fit before has left it frozen, and as a classifier it is (preset "joint_d").

        Not first in ``configure_optimizers``: before that, several processes look for the weights whose gradients they
        have to exchange.
        """
        super().setup(stage)
        if stage == "fit":
            self.critic.requires_grad_(True)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One critic step and one generator step on a shared set of renderings."""
        whole = self._draw(batch)
        parts = [whole.rows(rows) for rows in parts_of(len(whole), self.micro_batches)]
        generator_optimizer, critic_optimizer = self.optimizers()  # type: ignore[misc, union-attr, attr-defined]
        # The generator does not change between the two steps.
        shown, rendered = render_twice(self._render, parts)
        self.critic.requires_grad_(True)
        terms = accumulate_and_step(
            self, parts, lambda part: self._critic_loss(part, shown(part)[0]), "critic", critic_optimizer
        )
        self.critic.requires_grad_(False)
        terms |= accumulate_and_step(
            self, parts, lambda part: self._generator_loss(part, *rendered(part)), "generator", generator_optimizer
        )
        log_training(self, terms, len(whole))

    def _draw(self, batch: dict[str, Any]) -> _Part:
        """The classes that a batch is rendered in, and its random numbers."""
        image = batch["image"]
        imitated = self.weights.critic_class_term == "kl"
        logits = self.classifier(image) if imitated or self.source == "classifier" else None
        label = batch["label"] if logits is None or self.source == "label" else logits.argmax(dim=1)
        return _Part(
            image=image,
            label=label,
            alternative=alternative_class(label, self.classifier.num_classes),
            logits=logits,
            latent=torch.randn(2 * len(image), self.mapping.latent_dim, device=image.device).unflatten(0, (2, -1)),
            alpha=torch.rand(len(image), self.generator.num_branches - 1, 1, 1, 1, device=image.device),
        )

    def _render(self, part: _Part) -> tuple[Blend, Tensor | None]:
        """Renders images in their own and in the alternative class; also the orthogonality term if it has a weight."""
        styles = self.mapping(part.latent.flatten(0, 1), torch.cat([part.label, part.alternative]))
        maps = self.generator.encode(part.image)
        own, other = self.generator.decode(maps, styles, part.image).chunk(2)
        orthogonality = None
        if self.weights.orthogonality_weight:
            orthogonality = branch_orthogonality(maps[:-1], self.generator.num_branches)
        rendered = blend(own, other, part.alpha)
        if self.counterfactual_weight:
            moved = (part.image - rendered.distinct).detach() + rendered.distinct_alternative
            rendered = replace(rendered, counterfactual=moved)
        return rendered, orthogonality

    def _critic_loss(self, part: _Part, rendered: Blend) -> dict[str, Tensor]:
        # Lightning counts one step per optimiser, and there are two.
        with_r1 = self.weights.r1_weight > 0 and (self.global_step // 2) % self.r1_interval == 0
        real = part.image.detach().requires_grad_(with_r1)
        with double_backward(real) if with_r1 else nullcontext():
            judged = self.critic(real)
            real_logits = self._judgement(judged, part.label)
            penalty = r1_penalty(real_logits, real) if with_r1 else None
        fake_logits = self._judge_renderings(part, rendered, detach=True)
        terms = {
            "critic_real": adversarial_loss(real_logits, real=True),
            "critic_fake": adversarial_loss(fake_logits, real=False),
        }
        total = terms["critic_real"] + terms["critic_fake"]
        if self.weights.critic_class_term == "kl":
            assert part.logits is not None, "what the critic imitates is drawn with the batch"
            terms["critic_class"] = kl_between_logits(part.logits, judged)
            total = total + terms["critic_class"]
        elif self.weights.critic_class_term == "cross_entropy":
            terms["critic_class"] = F.cross_entropy(judged, part.label)
            total = total + terms["critic_class"]
        if penalty is not None:
            terms["r1"] = penalty
            total = total + self.weights.r1_weight * self.r1_interval * penalty
        return terms | {"critic": total}

    def _generator_loss(self, part: _Part, rendered: Blend, orthogonality: Tensor | None) -> dict[str, Tensor]:
        image, label, alternative = part.image, part.label, part.alternative
        fooled = self._judge_renderings(part, rendered, detach=False)
        own_class, other_class = self.classifier(torch.cat([rendered.own, rendered.alternative])).chunk(2)
        if self.objective == "paper":
            class_term = F.cross_entropy(torch.cat([own_class, other_class]), torch.cat([label, alternative]))
        else:
            class_term = 0.5 * (F.cross_entropy(own_class, label) + kl_from_uniform(other_class).mean())
        weights = self.weights
        terms = {
            "adversarial": adversarial_loss(fooled, real=True),
            "class": class_term,
            "reconstruction": 0.5 * (distance(image, rendered.own) + distance(image, rendered.alternative)),
            "masked": masked_distance(rendered.distinct, rendered.own, image),
            "distinct_magnitude": rendered.distinct.abs().mean(),
        }
        total = (
            weights.adversarial_weight * terms["adversarial"]
            + weights.class_weight * terms["class"]
            + weights.reconstruction_weight * terms["reconstruction"]
            + weights.masked_weight * terms["masked"]
            + self.sparsity_weight * terms["distinct_magnitude"]
        )
        if orthogonality is not None:
            terms["orthogonality"] = orthogonality
            total = total + weights.orthogonality_weight * orthogonality
        if rendered.counterfactual is not None:
            terms["counterfactual"] = F.cross_entropy(self.classifier(rendered.counterfactual), alternative)
            total = total + self.counterfactual_weight * terms["counterfactual"]
            total = total + self.sparsity_weight * rendered.distinct_alternative.abs().mean()
        if self.objective == "neutral" and self.neutral_weight:
            terms["neutral"] = kl_from_uniform(self.classifier(image - rendered.distinct)).mean()
            total = total + self.neutral_weight * terms["neutral"]
        return terms | {"generator": total}

    def _judge_renderings(self, part: _Part, rendered: Blend, detach: bool) -> Tensor:
        """The critic's logits of all renderings of some images, [2 B] or, with counterfactuals, [3 B]."""
        label, alternative = part.label, part.alternative
        images = [rendered.own, rendered.alternative]
        if rendered.counterfactual is not None:
            images.append(rendered.counterfactual)
        together = torch.cat(images)
        judged = self.critic(together.detach() if detach else together).chunk(len(images))
        logits = [self._judgement(judged[0], label), self._judgement_without_class(judged[1], alternative)]
        if rendered.counterfactual is not None:
            logits.append(self._judgement(judged[2], alternative))
        return torch.cat(logits)

    def _judgement(self, judged: Tensor, label: Tensor) -> Tensor:
        """The critic's logit for membership in ``label``, [B, heads] -> [B]."""
        return judged.gather(1, label[:, None]).squeeze(1) if self.weights.per_class_critic else judged.squeeze(1)

    def _judgement_without_class(self, judged: Tensor, alternative: Tensor) -> Tensor:
        """The critic's logit for a rendering without distinct part, [B, heads] -> [B]."""
        return self._judgement(judged, alternative) if self.objective == "paper" else judged.mean(dim=1)

    @torch.no_grad()
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Measures what an explanation of unseen images would be worth, with the deterministic mean style."""
        image, label = batch["image"], batch["label"]
        explanation, branches = self._explained(image, None)
        distinct = explanation.parts["distinct"]
        agnostic_logits = self.classifier(explanation.parts["agnostic"])
        removed_logits = self.classifier(image - distinct)
        own_class = F.cross_entropy(self.classifier(explanation.parts["reconstruction"]), label)
        # What was trained is the whole of branch 0, however much of it an explanation takes away.
        without_logits = self.classifier(branches[:, 1:].sum(dim=1))
        if self.objective == "paper":
            removed_class = F.cross_entropy(without_logits, runner_up(explanation.logits))
        else:
            removed_class = kl_from_uniform(without_logits).mean()
        reconstruction = distance(image, explanation.parts["reconstruction"])
        loss = self.weights.class_weight * 0.5 * (own_class + removed_class)
        loss = loss + self.weights.reconstruction_weight * reconstruction
        predicted = explanation.predicted
        flipped = explanation.flipped
        assert flipped is not None, "Dxai.explain always returns a counterfactual"
        values = {
            "loss": loss,
            "psnr": explanation.scores["reconstruction_psnr"].mean(),
            "classifier_agreement": (predicted == label).float().mean(),
            "accuracy_without_distinct": (removed_logits.argmax(dim=1) == label).float().mean(),
            "confidence_without_distinct": removed_logits.softmax(dim=1).amax(dim=1).mean(),
            "kl_to_uniform": kl_from_uniform(agnostic_logits).mean(),
            "distinct_magnitude": distinct.abs().mean(),
            "flip_rate": flipped.float().mean(),
        }
        log_validation(self, values, len(image))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam for generator and mapping network (two learning rates), and for the critic."""
        generator_rate, mapping_rate, critic_rate = self.learning_rates
        # Both betas must be floats: recent PyTorch rejects mixed types.
        options: dict[str, Any] = {"betas": (0.0, 0.99), "weight_decay": self.weight_decay}
        options["fused"] = self.device.type in FUSED
        groups = [
            {"params": self.generator.parameters(), "lr": generator_rate},
            {"params": self.mapping.parameters(), "lr": mapping_rate},
        ]
        return [torch.optim.Adam(groups, **options), torch.optim.Adam(self.critic.parameters(), critic_rate, **options)]


def _critic_as_classifier(
    critic: ResidualCritic, critic_args: dict[str, Any], classifier: FrozenClassifier
) -> FrozenClassifier:
    """The critic's class heads seen as the classifier to be explained (paper, appendix B, third kind)."""
    half = (0.5,) * critic_args["channels"]
    spec = replace(
        classifier.spec,
        class_path=public_path(ResidualCritic),
        init_args=critic_args,
        class_names=classifier.class_names,
        head="heads",
        feature_map=None,
        label=None,
        mean=half,
        std=half,
    )
    return FrozenClassifier(critic, spec)
