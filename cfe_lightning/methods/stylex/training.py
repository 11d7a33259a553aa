"""The losses of StylEx, what is drawn for a batch, and the two profiles of its training.

Source: Atad et al., "CheXplaining in Style" (2022) and its code; Karras et al., StyleGAN2 (CVPR 2020), for the lazy
penalties.

Shapes: B images, C channels, H, W pixels, K classes, D entries of the latent, L slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cfe_lightning.compute.losses import adversarial_loss, path_length_penalty, r1_penalty
from cfe_lightning.compute.precision import double_backward, to_float32
from cfe_lightning.methods.stylex.critic import StyleCritic
from cfe_lightning.methods.stylex.generator import StyleGenerator
from cfe_lightning.methods.stylex.ranking import Scoring

LabelSource = Literal["predicted", "truth"]
NoiseLabel = Literal["empirical", "uniform", "classifier"]
LabelForm = Literal["probabilities", "one_hot"]
#: Generated images [B, C, H, W] and the labels that the critic is told with them [B, K].
Fake = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """What the two profiles switch; every switch can be set by itself.

    Attributes:
        real_label: The label the critic is told with real images: what the classifier says, or the truth.
        noise_label: The label of pictures of noise: other images' labels of the batch, a random class, or what the
            classifier says of the picture.
        label_form: Class probabilities, or the most probable class alone.
        pixel_weight: Weight of the mean absolute difference of pixels.
        scoring: See ``style_ranking.effects``.
    """

    real_label: LabelSource
    noise_label: NoiseLabel
    label_form: LabelForm
    pixel_weight: float
    scoring: Scoring


PROFILES = {
    "recommended": Profile(
        real_label="predicted",
        noise_label="empirical",
        label_form="probabilities",
        pixel_weight=1.0,
        scoring="strict",
    ),
    # 2.2 in [-1, 1] is what 1 is among images normalised as for ImageNet.
    "paper_code": Profile(
        real_label="truth", noise_label="uniform", label_form="one_hot", pixel_weight=2.2, scoring="paper_code"
    ),
}


class Mixture(NamedTuple):
    """Noise for latents in every slot, two of them mixed.

    Attributes:
        z: [2, B, Z].
        cut: The slot from which the second is taken, [B]; L for none.
    """

    z: Tensor
    cut: Tensor

    @classmethod
    def draw(cls, generator: StyleGenerator, batch: int, probability: float, device: torch.device) -> Mixture:
        """Of images that have two latents with a probability."""
        z = torch.randn(2, batch, generator.z_dim, device=device)
        cut = torch.randint(1, generator.num_slots, (batch,), device=device)
        alone = torch.rand(batch, device=device) >= probability
        return cls(z, torch.where(alone, generator.num_slots, cut))

    def latents(self, generator: StyleGenerator) -> Tensor:
        """[B, L, D]."""
        return generator.mixed(self.z[0], self.z[1], self.cut)

    def rows(self, rows: slice) -> Mixture:
        """Of some images."""
        return Mixture(self.z[:, rows], self.cut[rows])


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Images of a batch and all that is random about what is rendered for them.

    Attributes:
        image: [B, C, H, W].
        logits: The classifier's, [B, K].
        label: What generator and critic are told of encoded images, [B, K].
        real_label: What the critic is told with the images, [B, K].
        noise_label: What generator and critic are told of pictures of noise, [B, K].
        latent: The encoder's, without gradient, [B, L, D].
        mixture: Noise of the other latents.
        noise: Noise maps of what is rendered together, each [2, B, 1, h, w] for encoded images and pictures of noise,
            [1, B, 1, h, w] for encoded images alone.
    """

    image: Tensor
    logits: Tensor
    label: Tensor
    real_label: Tensor
    noise_label: Tensor
    latent: Tensor
    mixture: Mixture
    noise: list[Tensor]

    def __len__(self) -> int:
        return len(self.image)

    def rows(self, rows: slice) -> Part:
        """Some of the images."""
        return Part(
            image=self.image[rows],
            logits=self.logits[rows],
            label=self.label[rows],
            real_label=self.real_label[rows],
            noise_label=self.noise_label[rows],
            latent=self.latent[rows],
            mixture=self.mixture.rows(rows),
            noise=[noise[:, rows] for noise in self.noise],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PathPart:
    """Pictures of noise and the directions in which their paths are measured.

    Attributes:
        label: [B, K].
        mixture: Noise of the latents.
        noise: Noise maps, each [B, 1, h, w].
        direction: Of unit variance, [B, C, R, R].
    """

    label: Tensor
    mixture: Mixture
    noise: list[Tensor]
    direction: Tensor

    def __len__(self) -> int:
        return len(self.label)

    @classmethod
    def draw(cls, generator: StyleGenerator, label: Tensor, channels: int, probability: float) -> PathPart:
        """Of pictures with labels [B, K]; two latents are mixed with a probability."""
        label = to_float32(label)
        mixture = Mixture.draw(generator, len(label), probability, label.device)
        noise = generator.synthesis.draw_noise(len(label), label)
        direction = torch.randn(len(label), channels, *noise[-1].shape[2:], device=label.device)
        return cls(label=label, mixture=mixture, noise=noise, direction=direction)

    def rows(self, rows: slice) -> PathPart:
        """Of some pictures."""
        return PathPart(
            label=self.label[rows],
            mixture=self.mixture.rows(rows),
            noise=[noise[rows] for noise in self.noise],
            direction=self.direction[rows],
        )


def critic_loss(critic: StyleCritic, image: Tensor, real_label: Tensor, fakes: Sequence[Fake]) -> dict[str, Tensor]:
    """Real images against encoded and drawn ones; the real term counts once for each kind of the others."""
    judged = _judged(critic, [(image, real_label), *((fake.detach(), label) for fake, label in fakes)])
    real = adversarial_loss(judged[0], real=True)
    encoded, drawn = (adversarial_loss(logits, real=False) for logits in judged[1:])
    terms = {"critic_real": real, "critic_encoded": encoded, "critic_drawn": drawn}
    return terms | {"critic": 2 * real + encoded + drawn}


def generator_loss(critic: StyleCritic, fakes: Sequence[Fake]) -> dict[str, Tensor]:
    """What makes encoded and drawn images look real."""
    encoded, drawn = (adversarial_loss(logits, real=True) for logits in _judged(critic, fakes))
    return {"adversarial_encoded": encoded, "adversarial_drawn": drawn, "generator": 0.5 * (encoded + drawn)}


def _judged(critic: StyleCritic, kinds: Sequence[Fake]) -> tuple[Tensor, ...]:
    """The critic's logits of images of several kinds, [B] each: one pass for all keeps a GPU busier."""
    images, labels = zip(*kinds, strict=True)
    return critic(torch.cat(images), torch.cat(labels), len(kinds)).chunk(len(kinds))


def r1_loss(critic: StyleCritic, image: Tensor, real_label: Tensor, weight: float) -> dict[str, Tensor]:
    """The critic's gradient penalty in single precision."""
    with double_backward(image):
        real = to_float32(image.detach()).requires_grad_()
        judged = critic(real, real_label)
        penalty = r1_penalty(judged, real)
    # The zero gives every weight a gradient, without which processes do not meet.
    return {"r1": penalty, "r1_step": weight * penalty + 0 * judged.sum()}


def path_loss(
    generator: StyleGenerator, part: PathPart, mean: Tensor, decay: float, weight: float
) -> dict[str, Tensor]:
    """The path length penalty in single precision, and the running mean after this batch."""
    with double_backward(part.label):
        latents = part.mixture.latents(generator)
        picture = generator(latents, part.label, part.noise)
        penalty, mean = path_length_penalty(path_lengths(picture, latents, part.direction), mean, decay)
    # As for R1.
    return {"path": penalty, "path_mean": mean, "path_step": weight * penalty + 0 * picture.sum()}


def path_lengths(picture: Tensor, latents: Tensor, direction: Tensor) -> Tensor:
    """How far random directions of the picture move per unit of the latents, root mean square over the slots.

    Args:
        picture: [B, C, H, W], made of
        latents: [B, L, D], one per slot already where the graph begins.
        direction: Noise of unit variance, as the picture.

    Returns:
        [B], differentiable.
    """
    noise = direction / (picture.shape[2] * picture.shape[3]) ** 0.5
    (jacobian,) = torch.autograd.grad((picture * noise).sum(), latents, create_graph=True)
    return (jacobian.square().sum(dim=2).mean(dim=1) + 1e-12).sqrt()
