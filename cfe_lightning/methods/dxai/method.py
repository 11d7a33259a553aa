"""DXAI: an image as a class-agnostic plus a class-distinct part.

Paper: "DXAI: Explaining Classification by Image Decomposition", arXiv 2401.00320; equations and definitions are its
own. A generator of N branches renders the image in the style of a class. Blending all branches but branch 0 between two
classes drives everything that the classes share out of branch 0, which keeps only what distinguishes the class.

Deviations, each with its reason in ``docs/methods/dxai.md``: brightness and contrast can pass the generator
(``stem_norm``, ``head_norm``). Explanations use the predicted class and its mean style. They remove only as much of
branch 0 as leaves the classifier undecided (definition 1), because removing all of it leads to another class.

Shapes: B images, C channels, H, W pixels, K classes, N branches, S style-modulated blocks, T steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.compute.losses import psnr
from cfe_lightning.compute.micro_batches import FUSED, accumulate_and_step, check_micro_batches, parts_of, render_twice
from cfe_lightning.compute.precision import full_precision
from cfe_lightning.compute.processes import log_training, log_validation
from cfe_lightning.compute.rows import rows_of
from cfe_lightning.decisions import alternative_class, kl_from_uniform, runner_up
from cfe_lightning.explainer import ExplainerModule
from cfe_lightning.explanation import Explanation
from cfe_lightning.files.trust import public_path
from cfe_lightning.methods.dxai.blending import Blend, blend, branch_orthogonality, distance, neutral_strength
from cfe_lightning.methods.dxai.critic import ResidualCritic
from cfe_lightning.methods.dxai.generator import MappingNetwork, MultiBranchGenerator, Norm
from cfe_lightning.methods.dxai.training import PRESETS, Objective, Slice

Strength = Literal["full", "neutral"]
#: Strengths of the sweep ``image - strength * distinct`` (equation 9).
SWEEP = tuple(i / 10 for i in range(11))


class Dxai(ExplainerModule):
    """Trains the multi-branch decomposition against a frozen classifier and explains with it.

    Args:
        classifier: The classifier to be explained. With ``preset="joint_d"`` only its class names and size are used:
            the critic itself is trained as the classifier and explained.
        preset: Critic and loss weights as published: "paper" (per-class critic that also imitates the classifier),
            "final" (the authors' last code, single-head critic), "first" (with the orthogonality loss), "joint_d".
        objective: Answer wanted of the classifier for a rendering without distinct part: "paper" wants the alternative
            class, "neutral" no decision (uniform output).
        strength: Share of branch 0 that an explanation calls distinct: "neutral" finds the share that leaves the
            classifier undecided on each image (definition 1), "full" takes all of it, as published.
        num_branches: Number of branches, N >= 2; branch 0 becomes the distinct part.
        branch_width: Channels per branch at full resolution. Paper: 7; here 8 because it vectorises.
        max_branch_width: Upper limit of the channels per branch, which double at every stage.
        min_resolution: Side of the innermost feature maps, a power of two, at most half the image.
        blocks_per_stage: Residual blocks before each of the first three down-samplings.
        stem_norm: Norm of the first layer. "instance" as published: explanations then ignore brightness and contrast.
        head_norm: Norm of the last layer. "instance" as published: explanations then ignore brightness and contrast.
        image_skip: Adds the image to the agnostic branches: the network learns what to remove. Not in the paper.
        style_dim: Length of the style of one block.
        latent_dim: Length of the random latent.
        mapping_width: Hidden width of the mapping network.
        mapping_shared: Hidden layers of the mapping network that all classes share.
        mapping_unshared: Hidden layers of the mapping network for each class alone.
        critic_width: The critic's channels at full resolution; None takes 2^14 / image size.
        critic_max_width: Upper limit of the critic's channels, which double at every stage.
        adversarial_weight: Weight of the generator's adversarial loss (equation 10); None takes the preset's.
        class_weight: Weight of the classifier's loss on the renderings (equation 6); None takes the preset's.
        reconstruction_weight: Weight of the distance to the image (equation 8); None takes the preset's.
        masked_weight: Weight of the distance where the distinct part is strong (equation 12); None takes the preset's.
        r1_weight: Weight of the critic's gradient penalty on real images; None takes the preset's.
        orthogonality_weight: Weight of the correlation between branches; None takes the preset's.
        neutral_weight: Weight of KL(uniform || classifier(image - distinct)); acts with objective "neutral".
        sparsity_weight: Weight of the mean magnitude of the distinct part.
        counterfactual_weight: Weight of the class loss of ``image - distinct + distinct of the alternative``, which the
            critic then judges too. Only the alternative's distinct part learns from it; the published loss never
            trains that part on images of other classes.
        r1_interval: Applies the gradient penalty in every n-th iteration, n times as strong.
        learning_rate: Adam step size of the generator.
        critic_learning_rate: Adam step size of the critic.
        mapping_learning_rate: Adam step size of the mapping network.
        weight_decay: Coupled L2 decay of all three networks.
        source: Class an image is rendered in during training: its "label", or the prediction of the "classifier".
        micro_batches: Number of slices that a batch is computed in, one after the other: the same gradient in less
            memory, for one more pass of the generator. The mean of the masked loss (equation 12) is taken per slice.

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
        # Losses: every weight that is given replaces the preset's.
        given: dict[str, Any] = {
            "objective": objective,
            "adversarial_weight": adversarial_weight,
            "class_weight": class_weight,
            "reconstruction_weight": reconstruction_weight,
            "masked_weight": masked_weight,
            "r1_weight": r1_weight,
            "orthogonality_weight": orthogonality_weight,
            "neutral_weight": neutral_weight,
            "sparsity_weight": sparsity_weight,
            "counterfactual_weight": counterfactual_weight,
        }
        self.losses = replace(PRESETS[preset], **{name: value for name, value in given.items() if value is not None})
        # Settings.
        self.strength = strength
        self.r1_interval = r1_interval
        self.learning_rates = (learning_rate, mapping_learning_rate, critic_learning_rate)
        self.weight_decay = weight_decay
        self.source = source
        self.micro_batches = check_micro_batches(micro_batches)
        # Networks.
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
            "num_heads": classifier.num_classes if self.losses.per_class_critic else 1,
            "base_width": critic_width,
            "max_width": critic_max_width,
        }
        # Dense convolutions train about a sixth faster in this layout; the generator's grouped ones do not.
        self.critic = ResidualCritic(**critic_args).to(memory_format=torch.channels_last)
        if preset == "joint_d":
            self.classifier = _critic_as_classifier(self.critic, critic_args, classifier)
        self._mean_styles: Tensor | None = None

    def blocks(self) -> list[nn.Module]:
        """Lists the building blocks of generator and critic."""
        return [*self.generator.blocks(), *self.critic.blocks()]

    # Explaining.

    @torch.no_grad()
    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        """Decomposes images for their predicted class and moves them to the target's distinct part.

        Args:
            image: Images, [B, C, H, W] in [-1, 1].
            target: Target classes, [B]; None takes the runner-up.

        Returns:
            An explanation with parts ``agnostic`` (generated), ``distinct`` and ``residual``, which sum to the image,
            and ``reconstruction``; steps ``image - strength * distinct``; as counterfactual, the image with its
            distinct part exchanged for the target's. With strength "neutral" both distinct parts are taken at the
            neutral strength, or whole where that does not reach the target.
        """
        return self._explained(image, target)[0]

    def _explained(self, image: Tensor, target: Tensor | None) -> tuple[Explanation, Tensor]:
        """Returns the explanation and the branches in the predicted class behind it, [B, N, C, H, W]."""
        # Branches of both classes.
        logits = self.classifier(image)
        predicted = logits.argmax(dim=1)
        target = self.default_target(logits) if target is None else target
        styles = self.mean_styles()
        maps = self.generator.encode(image)
        own, other = self.generator.decode(maps, torch.cat([styles[predicted], styles[target]]), image).chunk(2)
        # Decomposition. The rendering has a neutral strength of its own: what it misses can move a steep classifier.
        reconstruction = own.sum(dim=1)
        share = self._share(image, own[:, 0])
        distinct = share * own[:, 0]
        agnostic = reconstruction - self._share(reconstruction, own[:, 0]) * own[:, 0]
        residual = image - agnostic - distinct
        # Counterfactual and sweep.
        counterfactual, counterfactual_logits = self._counterfactual(image, own[:, 0], other[:, 0], share, target)
        strengths = image.new_tensor(SWEEP)
        undecided = self.classifier(image - distinct).softmax(dim=1)
        explanation = Explanation(
            image=image,
            logits=logits,
            target=target,
            attribution=distinct.abs().mean(dim=1, keepdim=True),
            counterfactual=counterfactual,
            counterfactual_logits=counterfactual_logits,
            steps=image[:, None] - strengths.view(1, -1, 1, 1, 1) * distinct[:, None],
            strengths=strengths.expand(len(image), -1),
            parts={"reconstruction": reconstruction, "agnostic": agnostic, "distinct": distinct, "residual": residual},
            scores={
                "reconstruction_psnr": psnr(image, reconstruction),
                "confidence_without_distinct": undecided.gather(1, predicted[:, None]).squeeze(1),
                "distinct_strength": share.view(-1).expand(len(image)),
            },
        )
        return explanation, own

    def _counterfactual(
        self, image: Tensor, own: Tensor, other: Tensor, share: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Exchanges the distinct parts ``own`` and ``other`` of images, [B, C, H, W], and returns the logits, too."""
        changed = (image - share * own + share * other).clamp(-1, 1)
        logits = self.classifier(changed)
        if self.strength == "neutral":
            # A share of the change may stop short of the target, and the whole of it may arrive.
            arrived = logits.argmax(dim=1) == target
            whole = (image - own + other).clamp(-1, 1)
            changed = torch.where(arrived.view(-1, 1, 1, 1), changed, whole)
            logits = self.classifier(changed)
        return changed, logits

    @torch.no_grad()
    def distinct(self, image: Tensor, source: Tensor) -> Tensor:
        """Returns the distinct part of images [B, C, H, W] rendered as class ``source`` [B] (definition 2)."""
        distinct = self.generator(image, self.mean_styles()[source])[:, 0]
        return self._share(image, distinct) * distinct

    def _share(self, image: Tensor, distinct: Tensor) -> Tensor:
        """Returns the strength at which an explanation removes the distinct part, [B or 1, 1, 1, 1]."""
        if self.strength == "full":
            return image.new_ones(1, 1, 1, 1)
        return neutral_strength(self.classifier, image, distinct).view(-1, 1, 1, 1)

    @torch.no_grad()
    def mean_styles(self) -> Tensor:
        """Returns the mean style of every class over 1,024 fixed latents, [K, S, style_dim].

        Paper: a fresh random latent per image; here: the mean, because an explanation must not depend on chance.
        """
        # After a validation Lightning resumes training without calling ``train``: the cache is then that of the
        # averaged weights.
        kept = None if self.training else self._mean_styles
        if kept is not None and kept.device == self.device:
            return kept
        # Average over latents.
        latent = torch.randn(1024, self.mapping.latent_dim, generator=torch.Generator().manual_seed(0)).to(self.device)
        classes = torch.arange(self.classifier.num_classes, device=self.device)
        # Full precision, because the cache must not depend on the precision of the first call.
        with full_precision(latent):
            styles = torch.stack([self.mapping(latent, k.expand(len(latent))).mean(dim=0) for k in classes])
        self._mean_styles = None if self.training else styles
        return styles

    def train(self, mode: bool = True) -> Dxai:
        """Forgets the cached styles: the weights may change after this call."""
        self._mean_styles = None
        return super().train(mode)

    def on_fit_end(self) -> None:
        """Forgets the styles of the last validation, which belong to the averaged weights."""
        self._mean_styles = None

    # Training.

    def setup(self, stage: str) -> None:
        """Unfreezes the critic: an earlier fit leaves it frozen, and so does its use as the classifier ("joint_d").

        ``configure_optimizers`` is too late: DDP looks up before it which weights exchange gradients.
        """
        super().setup(stage)
        if stage == "fit":
            self.critic.requires_grad_(True)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Takes one critic step and one generator step on a shared set of renderings."""
        whole = self._draw(batch)
        slices = [rows_of(whole, rows) for rows in parts_of(len(whole), self.micro_batches)]
        generator_optimizer, critic_optimizer = self.optimizers()  # type: ignore[misc, union-attr, attr-defined]
        # The generator does not change between the two steps.
        shown, rendered = render_twice(self._render, slices)
        # Critic step.
        self.critic.requires_grad_(True)
        terms = accumulate_and_step(
            self, slices, lambda some: self._critic_loss(some, shown(some)), "critic", critic_optimizer
        )
        # Generator step.
        self.critic.requires_grad_(False)
        terms |= accumulate_and_step(
            self, slices, lambda some: self._generator_loss(some, rendered(some)), "generator", generator_optimizer
        )
        log_training(self, terms, len(whole))

    def _draw(self, batch: dict[str, Any]) -> Slice:
        """Draws the classes in which a batch is rendered, and its random numbers."""
        image = batch["image"]
        imitated = self.losses.critic_class_term == "kl"
        logits = self.classifier(image) if imitated or self.source == "classifier" else None
        label = batch["label"] if logits is None or self.source == "label" else logits.argmax(dim=1)
        return Slice(
            image=image,
            label=label,
            alternative=alternative_class(label, self.classifier.num_classes),
            logits=logits,
            # All latents of the own classes, then all of the alternatives.
            latent=torch.randn(2, len(image), self.mapping.latent_dim, device=image.device).transpose(0, 1),
            alpha=torch.rand(len(image), self.generator.num_branches - 1, 1, 1, 1, device=image.device),
        )

    def _render(self, images: Slice) -> Blend:
        """Renders images in their own and in the alternative class, with the extra terms that have a weight."""
        classes = torch.cat([images.label, images.alternative])
        styles = self.mapping(images.latent.transpose(0, 1).flatten(0, 1), classes)
        maps = self.generator.encode(images.image)
        own, other = self.generator.decode(maps, styles, images.image).chunk(2)
        rendered = blend(own, other, images.alpha)
        if self.losses.orthogonality_weight:
            rendered = replace(rendered, orthogonality=branch_orthogonality(maps[:-1], self.generator.num_branches))
        if self.losses.counterfactual_weight:
            moved = (images.image - rendered.distinct).detach() + rendered.distinct_alternative
            rendered = replace(rendered, counterfactual=moved)
        return rendered

    def _critic_loss(self, images: Slice, rendered: Blend) -> dict[str, Tensor]:
        # Lightning counts one step per optimiser, and there are two.
        with_r1 = (self.global_step // 2) % self.r1_interval == 0
        r1_weight = self.losses.r1_weight * self.r1_interval if with_r1 else 0.0
        return self.losses.of_critic(self.critic, images, rendered, r1_weight)

    def _generator_loss(self, images: Slice, rendered: Blend) -> dict[str, Tensor]:
        return self.losses.of_generator(self.critic, self.classifier, images, rendered)

    @torch.no_grad()
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Measures explanations of unseen images, made with the deterministic mean style."""
        image, label = batch["image"], batch["label"]
        explanation, branches = self._explained(image, None)
        distinct, flipped = explanation.parts["distinct"], explanation.flipped
        assert flipped is not None, "Dxai.explain always returns a counterfactual"
        # Decomposition.
        agnostic_logits = self.classifier(explanation.parts["agnostic"])
        removed_logits = self.classifier(image - distinct)
        # Loss. Training removes the whole of branch 0, whatever share an explanation removes.
        own_class = F.cross_entropy(self.classifier(explanation.parts["reconstruction"]), label)
        without_logits = self.classifier(branches[:, 1:].sum(dim=1))
        if self.losses.objective == "paper":
            removed_class = F.cross_entropy(without_logits, runner_up(explanation.logits))
        else:
            removed_class = kl_from_uniform(without_logits).mean()
        loss = self.losses.class_weight * 0.5 * (own_class + removed_class)
        loss = loss + self.losses.reconstruction_weight * distance(image, explanation.parts["reconstruction"])
        values = {
            "loss": loss,
            "psnr": explanation.scores["reconstruction_psnr"].mean(),
            "classifier_agreement": (explanation.predicted == label).float().mean(),
            "accuracy_without_distinct": (removed_logits.argmax(dim=1) == label).float().mean(),
            "confidence_without_distinct": removed_logits.softmax(dim=1).amax(dim=1).mean(),
            "kl_to_uniform": kl_from_uniform(agnostic_logits).mean(),
            "distinct_magnitude": distinct.abs().mean(),
            "flip_rate": flipped.float().mean(),
        }
        log_validation(self, values, len(image))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Builds Adam for generator and mapping network (two learning rates) and for the critic."""
        generator_rate, mapping_rate, critic_rate = self.learning_rates
        # Both betas must be floats: recent PyTorch rejects mixed types.
        options: Any = {"betas": (0.0, 0.99), "weight_decay": self.weight_decay, "fused": self.device.type in FUSED}
        groups = [
            {"params": self.generator.parameters(), "lr": generator_rate},
            {"params": self.mapping.parameters(), "lr": mapping_rate},
        ]
        return [torch.optim.Adam(groups, **options), torch.optim.Adam(self.critic.parameters(), critic_rate, **options)]


def _critic_as_classifier(
    critic: ResidualCritic, critic_args: dict[str, Any], classifier: FrozenClassifier
) -> FrozenClassifier:
    """Presents the critic's class heads as the classifier to be explained (appendix B, third kind of classifier)."""
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
