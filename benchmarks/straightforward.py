"""The straightforward implementations that the package's own replace: what a paper's code or a first draft does.

Each has the weights and the answers of the module it is made from, which ``benchmarks/run.py`` checks before it
measures: only the order of the work and the form of the layers differ. A module is made straightforward by exchanging
the classes of itself and of its layers, so that nothing has to be copied.

Shapes: B images, C channels, H, W pixels, N branches, T steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfe_lightning.compute.losses import adversarial_loss, r1_penalty
from cfe_lightning.decisions import kl_between_logits, kl_from_uniform, margin
from cfe_lightning.explanation import Explanation
from cfe_lightning.methods.diff_explainer import DiffExplainer
from cfe_lightning.methods.dxai import Dxai
from cfe_lightning.methods.dxai.blending import distance
from cfe_lightning.methods.dxai.critic import CriticBlock
from cfe_lightning.methods.dxai.generator import MultiBranchGenerator, ResidualBlock, StyledResidualBlock
from cfe_lightning.methods.mirror_cfe import MirrorCFE
from cfe_lightning.methods.mirror_cfe.geometry import Reflection, bisect_step
from cfe_lightning.methods.mirror_cfe.path import Mirrored
from cfe_lightning.methods.mirror_cfe.spread import spread_uniform
from cfe_lightning.methods.steerable_lens import SteerableLens
from cfe_lightning.methods.steerable_lens.course import Course, Frames
from cfe_lightning.methods.steerable_lens.pyramid import Decomposition, SteerablePyramid
from cfe_lightning.methods.stylex import StylEx
from cfe_lightning.methods.stylex.generator import StyledConv, ToImage
from cfe_lightning.methods.stylex.layers import activate, low_pass
from cfe_lightning.methods.stylex.training import Fake, TrainingBatch, critic_loss, generator_loss, r1_loss


@dataclass(frozen=True, kw_only=True)
class Straightforward:
    """One straightforward implementation of training or explaining.

    Attributes:
        what: What it does, in a few words.
        exchange: Turns a module as built into it, in place.
        one_by_one: Explain image by image.
        tolerance: Largest relative difference of its gradients or explanations from those of the module as built; None
            where it gives other ones by design.
    """

    what: str
    exchange: Callable[[Any], None]
    one_by_one: bool = False
    tolerance: float | None


def exchange_classes(module: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    """Every layer of one of the classes becomes one of the class beside it; weights stay."""
    for layer in module.modules():
        layer.__class__ = classes.get(type(layer), type(layer))


# --- DXAI ---


class PlainResidualBlock(ResidualBlock):
    """Convolves at full resolution, then pools."""

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv1(F.leaky_relu(self.norm1(x), 0.2))
        shortcut = self.shortcut(x)
        if self.down:
            residual, shortcut = F.avg_pool2d(residual, 2), F.avg_pool2d(shortcut, 2)
        return (self.conv2(F.leaky_relu(self.norm2(residual), 0.2)) + shortcut) * math.sqrt(0.5)


class PlainStyledResidualBlock(StyledResidualBlock):
    """Up-samples, then convolves at full resolution."""

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        residual, shortcut = F.leaky_relu(self.norm1(x, style), 0.2), x
        if self.up:
            residual = F.interpolate(residual, scale_factor=2.0, mode="nearest")
            shortcut = F.interpolate(shortcut, scale_factor=2.0, mode="nearest")
        residual = self.conv2(F.leaky_relu(self.norm2(self.conv1(residual), style), 0.2))
        return (residual + self.shortcut(shortcut)) * math.sqrt(0.5)


class PlainCriticBlock(CriticBlock):
    """Convolves at full resolution, then pools."""

    def forward(self, x: Tensor) -> Tensor:
        residual = F.avg_pool2d(self.conv1(F.leaky_relu(x, 0.2)), 2)
        residual = self.conv2(F.leaky_relu(residual, 0.2))
        return (residual + F.avg_pool2d(self.shortcut(x), 2)) * math.sqrt(0.5)


class PlainGenerator(MultiBranchGenerator):
    """Runs the encoder for every style, on one copy of the image per branch."""

    def encode(self, image: Tensor) -> list[Tensor]:
        return [image]

    def decode(self, maps: Any, styles: Tensor, image: Tensor) -> Tensor:
        image = image.repeat(len(styles) // len(image), 1, 1, 1)
        h = image.repeat(1, self.num_branches, 1, 1)
        if self.stem_affine is not None:
            h = F.leaky_relu(self.stem_affine(h), 0.2)
        h = self.stem(h)
        every = []
        for stage in self.encoder:
            h = stage(h)
            every.append(h)
        every.append(self.encoder_bottleneck(h))
        return super().decode(every, styles, image)


class PlainDxai(Dxai):
    """The published order: renders for the critic and again for itself, judges real images twice, freezes nothing."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        part = self._draw(batch)
        image, label, alternative = part.image, part.label, part.alternative
        targets = torch.cat([label, alternative])
        generator_optimizer, critic_optimizer = self.optimizers()  # type: ignore[misc, union-attr]

        doubled = torch.cat([image, image]).requires_grad_(True)
        judged = self.critic(doubled)
        real = self.losses.judgement(judged, torch.cat([label, label]))
        with torch.no_grad():
            rendered = self._render(part)
            teacher = self.classifier(doubled)
        fake = self.losses.judgement(self.critic(torch.cat([rendered.own, rendered.alternative])), targets)
        loss = adversarial_loss(real, real=True) + adversarial_loss(fake, real=False)
        loss = loss + kl_between_logits(teacher, judged)
        if (self.global_step // 2) % self.r1_interval == 0:
            loss = loss + self.losses.r1_weight * self.r1_interval * r1_penalty(real, doubled)
        generator_optimizer.zero_grad()
        critic_optimizer.zero_grad()
        loss.backward()
        critic_optimizer.step()

        rendered = self._render(part)
        both = torch.cat([rendered.own, rendered.alternative])
        adversarial = adversarial_loss(self.losses.judgement(self.critic(both), targets), real=True)
        class_term = F.cross_entropy(self.classifier(both), targets)
        magnitude = rendered.distinct.abs()
        chosen = magnitude > magnitude.mean(dim=(2, 3), keepdim=True)
        masked = distance(rendered.own[chosen], image[chosen])
        weights = self.losses
        loss = (
            weights.adversarial_weight * adversarial
            + weights.class_weight * class_term
            + weights.reconstruction_weight * distance(torch.cat([image, image]), both)
            + weights.masked_weight * masked
        )
        generator_optimizer.zero_grad()
        critic_optimizer.zero_grad()
        loss.backward()
        generator_optimizer.step()

    def _share(self, image: Tensor, distinct: Tensor) -> Tensor:
        """One strength after the other."""
        strength = image.new_ones(len(image))
        for reach, num_points in ((1.0, 21), (0.1, 11), (0.02, 11)):
            best = image.new_full((len(image),), torch.inf)
            centre = strength
            for offset in torch.linspace(-reach, reach, num_points).tolist():
                candidate = (centre + offset).clamp(0, 2)
                undecided = kl_from_uniform(self.classifier(image - candidate.view(-1, 1, 1, 1) * distinct))
                strength = torch.where(undecided < best, candidate, strength)
                best = torch.minimum(undecided, best)
        return strength.view(-1, 1, 1, 1)


def published_order(model: Dxai) -> None:
    """The order of the published code with the layers as built."""
    model.__class__ = PlainDxai
    exchange_classes(model, {MultiBranchGenerator: PlainGenerator})
    # The published code leaves the classifier's weights requiring gradients that nobody uses.
    model.classifier.network.requires_grad_(True)


def published_dxai(model: Dxai) -> None:
    """The order and the layers of the published code."""
    published_order(model)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    blocks = {ResidualBlock: PlainResidualBlock, StyledResidualBlock: PlainStyledResidualBlock}
    exchange_classes(model, {**blocks, CriticBlock: PlainCriticBlock})


# --- StylEx ---


class GroupedConv(StyledConv):
    """One kernel per image: weights times styles, scaled back, as a grouped convolution (StyleGAN2's own code)."""

    def forward(self, x: Tensor, style: Tensor, noise: Tensor | None = None) -> Tensor:
        batch, _, height, width = x.shape
        weight = (self.weight * self.gain)[None] * style[:, None, :, None, None]
        weight = weight * (weight.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        x = x.reshape(1, -1, height, width)
        if self.up:
            kernel = weight.transpose(1, 2).flatten(0, 1)
            x = F.conv_transpose2d(x, kernel, stride=2, groups=batch)
            x = low_pass(x.unflatten(1, (batch, -1)).squeeze(0), 1, 4.0)
        else:
            x = F.conv2d(x, weight.flatten(0, 1), padding=1, groups=batch).unflatten(1, (batch, -1)).squeeze(0)
        noise = self.noise if noise is None else noise
        return activate(x + self.noise_strength * noise + self.bias[:, None, None])


class GroupedToImage(ToImage):
    """One kernel per image, without scaling back."""

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        weight = (self.weight * self.gain)[None] * style[:, None, :, None, None]
        painted = F.conv2d(x.reshape(1, -1, height, width), weight.flatten(0, 1), groups=batch)
        return painted.view(batch, -1, height, width) + self.bias[:, None, None]


class PlainStylEx(StylEx):
    """Encoded and drawn pictures one after the other, for the critic and again for the generator; freezes nothing."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        iteration = self.trainer.fit_loop.total_batch_idx
        generator, critic, encoder = self.optimizers()  # type: ignore[misc, union-attr]
        part = self._draw(batch)
        with torch.no_grad():
            fakes = self._fakes(part)
        _descend(critic_loss(self.critic, part.image, part.real_label, fakes)["critic"], critic)
        if self.r1_weight and iteration % self.r1_interval == 0:
            weight = self.r1_weight * self.r1_interval
            _descend(r1_loss(self.critic, part.image, part.real_label, weight)["r1_step"], critic)
        _descend(generator_loss(self.critic, self._fakes(part))["generator"], generator)
        if self.path_weight and iteration % self.path_interval == 0:
            self._path_step(part.noise_label[: max(1, len(part) // 2)], generator)
        noise = self.generator.synthesis.draw_noise(len(part), part.image)
        again = replace(part, noise=[each[:, None] for each in noise])
        _descend(self._reconstruction_loss(again)["reconstruction"], generator, encoder)

    def _fakes(self, part: TrainingBatch) -> list[Fake]:
        encoded = self.generator(part.latent, part.label, [noise[:, 0] for noise in part.noise])
        latents = part.mixture.latents(self.generator)
        drawn = self.generator(latents, part.noise_label, [noise[:, 1] for noise in part.noise])
        return [(encoded, part.label), (drawn, part.noise_label)]


def _descend(loss: Tensor, *optimizers: Any) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def grouped_stylex(model: StylEx) -> None:
    """Grouped convolutions in the default memory layout, and the order of a first draft."""
    model.__class__ = PlainStylEx
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    exchange_classes(model, {StyledConv: GroupedConv, ToImage: GroupedToImage})


# --- Mirror-CFE ---


class PlainMirror(MirrorCFE):
    """Renders twice to train; explains picture by picture, and finds the boundary by bisection."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        image, source = self._inside_pairs(batch["image"])
        decoder, critic = self.optimizers()  # type: ignore[misc, union-attr]
        target, step = self._draw_target(source), torch.rand(len(image), 1, device=image.device)
        part = self._slice(image, target, step)
        with torch.no_grad():
            _, rendered = self._render(part)
        _descend(self._critic_loss(part, rendered)["critic"], critic)
        _descend(self._decoder_loss(part, *self._render(part))["decoder"], decoder)

    @torch.no_grad()
    def explain(self, image: Tensor, target: Tensor | None = None) -> Any:
        """Steps [B, T, C, H, W] and counterfactual [B, C, H, W]."""
        found = [self._explain_one(image[row : row + 1]) for row in range(len(image))]
        steps, counterfactuals = zip(*found, strict=True)
        return SimpleNamespace(steps=torch.stack(steps), counterfactual=torch.stack(counterfactuals))

    def _explain_one(self, image: Tensor) -> tuple[Tensor, Tensor]:
        mirrored = self._reflect_by_bisection(image)
        steps, counterfactual = [], None
        for share in torch.linspace(0, 1, self.num_steps, device=image.device):
            picture = self.decode(mirrored, share.view(1, 1))[:, 0]
            steps.append(picture[0])
            if counterfactual is None and bool(self.classifier(picture).argmax(dim=1) == mirrored.target):
                counterfactual = picture[0]
        self.decode(mirrored, image.new_full((1, 1), 0.5))  # the boundary, which is shown beside the steps
        return torch.stack(steps), steps[-1] if counterfactual is None else counterfactual

    def _reflect_by_bisection(self, image: Tensor) -> Mirrored:
        """Looks along the swap's line for the boundary, and goes as far again."""
        seen = self.classifier.activations(image, self.levels)
        feature_map, head = seen.feature_map.double(), self.head()
        features = feature_map.mean(dim=(2, 3))
        source, target = seen.logits.topk(2, dim=1).indices.unbind(dim=1)
        assert head.linear is not None, "the benchmark's classifiers are linear at the end"
        weight, _, matrix = head.linear
        line = matrix[target] - matrix[source]

        def crossed(step: Tensor) -> Tensor:
            return margin(head.logits(features + step[:, None] * line), source, target) <= 0

        far = features.new_ones(1)
        while not bool(crossed(far)):
            far = 2 * far
        reached = features + 2 * bisect_step(crossed, torch.zeros_like(far), far, iterations=60)[:, None] * line
        zero = torch.zeros_like(far)
        reflection = Reflection(features=reached, status=source, residual=zero, distance=zero, negative=zero)
        change = (spread_uniform(feature_map, reached) - feature_map).to(seen.feature_map.dtype)
        return Mirrored(
            source=source,
            target=target,
            logits=seen.logits,
            feature_map=seen.feature_map,
            change=change,
            features=features,
            reflection=reflection,
            rows=weight[torch.stack([source, target], dim=1)],
            levels=seen.levels,
        )


def plain_mirror(model: MirrorCFE) -> None:
    """Two renderings to train, and picture by picture with bisection to explain."""
    model.__class__ = PlainMirror


def iterated_mirror(model: MirrorCFE) -> None:
    """L-BFGS instead of the closed form, too."""
    plain_mirror(model)
    model.swap = "lbfgs"


# --- DiffExplainer ---


def published_sampler(model: DiffExplainer) -> None:
    """250 plain steps of inversion and decoding instead of 20 refined ones."""
    model.diffusion_steps = model.decoding_steps = 250
    model.refinements = 0


# --- Steerable Lens ---


class BandByBand(SteerablePyramid):
    """One pair of transforms of the whole image for every band of every scale."""

    def analyse(self, image: Tensor, residuals: bool = True) -> Decomposition:
        return self._one_by_one(image, "there", residuals)

    def gradient(self, gradient: Tensor, residuals: bool = True) -> Decomposition:
        return self._one_by_one(gradient, "back", residuals)

    def _one_by_one(self, image: Tensor, masks: str, residuals: bool) -> Decomposition:
        bands = []
        for scale in range(self.scales):
            every = []
            for mask in getattr(self, f"{masks}{scale}"):
                part = _lowest(torch.fft.fft2(image, norm="ortho"), mask.shape)
                every.append(torch.fft.ifft2(part * mask, norm="ortho"))
            bands.append(torch.stack(every, dim=-3))
        windows = [self.get_buffer(f"residual{index}") for index in range(2 if residuals else 0)]
        rest = [torch.fft.ifft2(torch.fft.fft2(image, norm="ortho") * window, norm="ortho").real for window in windows]
        return Decomposition(bands, rest)

    def synthesise(self, bands: Any, residuals: Any = ()) -> Tensor:
        image: Tensor | None = None
        for scale, band in enumerate(bands):
            for index, mask in enumerate(getattr(self, f"back{scale}")):
                part = torch.fft.fft2(band[..., index, :, :], norm="ortho") * mask
                added = torch.fft.ifft2(_embedded(part, (self.height, self.width)), norm="ortho").real
                image = added if image is None else image + added
        assert image is not None, "a pyramid has bands"
        assert not residuals, "the benchmark moves bands only"
        return image


def _lowest(spectrum: Tensor, shape: Any) -> Tensor:
    """The lowest frequencies of a spectrum."""
    (height, width), (rows, columns) = spectrum.shape[-2:], shape
    top, left = height // 2 - rows // 2, width // 2 - columns // 2
    centred = torch.fft.fftshift(spectrum, dim=(-2, -1))[..., top : top + rows, left : left + columns]
    return torch.fft.ifftshift(centred, dim=(-2, -1))


def _embedded(part: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of ``_lowest``, zero elsewhere."""
    (height, width), (rows, columns) = shape, part.shape[-2:]
    top, left = height // 2 - rows // 2, width // 2 - columns // 2
    padding = (left, width - columns - left, top, height - rows - top)
    return torch.fft.ifftshift(F.pad(torch.fft.fftshift(part, dim=(-2, -1)), padding), dim=(-2, -1))


class PlainLens(SteerableLens):
    """Band by band and one strength after the other, each shown to the classifier by itself."""

    def course(
        self, image: Tensor, target: Tensor | None = None, origin: Tensor | None = None
    ) -> tuple[Course, Tensor]:
        # Made once for every device.
        self.extrapolator.transform_for(image).__class__ = BandByBand
        return super().course(image, target, origin)

    def frames(self, course: Course, alpha: Tensor) -> Frames:
        every = [super(PlainLens, self).frames(course, alpha[:, index : index + 1]) for index in range(alpha.shape[1])]
        return Frames(*(torch.cat(values, dim=1) for values in zip(*every, strict=True)))

    def _judge(self, frames: Tensor) -> Tensor:
        return self.classifier.along(frames, 1).float()


def looped_lens(model: SteerableLens) -> None:
    """Band by band and strength by strength."""
    model.__class__ = PlainLens


# --- all ---


def as_built(model: Any) -> None:
    """The module as it is."""


def explain_one_by_one(model: Any, image: Tensor) -> Explanation | SimpleNamespace:
    """Every image by itself: steps [B, T, C, H, W] and counterfactuals [B, C, H, W]."""
    every = [model.explain(image[row : row + 1]) for row in range(len(image))]
    return SimpleNamespace(
        steps=torch.cat([one.steps for one in every]),
        counterfactual=torch.cat([one.counterfactual for one in every]),
    )


#: By work and class of the module.
STRAIGHTFORWARD: dict[tuple[str, str], dict[str, Straightforward]] = {
    ("train", "Dxai"): {
        "published code": Straightforward(
            what="generator run for the critic and again for itself, real images judged twice, encoder run for every "
            "style, one image copy per branch, nothing frozen; pooling and up-sampling beside the convolutions",
            exchange=published_dxai,
            tolerance=1e-2,
        ),
        "published order": Straightforward(
            what="the same order with the layers as built", exchange=published_order, tolerance=1e-2
        ),
    },
    ("explain", "Dxai"): {
        "published code": Straightforward(
            what="encoder run for every style, layers not fused, one strength after the other",
            exchange=published_dxai,
            tolerance=1e-2,
        )
    },
    ("train", "StylEx"): {
        "grouped": Straightforward(
            what="one kernel per image (grouped convolution), pictures rendered for the critic and again for the "
            "generator, nothing frozen, default memory layout",
            exchange=grouped_stylex,
            tolerance=1e-2,
        )
    },
    ("explain", "StylEx"): {
        "one by one": Straightforward(
            what="image by image with one kernel per image", exchange=grouped_stylex, one_by_one=True, tolerance=1e-2
        )
    },
    ("train", "MirrorCFE"): {
        "L-BFGS": Straightforward(
            what="confidences swapped by L-BFGS (paper), pictures rendered for the critic and again for the decoder, "
            "nothing frozen",
            exchange=iterated_mirror,
            tolerance=1e-2,
        )
    },
    ("explain", "MirrorCFE"): {
        "one by one": Straightforward(
            what="image by image and step by step, boundary by bisection along the line",
            exchange=plain_mirror,
            tolerance=1e-3,
        )
    },
    ("explain", "DiffExplainer"): {
        "one by one": Straightforward(what="image by image", exchange=as_built, one_by_one=True, tolerance=1e-2),
    },
    ("decode", "DiffExplainer"): {
        "published sampler": Straightforward(
            what="250 plain DDIM steps instead of 20 (quality of both: benchmarks/diff_explainer.py samplers)",
            exchange=published_sampler,
            tolerance=None,
        ),
    },
    ("explain", "SteerableLens"): {
        "one by one": Straightforward(
            what="image by image, band by band, strength by strength",
            exchange=looped_lens,
            one_by_one=True,
            tolerance=1e-2,
        )
    },
}
