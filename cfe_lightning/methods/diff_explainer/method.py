"""DiffExplainer: counterfactuals by moving an image's semantic code, with almost nothing lost in the decoding.

Paper: "DiffExplainer: Unveiling Black Box Models Via Counterfactual Generation" (MICCAI 2024, arXiv 2406.15182). A
linear agent learns to read the classifier's features from the codes of a diffusion autoencoder. Its gradient is the
direction of the edit. The classifier, never the agent, decides how far to go; it is asked, but not differentiated.

Deviations, with reasons in ``docs/methods/diff_explainer.md``: the noise map comes from a refined inversion, the agent
starts from ridge regression, and the metric of the step is chosen by measuring the classifier on held-out images.

Shapes: B images, C channels, H, W pixels, S slices per image (1 unless it is a montage) of side s, K classes, D entries
of the code, F features, T steps.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.compute.memory import pictures_at_once
from cfe_lightning.compute.precision import full_precision
from cfe_lightning.compute.processes import all_gather_rows, log_training
from cfe_lightning.compute.rows import rows_of
from cfe_lightning.compute.search import smallest_step
from cfe_lightning.decisions import confidence_gap, probability, runner_up, sure_enough
from cfe_lightning.explainer import ExplainerModule
from cfe_lightning.explanation import Explanation
from cfe_lightning.images import cut_montage, montage_side, tile_montage
from cfe_lightning.methods.diff_explainer import agent
from cfe_lightning.methods.diff_explainer.agent import METRICS, Alignment, CodeStatistics, StepMetric, metric_matrix
from cfe_lightning.methods.diff_explainer.autoencoder import DiffusionAutoencoder, load_autoencoder
from cfe_lightning.methods.diff_explainer.calibration import AGREED, DISTANCES, preferred_metric, responses
from cfe_lightning.methods.diff_explainer.diffusion import Sampler, check_steps

_log = logging.getLogger(__name__)

#: A reconstruction is faithful if the probability of the image's class differs by at most this.
_FAITHFUL = 0.1
#: Smallest area under the curve and smallest correlation of margins at which the agent counts as aligned.
_ALIGNED_AUC, _ALIGNED_CORRELATION = 0.9, 0.8


class Located(NamedTuple):
    """Images as the autoencoder sees them: codes [B, S, D], noise maps [B, S, C, s, s], inversion residuals [B]."""

    code: Tensor
    noise_map: Tensor
    residual: Tensor


class DiffExplainer(ExplainerModule):
    """Fits the agent of one classifier to the codes of a trained autoencoder, and explains by moving codes.

    The training images are encoded once, and the agent is fitted to all codes before the first batch. One validation
    judges it and calibrates the metric of the step. A training of two batches is enough (``limit_train_batches``).

    Args:
        classifier: The classifier to be explained. Its features and last linear layer are read; without a linear head
            the agent learns its logits instead.
        autoencoder: Path of a checkpoint of ``DiffusionAutoencoder`` for this kind of images. A checkpoint of the
            explainer holds the autoencoder's constructor arguments instead.
        num_slices: Slices of a patient that are tiled into one image, S (see ``data.patient_slices``). Every slice is
            encoded by itself, the agent reads the mean of their codes, and all codes change alike.
        alignment: Target of the fit: the classifier's features by "l1" (published) or "mse", or its decisions by "kl".
        ridge_penalty: Penalty of the regression from which the fit starts, in units of the number of images.
        agent_epochs: Passes over all codes after the regression; none for "mse", which the regression solves.
        agent_learning_rate: Learning rate of Adam on standardised codes.
        metric: Metric in which a step is the shortest: "identity", "diagonal" or "covariance"; "calibrate" measures all
            three on the classifier and takes the one that works best.
        shrinkage: Share of the identity in the covariance metric.
        calibration_images: Number of validation images for the calibration.
        largest_step: Longest edit, in standard deviations of the codes along the edit's own line.
        confidence: Probability that the target must reach; None stops at a clear decision for the target.
        num_steps: Steps of an explanation, from the reconstruction to the counterfactual.
        search_points: Step sizes examined together in each round of the search.
        search_rounds: Rounds of the search after the first.
        diffusion_steps: Diffusion steps of inversion and decoding, a divisor of 1,000.
        refinements: Iterations per step of the inversion; 0 is the published inversion, which needs 250 steps.
        sampler: Sampler of the decoding: "ddim", or "dpm" for previews with few ``decoding_steps``.
        decoding_steps: Diffusion steps of the decoding; None takes ``diffusion_steps``, the only exact choice.

    Raises:
        FileNotFoundError: If the autoencoder's checkpoint does not exist.
        ValueError: If autoencoder and classifier do not fit, or an argument is out of range.
    """

    needs_gradient: ClassVar[bool] = False

    code_mean: Tensor
    code_spread: Tensor
    code_covariance: Tensor
    head_weight: Tensor
    head_bias: Tensor
    offset: Tensor
    step_matrix: Tensor
    fitted: Tensor

    def __init__(
        self,
        classifier: FrozenClassifier,
        *,
        autoencoder: str | dict[str, Any],
        num_slices: int = 1,
        alignment: Alignment = "l1",
        ridge_penalty: float = 1e-2,
        agent_epochs: int = 50,
        agent_learning_rate: float = 1e-4,
        metric: StepMetric | Literal["calibrate"] = "calibrate",
        shrinkage: float = 0.05,
        calibration_images: int = 32,
        largest_step: float = 4.0,
        confidence: float | None = None,
        num_steps: int = 8,
        search_points: int = 4,
        search_rounds: int = 2,
        diffusion_steps: int = 20,
        refinements: int = 2,
        sampler: Sampler = "ddim",
        decoding_steps: int | None = None,
    ) -> None:
        super().__init__(classifier)
        # Ranges.
        if num_steps < 2 or search_points < 1 or search_rounds < 0:
            raise ValueError(
                "num_steps must be at least 2, search_points at least 1 and search_rounds not negative, got "
                f"{num_steps}, {search_points} and {search_rounds}."
            )
        if sampler not in get_args(Sampler):
            raise ValueError(f"sampler must be one of {', '.join(get_args(Sampler))}, got {sampler!r}.")
        if confidence is not None and not 0 < confidence < 1:
            raise ValueError(f"confidence is a probability between 0 and 1, got {confidence}.")

        # Networks.
        self.autoencoder = self._frozen_autoencoder(autoencoder)
        self._build_agent()

        # Settings.
        self.automatic_optimization = False
        self.num_slices = num_slices
        self.image_size = self.autoencoder.image_size * montage_side(num_slices)
        self.alignment: Alignment = alignment
        self.ridge_penalty = ridge_penalty
        self.agent_epochs, self.agent_learning_rate = agent_epochs, agent_learning_rate
        self.metric, self.shrinkage, self.calibration_images = metric, shrinkage, calibration_images
        self.largest_step, self.confidence = largest_step, confidence
        self.num_steps, self.search_points, self.search_rounds = num_steps, search_points, search_rounds
        self.diffusion_steps = check_steps(diffusion_steps)
        self.refinements = refinements
        self.sampler: Sampler = sampler
        self.decoding_steps = check_steps(decoding_steps or diffusion_steps)
        self._held_out: list[tuple[Tensor, ...]] = []
        self._cases: list[Tensor] = []

    def _frozen_autoencoder(self, source: str | dict[str, Any]) -> DiffusionAutoencoder:
        if isinstance(source, str):
            autoencoder = load_autoencoder(source)
            # A checkpoint brings the weights; its arguments must be enough to build the networks.
            self.hparams["autoencoder"] = dict(autoencoder.hparams)
        else:
            autoencoder = DiffusionAutoencoder(**source)
        if autoencoder.channels != self.channels:
            raise ValueError(
                f"The autoencoder was trained on images of {autoencoder.channels} channels, but the classifier takes "
                f"{self.channels}: train one on the classifier's kind of images."
            )
        return autoencoder.requires_grad_(False).eval()

    def _build_agent(self) -> None:
        """Creates the agent's layer, a copy of the classifier's head, and empty statistics of the codes."""
        dim, num_classes = self.autoencoder.code_dim, self.classifier.num_classes
        head = self.classifier.linear_head() if self.classifier.spec.head is not None else None
        self.reads_features = head is not None
        weight, bias = head or (torch.eye(num_classes).double(), torch.zeros(num_classes).double())
        self.register_buffer("head_weight", weight.detach().clone())
        self.register_buffer("head_bias", bias.detach().clone())
        self.agent = nn.Linear(dim, weight.shape[1])

        # Filled by the fit.
        self.register_buffer("code_mean", torch.zeros(dim).double())
        self.register_buffer("code_spread", torch.ones(dim).double())
        self.register_buffer("code_covariance", torch.eye(dim).double())
        self.register_buffer("offset", torch.zeros(num_classes).double())
        self.register_buffer("step_matrix", torch.eye(dim).double())
        self.register_buffer("fitted", torch.tensor(False))

    def train(self, mode: bool = True) -> DiffExplainer:
        """Keeps the autoencoder in eval mode: its dropout would make the inversion random."""
        super().train(mode)
        self.autoencoder.eval()
        return self

    def blocks(self) -> list[nn.Module]:
        """Returns the blocks of the autoencoder, to be compiled one by one."""
        return self.autoencoder.blocks()

    # Codes, decisions, pictures

    def agent_logits(self, code: Tensor) -> Tensor:
        """Returns the agent's logits of codes [..., D], [..., K] float64; they are linear in the code."""
        weight, bias = self.folded()
        return code.double() @ weight.T + bias

    def folded(self) -> tuple[Tensor, Tensor]:
        """Folds agent and head into one map from raw codes to logits: weight [K, D] and bias [K], float64."""
        inner = self.agent.weight.double() / self.code_spread
        offset = self.agent.bias.double() - inner @ self.code_mean
        return self.head_weight @ inner, self.head_weight @ offset + self.head_bias + self.offset

    def encode(self, image: Tensor) -> Tensor:
        """Encodes every slice, [B, C, H, W] -> [B, S, D]; the agent reads the mean over slices.

        Raises:
            ValueError: If the images have another size than the autoencoder's.
        """
        if image.shape[-1] != self.image_size:
            raise ValueError(
                f"The images are {image.shape[-1]} pixels wide, but the autoencoder was trained for {self.image_size} "
                f"({self.num_slices} slices of {self.autoencoder.image_size}): set the size of the data to that."
            )
        slices = cut_montage(image, self.num_slices)
        return self.autoencoder.encode(slices.flatten(0, 1)).unflatten(0, slices.shape[:2])

    def locate(self, image: Tensor) -> Located:
        """Encodes and inverts images [B, C, H, W] once, for all edits of them."""
        slices, code = cut_montage(image, self.num_slices), self.encode(image)
        maps = self.autoencoder.invert(slices.flatten(0, 1), code.flatten(0, 1), self.diffusion_steps, self.refinements)
        noise_map, residual = (values.unflatten(0, slices.shape[:2]) for values in maps)
        return Located(code=code, noise_map=noise_map, residual=residual.amax(dim=1))

    def render(self, located: Located, change: Tensor) -> Tensor:
        """Decodes moved codes: changes [B, T, D] -> pictures [B, T, C, H, W]; no change gives the reconstruction.

        All slices of an image get the same change: that is the shortest way to move the mean of their codes.
        """
        batch, num_steps = change.shape[:2]
        code = (located.code[:, None] + change[:, :, None].to(located.code)).flatten(0, 2)
        noise_map = located.noise_map[:, None].expand(-1, num_steps, -1, -1, -1, -1).flatten(0, 2)
        at_once = pictures_at_once(self.autoencoder.image_size**2, change.device)
        slices = [
            self.autoencoder.decode(noise, moved, self.decoding_steps, self.sampler)
            for noise, moved in zip(noise_map.split(at_once), code.split(at_once), strict=True)
        ]
        return tile_montage(torch.cat(slices).unflatten(0, (-1, self.num_slices))).unflatten(0, (batch, num_steps))

    def direction(self, source: Tensor, target: Tensor, matrix: Tensor | None = None) -> Tensor:
        """Returns the change of codes, [B, D] float64, that moves the agent's margin of targets over sources [B] by 1.

        The margin's gradient is the same for all codes. The probability's gradient (the paper's) lies on the same line
        for two classes, but its length vanishes where the agent is sure. Metric: ``matrix`` [D, D], or the chosen one.
        """
        weight, _ = self.folded()
        return agent.unit_step(weight[target] - weight[source], self.step_matrix if matrix is None else matrix)

    # Explaining

    @torch.no_grad()
    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        """Moves codes of images [B, C, H, W] until the classifier, not the agent, decides for the targets [B].

        Where a target is already predicted, the edit makes the classifier surer of it.

        Returns:
            An explanation. Its steps lead from the reconstruction to the counterfactual, its strengths are changes of
            the agent's margin, and ``intended`` holds the agent's logits. Parts: ``reconstruction``, ``redrawn``
            (counterfactual minus reconstruction, signed) and ``opposite`` (equally far in the other direction). Scores:
            ``reached`` (1 where the target is reached with ``confidence``), ``reconstruction_kept`` (1 where
            reconstruction and image are decided alike), ``faithful`` (1 where, moreover, the decision's probability
            differs by at most 0.1; otherwise another image is explained), ``step`` (change of the agent's margin),
            ``standard_deviations`` (length of the edit among the data's codes), ``agent_gap`` (mean absolute difference
            of agent and classifier along the path) and ``inversion_residual``.
        """
        # Direction.
        image = image.to(self.dtype)
        logits = self.classifier(image)
        predicted = logits.argmax(dim=1)
        target = self.default_target(logits) if target is None else target
        source = torch.where(target == predicted, runner_up(logits), predicted)
        located = self.locate(image)
        step = self.direction(source, target)
        limit = self.largest_step / agent.travelled(step, self.code_covariance)

        # Search.
        def reached(size: Tensor, rows: Tensor) -> Tensor:
            pictures = self.render(rows_of(located, rows), size[:, :, None] * step[rows, None])
            return sure_enough(self.classifier.along(pictures), target[rows], self.confidence)

        size, found = smallest_step(reached, limit, points=self.search_points, rounds=self.search_rounds)

        # Path. The opposite is one more picture of the same batch.
        share = torch.linspace(0, 1, self.num_steps, device=image.device, dtype=size.dtype)
        sizes = torch.cat([size[:, None] * share, -size[:, None]], dim=1)
        change = sizes[:, :, None] * step[:, None]
        pictures = self.render(located, change)
        steps, opposite = pictures[:, :-1], pictures[:, -1]
        answers = self.classifier.along(steps)
        intended = self.agent_logits(located.code.mean(dim=1)[:, None] + change[:, :-1])

        # Answer.
        redrawn = steps[:, -1] - steps[:, 0]
        kept = answers[:, 0].argmax(dim=1) == predicted
        drift = probability(answers[:, 0], predicted) - probability(logits, predicted)
        return Explanation(
            image=image,
            logits=logits,
            target=target,
            attribution=redrawn.abs().mean(dim=1, keepdim=True),
            counterfactual=steps[:, -1],
            counterfactual_logits=answers[:, -1],
            steps=steps,
            strengths=sizes[:, :-1].to(logits.dtype),
            intended=intended.to(logits.dtype),
            parts={"reconstruction": steps[:, 0], "redrawn": redrawn, "opposite": opposite},
            scores={
                "reached": found.to(logits.dtype),
                "step": size.to(logits.dtype),
                "standard_deviations": (size / limit * self.largest_step).to(logits.dtype),
                "agent_gap": confidence_gap(intended, answers, target),
                "reconstruction_kept": kept.to(logits.dtype),
                "faithful": (kept & (drift.abs() <= _FAITHFUL)).to(logits.dtype),
                "inversion_residual": located.residual,
            },
            caveats={
                "the rendering alone changes the decision, so another image is explained": ~kept,
                "the longest edit does not reach the goal": ~found,
            },
        )

    # Training

    def on_fit_start(self) -> None:
        """Encodes the training images and fits the agent, before any batch; a resumed run is already fitted."""
        if bool(self.fitted):
            return
        # Without augmentation, because statistics of the codes follow.
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        dataset = data.dataset("train")
        mine = Subset(dataset, range(self.trainer.global_rank, len(dataset), self.trainer.world_size))
        loader = DataLoader(mine, data.batch_size, num_workers=data.num_workers, generator=torch.Generator())
        with torch.no_grad():
            taught = [self._taught(batch["image"].to(self.device)) for batch in loader]
        self._fit(*self._gathered(taught))

    @torch.no_grad()
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Logs the distance of agent and classifier on a batch; the agent is already fitted."""
        code, features, logits = self._taught(batch["image"])
        log_training(self, {"alignment": self._distance(code, features, logits)}, len(code))
        # Lightning saves a checkpoint only after an optimiser's step; without gradients it changes nothing.
        self.optimizers().step()  # type: ignore[union-attr]

    def _taught(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns codes [B, D] with the features [B, F] and logits [B, K] that the agent should give them."""
        # The head reads the features of the same pass, instead of a second pass.
        features = self.classifier.features(image) if self.reads_features else self.classifier(image)
        logits = self.classifier.head(features) if self.reads_features else features
        return self.encode(image).mean(dim=1), features, logits

    def _standardised(self, code: Tensor) -> Tensor:
        """Standardises codes [B, D] for the agent, in float64."""
        return (code.double() - self.code_mean) / self.code_spread

    def _distance(self, code: Tensor, features: Tensor, logits: Tensor) -> Tensor:
        """Measures the alignment loss on raw codes, []."""
        with full_precision(code):
            predicted = self.agent(self._standardised(code).to(code))
            answers = predicted @ self.head_weight.to(predicted).T + (self.head_bias + self.offset).to(predicted)
        return agent.alignment_loss(predicted, features, answers, logits, self.alignment)

    def _gathered(self, parts: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
        """Joins the entries of all batches and processes in the order of the data, one tensor per entry."""
        return [all_gather_rows(torch.cat(entries)) for entries in zip(*parts, strict=True)]

    def _fit(self, code: Tensor, features: Tensor, logits: Tensor) -> None:
        """Fits the agent to codes [N, D]: regression, epochs of Adam unless the alignment is "mse", and the offset."""
        # Statistics.
        statistics = agent.code_statistics(code)
        for buffer, value in zip((self.code_mean, self.code_spread, self.code_covariance), statistics, strict=True):
            buffer.copy_(value)
        standardised = self._standardised(code)

        # Agent.
        weight, bias = agent.fit_ridge(standardised, features, self.ridge_penalty)
        with torch.no_grad():
            self.agent.weight.copy_(weight)
            self.agent.bias.copy_(bias)
        if self.alignment != "mse":
            head = self.head_weight.float(), self.head_bias.float()
            samples = standardised.float(), features.float(), logits.float()
            epochs, learning_rate = self.agent_epochs, self.agent_learning_rate
            agent.refine(self.agent, *samples, head, kind=self.alignment, epochs=epochs, learning_rate=learning_rate)

        # Threshold and metric.
        self.offset.zero_()
        self.offset.copy_(agent.fit_offset(self.agent_logits(code), logits))
        if self.metric != "calibrate":
            self.step_matrix.copy_(metric_matrix(self.metric, statistics, self.shrinkage))
        self.fitted.fill_(True)

    @torch.no_grad()
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Encodes held-out images, and keeps the first ones for the calibration."""
        self._held_out.append(self._taught(batch["image"]))
        # Every process has its share of the first images, but at least one, because it must take part.
        share = len(range(self.trainer.global_rank, self.calibration_images, self.trainer.world_size))
        if (wanted := max(share, 1) - sum(map(len, self._cases))) > 0:
            self._cases.append(batch["image"][:wanted])

    @torch.no_grad()
    def on_validation_epoch_end(self) -> None:
        """Judges the agent, and chooses the metric by the classifier's answers to moved codes.

        Raises:
            ValueError: If the classifier follows the agent in none of the metrics.
        """
        # Held-out images.
        code, features, logits = self._gathered(self._held_out)
        cases = torch.cat(self._cases)
        self._held_out.clear()
        self._cases.clear()

        # Agent.
        found = agent.agreement(self.agent_logits(code), logits.double())
        values = {f"agent_{name}": value for name, value in found.items()}
        values["loss"] = self._distance(code, features, logits)
        auc, correlation = values["agent_auc"], values["agent_margin_correlation"]
        if auc < _ALIGNED_AUC or correlation < _ALIGNED_CORRELATION:
            _log.warning(
                f"The agent does not follow the classifier (AUC {auc:.2f}, correlation of margins {correlation:.2f}): "
                "its directions are unreliable. Train the autoencoder longer, until its codes know the classes."
            )

        # Metric.
        if self.metric == "calibrate" and not self.trainer.sanity_checking:
            values |= self._calibrate(cases)
        self.log_dict({f"val/{name}": value for name, value in values.items()}, batch_size=1, sync_dist=False)

    @torch.no_grad()
    def _calibrate(self, image: Tensor) -> dict[str, Tensor]:
        """Moves held-out images equally far in every metric, and adopts the metric that works best.

        Returns:
            Mean over all processes of every figure of ``calibration.responses``, named ``<metric>_<figure>``.
        """
        statistics = CodeStatistics(self.code_mean, self.code_spread, self.code_covariance)
        located = self.locate(image)
        source, target = self.classifier(image).topk(2, dim=1).indices.unbind(dim=1)
        distances = self.code_mean.new_tensor(DISTANCES)

        # Comparison.
        table: dict[str, Tensor] = {}
        for kind in METRICS:
            step = self.direction(source, target, metric_matrix(kind, statistics, self.shrinkage))
            step = step / agent.travelled(step, self.code_covariance)[:, None]
            pictures = self.render(located, distances[None, :, None] * step[:, None])
            found = responses(pictures, self.classifier.along(pictures), source, target)
            table |= {f"{kind}_{name}": all_gather_rows(value).mean() for name, value in found.items()}

        # Choice.
        chosen = preferred_metric({name: float(value) for name, value in table.items()})
        if chosen is None:
            shares = ", ".join(f"{kind} {float(table[f'{kind}_sign_agreement']):.2f}" for kind in METRICS)
            raise ValueError(
                f"The classifier does not follow the agent in any metric (share of edits that move it the right way: "
                f"{shares}; {AGREED} is needed): train the autoencoder longer, until its codes know the classes, or "
                "choose a metric yourself with --model.metric."
            )
        _log.info("Steps are measured in the %s metric.", chosen)
        self.step_matrix.copy_(metric_matrix(chosen, statistics, self.shrinkage))
        return table

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns Adam for the agent's layer alone; the classifier's head is a buffer that no optimiser can move."""
        return torch.optim.Adam(self.agent.parameters(), lr=self.agent_learning_rate)
