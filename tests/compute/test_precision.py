"""Weights rounded once give the numbers of autocast in every pass, and are restored afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cfe_lightning.compute.precision import cast_once
from cfe_lightning.methods.diff_explainer import DiffusionAutoencoder

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def block() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 2))


def types(module: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in module.parameters()}


@torch.no_grad()
def test_passes_have_the_same_numbers_and_the_weights_come_back() -> None:
    network = block()
    before = [parameter.clone() for parameter in network.parameters()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = network(IMAGE)
        with cast_once([network], IMAGE):
            assert types(network[0]) == types(network[3]) == {torch.bfloat16}
            assert types(network[1]) == {torch.float32}
            assert torch.equal(network(IMAGE), expected)
        with pytest.raises(KeyError), cast_once([network], IMAGE):
            raise KeyError
    assert all(map(torch.equal, network.parameters(), before))


def test_without_autocast_or_with_gradients_nothing_is_rounded() -> None:
    network = block()
    with torch.no_grad(), cast_once([network], IMAGE):
        assert types(network) == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16), cast_once([network], IMAGE):
        assert types(network) == {torch.float32}


@torch.no_grad()
def test_decoding_and_inverting_round_the_blocks_of_the_network_once() -> None:
    small = {"width": 8, "multipliers": [1, 2], "blocks": 1, "attention_sizes": [4], "time_dim": 8, "groups": 4}
    model = DiffusionAutoencoder(image_size=8, code_dim=6, **small).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.1)
    seen: set[torch.dtype] = set()
    for inner in model.unet.blocks():
        inner.register_forward_pre_hook(lambda module, _: seen.update(types(module)))
    code = model.encode(IMAGE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        picture = model.decode(IMAGE, code, 2)
        noise_map, _ = model.invert(IMAGE, code, 2)
        assert torch.bfloat16 in seen
        # The reference: autocast with weights in single precision.
        process, predict = model.process, model._noise_predictor(code)
        assert torch.equal(picture, process.decode(predict, IMAGE, 2).clamp(-1, 1))
        assert torch.equal(noise_map, process.invert(predict, IMAGE, 2)[0])
    assert types(model) == {torch.float32}
