"""StylEx: a StyleGAN2 trained with a classifier, and the few directions of its latent that change decisions.

Papers: "Explaining in Style" (Lang et al., arXiv 2104.13369) and "CheXplaining in Style" (Atad et al., arXiv
2207.07553) with its search EigenFind. Encoder and generator learn to render an image so that it looks the same and is
classified the same. Then the search finds directions that, over many images, push the decision to another class.

``docs/methods/stylex.md`` lists the differences of paper and code, and our deviations from both.

Shapes: B images, C channels, H, W pixels, K classes, D entries of the latent, L slots, N entries of a change (D, or the
size M of the style space), k kept directions, T steps, n reference images.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfe_lightning.atlas import Atlas
from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.compute.losses import Lpips, relative_distance
from cfe_lightning.compute.memory import pictures_at_once
from cfe_lightning.compute.micro_batches import accumulate_and_step, check_micro_batches, frozen, parts_of, render_twice
from cfe_lightning.compute.processes import all_gather_rows, log_training, log_validation
from cfe_lightning.compute.rows import rows_of
from cfe_lightning.compute.search import smallest_step
from cfe_lightning.decisions import kl_between_logits, leads, runner_up, target_margin
from cfe_lightning.explainer import ExplainerModule
from cfe_lightning.explanation import Explanation
from cfe_lightning.methods.stylex import training
from cfe_lightning.methods.stylex.atlas import draw_atlas
from cfe_lightning.methods.stylex.critic import LabelEntry, StyleCritic
from cfe_lightning.methods.stylex.generator import Conditioning, LatentSpace, StyleEncoder, StyleGenerator
from cfe_lightning.methods.stylex.layers import channel_table
from cfe_lightning.methods.stylex.ranking import Scoring, SearchResult
from cfe_lightning.methods.stylex.reference import Reference, first_of_each_class
from cfe_lightning.methods.stylex.search import Directions, DirectionSpace, LatentSearch, StepUnit
from cfe_lightning.methods.stylex.training import Fake, LabelForm, LabelSource, NoiseLabel, PathBatch, TrainingBatch

_log = logging.getLogger(__name__)

Perception = Literal["classifier", "lpips", "none"]

#: Pictures per round of the search for the shortest step.
_POINTS = 8
#: Images per class of a quick search during training.
_QUICK = 64


class _Choice(NamedTuple):
    """The k directions tried on each image, and the chosen one."""

    whole: Tensor  # pictures at the whole steps of the tried directions, [B, k, C, H, W]
    flips: Tensor  # tried directions that flip the decision, [B, k] bool
    rank: Tensor  # place of the chosen direction among the tried ones, from 0, [B]
    direction: Tensor  # number of the chosen direction among the search's candidates, [B]
    sign: Tensor  # sign of the chosen direction, +1 or -1, [B]
    ranked: Tensor  # 1 where the search ranked the chosen direction for the pair of classes, else 0, [B]
    step: Tensor  # whole step along the chosen direction, [B, N]


class StylEx(ExplainerModule):
    """Trains generator, encoder and critic against one classifier, and explains images by directions of the latent.

    The last validation keeps the latents of its images in the checkpoint, so that the checkpoint alone suffices to
    search directions.

    Args:
        classifier: The classifier to be explained.
        profile: Defaults of ``real_label``, ``noise_label``, ``label_form``, ``pixel_weight`` and ``scoring``:
            "recommended", or "paper_code" for those of the released code of CheXplaining in Style.
        image_size: Side of the pictures in pixels, a power of two from 8 on; None takes the classifier's.
        base: A layer at resolution r has base / r channels, at most ``max_width``.
        max_width: Upper limit of the channels of a layer.
        z_dim: Entries of the noise that the mapping network reads.
        w_dim: Entries of the latent (D).
        mapping_layers: Number of layers of the mapping network.
        conditioning: Entry of the class into the generator. "none" leaves all evidence to the latent and is best for
            the search; "const_concat" embeds it beside the learned constant, "w_concat" appends it to the latent.
        label_entry: Entry of the class into the critic: "projection" on last features, or "planes" beside the image
            (published).
        encoder_space: "w" for one latent per image; "w+" for one per slot: sharper pictures, harder to edit.
        real_label: Label of real images for the critic, "predicted" or the "truth"; None takes the profile's.
        noise_label: Label of pictures rendered from noise: "empirical" (another image's of the batch), "uniform" (a
            random class), "classifier" (its prediction; needs conditioning "none"), or None for the profile's.
        label_form: Form of all labels, "probabilities" or "one_hot" (most probable class); None takes the profile's.
        pixel_weight: Weight of the mean absolute difference of pixels; None takes the profile's.
        perception: Comparison of images beside pixels: by the "classifier"'s own shallow maps (needs no download), by
            "lpips" (AlexNet's weights are downloaded at first use), or "none".
        perceptual_weight: Weight of the comparison that ``perception`` names.
        latent_weight: Weight of the mean absolute difference between the latents of image and rendering.
        class_weight: Weight of KL(decision of the image || decision of the rendering).
        r1_weight: Weight of the critic's gradient penalty (gamma); 2 for images in [-1, 1] equals the published 10.
        r1_interval: Iterations from one gradient penalty to the next.
        path_weight: Weight of the path length penalty; 0 leaves it out.
        path_interval: Iterations from one path length penalty to the next.
        path_decay: Share of a batch in the running mean of the path length.
        mixing: Probability that two latents share the slots of a picture rendered from noise.
        learning_rate: Learning rate of Adam before the correction for lazy penalties.
        reference_size: Largest number of validation images whose latents are kept (n).
        search_images: Largest number of images per class in a search.
        search_space: "pca_w" (principal components of encoded latents), "sefa_w" (published: latent directions that the
            affine maps to the styles amplify most), or "pca_s" (principal components of encoded styles).
        search_directions: Number of candidate directions before ranking.
        kept_directions: Number of directions kept for each pair of classes (k).
        degree: Length of the whole step along a direction, in the unit ``degree_unit``.
        degree_unit: "sigma" for standard deviations of the reference along the direction, or "abs" for the latent's own
            unit (published, with degree 10).
        reaverage: Averages scores over the images not yet explained before every choice, as Explaining in Style does.
        normalise_rows: Lets every style count alike in "sefa_w", as the code of SeFa does.
        edited_layers: Convolutions whose slots the directions of the latent move; None moves all slots.
        scoring: Score of a direction: "strict" (change of the logit margin from the reconstruction's), or "paper_code"
            (change of the target's sigmoid from the image's); None takes the profile's.
        smallest: Ends the counterfactual at the shortest step that flips the decision, not at the whole step.
        num_steps: Number of steps of an explanation, from the reconstruction to the whole step.
        shown_directions: Number of best directions whose pictures become parts of an explanation.
        micro_batches: Number of parts that a batch is computed in: the same gradient in less memory, for one more pass
            of the generator. The critic compares the images of one part, the running mean of the path length takes the
            mean of a part, and the classifier's own maps are compared in units of a part.

    Raises:
        ValueError: If an argument is out of range, or contradicts another.
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
        counts = {"num_steps": num_steps, "search_directions": search_directions, "search_images": search_images}
        for name, count in (counts | {"kept_directions": kept_directions, "reference_size": reference_size}).items():
            if count < 2:
                raise ValueError(f"{name} must be at least 2, got {count}.")
        self.automatic_optimization = False
        self.image_size = image_size or classifier.spec.image_size
        if self.image_size < 8 or self.image_size & (self.image_size - 1):
            better = max(8, 2 ** round(math.log2(self.image_size)))
            raise ValueError(
                f"StylEx renders pictures whose side is a power of two from 8 on, got {self.image_size}: set "
                f"image_size of model and data to {better}; the classifier resizes them to its own "
                f"{classifier.spec.image_size}."
            )

        # Training.
        switches = training.PROFILES[profile]
        self.real_label = real_label or switches.real_label
        self.noise_label = noise_label or switches.noise_label
        self.label_form = label_form or switches.label_form
        self.pixel_weight = switches.pixel_weight if pixel_weight is None else pixel_weight
        if self.noise_label == "classifier" and conditioning != "none":
            raise ValueError(
                "noise_label 'classifier' labels a picture after it is rendered, so it needs conditioning 'none'; "
                "choose 'empirical' or 'uniform' for a generator that is told the class."
            )
        self.perceptual_weight = 0.0 if perception == "none" else perceptual_weight
        self.latent_weight = latent_weight
        self.class_weight = class_weight
        self.r1_weight, self.r1_interval = r1_weight, r1_interval
        self.path_weight, self.path_interval, self.path_decay = path_weight, path_interval, path_decay
        self.mixing = mixing
        self.learning_rate = learning_rate
        self.micro_batches = check_micro_batches(micro_batches)

        # Search and explanation.
        # fmt: off
        self.latent_search = LatentSearch(
            search_images=search_images, search_space=search_space, search_directions=search_directions,
            kept_directions=kept_directions, degree=degree, degree_unit=degree_unit, reaverage=reaverage,
            normalise_rows=normalise_rows, edited_layers=edited_layers, scoring=scoring or switches.scoring,
        )
        # fmt: on
        self.smallest = smallest
        self.num_steps = num_steps
        self.shown_directions = min(shown_directions, kept_directions)

        # Networks.
        num_classes, channels = classifier.num_classes, self.channels
        widths = channel_table(self.image_size, base, max_width)
        # fmt: off
        self.generator = StyleGenerator(
            channels=channels, num_classes=num_classes, conditioning=conditioning, widths=widths, z_dim=z_dim,
            w_dim=w_dim, mapping_layers=mapping_layers,
        )
        # fmt: on
        self.encoder = StyleEncoder(channels=channels, widths=widths, w_dim=w_dim, space=encoder_space)
        self.critic = StyleCritic(channels=channels, num_classes=num_classes, widths=widths, label_entry=label_entry)
        for network in (self.generator, self.encoder, self.critic):
            # Convolutions take a seventh less time in this layout on a CPU.
            network.to(memory_format=torch.channels_last)
        num_slots = self.generator.num_slots
        if edited_layers is not None and not {*edited_layers} <= {*range(num_slots - 1)}:
            raise ValueError(f"edited_layers must be convolutions from 0 to {num_slots - 2}, got {edited_layers}.")

        # Reference and result of the search.
        latent = (w_dim,) if encoder_space == "w" else (num_slots, w_dim)
        self.register_buffer("path_mean", torch.zeros(()))
        self.reference = Reference(reference_size, latent, num_classes, self.image_size)
        self._result: SearchResult | None = None
        self._ranks: Tensor | None = None

        # Perception. Lists hide the networks from the checkpoint.
        self.perception = perception
        self._lpips: list[Lpips] = []
        self._shallow = classifier.shallow_maps() if perception == "classifier" and perceptual_weight else []
        if perception == "classifier" and perceptual_weight and not self._shallow:
            _log.warning("This classifier has no feature maps to compare images by: pixels alone are compared.")
            self.perceptual_weight = 0.0

    def train(self, mode: bool = True) -> StylEx:
        """Forgets the search, because the weights may change after this call."""
        self._result = self._ranks = None
        return super().train(mode)

    def blocks(self) -> list[nn.Module]:
        """Returns the blocks of generator, encoder and critic that can be compiled or recomputed one by one."""
        return [*self.generator.blocks(), *self.encoder.blocks(), *self.critic.blocks()]

    # Latents, labels, pictures

    def label(self, logits: Tensor) -> Tensor:
        """Returns the labels of images with these logits for generator and critic, [B, K] -> [B, K]."""
        if self.label_form == "probabilities":
            return logits.softmax(dim=1)
        return F.one_hot(logits.argmax(dim=1), logits.shape[1]).to(logits.dtype)

    def encode(self, image: Tensor) -> Tensor:
        """Encodes images [B, C, H, W] in [-1, 1] as latents [B, D], or [B, L, D] in the space "w+".

        Raises:
            ValueError: If the images have another size than the generator's pictures.
        """
        if image.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"The images are {image.shape[-1]} x {image.shape[-2]} pixels, but the generator renders "
                f"{self.image_size} x {self.image_size}: set image_size of model and data alike."
            )
        return self.encoder(image)

    def render(self, latent: Tensor, label: Tensor, change: Tensor) -> Tensor:
        """Renders latents [B, D] or [B, L, D] with labels [B, K] and changes [B, T, N] as pictures [B, T, C, H, W].

        The label stays the same during an edit. Changes are those of ``LatentSearch.render``; pictures are in [-1, 1].
        """
        batch, num_steps = change.shape[:2]
        rows = torch.arange(batch, device=change.device).repeat_interleave(num_steps)
        at_once = pictures_at_once(self.image_size**2, change.device)
        parts = zip(rows.split(at_once), change.flatten(0, 1).split(at_once), strict=True)
        render = partial(self.latent_search.render, self.generator)
        pictures = [render(latent[row], label[row], moved) for row, moved in parts]
        return torch.cat(pictures).unflatten(0, (batch, num_steps))

    def reconstruct(self, latent: Tensor, label: Tensor) -> Tensor:
        """Renders pictures of latents without any edit, [B, C, H, W] in [-1, 1]."""
        generator, in_styles = self.generator, self.latent_search.search_space == "pca_s"
        size = sum(generator.synthesis.layer_sizes) if in_styles else generator.w_dim
        return self.render(latent, label, torch.zeros(len(latent), 1, size, device=latent.device))[:, 0]

    # Searching

    def survey(self) -> dict[str, Any]:
        """Searches directions for all pairs of classes from the reference in the checkpoint; returns plain data."""
        return self._searched().to_plain()

    def adopt(self, survey: dict[str, Any]) -> None:
        """Adopts the search of a model with the same weights and arguments."""
        self._result = SearchResult.from_plain(survey, self.device)
        self._ranks = None

    @torch.no_grad()
    def _searched(self) -> SearchResult:
        """Returns the search's result; searches if none was adopted."""
        if self._result is None:
            # A sample grid during training needs a quick answer: all images would delay the training.
            fitting = self._trainer is not None and self.trainer.training
            self._result = self.search(_QUICK if fitting else None)
        return self._result

    def atlas(self) -> Atlas | None:
        """Draws the best directions of every pair of classes on a few reference images; None without any direction."""
        result = self._searched()
        latent, logits = self.starting_points()
        atlas = draw_atlas(self, result, latent, logits, self.reference.masks)
        return atlas if atlas.pairs else None

    def starting_points(self) -> tuple[Tensor, Tensor]:
        """Returns latents of the reference, [n, D] or [n, L, D], and the classifier's logits of its images, [n, K].

        Before the first validation, pictures rendered from noise stand in for encoded images.
        """
        # Encoded images.
        kept = self.reference
        if count := int(kept.count):
            return kept.latents[:count], kept.logits[:count]

        # Pictures rendered from noise.
        count = min(len(kept.latents), 256)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(count, self.generator.z_dim, generator=generator).to(self.device)
        latent = self.generator.mapping(noise)
        latent = self.generator.spread(latent) if kept.latents.ndim == 3 else latent
        uniform = torch.full((count, kept.logits.shape[1]), 1 / kept.logits.shape[1], device=self.device)
        return latent, self.classifier(self.reconstruct(latent, uniform))

    def search(self, images: int | None = None, batch_size: int | None = None) -> SearchResult:
        """Searches the reference by EigenFind, for all classes at once.

        Args:
            images: Largest number of images per class; None takes ``search_images``.
            batch_size: Pictures per pass; None takes ``pictures_at_once``. The result does not depend on it.
        """
        latent, logits = self.starting_points()
        directions = self.latent_search.directions(self.generator, latent, self.label(logits))
        chosen = first_of_each_class(logits.argmax(dim=1), images or self.latent_search.search_images)
        return replace(self.measure(directions, latent[chosen], logits[chosen], batch_size), index=chosen)

    @torch.no_grad()
    def measure(
        self, directions: Directions, latent: Tensor, logits: Tensor, batch_size: int | None = None
    ) -> SearchResult:
        """Moves images with latents [n, D] or [n, L, D] and logits [n, K] both ways along directions.

        ``batch_size`` is that of ``search``.
        """
        batch_size = batch_size or pictures_at_once(self.image_size**2, latent.device)
        logits_of = self.latent_search.logits_of_edits(self.generator, self.classifier, latent, self.label(logits))
        return self.latent_search.measure(logits_of, directions, logits, batch_size)

    # Explaining

    @torch.no_grad()
    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        """Explains images [B, C, H, W] by the first of the search's directions that flips the decision to targets [B].

        Where a target is already predicted, the edit makes the classifier surer of it.

        Returns:
            An explanation whose steps lead from the reconstruction along the direction to the whole step; strengths are
            in standard deviations. If no direction flips the decision, it is the direction that comes nearest. The
            counterfactual is the shortest step found that flips, or the whole step. Parts: ``reconstruction``,
            ``redrawn`` (counterfactual minus reconstruction, signed), and ``direction_1`` and so on (pictures at the
            whole steps of the best directions). Scores:

            - ``explained``: 1 where a direction flips the decision and the reconstruction alone does not;
            - ``reconstruction_kept``: 1 where the reconstruction is classified as the image;
            - ``reconstruction_l1``: mean absolute difference of image and reconstruction, on [-1, 1];
            - ``direction``, ``rank``: number of the direction among the candidates, its place (from 1) for this pair;
            - ``ranked``: 0 where the search knew no direction for this pair of classes;
            - ``directions_that_flip``: number of tried directions that flip the decision;
            - ``standard_deviations``, ``degree``: length of the edit, negative against the direction.
        """
        # Classes and latents.
        image = image.to(self.dtype)
        logits = self.classifier(image)
        predicted = logits.argmax(dim=1)
        target = self.default_target(logits) if target is None else target
        latent, label = self.encode(image), self.label(logits)
        choice = self._choose(latent, label, torch.where(target == predicted, runner_up(logits), predicted), target)

        # Path. A predicted target needs no step to flip, so its counterfactual is the whole step.
        share = torch.ones_like(choice.step[:, 0])
        if self.smallest:
            share = torch.where(target == predicted, share, self._shortest(latent, label, choice.step, target))
        grid = torch.linspace(0, 1, self.num_steps, device=image.device)
        # The counterfactual is one more picture of the same batch.
        shares = torch.cat([grid.expand(len(image), -1), share[:, None]], dim=1)
        pictures = self.render(latent, label, shares[:, :, None] * choice.step[:, None])
        reconstruction, counterfactual = pictures[:, 0], pictures[:, -1]
        redrawn = counterfactual - reconstruction

        # Scores.
        ends = self.classifier.along(torch.stack([reconstruction, counterfactual], dim=1))
        kept, found = ends[:, 0].argmax(dim=1) == predicted, choice.flips.any(dim=1)
        result = self._searched()
        sigma = (result.steps / result.spread.clamp_min(1e-12))[choice.direction]
        scores = {
            "explained": found & kept,
            "reconstruction_kept": kept,
            "reconstruction_l1": (reconstruction - image).abs().mean(dim=(1, 2, 3)),
            "rank": choice.rank + 1,
            "direction": choice.direction,
            "ranked": choice.ranked,
            "directions_that_flip": choice.flips.sum(dim=1),
            "standard_deviations": share * (choice.sign * sigma),
            "degree": share * (choice.sign * result.steps[choice.direction]),
        }
        shown = {f"direction_{i + 1}": choice.whole[:, i] for i in range(self.shown_directions)}
        return Explanation(
            image=image,
            logits=logits,
            target=target,
            attribution=redrawn.abs().mean(dim=1, keepdim=True),
            counterfactual=counterfactual,
            counterfactual_logits=ends[:, 1],
            steps=pictures[:, :-1],
            strengths=(grid * sigma[:, None]).to(logits.dtype),
            parts={"reconstruction": reconstruction, "redrawn": redrawn, **shown},
            scores={name: value.to(logits.dtype) for name, value in scores.items()},
            caveats={
                "the rendering alone changes the decision, so another image is explained": ~kept,
                "no direction flips it, shown is the one that comes nearest": ~found,
                "the search found no direction for this pair of classes": ~scores["ranked"].bool(),
            },
        )

    def _choose(self, latent: Tensor, label: Tensor, source: Tensor, target: Tensor) -> _Choice:
        """Tries the best directions for pairs of classes [B]; chooses the first that flips, else the nearest."""
        # Whole steps along the candidates.
        result = self._searched()
        if self._ranks is None:
            self._ranks = self.latent_search.candidates(result, self.classifier.num_classes).to(self.device)
        direction, sign, ranked = self._ranks[source, target].unbind(dim=2)
        change = (sign * result.steps[direction])[:, :, None] * result.vectors[direction]
        whole = self.render(latent, label, change)

        # Decisions.
        logits = self.classifier.along(whole)
        flips = leads(logits, target)
        nearest = target_margin(logits, target).argmax(dim=1)
        rank = torch.where(flips.any(dim=1), flips.to(torch.int8).argmax(dim=1), nearest)
        rows = torch.arange(len(rank), device=rank.device)
        return _Choice(whole, flips, rank, *(value[rows, rank] for value in (direction, sign, ranked, change)))

    def _shortest(self, latent: Tensor, label: Tensor, step: Tensor, target: Tensor) -> Tensor:
        """Finds the smallest share of the steps [B, N] that flips, [B]; 1 where none does."""

        def reached(share: Tensor, rows: Tensor) -> Tensor:
            pictures = self.render(latent[rows], label[rows], share[:, :, None] * step[rows, None])
            return leads(self.classifier.along(pictures), target[rows])

        return smallest_step(reached, torch.ones_like(step[:, 0]), points=_POINTS, rounds=1)[0]

    # Training

    def on_fit_start(self) -> None:
        """Loads AlexNet before the first batch if ``perception`` is "lpips".

        Raises:
            ValueError: If its weights can be neither found nor downloaded.
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
        """Steps critic, its penalty, generator, its penalty, then generator and encoder, in the order of the code."""
        # Parts of the batch. Critic and generator share a rendering, as generator and encoder do not change in between.
        iteration = self.trainer.fit_loop.total_batch_idx
        generator, critic, encoder = self.optimizers()  # type: ignore[misc, union-attr, attr-defined]
        whole = self._draw(batch)
        rows = parts_of(len(whole), self.micro_batches)
        parts = [rows_of(whole, part) for part in rows]
        shown, rendered = render_twice(self._fakes, parts)
        step = partial(accumulate_and_step, self, parts)

        # Critic.
        terms = step(lambda x: training.critic_loss(self.critic, x.image, x.real_label, shown(x)), "critic", critic)
        if self.r1_weight and iteration % self.r1_interval == 0:
            weight = self.r1_weight * self.r1_interval
            terms |= step(lambda x: training.r1_loss(self.critic, x.image, x.real_label, weight), "r1_step", critic)

        # Generator.
        with frozen(self.critic):
            terms |= step(lambda x: training.generator_loss(self.critic, rendered(x)), "generator", generator)
        if self.path_weight and iteration % self.path_interval == 0:
            terms |= self._path_step(whole.noise_label[: max(1, len(whole) // 2)], generator)

        # Generator and encoder, with new noise maps.
        noise = self.generator.synthesis.draw_noise(len(whole), whole.image)
        again = replace(whole, noise=[each[:, None] for each in noise])
        parts = [rows_of(again, part) for part in rows]
        terms |= accumulate_and_step(self, parts, self._reconstruction_loss, "reconstruction", generator, encoder)
        log_training(self, terms, len(whole))

    @torch.no_grad()
    def _draw(self, batch: dict[str, Any]) -> TrainingBatch:
        """Prepares labels, latents and random numbers of a batch."""
        # Labels.
        image = batch["image"]
        logits = self.classifier(image)
        label, latent = self.label(logits), self.encode(image)
        truth = F.one_hot(batch["label"], logits.shape[1]).to(label.dtype)
        noise_label = self._draw_labels(label)

        # One draw holds the noise of all encoded images, then that of all images of noise.
        noise = self.generator.synthesis.draw_noise(2 * len(image), image)
        return TrainingBatch(
            image=image,
            logits=logits,
            label=label,
            real_label=label if self.real_label == "predicted" else truth,
            noise_label=noise_label,
            latent=self.generator.spread(latent),
            mixture=training.Mixture.draw(self.generator, len(image), self.mixing, image.device),
            noise=[each.unflatten(0, (2, -1)).transpose(0, 1) for each in noise],
        )

    def _fakes(self, batch: TrainingBatch) -> list[Fake]:
        """Renders encoded images and noise."""
        latents = torch.cat([batch.latent, batch.mixture.latents(self.generator)])
        noise = [each.transpose(0, 1).flatten(0, 1) for each in batch.noise]
        encoded, drawn = self.generator(latents, torch.cat([batch.label, batch.noise_label]), noise).chunk(2)
        noise_label = batch.noise_label
        if self.noise_label == "classifier":
            with torch.no_grad():
                noise_label = self.label(self.classifier(drawn))
        return [(encoded, batch.label), (drawn, noise_label)]

    def _draw_labels(self, label: Tensor) -> Tensor:
        """Draws labels for pictures rendered from noise, [B, K] -> [B, K]."""
        if self.noise_label == "uniform":
            drawn = torch.randint(label.shape[1], (len(label),), device=label.device)
            return F.one_hot(drawn, label.shape[1]).to(label.dtype)
        return label[torch.randperm(len(label), device=label.device)]

    def _path_step(self, label: Tensor, optimizer: Any) -> dict[str, Tensor]:
        """Steps on the path length penalty for pictures of noise with labels [B, K], and keeps the mean length."""
        # A part's mean length goes into the running mean.
        whole = PathBatch.draw(self.generator, label, self.channels, self.mixing)
        parts = [rows_of(whole, rows) for rows in parts_of(len(whole), self.micro_batches)]
        weight = self.path_weight * self.path_interval
        loss = partial(training.path_loss, self.generator, mean=self.path_mean, decay=self.path_decay, weight=weight)
        terms = accumulate_and_step(self, parts, loss, "path_step", optimizer)
        self.path_mean.copy_(self.all_gather(terms["path_mean"]).mean())  # type: ignore[union-attr]
        return terms

    def _reconstruction_loss(self, batch: TrainingBatch) -> dict[str, Tensor]:
        # Terms.
        image, label, logits = batch.image, batch.label, batch.logits
        latent = self.encoder(image)
        picture = self.generator(latent, label, [each[:, 0] for each in batch.noise])
        maps, rendered = self.classifier.maps(picture, self._shallow)
        terms = {
            "pixel": (picture - image).abs().mean(),
            "latent": (self.encoder(picture) - latent).abs().mean(),
            "class": kl_between_logits(logits, rendered),
            "agreement": (rendered.argmax(dim=1) == logits.argmax(dim=1)).float().mean(),
        }

        # Weighted sum.
        total = self.pixel_weight * terms["pixel"] + self.latent_weight * terms["latent"]
        total = total + self.class_weight * terms["class"]
        if self.perceptual_weight:
            if self.perception == "classifier":
                with torch.no_grad():
                    wanted, _ = self.classifier.maps(image, self._shallow)
                terms["perceptual"] = relative_distance(maps, wanted)
            else:
                terms["perceptual"] = self._lpips[0](picture, image)
            total = total + self.perceptual_weight * terms["perceptual"]
        return terms | {"reconstruction": total}

    @torch.no_grad()
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Measures reconstruction and agreement and keeps the latents; a quick search follows the last batch."""
        # Metrics.
        image = batch["image"]
        logits = self.classifier(image)
        latent, label = self.encode(image), self.label(logits)
        picture = self.reconstruct(latent, label)
        rendered = self.classifier(picture)
        values = {
            "reconstruction_l1": (picture - image).abs().mean(),
            "classifier_agreement": (rendered.argmax(dim=1) == logits.argmax(dim=1)).float().mean(),
            "class": kl_between_logits(logits, rendered),
        }
        values["loss"] = values["reconstruction_l1"] + values["class"]
        log_validation(self, values, len(image))

        # Latents.
        if self.trainer.sanity_checking:
            return
        self.reference.collect(latent, logits, batch.get("mask"))
        if batch_idx + 1 == self.trainer.num_val_batches[0]:
            self.reference.keep(all_gather_rows)
            self._quick_search()

    def _quick_search(self) -> None:
        """Logs the share of images that some direction flips, of the class where it is smallest."""
        result = self.search(_QUICK)
        flipped = (result.table.argmax(dim=3) != result.predicted[:, None, None]).flatten(1).any(dim=1).float()
        classes = [result.images(source) for source in range(self.classifier.num_classes)]
        if shares := [flipped[mine].mean() for mine in classes if len(mine)]:
            self.log("val/coverage", torch.stack(shares).min(), batch_size=1, sync_dist=True)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Returns Adam for generator and critic, corrected for lazy penalties (StyleGAN2), and for the encoder."""

        def lazy(module: nn.Module, interval: int, used: float) -> torch.optim.Optimizer:
            ratio = interval / (interval + 1) if used else 1.0
            return torch.optim.Adam(module.parameters(), lr=self.learning_rate * ratio, betas=(0.0, 0.99**ratio))

        return [
            lazy(self.generator, self.path_interval, self.path_weight),
            lazy(self.critic, self.r1_interval, self.r1_weight),
            torch.optim.Adam(self.encoder.parameters(), lr=self.learning_rate),
        ]
