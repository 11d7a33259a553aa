"""Tests of ``cfe_lightning.methods.dxai.critic``."""

from __future__ import annotations

import pytest
import torch

from cfe_lightning.methods.dxai.critic import ResidualCritic


@pytest.mark.parametrize(
    ("size", "heads", "expected"),
    [(32, 1, 18_368_513), (64, 1, 20_262_657), (256, 1, 20_851_777), (256, 3, 20_852_803)],
)
def test_parameter_count_of_the_published_critic(size, heads, expected):
    with torch.device("meta"):
        critic = ResidualCritic(image_size=size, num_heads=heads)
    assert sum(parameter.numel() for parameter in critic.parameters()) == expected


@pytest.mark.parametrize("size", [8, 28, 32, 50, 64, 96])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_size_ends_in_one_logit_per_head(size, channels):
    critic = ResidualCritic(image_size=size, channels=channels, num_heads=4, base_width=2, max_width=4)
    assert critic(torch.rand(3, channels, size, size)).shape == (3, 4)


def test_too_small_an_image_is_refused():
    with pytest.raises(ValueError, match="image_size must be at least 8, got 4"):
        ResidualCritic(image_size=4)
