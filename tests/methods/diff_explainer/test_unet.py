"""Tests of ``cfe_lightning.methods.diff_explainer.unet``: published sizes, and how the code enters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from cfe_lightning.methods.diff_explainer.unet import SemanticEncoder, SemanticUnet, _EncoderBlock, _Modulation

TOY: dict[str, Any] = {"image_size": 16, "channels": 1, "width": 8, "blocks": 1, "attention_sizes": [8], "groups": 4}


def unet(**changes: Any) -> SemanticUnet:
    """Builds a toy network and fills its zero-initialised layers, as training would."""
    torch.manual_seed(0)
    network = SemanticUnet(multipliers=(1, 2), code_dim=6, time_dim=8, **{**TOY, **changes}).eval()
    for parameter in network.parameters():
        if parameter.abs().max() == 0:
            nn.init.normal_(parameter, std=0.1)
    return network


@pytest.mark.parametrize(
    ("size", "width", "multipliers", "deeper", "millions"),
    [
        (64, 64, (1, 2, 4, 8), (1, 2, 4, 8, 8), (71.52, 19.32)),
        (128, 128, (1, 1, 2, 3, 4), (1, 1, 2, 3, 4, 4), (103.87, 24.67)),
        (256, 128, (1, 1, 2, 2, 4, 4), (1, 1, 2, 2, 4, 4, 4), (138.34, 30.15)),
    ],
)
def test_parameter_counts_are_the_published_ones(
    size: int, width: int, multipliers: tuple[int, ...], deeper: tuple[int, ...], millions: tuple[float, float]
) -> None:
    with torch.device("meta"):
        networks = (
            SemanticUnet(image_size=size, width=width, multipliers=multipliers),
            SemanticEncoder(image_size=size, width=width, multipliers=deeper),
        )
    counts = [sum(parameter.numel() for parameter in network.parameters()) / 1e6 for network in networks]
    assert counts == pytest.approx(millions, abs=0.005)


def test_a_block_is_modulated_by_the_product_of_step_and_code() -> None:
    module = _Modulation(8, 6, 4)
    embedding, norm = torch.randn(3, 14), torch.randn(3, 4)
    scale, shift = module(embedding).chunk(2, dim=1)
    of_time, of_code = module.of_time(embedding[:, :8]), module.of_code(embedding[:, 8:])
    expected = (1 + of_code) * ((1 + of_time[:, :4]) * norm + of_time[:, 4:])
    torch.testing.assert_close(norm * (1 + scale) + shift, expected, atol=1e-6, rtol=1e-5)


def test_every_block_sees_step_and_code_beside_each_other() -> None:
    network = unet()
    code, step = torch.randn(2, 6), torch.tensor([3, 700])
    seen: list[torch.Tensor] = []
    blocks = [module for module in network.modules() if isinstance(module, ResnetBlock2D)]
    for block in blocks:
        block.time_emb_proj.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    network(torch.randn(2, 1, 16, 16), step, code)
    assert len(seen) == len(blocks) > 5
    activated = nn.functional.silu(code)
    assert all(torch.equal(embedding[:, 8:], activated) for embedding in seen)
    assert all(torch.equal(embedding, seen[0]) for embedding in seen)
    assert not torch.allclose(seen[0][0, :8], seen[0][1, :8])


@pytest.mark.parametrize("code_mode", ["adagn", "sum"])
def test_the_prediction_depends_on_the_code_and_lets_its_gradient_through(code_mode: Any) -> None:
    network = unet(code_mode=code_mode)
    noisy, step = torch.randn(2, 1, 16, 16), torch.tensor([3, 700])
    code = torch.randn(2, 6, requires_grad=True)
    predicted = network(noisy, step, code)
    assert predicted.shape == noisy.shape
    assert not torch.allclose(predicted, network(noisy, step, torch.zeros(2, 6)))
    (gradient,) = torch.autograd.grad(predicted.square().sum(), [code])
    assert gradient.abs().sum() > 0


def test_at_first_nothing_is_predicted() -> None:
    network = SemanticUnet(multipliers=(1, 2), code_dim=6, time_dim=8, **TOY)
    assert network(torch.randn(2, 1, 16, 16), torch.tensor([3, 700]), torch.randn(2, 6)).abs().max() == 0


def test_the_lowest_attention_is_normalised() -> None:
    assert isinstance(unet().unet.mid_block.attentions[0].group_norm, nn.GroupNorm)


def test_an_encoder_block_pools_both_branches_before_its_only_convolution() -> None:
    block = _EncoderBlock(4, 6, groups=2, pool=True)
    x = torch.randn(2, 4, 8, 8)
    pooled = nn.functional.avg_pool2d(nn.functional.silu(block.norm(x)), 2)
    expected = block.skip(nn.functional.avg_pool2d(x, 2)) + block.convolution(pooled)
    torch.testing.assert_close(block(x), expected)
    assert [type(module).__name__ for module in block.children()].count("Conv2d") == 2  # one is the skip


def test_an_image_becomes_one_code() -> None:
    encoder = SemanticEncoder(multipliers=(1, 2, 2), code_dim=6, **TOY)
    assert encoder(torch.randn(3, 1, 16, 16)).shape == (3, 6)


def test_the_maximum_does_not_average_away_what_is_in_one_place() -> None:
    torch.manual_seed(0)
    pooled = SemanticEncoder(
        image_size=8, channels=1, code_dim=5, width=4, multipliers=(1, 2), groups=2, pool="mean_max"
    )
    *body, convolution, flatten = pooled.body
    features = nn.Sequential(*body)
    seen: list[torch.Tensor] = []
    body[-2].register_forward_hook(lambda _layer, _inputs, output: seen.append(output))
    found = features(torch.randn(3, 1, 8, 8))
    expected = torch.cat([seen[0].mean(dim=(2, 3)), seen[0].flatten(2).amax(dim=2)], dim=1)
    torch.testing.assert_close(found.flatten(1), expected)
    assert flatten(convolution(found)).shape == (3, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 17}, "image_size must be a multiple of 2 for 2 multipliers, got 17"),
        ({"groups": 3}, r"groups must divide the channels of every resolution, got 3 for \[8, 16\]"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unet(**changes)
