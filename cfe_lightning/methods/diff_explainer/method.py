"""DiffExplainer: counterfactuals by moving an image's semantic code, with almost nothing lost in the decoding.

Paper: "DiffExplainer: Unveiling Black Box Models Via Counterfactual Generation" (MICCAI 2024). A linear agent learns to
read the classifier's features off the codes of a diffusion autoencoder; its gradient is the direction of the edit, and
the classifier itself, never the agent, decides how far to go. The classifier is only asked, not differentiated.

Deviations, each with its reason in ``docs/methods/diff_explainer.md``: the noise map comes from a refined inversion,
the agent starts from ridge regression, and the metric of the step is chosen by measuring the classifier on held-out
images.

Shapes: B images, C channels, H, W pixels, S slices per image (1 unless it is a montage) of side s, K classes, D entries
of the code, F features, T steps.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.compute.memory import pictures_at_once
from cfe_lightning.compute.precision import full_precision
from cfe_lightning.compute.processes import all_gather_rows, log_training
from cfe_lightning.compute.search import smallest_step
from cfe_lightning.decisions import confidence_gap, runner_up, sure_enough
from cfe_lightning.explainer import ExplainerModule
from cfe_lightning.explanation import Explanation
from cfe_lightning.images import cut_montage, montage_side, tile_montage
from cfe_lightning.methods.diff_explainer.agent import (
    METRICS,
    Alignment,
    CodeStatistics,
    StepMetric,
    agreement,
    alignment_loss,
    code_statistics,
    fit_offset,
    fit_ridge,
    metric_matrix,
    refine,
    travelled,
    unit_step,
)
from cfe_lightning.methods.diff_explainer.autoencoder import DiffusionAutoencoder, load_autoencoder
from cfe_lightning.methods.diff_explainer.diffusion import Sampler, check_steps

_log = logging.getLogger(__name__)

#: A reconstruction whose predicted class lost or won more probability than this is another image to the classifier.
_FAITHFUL = 0.1
#: Distances, in standard deviations of the codes, at which the metrics are compared.
_CALIBRATION_DISTANCES = (1.0, 2.0, 3.0)
_AGREED = 0.9
_AS_GOOD = 0.05


def preferred_metric(table: Mapping[str, float]) -> StepMetric | None:
    """Which metric to step in: of those that the classifier follows, and that flip most, the least visible.

    The specification (section 5.3) takes the least visible of those that are followed; but equally far from the image,
    the least visible one may be that which changes nothing.

    Args:
        table: For every metric the share of edits that the classifier follows (``<metric>_sign_agreement``; nine in ten
            are needed), the share that flips (``_flip_rate``; one in twenty less is as good), and the mean change of
            the pictures (``_change``).

    Returns:
        The metric, None if the classifier follows none.
    """
    followed = [kind for kind in METRICS if table[f"{kind}_sign_agreement"] >= _AGREED]
    if not followed:
        return None
    most = max(table[f"{kind}_flip_rate"] for kind in followed)
    able = [kind for kind in followed if table[f"{kind}_flip_rate"] >= most - _AS_GOOD]
    return min(able, key=lambda kind: table[f"{kind}_change"])


class Located(NamedTuple):
    """A batch of images as the autoencoder sees them: codes [B, S, D], noise maps [B, S, C, s, s], their error [B]."""

    code: Tensor
    noise_map: Tensor
    residual: Tensor


class DiffExplainer(ExplainerModule):
    """Fits the agent of one classifier on the codes of a trained autoencoder, and explains by moving codes.

    The training images are encoded once and the agent is fitted to all codes before the first batch; one validation
    judges it and calibrates the metric of the step. A training of two batches is enough (``limit_train_batches``).

    Args:
        classifier: The classifier to be explained. Its features and last linear layer are read; without a linear head
            the agent learns its logits instead.
        autoencoder: A checkpoint of ``DiffusionAutoencoder`` for this kind of images (or, in a checkpoint of ours, the
            arguments it was built with).
        num_slices: Slices of a montage (``data.patient_slices``) to one decision, S; each is encoded by itself, the
            agent reads the mean of their codes, and all are moved alike.
        alignment: What the agent is fitted to: the classifier's features by "l1" (published) or "mse", or its
            decisions by "kl".
        ridge_penalty: Of the regression the fit starts from, in units of the number of images.
        agent_epochs: Passes over all codes after it, unless the alignment is "mse": that is the regression.
        agent_learning_rate: Adam's, on standardised codes.
        metric: In which metric a step is the shortest; "calibrate" measures all three on the classifier, see
            ``preferred_metric``.
        shrinkage: Share of the identity in the covariance metric.
        calibration_images: Validation images that calibrate.
        largest_step: Longest edit, in standard deviations of the codes along its own line.
        confidence: Probability of the target to be reached; None stops where the classifier says the target.
        num_steps: Steps of an explanation, from the reconstruction to the counterfactual.
        search_points: Steps looked at together per round of the search.
        search_rounds: Rounds after the first.
        diffusion_steps: Steps of inversion and decoding, a divisor of 1,000.
        refinements: Iterations per step of the inversion; 0 is the published one, which needs 250 steps.
        sampler: "ddim", or "dpm" for previews with few ``decoding_steps``.
        decoding_steps: Steps of the decoding; None takes ``diffusion_steps``, which alone reconstructs exactly.

    Raises:
        FileNotFoundError: If there is no such autoencoder.
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
        if num_steps < 2 or search_points < 1 or search_rounds < 0:
            raise ValueError(
                "num_steps must be at least 2, search_points at least 1 and search_rounds not negative, got "
                f"{num_steps}, {search_points} and {search_rounds}."
            )
        if sampler not in get_args(Sampler):
            raise ValueError(f"sampler must be one of {', '.join(get_args(Sampler))}, got {sampler!r}.")
        if confidence is not None and not 0 < confidence < 1:
            raise ValueError(f"confidence is a probability between 0 and 1, got {confidence}.")
        self.automatic_optimization = False
        if isinstance(autoencoder, str):
            self.autoencoder = load_autoencoder(autoencoder)
            # The checkpoint brings the weights; what it takes to build the networks has to be in its arguments.
            self.hparams["autoencoder"] = dict(self.autoencoder.hparams)
        else:
            self.autoencoder = DiffusionAutoencoder(**autoencoder)
        self.autoencoder.requires_grad_(False).eval()
        if self.autoencoder.channels != classifier.spec.channels:
            raise ValueError(
                f"The autoencoder was trained on images of {self.autoencoder.channels} channels, but the classifier "
                f"takes {classifier.spec.channels}: train one on the classifier's kind of images."
            )
        self.num_slices = num_slices
        self.image_size = self.autoencoder.image_size * montage_side(num_slices)
        self.alignment: Alignment = alignment
        self.ridge_penalty = ridge_penalty
        self.agent_epochs = agent_epochs
        self.agent_learning_rate = agent_learning_rate
        self.metric = metric
        self.shrinkage = shrinkage
        self.calibration_images = calibration_images
        self.largest_step = largest_step
        self.confidence = confidence
        self.num_steps = num_steps
        self.search_points = search_points
        self.search_rounds = search_rounds
        self.diffusion_steps = check_steps(diffusion_steps)
        self.refinements = refinements
        self.sampler: Sampler = sampler
        self.decoding_steps = check_steps(decoding_steps or diffusion_steps)

        dim, num_classes = self.autoencoder.code_dim, classifier.num_classes
        head = classifier.linear_head() if classifier.spec.head is not None else None
        self.reads_features = head is not None
        weight, bias = head or (torch.eye(num_classes).double(), torch.zeros(num_classes).double())
        self.register_buffer("head_weight", weight.detach().clone())
        self.register_buffer("head_bias", bias.detach().clone())
        self.agent = nn.Linear(dim, weight.shape[1])
        for name, value in {
            "code_mean": torch.zeros(dim),
            "code_spread": torch.ones(dim),
            "code_covariance": torch.eye(dim),
            "offset": torch.zeros(num_classes),
            "step_matrix": torch.eye(dim),
        }.items():
            self.register_buffer(name, value.double())
        self.register_buffer("fitted", torch.tensor(False))
        self._held_out: list[tuple[Tensor, ...]] = []
        self._cases: list[Tensor] = []

    def train(self, mode: bool = True) -> DiffExplainer:
        """The autoencoder stays in eval mode: its dropout would make the inversion random."""
        super().train(mode)
        self.autoencoder.eval()
        return self

    def blocks(self) -> list[nn.Module]:
        """Of the autoencoder."""
        return self.autoencoder.blocks()

    # Codes, decisions, pictures

    def agent_logits(self, code: Tensor) -> Tensor:
        """What the agent says of codes [..., D], [..., K] float64; linear in the code."""
        weight, bias = self.folded()
        return code.double() @ weight.T + bias

    def folded(self) -> tuple[Tensor, Tensor]:
        """The agent and the classifier's head as one map from raw codes to logits: weight [K, D], bias [K], float64."""
        inner = self.agent.weight.double() / self.code_spread
        offset = self.agent.bias.double() - inner @ self.code_mean
        return self.head_weight @ inner, self.head_weight @ offset + self.head_bias + self.offset

    def encode(self, image: Tensor) -> Tensor:
        """Semantic codes of every slice, [B, C, H, W] -> [B, S, D]; the agent reads their mean.

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
        """Codes and noise maps of images [B, C, H, W]: encoded once, inverted once, whatever is asked of them later."""
        slices, code = cut_montage(image, self.num_slices), self.encode(image)
        noise_map, residual = self.autoencoder.invert(
            slices.flatten(0, 1), code.flatten(0, 1), self.diffusion_steps, self.refinements
        )
        return Located(
            code=code,
            noise_map=noise_map.unflatten(0, slices.shape[:2]),
            residual=residual.unflatten(0, slices.shape[:2]).amax(dim=1),
        )

    def render(self, located: Located, change: Tensor) -> Tensor:
        """Pictures of moved codes: changes [B, T, D] -> [B, T, C, H, W]; a change of zero is the reconstruction.

        The shortest way to move a mean is to move all slices by as much.
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
        """The change of a code that moves the agent's margin of targets over sources [B] by 1, [B, D] float64.

        The margin's gradient is the same everywhere. That of the probability (the paper's) lies on the same line for
        two classes, but its length vanishes where the agent is sure.
        """
        weight, _ = self.folded()
        return unit_step(weight[target] - weight[source], self.step_matrix if matrix is None else matrix)

    # Explaining

    @torch.no_grad()
    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        """Moves the code towards the target until the classifier, not the agent, follows.

        Args:
            image: [B, C, H, W] in [-1, 1].
            target: Classes asked for, [B]; None asks for ``default_target``. Where it is predicted already the edit
                makes the classifier surer of it.

        Returns:
            An explanation with the path as steps (the reconstruction first, the counterfactual last; strengths are
            changes of the agent's margin) and the agent's logits as ``intended``; parts ``reconstruction``, ``redrawn``
            (counterfactual minus reconstruction, signed) and ``opposite`` (as far in the other direction); scores
            ``reached`` (1 where the goal is met, be it the flip or ``confidence``), ``reconstruction_kept`` (1 where
            the reconstruction is decided as the image), ``faithful`` (1 where moreover the decision's probability
            differs by at most 0.1: otherwise it is another image that is explained), ``step`` (change of the agent's
            margin), ``standard_deviations`` (length of the edit among the data's codes), ``agent_gap`` (mean absolute
            difference of agent and classifier along the path) and ``inversion_residual``.
        """
        image = image.to(self.dtype)
        logits = self.classifier(image)
        predicted, other = logits.argmax(dim=1), runner_up(logits)
        target = self.default_target(logits) if target is None else target
        source = torch.where(target == predicted, other, predicted)
        located = self.locate(image)
        code = located.code.mean(dim=1)
        step = self.direction(source, target)
        limit = self.largest_step / travelled(step, self.code_covariance)

        def reached(size: Tensor, rows: Tensor) -> Tensor:
            part = Located(*(value[rows] for value in located))
            said = self.classifier.along(self.render(part, size[:, :, None] * step[rows, None]))
            return sure_enough(said, target[rows], self.confidence)

        size, found = smallest_step(reached, limit, points=self.search_points, rounds=self.search_rounds)
        share = torch.linspace(0, 1, self.num_steps, device=image.device, dtype=size.dtype)
        # The opposite is one more picture of the same batch.
        sizes = torch.cat([size[:, None] * share, -size[:, None]], dim=1)
        change = sizes[:, :, None] * step[:, None]
        pictures = self.render(located, change)
        steps, opposite = pictures[:, :-1], pictures[:, -1]
        said = self.classifier.along(steps)
        intended = self.agent_logits(code[:, None] + change[:, :-1])
        reconstruction, counterfactual = steps[:, 0], steps[:, -1]
        redrawn = counterfactual - reconstruction
        before = logits.softmax(dim=1).gather(1, predicted[:, None])
        kept = said[:, 0].argmax(dim=1) == predicted
        faithful = kept & ((said[:, 0].softmax(dim=1).gather(1, predicted[:, None]) - before).abs() <= _FAITHFUL)[:, 0]
        return Explanation(
            image=image,
            logits=logits,
            target=target,
            attribution=redrawn.abs().mean(dim=1, keepdim=True),
            counterfactual=counterfactual,
            counterfactual_logits=said[:, -1],
            steps=steps,
            strengths=sizes[:, :-1].to(logits.dtype),
            intended=intended.to(logits.dtype),
            parts={"reconstruction": reconstruction, "redrawn": redrawn, "opposite": opposite},
            scores={
                "reached": found.to(logits.dtype),
                "step": size.to(logits.dtype),
                "standard_deviations": (size / limit * self.largest_step).to(logits.dtype),
                "agent_gap": confidence_gap(intended, said, target),
                "reconstruction_kept": kept.to(logits.dtype),
                "faithful": faithful.to(logits.dtype),
                "inversion_residual": located.residual,
            },
            caveats={
                "the rendering alone changes the decision, so another image is explained": ~kept,
                "the longest edit does not reach the goal": ~found,
            },
        )

    # Training

    def on_fit_start(self) -> None:
        """Encodes the training images and fits the agent, before any batch; a resumed run has one already."""
        if bool(self.fitted):
            return
        dataset = self.trainer.datamodule.dataset("train")  # type: ignore[attr-defined]
        # Not augmented, because statistics of codes follow.
        mine = range(self.trainer.global_rank, len(dataset), self.trainer.world_size)
        loader = DataLoader(
            Subset(dataset, mine),
            batch_size=self.trainer.datamodule.batch_size,  # type: ignore[attr-defined]
            num_workers=self.trainer.datamodule.num_workers,  # type: ignore[attr-defined]
            generator=torch.Generator(),
        )
        with torch.no_grad():
            taught = [self._taught(batch["image"].to(self.device)) for batch in loader]
        self._fit(*self._gathered(taught))

    @torch.no_grad()
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Only tells how far the agent is from the classifier on these images: it is fitted already."""
        code, features, logits = self._taught(batch["image"])
        log_training(self, {"alignment": self._distance(code, features, logits)}, len(code))
        # Lightning saves a checkpoint only after a step; without gradients this one changes nothing.
        self.optimizers().step()  # type: ignore[union-attr]

    def _taught(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [B, D], and what the agent should make of them: features [B, F] and logits [B, K]."""
        # Features and the head that reads them are one pass through the classifier, not two.
        features = self.classifier.features(image) if self.reads_features else self.classifier(image)
        logits = self.classifier.head(features) if self.reads_features else features
        return self.encode(image).mean(dim=1), features, logits

    def _standardised(self, code: Tensor) -> Tensor:
        """What the agent reads of codes [B, D], float64."""
        return (code.double() - self.code_mean) / self.code_spread

    def _distance(self, code: Tensor, features: Tensor, logits: Tensor) -> Tensor:
        """The alignment loss on raw codes, []."""
        with full_precision(code):
            said = self.agent(self._standardised(code).to(code))
            answered = said @ self.head_weight.to(said).T + (self.head_bias + self.offset).to(said)
        return alignment_loss(said, features, answered, logits, self.alignment)

    def _gathered(self, parts: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
        """What all batches and all processes have seen, in the order of the data, one tensor per entry."""
        return [all_gather_rows(torch.cat(entries)) for entries in zip(*parts, strict=True)]

    def _fit(self, code: Tensor, features: Tensor, logits: Tensor) -> None:
        """Regression in one go, then, for the other distances, some epochs of Adam from there, then the offset."""
        statistics = code_statistics(code)
        self.code_mean.copy_(statistics.mean)
        self.code_spread.copy_(statistics.spread)
        self.code_covariance.copy_(statistics.covariance)
        standardised = self._standardised(code)
        weight, bias = fit_ridge(standardised, features, self.ridge_penalty)
        with torch.no_grad():
            self.agent.weight.copy_(weight)
            self.agent.bias.copy_(bias)
        if self.alignment != "mse":
            refine(
                self.agent,
                standardised.float(),
                features.float(),
                logits.float(),
                (self.head_weight.float(), self.head_bias.float()),
                kind=self.alignment,
                epochs=self.agent_epochs,
                learning_rate=self.agent_learning_rate,
            )
        self.offset.zero_()
        self.offset.copy_(fit_offset(self.agent_logits(code), logits))
        if self.metric != "calibrate":
            self.step_matrix.copy_(metric_matrix(self.metric, statistics, self.shrinkage))
        self.fitted.fill_(True)

    @torch.no_grad()
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Encodes held-out images, and keeps some for the calibration."""
        self._held_out.append(self._taught(batch["image"]))
        # Every process has its share of the first images, and one at least, because it has to take part.
        share = len(range(self.trainer.global_rank, self.calibration_images, self.trainer.world_size))
        if (wanted := max(share, 1) - sum(map(len, self._cases))) > 0:
            self._cases.append(batch["image"][:wanted])

    @torch.no_grad()
    def on_validation_epoch_end(self) -> None:
        """Judges the agent, and chooses the metric by what the classifier says of moved codes.

        Raises:
            ValueError: If the classifier follows the agent in none of the metrics.
        """
        code, features, logits = self._gathered(self._held_out)
        cases = torch.cat(self._cases)
        self._held_out.clear()
        self._cases.clear()
        values = {f"agent_{name}": value for name, value in agreement(self.agent_logits(code), logits.double()).items()}
        values["loss"] = self._distance(code, features, logits)
        if values["agent_auc"] < 0.9 or values["agent_margin_correlation"] < 0.8:
            _log.warning(
                "The agent does not follow the classifier (AUC %.2f, correlation of margins %.2f): its directions are "
                "unreliable. Train the autoencoder longer, until its codes know the classes.",
                values["agent_auc"],
                values["agent_margin_correlation"],
            )
        if self.metric == "calibrate" and not self.trainer.sanity_checking:
            values |= self._calibrate(cases)
        self.log_dict({f"val/{name}": value for name, value in values.items()}, batch_size=1, sync_dist=False)

    @torch.no_grad()
    def _calibrate(self, image: Tensor) -> dict[str, Tensor]:
        """Moves held-out images by the same distances in every metric and takes the one that the classifier follows."""
        statistics = CodeStatistics(mean=self.code_mean, spread=self.code_spread, covariance=self.code_covariance)
        located = self.locate(image)
        pair = self.classifier(image).topk(2, dim=1).indices
        target, source = pair[:, 1], pair[:, 0]
        distances = torch.tensor(_CALIBRATION_DISTANCES, device=image.device, dtype=torch.float64)
        signed = torch.cat([-distances.flip(0), distances.new_zeros(1), distances])
        zero = len(distances)
        table: dict[str, Tensor] = {}
        for kind in METRICS:
            matrix = metric_matrix(kind, statistics, self.shrinkage)
            step = self.direction(source, target, matrix)
            step = step / travelled(step, self.code_covariance)[:, None]
            pictures = self.render(located, signed[None, :, None] * step[:, None])
            logits = self.classifier.along(pictures)
            margin = (
                logits.gather(2, target[:, None, None].expand(-1, len(signed), 1))
                - logits.gather(2, source[:, None, None].expand(-1, len(signed), 1))
            ).squeeze(2)
            moved = margin - margin[:, zero : zero + 1]
            agreed = (moved.sign() == signed.sign()).double()
            follows = self._mean_of_all((agreed.sum(dim=1) - agreed[:, zero]) / (2 * zero))
            flips = self._mean_of_all((logits[:, -1].argmax(dim=1) == target).double())
            visible = self._mean_of_all((pictures - pictures[:, zero : zero + 1]).abs().mean(dim=(1, 2, 3, 4)))
            rising = self._mean_of_all((margin.diff(dim=1) >= 0).double().mean(dim=1))
            table |= {
                f"{kind}_sign_agreement": follows,
                f"{kind}_flip_rate": flips,
                f"{kind}_monotone": rising,
                f"{kind}_change": visible,
            }
        chosen = preferred_metric({name: float(value) for name, value in table.items()})
        if chosen is None:
            told = ", ".join(f"{kind} {float(table[f'{kind}_sign_agreement']):.2f}" for kind in METRICS)
            raise ValueError(
                f"The classifier does not follow the agent in any metric (share of edits that move it the right way: "
                f"{told}; {_AGREED} is needed): train the autoencoder longer, until its codes know the classes, or "
                "choose a metric yourself with --model.metric."
            )
        _log.info("Steps are measured in the %s metric.", chosen)
        self.step_matrix.copy_(metric_matrix(chosen, statistics, self.shrinkage))
        return table

    def _mean_of_all(self, value: Tensor) -> Tensor:
        """Mean over the images of all processes, [B] -> []."""
        return all_gather_rows(value).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam for the agent's own layer alone; the classifier's head is a buffer that no optimiser can move."""
        return torch.optim.Adam(self.agent.parameters(), lr=self.agent_learning_rate)
