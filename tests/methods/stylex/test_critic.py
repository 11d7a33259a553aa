"""Tests of ``cfe_lightning.methods.stylex.critic``."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cfe_lightning.compute.losses import r1_penalty
from cfe_lightning.methods.stylex.critic import StyleCritic
from cfe_lightning.methods.stylex.layers import channel_table


def style_critic(label_entry: Any, size: int = 16, channels: int = 1, num_classes: int = 3) -> StyleCritic:
    """Builds a toy whose biases are not zero, as after some training."""
    torch.manual_seed(0)
    critic = StyleCritic(
        channels=channels,
        num_classes=num_classes,
        widths=channel_table(size, base=64, maximum=6),
        label_entry=label_entry,
    )
    for parameter in critic.parameters():
        if parameter.abs().max() == 0:
            nn.init.normal_(parameter, std=0.2)
    return critic


@pytest.mark.parametrize("label_entry", ["planes", "projection"])
def test_a_style_critic_minds_the_label(label_entry: Any) -> None:
    critic = style_critic(label_entry)
    images = torch.randn(4, 1, 16, 16)
    logits = torch.stack([critic(images, torch.eye(3)[k].expand(4, -1)) for k in range(3)])
    assert logits.shape == (3, 4)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert ((logits[a] - logits[b]).abs() > 1e-4).all()
    # A label of one image says nothing about the others.
    mixed = critic(images, torch.eye(3)[[0, 1, 2, 0]])
    if label_entry == "projection":
        torch.testing.assert_close(mixed, logits[[0, 1, 2, 0], range(4)], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("channels", "num_classes"), [(1, 2), (3, 2), (3, 5)])
def test_labels_enter_as_planes_or_behind_the_image(channels: int, num_classes: int) -> None:
    planes = style_critic("planes", 8, channels, num_classes)
    projection = style_critic("projection", 8, channels, num_classes)
    assert planes.trunk.stem.weight.shape[1] == channels + num_classes
    assert projection.trunk.stem.weight.shape[1] == channels
    assert planes.projection is None
    assert planes.planes is not None
    assert planes.planes.shape == (2, 64)
    assert projection.planes is None
    label = torch.full((2, num_classes), 1 / num_classes)
    for critic in (planes, projection):
        assert critic(torch.randn(2, channels, 8, 8), label).shape == (2,)


def test_planes_are_drawn_beside_the_image() -> None:
    critic = style_critic("planes", 8, 1, 2)
    seen: list[Tensor] = []
    critic.trunk.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    images = torch.randn(2, 1, 8, 8)
    critic(images, torch.tensor([[0.0, 1.0], [0.25, 0.75]]))
    assert critic.planes is not None
    off, on = critic.planes.unflatten(1, (8, 8))
    torch.testing.assert_close(seen[0][:, 0], images[:, 0])
    torch.testing.assert_close(seen[0][0, 1:], torch.stack([off, on]))
    torch.testing.assert_close(seen[0][1, 1:], torch.stack([0.75 * off + 0.25 * on, 0.25 * off + 0.75 * on]))


def test_a_projection_is_added_to_the_plain_logit() -> None:
    critic = style_critic("projection")
    seen: list[Tensor] = []
    critic.head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    label = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    logit = critic(torch.randn(2, 1, 16, 16), label)
    (features,) = seen
    assert critic.projection is not None
    embedded = label @ critic.projection.weight.T / math.sqrt(3) + critic.projection.bias
    expected = critic.head(features).squeeze(1) + (features * embedded).sum(dim=1) / math.sqrt(6)
    torch.testing.assert_close(logit, expected, atol=1e-5, rtol=1e-5)


def test_a_style_critic_compares_the_images_of_a_call() -> None:
    critic = style_critic("projection")
    image, other = torch.randn(2, 1, 1, 16, 16)
    label = torch.eye(3)[:1].expand(2, -1)
    twice, beside = critic(torch.cat([image, image]), label), critic(torch.cat([image, other]), label)
    assert twice[0].item() == pytest.approx(twice[1].item(), abs=1e-5)
    assert abs(twice[0].item() - beside[0].item()) > 1e-4


@pytest.mark.parametrize("label_entry", ["planes", "projection"])
def test_kinds_of_one_call_are_judged_as_in_calls_of_their_own(label_entry: Any) -> None:
    critic = style_critic(label_entry)
    images, labels = torch.randn(9, 1, 16, 16), torch.eye(3).repeat(3, 1)
    apart = torch.cat([critic(image, label) for image, label in zip(images.split(3), labels.split(3), strict=True)])
    torch.testing.assert_close(critic(images, labels, 3), apart, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(critic(images, labels), apart, atol=1e-4)


@pytest.mark.parametrize("label_entry", ["planes", "projection"])
def test_the_gradient_penalty_of_a_style_critic_has_the_right_gradient(label_entry: Any) -> None:
    critic = style_critic(label_entry, size=8).double()
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    label = torch.eye(3, dtype=torch.float64)[:2]
    assert torch.autograd.gradgradcheck(lambda x: critic(x, label), [images], fast_mode=True)
    r1_penalty(critic(images, label), images).backward()
    reached = {name for name, value in critic.named_parameters() if value.grad is not None and value.grad.any()}
    # Kinks apart, no bias in front of them curves the logit.
    assert {name for name, _ in critic.named_parameters() if name.endswith("weight")} - {"projection.weight"} <= reached
    step = 1e-5
    weight = critic.trunk.stem.weight
    gradient = weight.grad
    assert gradient is not None
    probe = torch.randn_like(weight)
    losses = []
    for sign in (1, -1):
        weight.data += sign * step * probe
        losses.append(r1_penalty(critic(images, label), images).item())
        weight.data -= sign * step * probe
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx((gradient * probe).sum().item(), rel=1e-4)
