"""Analytic tests of ``cfe_lightning.methods.stylex.layers`` (StyleGAN2, arXiv 1912.04958)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cfe_lightning.methods.stylex.layers import (
    EqualConv,
    EqualLinear,
    ResidualDown,
    ResidualTrunk,
    activate,
    channel_table,
    encode_bits,
    low_pass,
    stddev_map,
    upsample,
)


def bilinear(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def test_upsampling_is_bilinear_and_fades_to_zero_at_the_border() -> None:
    x = torch.randn(2, 3, 5, 6)
    doubled = upsample(x)
    assert doubled.shape == (2, 3, 10, 12)
    torch.testing.assert_close(doubled[..., 1:-1, 1:-1], bilinear(x)[..., 1:-1, 1:-1])
    torch.testing.assert_close(doubled, bilinear(F.pad(x, (1, 1, 1, 1)))[..., 2:-2, 2:-2])


@pytest.mark.parametrize("padding", [1, 2])
@pytest.mark.parametrize("gain", [1.0, 4.0])
def test_a_constant_image_stays_constant_inside(padding: int, gain: float) -> None:
    passed = low_pass(torch.full((2, 3, 8, 8), 0.7), padding, gain)
    assert passed.shape == (2, 3, 5 + 2 * padding, 5 + 2 * padding)
    inside = passed[..., padding:-padding, padding:-padding]
    torch.testing.assert_close(inside, torch.full_like(inside, 0.7 * gain))
    assert (passed[..., 0, :] < 0.7 * gain).all()


def test_an_impulse_shows_the_filter_and_stays_in_its_channel() -> None:
    x = torch.zeros(1, 2, 5, 5)
    x[0, 0, 2, 2] = 64
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    passed = low_pass(x, 1)
    torch.testing.assert_close(passed[0, 0], taps[:, None] * taps)
    assert passed[0, 1].abs().max() == 0


class Operations(TorchDispatchMode):
    """Records the names of all operations inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_filter_is_exact_and_not_copied_from_the_host(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 8, 8).to(dtype)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=dtype) / 8
    expected = F.conv2d(x, torch.outer(taps, taps).expand(3, 1, 4, 4), padding=1, groups=3)
    with Operations() as done:
        passed = low_pass(x, 1)
    assert torch.equal(passed, expected)
    assert "convolution" in done.names
    assert not done.names & {"lift_fresh", "_to_copy", "copy_"}


@pytest.mark.parametrize("padding", [1, 2])
def test_a_stride_leaves_every_second_pixel_out(padding: int) -> None:
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(low_pass(x, padding, stride=2), low_pass(x, padding)[..., ::2, ::2])


def test_the_activation_keeps_the_second_moment_of_normal_noise() -> None:
    root = math.sqrt(2)
    torch.testing.assert_close(activate(torch.tensor([-1.0, 0.0, 2.0])), torch.tensor([-0.2 * root, 0.0, 2 * root]))
    torch.manual_seed(0)
    # (1 + 0.2^2) / 2 of the square, times 2.
    assert activate(torch.randn(10**5)).square().mean().item() == pytest.approx(1.04, rel=0.02)


@pytest.mark.parametrize("lr_mul", [1.0, 0.01])
@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_a_linear_layer_is_unit_noise_scaled_at_run_time(lr_mul: float, bias: float) -> None:
    torch.manual_seed(0)
    layer = EqualLinear(100, 300, bias=bias, lr_mul=lr_mul)
    assert (layer.weight * lr_mul).std().item() == pytest.approx(1, rel=0.02)
    torch.testing.assert_close(layer(torch.zeros(1, 100)), torch.full((1, 300), bias))
    x = torch.randn(50, 100)
    assert (layer(x) - bias).std().item() == pytest.approx(1, rel=0.05)
    torch.testing.assert_close(layer(x), x @ layer.weight.T * lr_mul / 10 + bias, atol=1e-4, rtol=1e-5)


def test_the_multiplier_slows_weight_and_bias_alike() -> None:
    layer = EqualLinear(4, 3, lr_mul=0.01)
    layer(torch.ones(1, 4)).sum().backward()
    torch.testing.assert_close(layer.weight.grad, torch.full((3, 4), 0.01 / 2))
    torch.testing.assert_close(layer.bias.grad, torch.full((3,), 0.01))


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 0), (1, 1, 0)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_is_unit_noise_scaled_at_run_time(kernel: int, stride: int, padding: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = EqualConv(20, 30, kernel, stride=stride, padding=padding, bias=bias)
    assert layer.weight.std().item() == pytest.approx(1, rel=0.1)
    assert (layer.bias is not None) == bias
    if layer.bias is not None:
        assert layer.bias.abs().max() == 0
        torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 20, 7, 7)
    weight = layer.weight / math.sqrt(20 * kernel**2)
    torch.testing.assert_close(layer(x), F.conv2d(x, weight, layer.bias, stride=stride, padding=padding))


