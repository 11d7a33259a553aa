"""The adversarial losses of StylEx and the two profiles of its training.

Source: Atad et al., "CheXplaining in Style" (2022) and its code; Karras et al., StyleGAN2 (CVPR 2020), for the lazy
penalties.

Shapes: B images, C channels, H, W pixels, K classes, D entries of the latent, L slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cfe_lightning.losses import adversarial_loss, r1_penalty
from cfe_lightning.methods.style_ranking import Scoring
from cfe_lightning.networks.discriminators import StyleCritic

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


def critic_loss(critic: StyleCritic, image: Tensor, real_label: Tensor, fakes: Sequence[Fake]) -> dict[str, Tensor]:
    """Real images against encoded and drawn ones; the real term counts once for each kind of the others."""
    # Each kind by itself: the critic compares the images of a call.
    real = adversarial_loss(critic(image, real_label), real=True)
    encoded, drawn = (adversarial_loss(critic(fake.detach(), label), real=False) for fake, label in fakes)
    terms = {"critic_real": real, "critic_encoded": encoded, "critic_drawn": drawn}
    return terms | {"critic": 2 * real + encoded + drawn}


def generator_loss(critic: StyleCritic, fakes: Sequence[Fake]) -> dict[str, Tensor]:
    """What makes encoded and drawn images look real."""
    encoded, drawn = (adversarial_loss(critic(fake, label), real=True) for fake, label in fakes)
    return {"adversarial_encoded": encoded, "adversarial_drawn": drawn, "generator": 0.5 * (encoded + drawn)}


def r1_loss(critic: StyleCritic, image: Tensor, real_label: Tensor, weight: float) -> dict[str, Tensor]:
    """The critic's gradient penalty in single precision."""
    with torch.autocast(image.device.type, enabled=False):
        real = image.detach().float().requires_grad_()
        judged = critic(real, real_label)
        penalty = r1_penalty(judged, real)
    # The zero gives every weight a gradient, without which processes do not meet.
    return {"r1": penalty, "r1_step": weight * penalty + 0 * judged.sum()}


def path_lengths(picture: Tensor, latents: Tensor) -> Tensor:
    """How far random directions of the picture move per unit of the latents, root mean square over the slots.

    Args:
        picture: [B, C, H, W], made of
        latents: [B, L, D], one per slot already where the graph begins.

    Returns:
        [B], differentiable.
    """
    noise = torch.randn_like(picture) / (picture.shape[2] * picture.shape[3]) ** 0.5
    (jacobian,) = torch.autograd.grad((picture * noise).sum(), latents, create_graph=True)
    return (jacobian.square().sum(dim=2).mean(dim=1) + 1e-12).sqrt()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No weight of the module gets a gradient inside; a gradient still passes through it."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
