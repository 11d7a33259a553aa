"""The losses of StylEx, the random numbers of a batch, and the two profiles of its training.

Sources: Atad et al., "CheXplaining in Style" (arXiv 2207.07553) and its code; Karras et al., StyleGAN2 (arXiv
1912.04958), for the lazy penalties.

Shapes: B images, C channels, H, W pixels, K classes, Z entries of the noise, D entries of the latent, L slots.
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
#: Generated images [B, C, H, W] and their labels for the critic [B, K].
Fake = tuple[Tensor, Tensor]


class Profile(NamedTuple):
    """Defaults for the arguments of ``StylEx`` of the same names."""

    real_label: LabelSource
    noise_label: NoiseLabel
    label_form: LabelForm
    pixel_weight: float
    scoring: Scoring


PROFILES = {
    "recommended": Profile("predicted", "empirical", "probabilities", 1.0, "strict"),
    # The code's weight is 1 for images normalised as for ImageNet; in [-1, 1] differences are 2.2 times smaller.
    "paper_code": Profile("truth", "uniform", "one_hot", 2.2, "paper_code"),
}


class Mixture(NamedTuple):
    """Noise for the latents in every slot; slots below the cut take the first of two latents, the others the second.

    Attributes:
        z: Noise of both latents, [B, 2, Z].
        cut: First slot of the second latent, [B]; L for none.
    """

    z: Tensor
    cut: Tensor

    @classmethod
    def draw(cls, generator: StyleGenerator, batch: int, probability: float, device: torch.device) -> Mixture:
        """Draws noise for ``batch`` images, each of which mixes two latents with a probability."""
        z = torch.randn(2, batch, generator.z_dim, device=device).transpose(0, 1)
        cut = torch.randint(1, generator.num_slots, (batch,), device=device)
        alone = torch.rand(batch, device=device) >= probability
        return cls(z, torch.where(alone, generator.num_slots, cut))

    def latents(self, generator: StyleGenerator) -> Tensor:
        """Maps the noise to mixed latents, [B, L, D]."""
        return generator.mixed(self.z[:, 0], self.z[:, 1], self.cut)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingBatch:
    """A batch of images and all random numbers of its renderings.

    Attributes:
        image: Images, [B, C, H, W].
        logits: The classifier's logits of the images, [B, K].
        label: Labels of encoded images for generator and critic, [B, K].
        real_label: Labels of real images for the critic, [B, K].
        noise_label: Labels of images rendered from noise for generator and critic, [B, K].
        latent: The encoder's latents without gradient, [B, L, D].
        mixture: Noise of the other latents.
        noise: Noise map of every convolution, each [B, 2, 1, h, w] for encoded images and images of noise, or
            [B, 1, 1, h, w] for encoded images alone.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class PathBatch:
    """The random numbers of the path length penalty for images rendered from noise.

    Attributes:
        label: Labels of the images, [B, K].
        mixture: Noise of the latents.
        noise: Noise map of every convolution, each [B, 1, h, w].
        direction: Random direction in the space of images, of unit variance, [B, C, H, W].
    """

    label: Tensor
    mixture: Mixture
    noise: list[Tensor]
    direction: Tensor

    def __len__(self) -> int:
        return len(self.label)

    @classmethod
    def draw(cls, generator: StyleGenerator, label: Tensor, channels: int, probability: float) -> PathBatch:
        """Draws random numbers for labels [B, K]; each image mixes two latents with a probability."""
        label = to_float32(label)
        mixture = Mixture.draw(generator, len(label), probability, label.device)
        noise = generator.synthesis.draw_noise(len(label), label)
        direction = torch.randn(len(label), channels, *noise[-1].shape[2:], device=label.device)
        return cls(label=label, mixture=mixture, noise=noise, direction=direction)


def critic_loss(critic: StyleCritic, image: Tensor, real_label: Tensor, fakes: Sequence[Fake]) -> dict[str, Tensor]:
    """Compares real images with encoded and drawn ones; the real term counts twice, once for each kind of fakes."""
    # Fakes are detached: only the critic learns.
    judged = _judged(critic, [(image, real_label), *((fake.detach(), label) for fake, label in fakes)])
    real = adversarial_loss(judged[0], real=True)
    encoded, drawn = (adversarial_loss(logits, real=False) for logits in judged[1:])
    total = 2 * real + encoded + drawn
    return {"critic_real": real, "critic_encoded": encoded, "critic_drawn": drawn, "critic": total}


def generator_loss(critic: StyleCritic, fakes: Sequence[Fake]) -> dict[str, Tensor]:
    """Rewards encoded and drawn images that the critic takes for real."""
    encoded, drawn = (adversarial_loss(logits, real=True) for logits in _judged(critic, fakes))
    return {"adversarial_encoded": encoded, "adversarial_drawn": drawn, "generator": 0.5 * (encoded + drawn)}


def _judged(critic: StyleCritic, kinds: Sequence[Fake]) -> tuple[Tensor, ...]:
    """Returns the critic's logits of images of several kinds, [B] each; one pass for all keeps a GPU busier."""
    images, labels = zip(*kinds, strict=True)
    return critic(torch.cat(images), torch.cat(labels), len(kinds)).chunk(len(kinds))


def r1_loss(critic: StyleCritic, image: Tensor, real_label: Tensor, weight: float) -> dict[str, Tensor]:
    """Penalises the critic's gradient at real images, in single precision."""
    with double_backward(image):
        real = to_float32(image.detach()).requires_grad_()
        judged = critic(real, real_label)
        penalty = r1_penalty(judged, real)
    # The zero term gives every weight a gradient: processes exchange gradients weight by weight.
    return {"r1": penalty, "r1_step": weight * penalty + 0 * judged.sum()}


def path_loss(
    generator: StyleGenerator, batch: PathBatch, mean: Tensor, decay: float, weight: float
) -> dict[str, Tensor]:
    """Penalises unequal path lengths in single precision, and returns their running mean including this batch."""
    with double_backward(batch.label):
        latents = batch.mixture.latents(generator)
        picture = generator(latents, batch.label, batch.noise)
        penalty, mean = path_length_penalty(path_lengths(picture, latents, batch.direction), mean, decay)
    # The zero term is that of ``r1_loss``.
    return {"path": penalty, "path_mean": mean, "path_step": weight * penalty + 0 * picture.sum()}


def path_lengths(picture: Tensor, latents: Tensor, direction: Tensor) -> Tensor:
    """Measures how far pictures move along random directions per unit of the latents, root mean square over the slots.

    Pictures are rendered from ``latents``, [B, L, D] -> [B, C, H, W]; ``direction`` is noise of unit variance,
    [B, C, H, W]. The lengths, [B], are differentiable.
    """
    # Scaled by the number of pixels, so that lengths do not depend on the resolution.
    noise = direction / (picture.shape[2] * picture.shape[3]) ** 0.5
    (jacobian,) = torch.autograd.grad((picture * noise).sum(), latents, create_graph=True)
    # The root has an infinite slope at 0.
    return (jacobian.square().sum(dim=2).mean(dim=1) + 1e-12).sqrt()
