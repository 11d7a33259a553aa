"""Mirror-CFE: what the image would look like on the other side of the classifier's own decision boundary.

Paper: "Looking in the Mirror: A Faithful Counterfactual Explanation Method for Interpreting Deep Image Classification
Models" (Chowdhury et al., ICCV 2025, arXiv 2509.16822). The classifier's features are reflected in the boundary between
the predicted class and the target, and a decoder that learned to invert the classifier renders the way there.

Deviations, each with its reason in ``docs/methods/mirror_cfe.md``: confidences are swapped in closed form instead of by
L-BFGS, one decoder serves all pairs of classes, and the critic can be told which class an image should show.

Shapes: B images, C channels, H, W pixels, K classes, D features, h, w cells of the feature map, T steps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfe_lightning.classifier import Activations, FrozenClassifier
from cfe_lightning.compute.batch_norm import uncounted
from cfe_lightning.compute.losses import adversarial_loss
from cfe_lightning.compute.memory import pictures_at_once
from cfe_lightning.compute.micro_batches import (
    FUSED,
    accumulate_and_step,
    check_micro_batches,
    frozen,
    parts_of,
    render_twice,
)
from cfe_lightning.compute.precision import full_precision, to_float32
from cfe_lightning.compute.processes import broadcast_buffers, log_training, log_validation
from cfe_lightning.decisions import alternative_class, confidence_gap, kl_between_logits, runner_up
from cfe_lightning.explainer import ExplainerModule
from cfe_lightning.explanation import Explanation
from cfe_lightning.methods.mirror_cfe.decoder import DecoderNorm, MirrorDecoder, PatchCritic
from cfe_lightning.methods.mirror_cfe.geometry import (
    Reflection,
    Swap,
    bisect_step,
    first_flip,
    reflect,
    reflect_nonlinear,
    swap_matrix,
)
from cfe_lightning.methods.mirror_cfe.spread import (
    Spread,
    class_maps,
    edit_mask,
    prior_of,
    spread_by_location,
    spread_by_water_filling,
    spread_uniform,
)

Batch = TypeVar("Batch")


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """The classifier's head in float64.

    Attributes:
        logits: Features [B, D] to logits [B, K].
        weight: [K, D]; like the others empty where the head is not linear.
        bias: [K].
        matrix: ``swap_matrix`` of it, [K, D]; None where the head is not linear.
    """

    logits: Callable[[Tensor], Tensor]
    weight: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    bias: Tensor = field(default_factory=lambda: torch.empty(0))
    matrix: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Mirrored:
    """A batch on its way through the mirror.

    Attributes:
        source: Classes the path starts from, [B].
        target: Classes it leads to, [B].
        logits: The classifier's logits of the images, [B, K].
        feature_map: The images' own maps, [B, D, h, w].
        change: What the reflection adds to them, [B, D, h, w].
        features: The images' own features, [B, D] float64.
        reflection: Where the path ends in feature space.
        rows: Rows of the head for source and target, [B, 2, D].
        levels: The classifier's earlier maps, nearest to the feature map first, each [B, C_i, H_i, W_i].
    """

    source: Tensor
    target: Tensor
    logits: Tensor
    feature_map: Tensor
    change: Tensor
    features: Tensor
    reflection: Reflection
    rows: Tensor
    levels: list[Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """Images of a batch on their way.

    Attributes:
        image: [B, C, H, W].
        mirrored: Where they go.
        step: How far, [B, 1] in [0, 1].
        shown: The classes that the renderings should show there, [B].
    """

    image: Tensor
    mirrored: Mirrored
    step: Tensor
    shown: Tensor

    def __len__(self) -> int:
        return len(self.image)


class MirrorCFE(ExplainerModule):
    """Trains a decoder of one classifier's features and explains by reflecting them.

    Args:
        classifier: The classifier to be explained; it needs a feature map whose spatial mean the head reads.
        levels: Dotted names of the classifier's layers that lend the decoder detail, nearest to the feature map first;
            None finds up to three by tracing, an empty list decodes from the feature map alone (blurred).
        swap: How features are reflected, see ``mirror_geometry.reflect``. Heads that are not linear are always inverted
            by L-BFGS.
        bounds: Lower and upper bound that reflected features must keep, such as [0] after a ReLU or [0, 6] after a
            ReLU6; None keeps none.
        spread: How the change is spread over the places of the feature map: "uniform", "location" (by how much each
            place speaks for the source) or "waterfill" (where the class maps are, never negative; needs bounds).
        thresholds: Lowest and highest threshold of the edit mask (Eq. 14).
        soft_mask: A smooth mask, for animations without jumps.
        pairs: Pairs of class names, such as [["3", "8"], ["4", "9"]]: training goes between them only. None draws any
            other class.
        num_steps: Steps of an explanation, from the reconstruction to the reflection.
        counterfactual: Which picture of the path is the answer: the "first" that the classifier calls the target
            (the reflection where none is), or the "reflection".
        width: Decoder channels at full resolution, doubled where the resolution halves.
        max_width: Upper limit of the decoder's channels.
        editor_width: Channels inside the spatial pattern editors.
        norm: "batch" for batches of 16 and more, "group" below.
        critic_widths: Channels of the critic's stride-2 layers.
        class_critic: Tell the critic which class an image should show; unconditional as published.
        class_weight: Weight of KL(intended || predicted) on both renderings (Eq. 2).
        adversarial_weight: Weight of Eq. 3.
        reconstruction_weight: Weight of Eq. 4.
        feature_weight: Weight of Eq. 5, relative to the mean length of the features.
        triangulation_weight: Weight of Eq. 6 to 11; the paper doubles it for large or colour images.
        tolerance: Half-width of the triangulation's band (alpha).
        learning_rate: Adam step size of decoder and critic.
        betas: Adam's.
        decay_from: Share of the training after which both learning rates fall linearly towards zero; 1 keeps them.
        micro_batches: Parts that a batch is computed in, one after the other: the same gradient in less memory, for
            one more pass of the decoder; what the classifier sees is kept of the whole batch, without a gradient. The
            batch norm, the mean length in the feature loss and the partners of the triangulation are those of a part,
            and the critic's spectral norms are refined once per part.

    Raises:
        ValueError: If the classifier has no pooled feature map, or an argument is out of range.
    """

    def __init__(
        self,
        classifier: FrozenClassifier,
        *,
        levels: list[str] | None = None,
        swap: Swap = "softmax",
        bounds: list[float] | None = None,
        spread: Spread = "uniform",
        thresholds: list[float] | None = None,
        soft_mask: bool = False,
        pairs: list[list[str]] | None = None,
        num_steps: int = 20,
        counterfactual: Literal["first", "reflection"] = "first",
        width: int = 16,
        max_width: int = 256,
        editor_width: int = 128,
        norm: DecoderNorm = "batch",
        critic_widths: list[int] | None = None,
        class_critic: bool = True,
        class_weight: float = 1.0,
        adversarial_weight: float = 1.0,
        reconstruction_weight: float = 1.0,
        feature_weight: float = 1.0,
        triangulation_weight: float = 1.0,
        tolerance: float = 0.2,
        learning_rate: float = 2e-4,
        betas: list[float] | None = None,
        decay_from: float = 1.0,
        micro_batches: int = 1,
    ) -> None:
        super().__init__(classifier)
        if not 0 <= decay_from <= 1:
            raise ValueError(f"decay_from is a share of the training, from 0 to 1, got {decay_from}.")
        if num_steps < 2:
            raise ValueError(f"num_steps must be at least 2 (reconstruction and reflection), got {num_steps}.")
        if bounds is not None and not 1 <= len(bounds) <= 2:
            raise ValueError(f"bounds is a lower and perhaps an upper bound, such as [0] or [0, 6], got {bounds}.")
        if spread == "waterfill" and (bounds is None or bounds[0] != 0):
            raise ValueError("spread 'waterfill' needs features that are never negative: set bounds to [0].")
        self.automatic_optimization = False
        self.swap: Swap = swap
        self.bounds = None if bounds is None else (bounds[0], bounds[1] if len(bounds) > 1 else torch.inf)
        self.spread: Spread = spread
        self.thresholds = (0.1, 0.5) if thresholds is None else (thresholds[0], thresholds[1])
        self.soft_mask = soft_mask
        self.num_steps = num_steps
        self.counterfactual = counterfactual
        self.class_weight = class_weight
        self.adversarial_weight = adversarial_weight
        self.reconstruction_weight = reconstruction_weight
        self.feature_weight = feature_weight
        self.triangulation_weight = triangulation_weight
        self.tolerance = tolerance
        self.learning_rate = learning_rate
        self.betas = (0.5, 0.999) if betas is None else (betas[0], betas[1])
        self.decay_from = decay_from
        self.micro_batches = check_micro_batches(micro_batches)
        self.register_buffer("partner", _partners(classifier.class_names, pairs), persistent=False)
        self.in_pairs = bool(pairs)

        feature_map = classifier.pooled_feature_map()
        self.levels = classifier.find_levels(levels)
        self.decoder = MirrorDecoder(
            map_shape=(feature_map.shape[1], feature_map.shape[2], feature_map.shape[3]),
            level_shapes=[level.size for level in self.levels.values()],
            non_negative=[level.non_negative for level in self.levels.values()],
            image_size=self.image_size,
            channels=self.channels,
            width=width,
            max_width=max_width,
            editor_width=editor_width,
            norm=norm,
        )
        self.critic = PatchCritic(
            channels=self.channels,
            num_classes=classifier.num_classes if class_critic else 0,
            widths=(64, 128, 256, 256) if critic_widths is None else critic_widths,
        )
        self._head: Head | None = None

    partner: Tensor

    def blocks(self) -> list[nn.Module]:
        """Of the decoder; a second pass of the small critic would refine its spectral norms once more."""
        return self.decoder.blocks()

    # Through the mirror

    @torch.no_grad()
    def reflect(self, image: Tensor, target: Tensor | None = None, seen: Activations | None = None) -> Mirrored:
        """All of the way from the predicted class to a target that needs no decoder.

        Args:
            image: [B, C, H, W] in [-1, 1].
            target: Classes asked for, [B]; None asks for ``default_target``. Where a target is predicted already the
                way leads to the runner-up, because no mirror stands in between.
            seen: What the classifier sees in them, with ``levels``, if at hand.
        """
        if seen is None:
            seen = self.classifier.activations(image, self.levels)
        with full_precision(image):
            return self._reflected(seen, target)

    def _reflected(self, seen: Activations, target: Tensor | None) -> Mirrored:
        """As ``reflect``, of what the classifier has seen in the images."""
        # float64 throughout: steps are short and the swap is exact only to rounding.
        own_map = to_float32(seen.feature_map)
        feature_map = own_map.double()
        features = feature_map.mean(dim=(2, 3))
        source, other = seen.logits.argmax(dim=1), runner_up(seen.logits)
        asked = self.default_target(seen.logits) if target is None else target
        target = torch.where(asked == source, other, asked)
        pair = torch.stack([source, target], dim=1)
        head = self.head()
        if head.matrix is None:
            reflection, weight, bias = reflect_nonlinear(features, head.logits, source, target)
            rows = weight.gather(1, pair[:, :, None].expand(-1, -1, weight.shape[2]))
            offset = bias.gather(1, pair)
        else:
            reflection = reflect(
                features,
                head.weight,
                head.bias,
                source,
                target,
                swap=self.swap,
                matrix=head.matrix,
                bounds=self.bounds,
            )
            rows, offset = head.weight[pair], head.bias[pair]
        if self.spread == "location":
            normal, height = rows[:, 0] - rows[:, 1], offset[:, 0] - offset[:, 1]
            reflected = spread_by_location(feature_map, reflection.features, normal, height)
        elif self.spread == "waterfill":
            prior = prior_of(class_maps(feature_map, rows))
            # Where no reflection without negative features exists, the map is spread evenly.
            inside = (reflection.features >= 0).all(dim=1)[:, None, None, None]
            filled = spread_by_water_filling(feature_map, reflection.features.clamp_min(0), prior)
            reflected = torch.where(inside, filled, spread_uniform(feature_map, reflection.features))
        else:
            reflected = spread_uniform(feature_map, reflection.features)
        return Mirrored(
            source=source,
            target=target,
            logits=seen.logits,
            feature_map=own_map,
            change=(reflected - feature_map).to(own_map.dtype),
            features=features,
            reflection=reflection,
            rows=rows,
            levels=seen.levels,
        )

    def default_target(self, logits: Tensor) -> Tensor:
        """The other class of the predicted one's pair, which alone the decoder has learnt; else the runner-up."""
        partner = self.partner[logits.argmax(dim=1)]
        return torch.where(partner >= 0, partner, runner_up(logits))

    def head(self) -> Head:
        """The classifier's head in float64; read once, because it is frozen."""
        if self._head is None:
            linear = self.classifier.linear_head()
            if linear is None:
                self._head = Head(logits=self.classifier.exact_head())
            else:
                weight, bias = linear
                form: Literal["softmax", "logits"] = "logits" if self.swap == "logits" else "softmax"
                self._head = Head(
                    logits=lambda features: features @ weight.T + bias,
                    weight=weight,
                    bias=bias,
                    matrix=swap_matrix(weight, form),
                )
        return self._head

    def train(self, mode: bool = True) -> MirrorCFE:
        """Forgets the head: weights may be loaded, or moved to another device, after this call."""
        self._head = None
        return super().train(mode)

    def decode(self, mirrored: Mirrored, step: Tensor, summaries: list[Tensor] | None = None) -> Tensor:
        """Renders the path at some steps.

        Args:
            mirrored: Where the path goes.
            step: How far, [B, T] in [0, 1]: 0 is the image's own map, 1 the reflected one.
            summaries: ``summarise`` of the decoder, if at hand.

        Returns:
            [B, T, C, H, W] in [-1, 1].
        """
        batch, num_steps = step.shape
        share = step.to(mirrored.change.dtype)[:, :, None, None, None]
        maps = (mirrored.feature_map[:, None] + share * mirrored.change[:, None]).flatten(0, 1)
        if summaries is None:
            summaries = self.decoder.summarise(mirrored.levels)
        rows = mirrored.rows.repeat_interleave(num_steps, dim=0)
        mask = edit_mask(class_maps(maps, rows), step.flatten(), self.thresholds, self.soft_mask)
        return self.decoder(maps, mirrored.levels, summaries, mask).unflatten(0, (batch, num_steps))

    def _decode_in_parts(self, mirrored: Mirrored, step: Tensor, at_once: int) -> Tensor:
        """As ``decode``, so many pictures at a time: several steps of all images, or few images one after the other."""
        rendered = []
        for start in range(0, len(step), at_once):
            rows = slice(start, start + at_once)
            part, steps = _rows_of(mirrored, rows), step[rows]
            summaries = self.decoder.summarise(part.levels)
            chunks = steps.split(max(1, at_once // len(steps)), dim=1)
            rendered.append(torch.cat([self.decode(part, chunk, summaries) for chunk in chunks], dim=1))
        return torch.cat(rendered)

    def intended(self, mirrored: Mirrored, step: Tensor) -> Tensor:
        """The head's logits of the features that each step stands for, [B, T] -> [B, T, K] float64."""
        with full_precision(step):
            return self.head().logits(_features_at(mirrored, step).flatten(0, 1)).unflatten(0, step.shape)

    def _crossings(self, mirrored: Mirrored) -> tuple[Tensor, Tensor]:
        """Steps at which the path meets the boundary and from which the head says the target, [B] float64 each."""
        ends = torch.tensor([0.0, 1.0], device=mirrored.target.device).expand(len(mirrored.target), -1)
        start, end = self.intended(mirrored, ends).unbind(dim=1)
        if self.head().matrix is not None:
            return torch.full_like(start[:, 0], 0.5), first_flip(start, end, mirrored.target)
        # Where the head is not linear, neither is the way of the logits.
        source, target = mirrored.source[:, None, None], mirrored.target[:, None, None]

        def reached(step: Tensor) -> Tensor:
            logits = self.intended(mirrored, step)
            to_target = logits.gather(2, target.expand(-1, 2, 1)).squeeze(2)
            to_source = logits[:, :1].gather(2, source).squeeze(2)
            return torch.cat([to_target[:, :1] >= to_source, to_target[:, 1:] >= logits[:, 1:].amax(dim=2)], dim=1)

        step = bisect_step(reached, ends.double() * 0, ends.double() * 0 + 1)
        arrives = end.argmax(dim=1) == mirrored.target
        return step[:, 0], torch.where(arrives, step[:, 1], 2.0)

    # Explaining

    @torch.no_grad()
    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        """Walks from the predicted class through the mirror to the target.

        Args:
            image: [B, C, H, W] in [-1, 1].
            target: Classes asked for, [B]; None asks for ``default_target``.

        Returns:
            An explanation with the path as steps (the reconstruction first, the reflection last) and the ``intended``
            logits beside what the classifier says; parts ``reconstruction``, ``boundary``, ``reflection`` and
            ``redrawn`` (counterfactual minus reconstruction, without the decoder's own error); scores ``first_flip``
            (the step from which the classifier says the target, 2 where it never does), ``intended_first_flip`` (from
            which the head says so of the reflected features), ``boundary_step`` (0.5 for a linear head),
            ``confidence_gap`` (mean absolute difference of intended and predicted target probability along the path),
            ``boundary_distance`` in feature space, ``status`` (index into ``mirror_geometry.STATUS``) and
            ``swap_residual``.
        """
        image = image.to(self.dtype)
        mirrored = self.reflect(image, target)
        batch = len(image)
        meets, intended_flip = self._crossings(mirrored)
        grid = torch.linspace(0, 1, self.num_steps, device=image.device)
        # The boundary is a step of its own: an even number of steps would miss it.
        step = torch.cat([grid.expand(batch, -1), meets[:, None].to(grid)], dim=1)
        pictures = self._decode_in_parts(mirrored, step, pictures_at_once(image[0, 0].numel(), image.device))
        logits = self.classifier.along(pictures)[:, :-1]
        steps, boundary = pictures[:, :-1], pictures[:, -1]
        reconstruction, reflection = steps[:, 0], steps[:, -1]

        arrived = logits.argmax(dim=2) == mirrored.target[:, None]
        found = arrived.any(dim=1)
        first = arrived.to(torch.int8).argmax(dim=1)
        chosen = torch.where(found & (self.counterfactual == "first"), first, self.num_steps - 1)
        rows = torch.arange(batch, device=image.device)
        counterfactual, counterfactual_logits = steps[rows, chosen], logits[rows, chosen]
        intended = self.intended(mirrored, step[:, :-1])
        redrawn = counterfactual - reconstruction
        return Explanation(
            image=image,
            logits=mirrored.logits,
            target=mirrored.target if target is None else target,
            attribution=redrawn.abs().mean(dim=1, keepdim=True),
            counterfactual=counterfactual,
            counterfactual_logits=counterfactual_logits,
            steps=steps,
            strengths=step[:, :-1],
            intended=intended.to(logits.dtype),
            parts={
                "reconstruction": reconstruction,
                "boundary": boundary,
                "reflection": reflection,
                "redrawn": redrawn,
            },
            scores={
                "first_flip": torch.where(found, grid[first], 2.0),
                "intended_first_flip": intended_flip.float(),
                "confidence_gap": confidence_gap(intended, logits, mirrored.target),
                "boundary_step": meets.float(),
                "boundary_distance": (meets * mirrored.reflection.distance).float(),
                "status": mirrored.reflection.status.float(),
                "swap_residual": mirrored.reflection.residual.float(),
            },
        )

    # Training

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Lowers the learning rates; from the progress alone, so that a resumed run goes on where it was."""
        if self.decay_from < 1 and self.trainer.max_epochs and self.trainer.max_epochs > 0:
            progress = (self.current_epoch + batch_idx / self.trainer.num_training_batches) / self.trainer.max_epochs
            rate = self.learning_rate * min(1.0, (1 - progress) / (1 - self.decay_from))
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                for group in optimizer.param_groups:
                    group["lr"] = rate

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One critic step and one decoder step on the same renderings."""
        image = batch["image"]
        if self.in_pairs:
            image, _ = self._inside_pairs(image)
        with torch.no_grad():
            seen = self.classifier.activations(image, self.levels)
        source = seen.logits.argmax(dim=1)
        decoder_optimizer, critic_optimizer = self.optimizers()  # type: ignore[misc, union-attr, attr-defined]
        target, step = self._draw_target(source), torch.rand(len(image), 1, device=image.device)
        rows = parts_of(len(image), self.micro_batches)
        parts = [self._part(image[r], target[r], step[r], _rows_of(seen, r)) for r in rows]
        shown, rendered = render_twice(self._render, parts)
        terms = accumulate_and_step(
            self, parts, lambda part: self._critic_loss(part, shown(part)[1]), "critic", critic_optimizer
        )
        with frozen(self.critic):
            terms |= accumulate_and_step(
                self, parts, lambda part: self._decoder_loss(part, *rendered(part)), "decoder", decoder_optimizer
            )
        log_training(self, terms, len(image))

    def _part(self, image: Tensor, target: Tensor, step: Tensor, seen: Activations | None = None) -> _Part:
        mirrored = self.reflect(image, target, seen)
        shown = torch.where(step[:, 0] < 0.5, mirrored.source, mirrored.target)
        return _Part(image=image, mirrored=mirrored, step=step, shown=shown)

    def _render(self, part: _Part) -> tuple[Tensor, Tensor]:
        """Where the path begins and where the step leads, [B, C, H, W] each."""
        # A pass without gradient is made again with it, and batch norms shall count it once.
        with nullcontext() if torch.is_grad_enabled() else uncounted(self.decoder):
            path = self.decode(part.mirrored, torch.cat([torch.zeros_like(part.step), part.step], dim=1))
        reconstruction, rendered = path.unbind(dim=1)
        return reconstruction, rendered

    def _critic_loss(self, part: _Part, rendered: Tensor) -> dict[str, Tensor]:
        terms = {
            "critic_real": adversarial_loss(self.critic(part.image, part.mirrored.source), real=True),
            "critic_fake": adversarial_loss(self.critic(rendered.detach(), part.shown), real=False),
        }
        return terms | {"critic": terms["critic_real"] + terms["critic_fake"]}

    @torch.no_grad()
    def _inside_pairs(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The batch and its predicted classes; images outside of all pairs give way to some inside: its size stays."""
        source = self.classifier(image).argmax(dim=1)
        kept = (self.partner[source] >= 0).nonzero().squeeze(1)
        if len(kept) == 0:  # without pairs, too
            return image, source
        chosen = kept[torch.arange(len(image), device=image.device) % len(kept)]
        return image[chosen], source[chosen]

    def _draw_target(self, source: Tensor) -> Tensor:
        """A target for every predicted class [B]: its partner, or any other class."""
        other = alternative_class(source, self.classifier.num_classes)
        return torch.where(self.partner[source] >= 0, self.partner[source], other)

    def _decoder_loss(self, part: _Part, reconstruction: Tensor, rendered: Tensor) -> dict[str, Tensor]:
        image, mirrored, step = part.image, part.mirrored, part.step
        intended = self.intended(mirrored, torch.cat([torch.zeros_like(step), step], dim=1)).to(image.dtype)
        seen = self.classifier.activations(torch.cat([reconstruction, rendered]))
        features = to_float32(seen.feature_map).mean(dim=(2, 3))
        wanted = _features_at(mirrored, step)[:, 0].to(image.dtype)
        length = mirrored.features.norm(dim=1).mean().to(image.dtype)
        terms = {
            "class": kl_between_logits(intended.transpose(0, 1).flatten(0, 1), seen.logits),
            "adversarial": adversarial_loss(self.critic(rendered, part.shown), real=True),
            "reconstruction": (reconstruction - image).abs().mean(),
            "feature": (features[len(image) :] - wanted).norm(dim=1).mean() / length,
            "triangulation": self._triangulation(part, rendered, wanted),
        }
        total = (
            self.class_weight * terms["class"]
            + self.adversarial_weight * terms["adversarial"]
            + self.reconstruction_weight * terms["reconstruction"]
            + self.feature_weight * terms["feature"]
            + self.triangulation_weight * terms["triangulation"]
        )
        return terms | {"decoder": total}

    def _triangulation(self, part: _Part, rendered: Tensor, wanted: Tensor) -> Tensor:
        """Asks for a visible change in proportion to the one in feature space (Eq. 6 to 11).

        The reference is a random image of the class on the rendering's side of the mirror, taken from the batch;
        images for which the batch holds none do not count.
        """
        image, mirrored = part.image, part.mirrored
        candidates = mirrored.source[None] == part.shown[:, None]
        candidates = candidates & ~torch.eye(len(image), dtype=torch.bool, device=image.device)
        chosen = (candidates * (0.1 + torch.rand(candidates.shape, device=image.device))).argmax(dim=1)
        counts = candidates.any(dim=1).to(image.dtype)
        reference = mirrored.features[chosen].to(image.dtype)
        near = (mirrored.features.to(image.dtype) - wanted).norm(dim=1)
        ratio = ((wanted - reference).norm(dim=1) / (near + 1e-8)).clamp(1e-2, 1e2)
        moved = (image - rendered).abs().mean(dim=(1, 2, 3))
        apart = (rendered - image[chosen]).abs().mean(dim=(1, 2, 3)) / ratio
        outside = F.relu((1 - self.tolerance) * apart - moved) + F.relu(moved - (1 + self.tolerance) * apart)
        return (outside * counts).sum() / counts.sum().clamp_min(1)

    def on_validation_epoch_start(self) -> None:
        """Has all processes measure the decoder with the same batch statistics."""
        broadcast_buffers(self.decoder)

    @torch.no_grad()
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Measures reconstruction, validity and faithfulness on the way to the default target."""
        image = batch["image"]
        mirrored = self.reflect(image)
        step = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], device=image.device).expand(len(image), -1)
        path = self.decode(mirrored, step)
        logits = self.classifier(path.flatten(0, 1)).unflatten(0, step.shape)
        error = (path[:, 0] - image).abs().mean()
        validity = (logits[:, -1].argmax(dim=1) == mirrored.target).float().mean()
        values = {
            "loss": error + 1 - validity,
            "reconstruction": error,
            "validity": validity,
            "confidence_gap": confidence_gap(self.intended(mirrored, step), logits, mirrored.target).mean(),
            "classifier_agreement": (logits[:, 0].argmax(dim=1) == mirrored.source).float().mean(),
            "change": (path[:, -1] - path[:, 0]).abs().mean(),
        }
        log_validation(self, values, len(image))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam for the decoder and for the critic."""
        options: dict[str, Any] = {"lr": self.learning_rate, "betas": self.betas, "fused": self.device.type in FUSED}
        return [
            torch.optim.Adam(self.decoder.parameters(), **options),
            torch.optim.Adam(self.critic.parameters(), **options),
        ]


def _rows_of(whole: Batch, rows: slice) -> Batch:
    """Some images of what is known of a batch: tensors whose first dimension is the batch, whatever holds them."""
    part: Any
    if isinstance(whole, Tensor):
        part = whole[rows]
    elif isinstance(whole, list):
        part = [_rows_of(each, rows) for each in whole]
    else:
        known: Any = whole
        part = replace(known, **{each.name: _rows_of(getattr(whole, each.name), rows) for each in fields(known)})
    return part  # type: ignore[no-any-return]


def _features_at(mirrored: Mirrored, step: Tensor) -> Tensor:
    """The features that steps [B, T] of the path stand for, [B, T, D] float64."""
    change = mirrored.reflection.features - mirrored.features
    return mirrored.features[:, None] + step.double()[:, :, None] * change[:, None]


def _partners(class_names: tuple[str, ...], pairs: list[list[str]] | None) -> Tensor:
    """The class on the other side for every class, -1 where any other class may be, [K]."""
    partner = torch.full((len(class_names),), -1)
    for pair in pairs or []:
        if len(pair) != 2 or pair[0] == pair[1] or not set(pair) <= set(class_names):
            raise ValueError(
                f"pairs must be pairs of two different class names out of {list(class_names)}, got {list(pair)}."
            )
        first, second = (class_names.index(name) for name in pair)
        if partner[first] >= 0 or partner[second] >= 0:
            raise ValueError(f"Each class can be in one pair only, but {list(pair)} repeats one.")
        partner[first], partner[second] = second, first
    return partner