def test_a_residual_block_halves_the_resolution() -> None:
    torch.manual_seed(0)
    block = ResidualDown(3, 5)
    x = torch.randn(2, 3, 8, 8)
    main = activate(block.conv1(x))
    main = F.conv2d(low_pass(main, 2), block.conv2.weight / math.sqrt(27), stride=2)
    skip = F.conv2d(low_pass(x, 1)[..., ::2, ::2], block.skip.weight / math.sqrt(3))
    assert block(x).shape == (2, 5, 4, 4)
    assert block.skip.bias is None
    torch.testing.assert_close(block(x), (activate(main) + skip) / math.sqrt(2))


@pytest.mark.parametrize("size", [8, 32])
def test_the_trunk_ends_in_four_by_four_cells(size: int) -> None:
    widths = channel_table(size, base=64, maximum=6)
    trunk = ResidualTrunk(2, widths)
    assert trunk.stem.weight.shape == (widths[size], 2, 1, 1)
    assert trunk(torch.randn(3, 2, size, size)).shape == (3, 6, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((256,), [512, 512, 512, 512, 512, 256, 128]),
        ((1024,), [512, 512, 512, 512, 512, 256, 128, 64, 32]),
        ((256, 16384), [512, 512, 512, 512, 256, 128, 64]),
        ((32, 4096, 128), [128, 128, 128, 128]),
        ((64, 2048, 64), [64, 64, 64, 64, 32]),
        ((8, 4), [1, 1]),
    ],
)
def test_channels_at_every_resolution(arguments: tuple[int, ...], expected: list[int]) -> None:
    table = channel_table(*arguments)
    assert list(table) == [4 * 2**i for i in range(len(expected))]
    assert list(table.values()) == expected


@pytest.mark.parametrize("size", [-8, 0, 4, 12, 255])
def test_a_size_that_cannot_be_halved_down_to_four_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"image_size must be a power of two from 8 on.*got {size}"):
        channel_table(size)


@pytest.mark.parametrize("batch", [1, 3, 4, 8])
def test_identical_images_do_not_differ(batch: int) -> None:
    x = torch.randn(1, 3, 4, 4).expand(batch, -1, -1, -1)
    appended = stddev_map(x)
    torch.testing.assert_close(appended[:, :3], x)
    # The square root of 1e-8.
    torch.testing.assert_close(appended[:, 3], torch.full((batch, 4, 4), 1e-4), atol=1e-8, rtol=1e-4)


@pytest.mark.parametrize(
    ("batch", "group", "used"),
    [(8, 4, 4), (4, 4, 4), (12, 4, 4), (6, 4, 3), (10, 4, 2), (2, 4, 2), (7, 4, 1), (8, 2, 2)],
)
def test_groups_are_spread_over_the_batch(batch: int, group: int, used: int) -> None:
    x = torch.randn(batch, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    appended = stddev_map(x, group)
    assert appended.shape == (batch, 4, 4, 5)
    for i in range(batch):
        step = batch // used
        members = torch.stack([x[j] for j in range(batch) if (j - i) % step == 0])
        assert len(members) == used
        expected = ((members - members.mean(dim=0)).square().mean(dim=0) + 1e-8).sqrt().mean()
        torch.testing.assert_close(appended[i, 3], expected.expand(4, 5))


def test_the_bits_of_a_label_are_looked_up() -> None:
    table = torch.tensor([[1.0, 2.0, 3.0], [-4.0, 5.0, 0.5]])
    found = encode_bits(table, torch.eye(2))
    assert torch.equal(found[0], table[[1, 0]])
    assert torch.equal(found[1], table[[0, 1]])
    assert torch.equal(encode_bits(table, torch.eye(3))[1], table[[0, 1, 0]])


def test_probabilities_are_looked_up_in_between() -> None:
    table = torch.randn(2, 4)
    found = encode_bits(table, torch.tensor([[0.3, 0.7]]))
    expected = torch.stack([0.3 * table[1] + 0.7 * table[0], 0.7 * table[1] + 0.3 * table[0]])
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize(
    "layer", [partial(low_pass, padding=1, gain=4.0), partial(low_pass, padding=2, stride=2), upsample]
)
def test_resampling_can_be_differentiated_twice(layer: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, [x])
    assert torch.autograd.gradgradcheck(layer, [x])


def test_minibatch_statistics_can_be_differentiated_twice() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 2, 2, 2, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(stddev_map, [x])
    assert torch.autograd.gradgradcheck(stddev_map, [x])
