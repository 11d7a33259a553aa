"""Mirror-CFE: the image on the other side of the classifier's own decision boundary.

Paper: "Looking in the Mirror: A Faithful Counterfactual Explanation Method for Interpreting Deep Image Classification
Models" (Chowdhury et al., ICCV 2025, arXiv 2509.16822); equations are its own. The classifier's features are reflected
in the boundary between the predicted class and the target. A decoder that learned to invert the classifier renders the
path between the two points.

Deviations, each with its reason in ``docs/methods/mirror_cfe.md``: confidences are swapped in closed form instead of by
L-BFGS, one decoder serves all pairs of classes, and the critic can be told which class an image should show.

Shapes: B images, C channels, H, W pixels, K classes, D features, h, w cells of the feature map, T steps.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

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
from cfe_lightning.compute.rows import joined, rows_of
from cfe_lightning.decisions import alternative_class, confidence_gap, kl_between_logits, runner_up
from cfe_lightning.explainer import ExplainerModule
from cfe_lightning.explanation import Explanation
from cfe_lightning.methods.mirror_cfe.decoder import DecoderNorm, MirrorDecoder, PatchCritic
from cfe_lightning.methods.mirror_cfe.geometry import Swap
from cfe_lightning.methods.mirror_cfe.path import Head, Mirrored, mirror
from cfe_lightning.methods.mirror_cfe.spread import Spread, class_maps, edit_mask


@dataclass(frozen=True, kw_only=True, slots=True)
class _Slice:
    """Images of a batch and the one step on each path that they are trained with.

    Attributes:
        image: Images, [B, C, H, W] in [-1, 1].
        mirrored: Paths of the images.
        step: Position on the path, [B, 1] in [0, 1].
        shown: Class that the rendering of this step should show, [B].
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
        classifier: The classifier to be explained; its head must read the spatial mean of a feature map.
        levels: Dotted names of the classifier's layers that lend the decoder detail, nearest to the feature map first;
            None finds up to three by tracing, an empty list decodes from the feature map alone (blurred).
        swap: Reflection of the features: "softmax" or "logits" swaps the confidences of source and target in closed
            form and keeps all others, "lbfgs" does so by the paper's iteration, "reflect" reflects plainly, which is
            exact for two classes only. Heads that are not linear are always inverted by L-BFGS.
        bounds: Lower and upper bound of reflected features, such as [0] after a ReLU or [0, 6] after a ReLU6, or None.
        spread: Distribution of the change over the feature map: "uniform", "location" (by how much each place speaks
            for the source) or "waterfill" (where the class maps are, never negative; needs bounds).
        thresholds: Lowest and highest threshold of the edit mask (equation 14).
        soft_mask: Takes a smooth mask, for animations without jumps.
        pairs: Pairs of class names that limit the training, such as [["3", "8"], ["4", "9"]]; None allows all classes.
        num_steps: Steps of an explanation, from the reconstruction to the reflection.
        counterfactual: Picture of the path that is the answer: the "first" that the classifier calls the target (the
            reflection if there is none), or the "reflection".
        width: Decoder channels at full resolution, doubled where the resolution halves.
        max_width: Upper limit of the decoder's channels.
        editor_width: Channels inside the spatial pattern editors.
        norm: Norm of the decoder: "batch" for batches of 16 and more, "group" below.
        critic_widths: Channels of the critic's stride-2 layers.
        class_critic: Tells the critic which class an image should show; unconditional as published.
        class_weight: Weight of KL(intended || predicted) on both renderings (equation 2).
        adversarial_weight: Weight of the adversarial loss (equation 3).
        reconstruction_weight: Weight of the reconstruction error (equation 4).
        feature_weight: Weight of the feature loss (equation 5), relative to the mean length of the features.
        triangulation_weight: Weight of the triangulation loss (equations 6 to 11); the paper doubles it for large or
            colour images.
        tolerance: Half-width of the triangulation's band (alpha).
        learning_rate: Adam step size of decoder and critic.
        betas: Decay rates of Adam's two moments; None takes [0.5, 0.999].
        decay_from: Share of the training after which both learning rates fall linearly towards zero; 1 keeps them.
        micro_batches: Number of slices that a batch is computed in, one after the other: the same gradient in less
            memory, for one more pass of the decoder. The classifier's activations are kept for the whole batch, without
            a gradient. The batch norm, the mean length in the feature loss and the partners of the triangulation are
            those of a slice, and the critic's spectral norms are refined once per slice.

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
        # Settings.
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
        # Networks.
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
        """Lists the decoder's blocks; another pass of the small critic would refine its spectral norms once more."""
        return self.decoder.blocks()

    # Path.

    @torch.no_grad()
    def reflect(self, image: Tensor, target: Tensor | None = None, seen: Activations | None = None) -> Mirrored:
        """Computes the paths from the predicted classes to targets in feature space, before any decoding.

        Args:
            image: Images, [B, C, H, W] in [-1, 1].
            target: Target classes, [B]; None takes ``default_target``. The runner-up replaces a target that is
                predicted already, because no mirror stands in between.
            seen: The classifier's activations of the images, with ``levels``; None computes them.
        """
        if seen is None:
            seen = self.classifier.activations(image, self.levels)
        with full_precision(image):
            asked = self.default_target(seen.logits) if target is None else target
            target = torch.where(asked == seen.logits.argmax(dim=1), runner_up(seen.logits), asked)
            return mirror(seen, target, self.head(), swap=self.swap, bounds=self.bounds, spread=self.spread)

    def default_target(self, logits: Tensor) -> Tensor:
        """Returns the partner in the predicted class's pair, the only one the decoder learned, or the runner-up."""
        partner = self.partner[logits.argmax(dim=1)]
        return torch.where(partner >= 0, partner, runner_up(logits))

    def head(self) -> Head:
        """Returns the classifier's head in float64; read once, because it is frozen."""
        if self._head is None:
            self._head = Head.of(self.classifier, self.swap)
        return self._head

    def train(self, mode: bool = True) -> MirrorCFE:
        """Forgets the head: weights may be loaded, or moved to another device, after this call."""
        self._head = None
        return super().train(mode)

    def intended(self, mirrored: Mirrored, step: Tensor) -> Tensor:
        """Returns the head's logits of the features intended at steps, [B, T] -> [B, T, K] float64."""
        return mirrored.intended(self.head(), step)

    def decode(self, mirrored: Mirrored, step: Tensor, summaries: list[Tensor] | None = None) -> Tensor:
        """Renders paths at some steps as pictures, [B, T, C, H, W] in [-1, 1].

        Args:
            mirrored: The paths.
            step: Positions on the paths, [B, T]: 0 is the image's own map, 1 the reflected one.
            summaries: ``summarise`` of the decoder; None computes them.
        """
        batch, num_steps = step.shape
        share = step.to(mirrored.change.dtype)[:, :, None, None, None]
        maps = (mirrored.feature_map[:, None] + share * mirrored.change[:, None]).flatten(0, 1)
        if summaries is None:
            summaries = self.decoder.summarise(mirrored.levels)
        rows = mirrored.rows.repeat_interleave(num_steps, dim=0)
        mask = edit_mask(class_maps(maps, rows), step.flatten(), self.thresholds, self.soft_mask)
        return self.decoder(maps, mirrored.levels, summaries, mask).unflatten(0, (batch, num_steps))

    def _decode_in_chunks(self, mirrored: Mirrored, step: Tensor, at_once: int) -> Tensor:
        """Decodes ``at_once`` pictures per pass: several steps of all images, or few images one after the other."""
        rendered = []
        for start in range(0, len(step), at_once):
            some, steps = rows_of((mirrored, step), slice(start, start + at_once))
            summaries = self.decoder.summarise(some.levels)
            chunks = steps.split(max(1, at_once // len(steps)), dim=1)
            rendered.append(torch.cat([self.decode(some, chunk, summaries) for chunk in chunks], dim=1))
        return joined(rendered)

    # Explaining.

    @torch.no_grad()
    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        """Renders the path from the predicted class through the mirror to the target.

        Args:
            image: Images, [B, C, H, W] in [-1, 1].
            target: Target classes, [B]; None takes ``default_target``.

        Returns:
            An explanation with the path as steps (the reconstruction first, the reflection last) and the ``intended``
            logits beside the measured ones; parts ``reconstruction``, ``boundary``, ``reflection`` and ``redrawn``
            (counterfactual minus reconstruction, without the decoder's own error); scores ``first_flip`` (the first
            step that the classifier calls the target, 2 without one), ``intended_first_flip`` (the first step whose
            reflected features the head calls the target), ``boundary_step`` (0.5 for a linear head),
            ``confidence_gap`` (mean absolute difference of intended and predicted target probability along the path),
            ``boundary_distance`` in feature space, ``status`` (index into ``geometry.STATUS``) and ``swap_residual``.
        """
        image = image.to(self.dtype)
        mirrored = self.reflect(image, target)
        # Path. The boundary is a step of its own, which an even number of steps would miss.
        meets, intended_flip = mirrored.crossings(self.head())
        grid = torch.linspace(0, 1, self.num_steps, device=image.device)
        step = torch.cat([grid.expand(len(image), -1), meets[:, None].to(grid)], dim=1)
        pictures = self._decode_in_chunks(mirrored, step, pictures_at_once(image[0, 0].numel(), image.device))
        logits = self.classifier.along(pictures)[:, :-1]
        strengths, steps, boundary = step[:, :-1], pictures[:, :-1], pictures[:, -1]
        intended = self.intended(mirrored, strengths)
        # Counterfactual.
        arrived = logits.argmax(dim=2) == mirrored.target[:, None]
        found, first = arrived.any(dim=1), arrived.to(torch.int8).argmax(dim=1)
        chosen = torch.where(found & (self.counterfactual == "first"), first, self.num_steps - 1)
        rows = torch.arange(len(image), device=image.device)
        counterfactual = steps[rows, chosen]
        redrawn = counterfactual - steps[:, 0]
        return Explanation(
            image=image,
            logits=mirrored.logits,
            target=mirrored.target if target is None else target,
            attribution=redrawn.abs().mean(dim=1, keepdim=True),
            counterfactual=counterfactual,
            counterfactual_logits=logits[rows, chosen],
            steps=steps,
            strengths=strengths,
            intended=intended.to(logits.dtype),
            parts={"reconstruction": steps[:, 0], "boundary": boundary, "reflection": steps[:, -1], "redrawn": redrawn},
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

    # Training.

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Lowers the learning rates; computed from the progress alone, so that a resumed run continues unchanged."""
        if self.decay_from < 1 and self.trainer.max_epochs and self.trainer.max_epochs > 0:
            progress = (self.current_epoch + batch_idx / self.trainer.num_training_batches) / self.trainer.max_epochs
            rate = self.learning_rate * min(1.0, (1 - progress) / (1 - self.decay_from))
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                for group in optimizer.param_groups:
                    group["lr"] = rate

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Takes one critic step and one decoder step on the same renderings."""
        # Paths.
        image = batch["image"]
        if self.in_pairs:
            image, _ = self._inside_pairs(image)
        with torch.no_grad():
            seen = self.classifier.activations(image, self.levels)
        target = self._draw_target(seen.logits.argmax(dim=1))
        whole = (image, target, torch.rand(len(image), 1, device=image.device), seen)
        slices = [self._slice(*rows_of(whole, rows)) for rows in parts_of(len(image), self.micro_batches)]
        # Steps.
        decoder_optimizer, critic_optimizer = self.optimizers()  # type: ignore[misc, union-attr, attr-defined]
        shown, rendered = render_twice(self._render, slices)
        terms = accumulate_and_step(
            self, slices, lambda some: self._critic_loss(some, shown(some)[1]), "critic", critic_optimizer
        )
        with frozen(self.critic):
            terms |= accumulate_and_step(
                self, slices, lambda some: self._decoder_loss(some, *rendered(some)), "decoder", decoder_optimizer
            )
        log_training(self, terms, len(image))

    @torch.no_grad()
    def _inside_pairs(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Replaces images outside of all pairs by images inside, and returns the predicted classes, too.

        The batch keeps its size. Without any image inside it stays as it is.
        """
        source = self.classifier(image).argmax(dim=1)
        kept = (self.partner[source] >= 0).nonzero().squeeze(1)
        if len(kept) == 0:
            return image, source
        chosen = kept[torch.arange(len(image), device=image.device) % len(kept)]
        return image[chosen], source[chosen]

    def _draw_target(self, source: Tensor) -> Tensor:
        """Draws a target for every predicted class [B]: its partner, or any other class."""
        other = alternative_class(source, self.classifier.num_classes)
        return torch.where(self.partner[source] >= 0, self.partner[source], other)

    def _slice(self, image: Tensor, target: Tensor, step: Tensor, seen: Activations | None = None) -> _Slice:
        mirrored = self.reflect(image, target, seen)
        shown = torch.where(step[:, 0] < 0.5, mirrored.source, mirrored.target)
        return _Slice(image=image, mirrored=mirrored, step=step, shown=shown)

    def _render(self, images: _Slice) -> tuple[Tensor, Tensor]:
        """Renders the start of the paths and the step, [B, C, H, W] each."""
        # A pass without gradient is repeated with one, and batch norms shall count it once.
        with nullcontext() if torch.is_grad_enabled() else uncounted(self.decoder):
            path = self.decode(images.mirrored, torch.cat([torch.zeros_like(images.step), images.step], dim=1))
        reconstruction, rendered = path.unbind(dim=1)
        return reconstruction, rendered

    def _critic_loss(self, images: _Slice, rendered: Tensor) -> dict[str, Tensor]:
        terms = {
            "critic_real": adversarial_loss(self.critic(images.image, images.mirrored.source), real=True),
            "critic_fake": adversarial_loss(self.critic(rendered.detach(), images.shown), real=False),
        }
        return terms | {"critic": terms["critic_real"] + terms["critic_fake"]}

    def _decoder_loss(self, images: _Slice, reconstruction: Tensor, rendered: Tensor) -> dict[str, Tensor]:
        # Intended and measured.
        image, mirrored, step = images.image, images.mirrored, images.step
        intended = self.intended(mirrored, torch.cat([torch.zeros_like(step), step], dim=1)).to(image.dtype)
        seen = self.classifier.activations(torch.cat([reconstruction, rendered]))
        features = to_float32(seen.feature_map).mean(dim=(2, 3))
        wanted = mirrored.features_at(step)[:, 0].to(image.dtype)
        length = mirrored.features.norm(dim=1).mean().to(image.dtype)
        # Terms.
        terms = {
            "class": kl_between_logits(intended.transpose(0, 1).flatten(0, 1), seen.logits),
            "adversarial": adversarial_loss(self.critic(rendered, images.shown), real=True),
            "reconstruction": (reconstruction - image).abs().mean(),
            "feature": (features[len(image) :] - wanted).norm(dim=1).mean() / length,
            "triangulation": self._triangulation(images, rendered, wanted),
        }
        total = (
            self.class_weight * terms["class"]
            + self.adversarial_weight * terms["adversarial"]
            + self.reconstruction_weight * terms["reconstruction"]
            + self.feature_weight * terms["feature"]
            + self.triangulation_weight * terms["triangulation"]
        )
        return terms | {"decoder": total}

    def _triangulation(self, images: _Slice, rendered: Tensor, wanted: Tensor) -> Tensor:
        """Demands a visible change in proportion to the change in feature space (equations 6 to 11).

        The reference is a random image of the class on the rendering's side of the mirror, taken from the batch.
        Images without a reference in the batch do not count.
        """
        # Reference.
        image, mirrored = images.image, images.mirrored
        candidates = mirrored.source[None] == images.shown[:, None]
        candidates = candidates & ~torch.eye(len(image), dtype=torch.bool, device=image.device)
        chosen = (candidates * (0.1 + torch.rand(candidates.shape, device=image.device))).argmax(dim=1)
        counts = candidates.any(dim=1).to(image.dtype)
        # Distances in feature space.
        reference = mirrored.features[chosen].to(image.dtype)
        near = (mirrored.features.to(image.dtype) - wanted).norm(dim=1)
        ratio = ((wanted - reference).norm(dim=1) / (near + 1e-8)).clamp(1e-2, 1e2)
        # Distances of pixels, which should have the same ratio within a band.
        moved = (image - rendered).abs().mean(dim=(1, 2, 3))
        apart = (rendered - image[chosen]).abs().mean(dim=(1, 2, 3)) / ratio
        outside = F.relu((1 - self.tolerance) * apart - moved) + F.relu(moved - (1 + self.tolerance) * apart)
        return (outside * counts).sum() / counts.sum().clamp_min(1)

    def on_validation_epoch_start(self) -> None:
        """Gives the batch statistics of the first process to all, so that they measure the same decoder."""
        broadcast_buffers(self.decoder)

    @torch.no_grad()
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Measures reconstruction, validity and faithfulness on the path to the default target."""
        # Path.
        image = batch["image"]
        mirrored = self.reflect(image)
        step = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], device=image.device).expand(len(image), -1)
        path = self.decode(mirrored, step)
        logits = self.classifier(path.flatten(0, 1)).unflatten(0, step.shape)
        # Measures.
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
        """Builds Adam for the decoder and for the critic."""
        options: dict[str, Any] = {"lr": self.learning_rate, "betas": self.betas, "fused": self.device.type in FUSED}
        return [torch.optim.Adam(network.parameters(), **options) for network in (self.decoder, self.critic)]


def _partners(class_names: tuple[str, ...], pairs: list[list[str]] | None) -> Tensor:
    """Returns the partner of every class, or -1 for a class in no pair, [K], after checking the pairs."""
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
