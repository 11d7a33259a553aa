"""Losses of critics, paths and features that were computed by hand, and the perceptual distance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cfe_lightning.compute.losses import Lpips, adversarial_loss, path_length_penalty, r1_penalty, relative_distance


def test_r1_of_a_linear_critic_is_half_its_squared_weight():
    weight = torch.randn(3 * 4 * 4)
    image = torch.randn(5, 3, 4, 4, requires_grad=True)
    assert r1_penalty(image.flatten(1) @ weight, image).item() == pytest.approx(0.5 * weight.square().sum().item())


def test_a_convinced_critic_costs_the_generator_less():
    assert adversarial_loss(torch.tensor([3.0]), real=True) < adversarial_loss(torch.tensor([-3.0]), real=True)
    assert adversarial_loss(torch.tensor([0.0]), real=False).item() == pytest.approx(0.6931, abs=1e-4)


@pytest.mark.parametrize(
    ("lengths", "mean", "decay", "penalty", "new_mean"),
    [
        ([1.0, 3.0], 0.0, 0.5, 2.0, 1.0),  # mean square of 0 and 2
        ([1.0, 3.0], 2.0, 0.01, 1.0, 2.0),  # the batch agrees with the running mean
        ([4.0, 4.0, 4.0], 0.0, 1.0, 0.0, 4.0),  # equally long
        ([6.0], 1.0, 0.2, 16.0, 2.0),
        ([6.0], 1.0, 0.0, 25.0, 1.0),
    ],
)
def test_unequal_paths_by_hand(
    lengths: list[float], mean: float, decay: float, penalty: float, new_mean: float
) -> None:
    found, updated = path_length_penalty(torch.tensor(lengths), torch.tensor(mean), decay)
    assert found.shape == updated.shape == ()
    assert found.item() == pytest.approx(penalty)
    assert updated.item() == pytest.approx(new_mean)


def test_the_mean_length_forgets_at_the_rate_of_its_decay() -> None:
    mean = torch.zeros(())
    for _ in range(20):
        _, mean = path_length_penalty(torch.tensor([2.0, 4.0]), mean, 0.1)
    assert mean.item() == pytest.approx(3 * (1 - 0.9**20))


def test_paths_get_a_gradient_and_their_mean_none() -> None:
    length = torch.tensor([1.0, 3.0], requires_grad=True)
    penalty, mean = path_length_penalty(length, torch.tensor(0.0), 0.01)
    assert not mean.requires_grad
    (gradient,) = torch.autograd.grad(penalty, length)
    # Both are longer than the mean, and the batch's share in it is small.
    torch.testing.assert_close(gradient, torch.tensor([1.0, 3.0]), atol=0.1, rtol=0)


def test_a_distance_is_relative_to_the_reference() -> None:
    features = [torch.tensor([[2.0, 1.0]]), torch.tensor([3.0, 0.0])]
    reference = [torch.tensor([[1.0, 1.0]]), torch.tensor([3.0, 4.0])]
    # Mean squares: 1/2 of 1, and 8 of 25/2.
    assert relative_distance(features, reference).item() == pytest.approx((0.5 + 0.64) / 2)
    assert relative_distance(reference, reference) == 0
    scaled = relative_distance([10 * features[0], features[1]], [10 * reference[0], reference[1]])
    assert scaled.item() == pytest.approx(0.57)


def test_a_silent_reference_gives_a_finite_distance() -> None:
    assert relative_distance([torch.zeros(2, 3)], [torch.zeros(2, 3)]) == 0
    assert relative_distance([torch.ones(2, 3)], [torch.zeros(2, 3)]).isfinite()


def test_the_reference_s_size_gets_no_gradient() -> None:
    features, reference = (torch.tensor(value, requires_grad=True) for value in ([2.0, 1.0], [1.0, 1.0]))
    of_features, of_reference = torch.autograd.grad(relative_distance([features], [reference]), [features, reference])
    torch.testing.assert_close(of_features, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(of_reference, -of_features)


def test_as_many_maps_as_references_are_needed() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        relative_distance([torch.ones(2), torch.ones(2)], [torch.ones(2)])


@pytest.fixture(scope="module")
def lpips() -> Lpips:
    torch.manual_seed(0)
    return Lpips(pretrained=False)


def images(channels: int, seed: int, batch: int = 2) -> Tensor:
    return torch.rand(batch, channels, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("channels", [1, 3])
def test_perceptual_distance_is_zero_of_equal_images_only(lpips: Lpips, channels: int) -> None:
    image, other = images(channels, 0), images(channels, 1)
    assert lpips(image, image).item() == 0
    distance = lpips(image, other)
    assert distance.shape == ()
    assert distance.item() > 1e-4
    assert lpips(other, image).item() == pytest.approx(distance.item(), rel=1e-4)
    # The mean over the batch.
    single = [lpips(image[i : i + 1], other[i : i + 1]).item() for i in range(2)]
    assert single[0] != pytest.approx(single[1], rel=1e-4)
    assert distance.item() == pytest.approx(sum(single) / 2, rel=1e-4)


def test_grey_is_seen_as_three_equal_channels(lpips: Lpips) -> None:
    grey, other = images(1, 0), images(1, 1)
    expected = lpips(grey.repeat(1, 3, 1, 1), other.repeat(1, 3, 1, 1))
    torch.testing.assert_close(lpips(grey, other), expected)


def test_perceptual_distance_teaches_images_and_not_alexnet(lpips: Lpips) -> None:
    image = images(1, 0).requires_grad_()
    lpips(image, images(1, 1)).backward()
    assert image.grad is not None
    assert (image.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    assert [name for name, weight in lpips.network.named_parameters() if weight.requires_grad] == []
    assert all(weight.grad is None for weight in lpips.network.parameters())
    assert not lpips.network.training


def test_whoever_holds_it_saves_no_weight_of_it(lpips: Lpips) -> None:
    holder = nn.Module()
    holder.lpips = lpips
    assert not holder.state_dict()
    assert list(holder.parameters()) == []
