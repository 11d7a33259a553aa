"""Tests of ``cfe_lightning.methods.dxai.resampling``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfe_lightning.methods.dxai.resampling import convolve_and_pool, upsample_and_convolve


def layer(in_channels: int, out_channels: int, groups: int) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, groups=groups).double()


def assert_same(actual: Tensor, expected: Tensor, parameters: tuple[Tensor, ...]) -> None:
    """Values and gradients agree."""
    torch.testing.assert_close(actual, expected)
    weights = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad((actual * weights).sum(), parameters),
        torch.autograd.grad((expected * weights).sum(), parameters),
    )


@pytest.mark.parametrize(("in_channels", "out_channels", "groups"), [(2, 3, 1), (6, 4, 2), (9, 6, 3)])
@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 2)])
def test_upsampling_inside_equals_upsampling_before(
    in_channels: int, out_channels: int, groups: int, size: tuple[int, int]
) -> None:
    convolution = layer(in_channels, out_channels, groups)
    x = torch.randn(2, in_channels, *size, dtype=torch.float64, requires_grad=True)
    expected = convolution(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    actual = upsample_and_convolve(x, convolution)
    assert_same(actual, expected, (x, *convolution.parameters()))


@pytest.mark.parametrize(("in_channels", "out_channels", "groups"), [(2, 3, 1), (6, 4, 2), (9, 6, 3)])
@pytest.mark.parametrize("size", [(4, 6), (5, 7), (2, 3)])
def test_pooling_inside_equals_pooling_after(
    in_channels: int, out_channels: int, groups: int, size: tuple[int, int]
) -> None:
    convolution = layer(in_channels, out_channels, groups)
    x = torch.randn(2, in_channels, *size, dtype=torch.float64, requires_grad=True)
    expected = F.avg_pool2d(convolution(x), 2)
    actual = convolve_and_pool(x, convolution)
    assert_same(actual, expected, (x, *convolution.parameters()))


def test_second_derivatives_pass() -> None:
    """R1 differentiates the critic's gradient."""
    convolution = layer(2, 2, 1)
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: convolve_and_pool(x, convolution).square(), (x,))
