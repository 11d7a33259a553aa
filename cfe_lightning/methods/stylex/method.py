"""StylEx: a StyleGAN2 that the classifier helps to train, and the few directions of its latent that flip decisions.

Papers: "Explaining in Style" (Lang et al., ICCV 2021, arXiv 2104.13369) and "CheXplaining in Style" (Atad et al. 2022,
arXiv 2207.07553), whose EigenFind is the search. Encoder and generator learn to render an image so that it looks the
same and is decided the same; then directions are found that, over many images, push the decision to another class.

Where paper and code disagree, and every deviation from both, is said in ``docs/methods/stylex.md``.

Shapes: B images, C channels, H, W pixels, K classes, D entries of the latent, L slots, N entries of what is moved (D,
or the size M of the style space), Q directions, k kept ones, T steps, n reference images.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfe_lightning.atlas import Atlas
from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.compute.losses import Lpips, relative_distance
from cfe_lightning.compute.memory import pictures_at_once
from cfe_lightning.compute.micro_batches import accumulate_and_step, check_micro_batches, frozen, parts_of, render_twice
from cfe_lightning.compute.precision import full_precision, to_float32
from cfe_lightning.compute.processes import all_gather_rows, log_training, log_validation
from cfe_lightning.compute.search import smallest_step
from cfe_lightning.decisions import kl_between_logits, leads, runner_up
from cfe_lightning.explainer import ExplainerModule
from cfe_lightning.explanation import Explanation
from cfe_lightning.methods.stylex.atlas import draw_atlas
from cfe_lightning.methods.stylex.critic import LabelEntry, StyleCritic
from cfe_lightning.methods.stylex.generator import Conditioning, LatentSpace, StyleEncoder, StyleGenerator
from cfe_lightning.methods.stylex.layers import channel_table
from cfe_lightning.methods.stylex.ranking import Scoring, SearchResult, candidate_table
from cfe_lightning.methods.stylex.reference import Reference, first_of_each_class
from cfe_lightning.methods.stylex.search import (
    Directions,
    DirectionSpace,
    LogitsOfEdits,
    StepUnit,
    absolute_steps,
    direction_table,
    factor_directions,
    principal_directions,
    rechecked,
)
from cfe_lightning.methods.stylex.training import (
    PROFILES,
    Fake,
    LabelForm,
    LabelSource,
    Mixture,
    NoiseLabel,
    Part,
    PathPart,
    critic_loss,
    generator_loss,
    path_loss,
    r1_loss,
)

_log = logging.getLogger(__name__)

Perception = Literal["classifier", "lpips", "none"]

#: Latents that styles are made of at a time: bounds the memory whatever is asked.
_CHUNK = 128
#: Pictures per round of the search for the shortest way.
_POINTS = 8
#: Images per class of a quick search during training.
_QUICK = 64


class StylEx(ExplainerModule):
    """Trains generator, encoder and critic against one classifier, and explains by moving along found directions.

    The last validation keeps the latents of its images in the checkpoint, so that directions can be searched from the
    checkpoint alone.

    Args:
        classifier: The classifier to be explained.
        profile: "recommended", or "paper_code" for what the released code does; both only set defaults.
        image_size: Side of the pictures, a power of two; None takes the classifier's.
        base: Channels at a resolution are base / resolution,
        max_width: but at most so many.
        z_dim: Entries of the noise.
        w_dim: D.
        mapping_layers: Layers from noise to latent.
        conditioning: How the class enters the generator, see ``StyleGenerator``; "none" leaves all evidence to the
            latent and is best for the search.
        label_entry: How the class enters the critic, see ``StyleCritic``.
        encoder_space: "w", or "w+" for one latent per slot.
        real_label: See ``Profile``; None takes the profile's, as for all of its switches.
        noise_label: See ``Profile``; "classifier" needs a generator without label.
        label_form: See ``Profile``.
        pixel_weight: See ``Profile``.
        perception: What compares images beside pixels: the "classifier"'s own shallow maps (needs no download),
            "lpips" (AlexNet's weights are downloaded at first use), or "none".
        perceptual_weight: Its weight.
        latent_weight: Weight of the difference of latents of image and rendering.
        class_weight: Weight of KL(decision of the image || decision of the rendering).
        r1_weight: Weight of the critic's gradient penalty (gamma); 2 is the published 10 in [-1, 1].
        r1_interval: Iterations from one penalty to the next.
        path_weight: Weight of the path length penalty; 0 leaves it out.
        path_interval: Iterations from one to the next.
        path_decay: Share of a batch in the running mean of the length.
        mixing: Probability that two latents share a picture's slots.
        learning_rate: Adam's before the correction for lazy penalties.
        reference_size: Validation images whose latents are kept, n.
        search_images: Images per class that a search looks at.
        search_space: "pca_w" (principal components of encoded latents), "sefa_w" (published: what the generator's
            affine maps amplify most), or "pca_s" (principal components in the style space).
        search_directions: Q, candidates before ranking.
        kept_directions: k.
        degree: How far a direction is followed.
        degree_unit: "sigma", standard deviations of the reference, or "abs" (published, 10).
        reaverage: See ``style_ranking.rank_directions``.
        normalise_rows: See ``style_search.factor_directions``.
        edited_layers: Convolutions whose slots directions of the latent move; None moves all.
        scoring: See ``Profile``.
        smallest: The counterfactual is the shortest way along its direction that flips, not the whole step.
        num_steps: Steps of an explanation, from the reconstruction to the whole step.
        shown_directions: Other directions whose pictures become parts.
        micro_batches: Parts that a batch is computed in, one after the other: the same gradient in less memory, for
            one more pass of the generator. The critic compares the images of a part, the path penalty takes the mean
            length of a part into its running mean, and the classifier's own maps are compared in units of a part.

    Raises:
        ValueError: If an argument is out of range, or does not fit another.
    """

    image_size: int
    path_mean: Tensor

    def __init__(
        self,
        classifier: FrozenClassifier,
        *,
        profile: Literal["recommended", "paper_code"] = "recommended",
        image_size: int | None = None,
        base: int = 32768,
        max_width: int = 512,
        z_dim: int = 512,
        w_dim: int = 512,
        mapping_layers: int = 8,
        conditioning: Conditioning = "none",
        label_entry: LabelEntry = "projection",
        encoder_space: LatentSpace = "w",
        real_label: LabelSource | None = None,
        noise_label: NoiseLabel | None = None,
        label_form: LabelForm | None = None,
        pixel_weight: float | None = None,
        perception: Perception = "classifier",
        perceptual_weight: float = 1.0,
        latent_weight: float = 1.0,
        class_weight: float = 1.0,
        r1_weight: float = 2.0,
        r1_interval: int = 16,
        path_weight: float = 2.0,
        path_interval: int = 4,
        path_decay: float = 0.01,
        mixing: float = 0.9,
        learning_rate: float = 0.002,
        reference_size: int = 2000,
        search_images: int = 600,
        search_space: DirectionSpace = "pca_w",
        search_directions: int = 20,
        kept_directions: int = 8,
        degree: float = 4.0,
        degree_unit: StepUnit = "sigma",
        reaverage: bool = False,
        normalise_rows: bool = False,
        edited_layers: list[int] | None = None,
        scoring: Scoring | None = None,
        smallest: bool = True,
        num_steps: int = 9,
        shown_directions: int = 4,
        micro_batches: int = 1,
    ) -> None:
        super().__init__(classifier)
        _check(search_space, get_args(DirectionSpace), "search_space")
        _check(degree_unit, get_args(StepUnit), "degree_unit")
        counts = {"num_steps": num_steps, "search_directions": search_directions, "search_images": search_images}
        for name, count in (counts | {"kept_directions": kept_directions, "reference_size": reference_size}).items():
            if count < 2:
                raise ValueError(f"{name} must be at least 2, got {count}.")
        if degree <= 0:
            raise ValueError(f"degree must be positive, got {degree}.")
        if edited_layers is not None and search_space == "pca_s":
            raise ValueError(
                "edited_layers chooses slots of the latent: use pca_w or sefa_w as search_space, or leave it."
            )
        self.automatic_optimization = False
        self.image_size = image_size or classifier.spec.image_size
        if self.image_size < 8 or self.image_size & (self.image_size - 1):
            better = max(8, 2 ** round(math.log2(self.image_size)))
            raise ValueError(
                f"StylEx renders pictures whose side is a power of two from 8 on, got {self.image_size}: set "
                f"image_size of model and data to {better}; the classifier resizes them to its own "
                f"{classifier.spec.image_size}."
            )
        switches = PROFILES[profile]
        self.real_label = real_label or switches.real_label
        self.noise_label = noise_label or switches.noise_label
        self.label_form = label_form or switches.label_form
        self.pixel_weight = switches.pixel_weight if pixel_weight is None else pixel_weight
        self.scoring: Scoring = scoring or switches.scoring
        if self.noise_label == "classifier" and conditioning != "none":
            raise ValueError(
                "noise_label 'classifier' says what a picture shows once it is made, so it needs conditioning 'none'; "
                "choose 'empirical' or 'uniform' for a generator that is told the class."
            )
        self.perceptual_weight = 0.0 if perception == "none" else perceptual_weight
        self.latent_weight = latent_weight
        self.class_weight = class_weight
        self.r1_weight = r1_weight
        self.r1_interval = r1_interval
        self.path_weight = path_weight
        self.path_interval = path_interval
        self.path_decay = path_decay
        self.mixing = mixing
        self.learning_rate = learning_rate
        self.micro_batches = check_micro_batches(micro_batches)
        self.search_images = search_images
        self.search_space: DirectionSpace = search_space
        self.search_directions = search_directions
        self.kept_directions = kept_directions
        self.degree = degree
        self.degree_unit: StepUnit = degree_unit
        self.reaverage = reaverage
        self.normalise_rows = normalise_rows
        self.smallest = smallest
        self.num_steps = num_steps
        self.shown_directions = min(shown_directions, kept_directions)

        num_classes, channels = classifier.num_classes, self.channels
        widths = channel_table(self.image_size, base, max_width)
        self.generator = StyleGenerator(
            channels=channels,
            num_classes=num_classes,
            conditioning=conditioning,
            widths=widths,
            z_dim=z_dim,
            w_dim=w_dim,
            mapping_layers=mapping_layers,
        )
        self.encoder = StyleEncoder(channels=channels, widths=widths, w_dim=w_dim, space=encoder_space)
        self.critic = StyleCritic(channels=channels, num_classes=num_classes, widths=widths, label_entry=label_entry)
        for network in (self.generator, self.encoder, self.critic):
            network.to(memory_format=torch.channels_last)  # convolutions are a seventh faster on a CPU
        num_slots = self.generator.num_slots
        if edited_layers is not None and not {*edited_layers} <= {*range(num_slots - 1)}:
            raise ValueError(f"edited_layers must be convolutions from 0 to {num_slots - 2}, got {edited_layers}.")
        self.edited_layers = edited_layers
        latent = (w_dim,) if encoder_space == "w" else (num_slots, w_dim)
        self.register_buffer("path_mean", torch.zeros(()))
        self.reference = Reference(reference_size, latent, num_classes, self.image_size)
        self._result: SearchResult | None = None
        self._ranks: Tensor | None = None
        # Neither is a part of the model that a checkpoint should hold.
        self._lpips: list[Lpips] = []
        self._shallow = classifier.shallow_maps() if perception == "classifier" and perceptual_weight else []
        self.perception = perception
        if perception == "classifier" and perceptual_weight and not self._shallow:
            _log.warning("This classifier has no maps that could compare images: pixels alone are compared.")
            self.perceptual_weight = 0.0

    def train(self, mode: bool = True) -> StylEx:
        """Forgets the search: the weights may change after this call."""
        self._result = self._ranks = None
        return super().train(mode)

    def blocks(self) -> list[nn.Module]:
        """Of generator, encoder and critic."""
        return [*self.generator.blocks(), *self.encoder.blocks(), *self.critic.blocks()]

    # Latents, labels, pictures

    def label(self, logits: Tensor) -> Tensor:
        """What generator and critic are told of images with these logits, [B, K] -> [B, K]."""
        if self.label_form == "probabilities":
            return logits.softmax(dim=1)
        return F.one_hot(logits.argmax(dim=1), logits.shape[1]).to(logits.dtype)

    def encode(self, image: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] to latents [B, D], or [B, L, D] in the space "w+".

        Raises:
            ValueError: If the images have another size than the generator's.
        """
        if image.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"The images are {image.shape[-1]} x {image.shape[-2]} pixels, but the generator renders "
                f"{self.image_size} x {self.image_size}: set image_size of model and data alike."
            )
        return self.encoder(image)

    def render(self, latent: Tensor, label: Tensor, change: Tensor) -> Tensor:
        """Pictures of moved latents, as they would be saved.

        Args:
            latent: [B, D], or [B, L, D].
            label: Labels of the images that were encoded, [B, K]; they stay what they are during an edit.
            change: What is added to the latents, or to the styles for directions of the style space, [B, T, N].

        Returns:
            [B, T, C, H, W] in [-1, 1].
        """
        batch, num_steps = change.shape[:2]
        rows = torch.arange(batch, device=change.device).repeat_interleave(num_steps)
        at_once = pictures_at_once(self.image_size**2, change.device)
        parts = zip(rows.split(at_once), change.flatten(0, 1).split(at_once), strict=True)
        pictures = [self._render(latent[row], label[row], moved) for row, moved in parts]
        return torch.cat(pictures).unflatten(0, (batch, num_steps))

    def _render(self, latent: Tensor, label: Tensor, change: Tensor) -> Tensor:
        generator = self.generator
        if self.search_space == "pca_s":
            styles = generator.styles(latent, label)
            flat = generator.synthesis.flatten_styles(styles) + change.to(latent)
            styles = generator.synthesis.replace_styles(styles, flat)
        else:
            moved = change.to(latent)[:, None]
            if self.edited_layers is not None:
                slots = torch.arange(generator.num_slots, device=latent.device)
                moved = moved * torch.isin(slots, slots.new_tensor(self.edited_layers))[:, None]
            styles = generator.styles(generator.spread(latent) + moved, label)
        picture = generator.synthesis(styles, self._search_noise(len(latent), latent)).clamp(-1, 1)
        # In this layout a classifier's pooling is several times faster on a CPU, and half precision on a GPU.
        return picture.contiguous(memory_format=torch.channels_last)

    def reconstruct(self, latent: Tensor, label: Tensor) -> Tensor:
        """Pictures of latents without any edit, [B, C, H, W] in [-1, 1]."""
        size = sum(self.generator.synthesis.layer_sizes) if self.search_space == "pca_s" else self.generator.w_dim
        return self.render(latent, label, torch.zeros(len(latent), 1, size, device=latent.device))[:, 0]

    def _search_noise(self, batch: int, like: Tensor) -> list[Tensor] | None:
        """The stored noise maps; fresh ones where everything is as in the released code."""
        return self.generator.synthesis.draw_noise(batch, like) if self.scoring == "paper_code" else None

    # Searching

    def survey(self) -> dict[str, Any]:
        """Searches the directions of all pairs of classes from the reference in the checkpoint, as plain data."""
        return self._searched().to_plain()

    def adopt(self, survey: dict[str, Any]) -> None:
        """Takes a search over that was made by the same weights and settings."""
        self._result = SearchResult.from_plain(survey, self.device)
        self._ranks = None

    @torch.no_grad()
    def _searched(self) -> SearchResult:
        """The search, made where none was adopted."""
        if self._result is None:
            # A sample grid in the middle of training shows where it stands; all images would hold it up.
            fitting = self._trainer is not None and self.trainer.training
            self._result = self.search(_QUICK if fitting else None)
        return self._result

    def atlas(self) -> Atlas | None:
        """The best directions of every pair of classes on a few reference images, drawn; None where there are none."""
        result = self._searched()
        latent, logits = self.starting_points()
        atlas = draw_atlas(self, result, latent, logits, self.reference.masks)
        return atlas if atlas.pairs else None

    def starting_points(self) -> tuple[Tensor, Tensor]:
        """Latents of the reference, [n, D] or [n, L, D], and the classifier's logits of its images [n, K].

        Before any validation there are none; then pictures of noise stand in for encoded images.
        """
        kept = self.reference
        if count := int(kept.count):
            return kept.latents[:count], kept.logits[:count]
        count = min(len(kept.latents), 256)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(count, self.generator.z_dim, generator=generator).to(self.device)
        latent = self.generator.mapping(noise)
        if kept.latents.ndim == 3:
            latent = self.generator.spread(latent)
        num_classes = self.classifier.num_classes
        uniform = torch.full((count, num_classes), 1 / num_classes, device=self.device)
        return latent, self.classifier(self.reconstruct(latent, uniform))

    def directions(self, latent: Tensor, label: Tensor) -> Directions:
        """The candidates of ``search_space``, from encoded images [n, D] or [n, L, D] and their labels [n, K]."""
        points = latent if latent.ndim == 2 else latent.mean(dim=1)
        if self.search_space == "pca_w":
            return principal_directions(points, self.search_directions)
        if self.search_space == "pca_s":
            styles = [
                self.generator.synthesis.flatten_styles(self.generator.styles(w, c))
                for w, c in zip(latent.split(_CHUNK), label.split(_CHUNK), strict=True)
            ]
            return principal_directions(torch.cat(styles), self.search_directions)
        weight = self.generator.affine_weights(self.edited_layers)
        return factor_directions(weight, points, self.search_directions, self.normalise_rows)

    def search(self, images: int | None = None, batch_size: int | None = None) -> SearchResult:
        """EigenFind over the reference, for all classes at once.

        Args:
            images: Per class; None takes ``search_images``.
            batch_size: Pictures at a time; None takes ``pictures_at_once``. No result depends on it.
        """
        latent, logits = self.starting_points()
        directions = self.directions(latent, self.label(logits))
        chosen = first_of_each_class(logits.argmax(dim=1), images or self.search_images)
        return replace(self.measure(directions, latent[chosen], logits[chosen], batch_size), index=chosen)

    @torch.no_grad()
    def measure(
        self, directions: Directions, latent: Tensor, logits: Tensor, batch_size: int | None = None
    ) -> SearchResult:
        """Moves images along directions both ways and asks the classifier.

        Args:
            directions: Which.
            latent: Of the images, [n, D] or [n, L, D].
            logits: Of the images, [n, K].
            batch_size: Pictures at a time; None takes ``pictures_at_once``. No result depends on it.
        """
        start = time.perf_counter()
        batch_size = batch_size or pictures_at_once(self.image_size**2, latent.device)
        steps = absolute_steps(directions, self.degree, self.degree_unit)
        judge = self.judge(latent, self.label(logits))
        rows = torch.arange(len(latent), device=latent.device)
        still = torch.zeros(len(latent), directions.vectors.shape[1], device=latent.device)
        parts = zip(rows.split(batch_size), still.split(batch_size), strict=True)
        rendered = torch.cat([judge(row, change) for row, change in parts])
        table = direction_table(judge, len(latent), steps[:, None] * directions.vectors, batch_size)
        predicted = logits.argmax(dim=1)
        strict = self.scoring == "strict"
        agreed = rendered.argmax(dim=1) == predicted
        return SearchResult(
            index=rows,
            vectors=directions.vectors,
            spread=directions.spread,
            steps=steps,
            table=table.float(),
            before=(rendered if strict else logits).float(),
            predicted=predicted,
            kept=agreed if strict else torch.ones_like(agreed),
            forward_passes=len(latent) + table.shape[:3].numel(),
            seconds=time.perf_counter() - start,
        )

    def judge(self, latent: Tensor, label: Tensor) -> LogitsOfEdits:
        """What the classifier says of these images after changes; in half precision on a GPU, checked near ties."""
        latent, label = to_float32(latent), to_float32(label)

        def said(rows: Tensor, change: Tensor) -> Tensor:
            return self.classifier(self._render(latent[rows], label[rows], change))

        def exact(rows: Tensor, change: Tensor) -> Tensor:
            # Whatever precision a training or an explanation around it has.
            with full_precision(latent):
                return said(rows, change)

        if latent.device.type != "cuda":
            return exact

        def rough(rows: Tensor, change: Tensor) -> Tensor:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                return said(rows, change)

        return rechecked(rough, exact)

    def _candidates(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Directions [B, k], signs [B, k] and whether the search ranked them [B, k], for pairs of classes [B]."""
        if self._ranks is None:
            result = self._searched()
            k, num_classes = self.kept_directions, self.classifier.num_classes
            rankings = {
                (one, other): result.ranking(one, other, k, reaverage=self.reaverage, scoring=self.scoring)
                for one in range(num_classes)
                for other in range(num_classes)
                if one != other
            }
            table = candidate_table(rankings, num_classes, len(result.vectors), k)
            self._ranks = table.to(self.device)
        direction, sign, ranked = self._ranks[source, target].unbind(dim=2)
        return direction, sign, ranked

    # Explaining

    @torch.no_grad()
    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        """Tries the directions that the search found for this pair of classes, best first.

        Args:
            image: [B, C, H, W] in [-1, 1].
            target: Classes asked for, [B]; None asks for the runner-up. Where it is predicted already the edit makes
                the classifier surer of it.

        Returns:
            An explanation with the way along the winning direction as steps (the reconstruction first, the whole step
            last; strengths in standard deviations); the counterfactual is the first picture of it that flips, or the
            whole step. Where no direction flips the image it is the one that comes nearest. Parts ``reconstruction``,
            ``redrawn`` (counterfactual minus reconstruction, signed) and ``direction_1`` and so on (the best directions
            of this pair at their whole step). Scores ``explained`` (1 where a direction flips the decision, 0 where
            none does or the reconstruction alone has), ``reconstruction_kept`` (1 where the reconstruction is decided
            as the image), ``reconstruction_l1`` (on [-1, 1]), ``rank`` of the winning direction (from 1), ``direction``
            (its number among the candidates), ``ranked`` (0 where the search knew no direction for this pair),
            ``directions_that_flip``, ``standard_deviations`` and ``degree`` (length of the edit along its direction; a
            minus is the opposite way).
        """
        image = image.to(self.dtype)
        logits = self.classifier(image)
        predicted, other = logits.argmax(dim=1), runner_up(logits)
        target = self.default_target(logits) if target is None else target
        source = torch.where(target == predicted, other, predicted)
        latent, label = self.encode(image), self.label(logits)
        direction, sign, ranked = self._candidates(source, target)
        result = self._searched()
        steps, spread = result.steps, result.spread
        change = (sign * steps[direction])[:, :, None] * result.vectors[direction]

        whole = self.render(latent, label, change)
        said = self.classifier.along(whole)
        flips = leads(said, target)
        found = flips.any(dim=1)
        nearest = self._target_margins(said, target).argmax(dim=1)
        rank = torch.where(found, flips.to(torch.int8).argmax(dim=1), nearest)
        rows = torch.arange(len(image), device=image.device)
        way = change[rows, rank]
        share = torch.ones_like(way[:, 0])
        if self.smallest:
            # What is predicted already needs no step, and is shown the whole one.
            share = torch.where(target == predicted, share, self._shortest(latent, label, way, target))
        grid = torch.linspace(0, 1, self.num_steps, device=image.device)
        # The counterfactual is one more picture of the same batch.
        shares = torch.cat([grid.expand(len(image), -1), share[:, None]], dim=1)
        pictures = self.render(latent, label, shares[:, :, None] * way[:, None])
        reconstruction, counterfactual = pictures[:, 0], pictures[:, -1]
        ends = self.classifier.along(torch.stack([reconstruction, counterfactual], dim=1))
        kept = ends[:, 0].argmax(dim=1) == predicted
        redrawn = counterfactual - reconstruction
        winner = direction[rows, rank]
        sigma = steps / spread.clamp_min(1e-12)
        scores = {
            "explained": found & kept,
            "reconstruction_kept": kept,
            "reconstruction_l1": (reconstruction - image).abs().mean(dim=(1, 2, 3)),
            "rank": rank + 1,
            "direction": winner,
            "ranked": ranked[rows, rank],
            "directions_that_flip": flips.sum(dim=1),
            "standard_deviations": share * (sign[rows, rank] * sigma[winner]),
            "degree": share * (sign[rows, rank] * steps[winner]),
        }
        shown = {f"direction_{i + 1}": whole[:, i] for i in range(self.shown_directions)}
        return Explanation(
            image=image,
            logits=logits,
            target=target,
            attribution=redrawn.abs().mean(dim=1, keepdim=True),
            counterfactual=counterfactual,
            counterfactual_logits=ends[:, 1],
            steps=pictures[:, :-1],
            strengths=(grid * sigma[winner][:, None]).to(logits.dtype),
            parts={"reconstruction": reconstruction, "redrawn": redrawn, **shown},
            scores={name: value.to(logits.dtype) for name, value in scores.items()},
            caveats={
                "the rendering alone changes the decision, so another image is explained": ~kept,
                "no direction flips it, shown is the one that comes nearest": ~found,
                "the search found no direction for this pair of classes": ~scores["ranked"].bool(),
            },
        )

    def _shortest(self, latent: Tensor, label: Tensor, way: Tensor, target: Tensor) -> Tensor:
        """The smallest share of the way that flips, [B]; 1 where none does."""

        def reached(share: Tensor, rows: Tensor) -> Tensor:
            pictures = self.render(latent[rows], label[rows], share[:, :, None] * way[rows, None])
            return leads(self.classifier.along(pictures), target[rows])

        return smallest_step(reached, torch.ones_like(way[:, 0]), points=_POINTS, rounds=1)[0]

    def _target_margins(self, logits: Tensor, target: Tensor) -> Tensor:
        """``style_ranking.target_margin`` for another target in every row, [B, T, K] -> [B, T]."""
        asked = target[:, None, None].expand(-1, logits.shape[1], 1)
        others = logits.scatter(2, asked, -torch.inf).logsumexp(dim=2)
        return logits.gather(2, asked).squeeze(2) - others

    # Training

    def on_fit_start(self) -> None:
        """Loads AlexNet before the first batch, where it is wanted.

        Raises:
            ValueError: If its weights cannot be had.
        """
        if self.perceptual_weight and self.perception == "lpips" and not self._lpips:
            try:
                self._lpips.append(Lpips())
            except OSError as error:
                raise ValueError(
                    f"AlexNet's weights for LPIPS could not be loaded ({error}): connect to the network once, or "
                    "compare images by the classifier's own maps with --model.perception classifier."
                ) from error

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Critic, its penalty, generator, its penalty, then generator and encoder together (the code's order)."""
        iteration = self.trainer.fit_loop.total_batch_idx
        generator, critic, encoder = self.optimizers()  # type: ignore[misc, union-attr, attr-defined]
        whole = self._draw(batch)
        rows = parts_of(len(whole), self.micro_batches)
        parts = [whole.rows(some) for some in rows]
        # Neither network changes between the critic's step and the generator's.
        shown, rendered = render_twice(self._fakes, parts)
        terms = accumulate_and_step(
            self,
            parts,
            lambda part: critic_loss(self.critic, part.image, part.real_label, shown(part)),
            "critic",
            critic,
        )
        if self.r1_weight and iteration % self.r1_interval == 0:
            weight = self.r1_weight * self.r1_interval
            terms |= accumulate_and_step(
                self, parts, lambda part: r1_loss(self.critic, part.image, part.real_label, weight), "r1_step", critic
            )
        with frozen(self.critic):
            terms |= accumulate_and_step(
                self, parts, lambda part: generator_loss(self.critic, rendered(part)), "generator", generator
            )
        if self.path_weight and iteration % self.path_interval == 0:
            terms |= self._path_step(whole.noise_label[: max(1, len(whole) // 2)], generator)
        noise = self.generator.synthesis.draw_noise(len(whole), whole.image)
        again = replace(whole, noise=[each[None] for each in noise])
        parts = [again.rows(some) for some in rows]
        terms |= accumulate_and_step(self, parts, self._reconstruction_loss, "reconstruction", generator, encoder)
        log_training(self, terms, len(whole))

    @torch.no_grad()
    def _draw(self, batch: dict[str, Any]) -> Part:
        """What the networks are told of a batch, and its random numbers."""
        image = batch["image"]
        logits = self.classifier(image)
        label, latent = self.label(logits), self.encode(image)
        truth = F.one_hot(batch["label"], logits.shape[1]).to(label.dtype)
        noise_label = self._draw_labels(label)
        noise = self.generator.synthesis.draw_noise(2 * len(image), image)
        return Part(
            image=image,
            logits=logits,
            label=label,
            real_label=label if self.real_label == "predicted" else truth,
            noise_label=noise_label,
            latent=self.generator.spread(latent),
            mixture=Mixture.draw(self.generator, len(image), self.mixing, image.device),
            noise=[each.unflatten(0, (2, -1)) for each in noise],
        )

    def _fakes(self, part: Part) -> list[Fake]:
        """Pictures of encoded images and of noise."""
        latents = torch.cat([part.latent, part.mixture.latents(self.generator)])
        noise = [each.flatten(0, 1) for each in part.noise]
        encoded, drawn = self.generator(latents, torch.cat([part.label, part.noise_label]), noise).chunk(2)
        noise_label = part.noise_label
        if self.noise_label == "classifier":
            with torch.no_grad():
                noise_label = self.label(self.classifier(drawn))
        return [(encoded, part.label), (drawn, noise_label)]

    def _draw_labels(self, label: Tensor) -> Tensor:
        """Labels for pictures of noise, [B, K] -> [B, K]."""
        if self.noise_label == "uniform":
            drawn = torch.randint(label.shape[1], (len(label),), device=label.device)
            return F.one_hot(drawn, label.shape[1]).to(label.dtype)
        return label[torch.randperm(len(label), device=label.device)]

    def _path_step(self, label: Tensor, optimizer: Any) -> dict[str, Tensor]:
        """Makes paths equally long, of pictures of noise with these labels [B, K], and keeps their mean length."""
        whole = PathPart.draw(self.generator, label, self.channels, self.mixing)
        parts = [whole.rows(rows) for rows in parts_of(len(whole), self.micro_batches)]
        weight = self.path_weight * self.path_interval
        terms = accumulate_and_step(
            self,
            parts,
            lambda part: path_loss(self.generator, part, self.path_mean, self.path_decay, weight),
            "path_step",
            optimizer,
        )
        self.path_mean.copy_(self.all_gather(terms["path_mean"]).mean())  # type: ignore[union-attr]
        return terms

    def _reconstruction_loss(self, part: Part) -> dict[str, Tensor]:
        image, label, logits = part.image, part.label, part.logits
        latent = self.encoder(image)
        picture = self.generator(latent, label, [each[0] for each in part.noise])
        maps, said = self.classifier.maps(picture, self._shallow)
        terms = {
            "pixel": (picture - image).abs().mean(),
            "latent": (self.encoder(picture) - latent).abs().mean(),
            "class": kl_between_logits(logits, said),
            "agreement": (said.argmax(dim=1) == logits.argmax(dim=1)).float().mean(),
        }
        total = (
            self.pixel_weight * terms["pixel"]
            + self.latent_weight * terms["latent"]
            + self.class_weight * terms["class"]
        )
        if self.perceptual_weight:
            terms["perceptual"] = self._perceptual(picture, image, maps)
            total = total + self.perceptual_weight * terms["perceptual"]
        return terms | {"reconstruction": total}

    def _perceptual(self, picture: Tensor, image: Tensor, maps: list[Tensor]) -> Tensor:
        if self.perception == "classifier":
            with torch.no_grad():
                wanted, _ = self.classifier.maps(image, self._shallow)
            return relative_distance(maps, wanted)
        return self._lpips[0](picture, image)

    @torch.no_grad()
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Measures reconstruction and agreement, keeps the latents, and searches a little after the last batch."""
        image = batch["image"]
        logits = self.classifier(image)
        latent, label = self.encode(image), self.label(logits)
        picture = self.reconstruct(latent, label)
        said = self.classifier(picture)
        values = {
            "reconstruction_l1": (picture - image).abs().mean(),
            "classifier_agreement": (said.argmax(dim=1) == logits.argmax(dim=1)).float().mean(),
            "class": kl_between_logits(logits, said),
        }
        values["loss"] = values["reconstruction_l1"] + values["class"]
        log_validation(self, values, len(image))
        if self.trainer.sanity_checking:
            return
        self.reference.collect(latent, logits, batch.get("mask"))
        if batch_idx + 1 == self.trainer.num_val_batches[0]:
            self.reference.keep(all_gather_rows)
            self._quick_search()

    def _quick_search(self) -> None:
        """Logs how many images of each class some direction flips: whether the latent knows the classes yet."""
        result = self.search(_QUICK)
        shares = []
        for source in range(self.classifier.num_classes):
            mine = result.images(source)
            if len(mine):
                left = result.table[mine].argmax(dim=3) != source
                shares.append(left.flatten(1).any(dim=1).float().mean())
        if shares:
            self.log("val/coverage", torch.stack(shares).min(), batch_size=1, sync_dist=True)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam for generator and critic, corrected for their lazy penalties (StyleGAN2), plain Adam for the encoder."""

        def lazy(module: nn.Module, interval: int, used: float) -> torch.optim.Optimizer:
            ratio = interval / (interval + 1) if used else 1.0
            return torch.optim.Adam(module.parameters(), lr=self.learning_rate * ratio, betas=(0.0, 0.99**ratio))

        return [
            lazy(self.generator, self.path_interval, self.path_weight),
            lazy(self.critic, self.r1_interval, self.r1_weight),
            torch.optim.Adam(self.encoder.parameters(), lr=self.learning_rate),
        ]


def _check(value: str, choices: Sequence[str], name: str) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
