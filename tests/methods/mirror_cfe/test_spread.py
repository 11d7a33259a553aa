"""Analytic tests of ``cfe_lightning.methods.mirror_cfe.spread``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cfe_lightning.methods.mirror_cfe.geometry import position, reflect
from cfe_lightning.methods.mirror_cfe.spread import (
    class_maps,
    edit_mask,
    prior_of,
    spread_by_location,
    spread_by_water_filling,
    spread_uniform,
)


def problem(num_classes: int = 3, num_features: int = 16, batch: int = 6) -> tuple[Tensor, ...]:
    """Draws a non-negative map, its mean, and a head with source and target, in float64."""
    generator = torch.Generator().manual_seed(0)
    feature_map = torch.randn(batch, num_features, 5, 4, generator=generator, dtype=torch.float64).relu()
    features = feature_map.mean(dim=(2, 3))
    weight = torch.randn(num_classes, num_features, generator=generator, dtype=torch.float64)
    bias = torch.randn(num_classes, generator=generator, dtype=torch.float64)
    source = (features @ weight.T + bias).argmax(dim=1)
    return feature_map, features, weight, bias, source, (source + 1) % num_classes


@pytest.mark.parametrize("spread", ["uniform", "location", "waterfill"])
def test_every_spread_averages_to_the_reflected_features(spread: str) -> None:
    feature_map, features, weight, bias, source, target = problem()
    reflected = reflect(features, weight, bias, source, target, bounds=(0.0, torch.inf))
    maps = class_maps(feature_map, weight[torch.stack([source, target], dim=1)])
    normal, offset = weight[source] - weight[target], bias[source] - bias[target]
    moved = {
        "uniform": lambda: spread_uniform(feature_map, reflected.features),
        "location": lambda: spread_by_location(feature_map, reflected.features, normal, offset),
        "waterfill": lambda: spread_by_water_filling(feature_map, reflected.features, prior_of(maps)),
    }[spread]()
    torch.testing.assert_close(moved.mean(dim=(2, 3)), reflected.features, atol=1e-12, rtol=0)
    # A straight line between two maps averages to the straight line between their features.
    between = (0.3 * moved + 0.7 * feature_map).mean(dim=(2, 3))
    torch.testing.assert_close(between, 0.3 * reflected.features + 0.7 * features, atol=1e-12, rtol=0)
    if spread == "waterfill":
        assert moved.min() >= 0


def test_reflecting_every_place_reflects_the_mean_and_is_its_own_inverse() -> None:
    feature_map, features, weight, bias, source, target = problem()
    mirrored = position(features, weight, bias, source, target)
    normal, offset = weight[source] - weight[target], bias[source] - bias[target]
    moved = spread_by_location(feature_map, mirrored, normal, offset)
    back = spread_by_location(moved, features, normal, offset)
    torch.testing.assert_close(back, feature_map, atol=1e-12, rtol=0)
    # No constant had to be added: the mean of an affine map is the affine map of the mean.
    place = position(feature_map[:, :, 2, 1], weight, bias, source, target)
    torch.testing.assert_close(moved[:, :, 2, 1], place, atol=1e-12, rtol=0)


def test_water_filling_follows_the_prior_and_cuts_at_zero() -> None:
    feature_map = torch.tensor([[[[4.0, 1.0]], [[2.0, 2.0]]]], dtype=torch.float64)  # one sample, two features, 1 x 2
    prior = torch.tensor([[[3.0, 1.0]]], dtype=torch.float64)
    grown = spread_by_water_filling(feature_map, torch.tensor([[4.5, 2.0]], dtype=torch.float64), prior)
    torch.testing.assert_close(grown[0, 0, 0], torch.tensor([7.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(grown[0, 1], feature_map[0, 1])
    # 3 has to go: 2.25 and 0.75 by the prior, nothing is cut.
    shrunk = spread_by_water_filling(feature_map, torch.tensor([[1.0, 2.0]], dtype=torch.float64), prior)
    torch.testing.assert_close(shrunk[0, 0, 0], torch.tensor([1.75, 0.25], dtype=torch.float64))
    # 4.4 has to go: the second place is empty after 1, the first gives the rest.
    empty = spread_by_water_filling(feature_map, torch.tensor([[0.3, 2.0]], dtype=torch.float64), prior)
    torch.testing.assert_close(empty[0, 0, 0], torch.tensor([0.6, 0.0], dtype=torch.float64))


def test_water_filling_reaches_zero_itself() -> None:
    feature_map, features, *_ = problem()
    prior = torch.rand(len(features), 5, 4, dtype=torch.float64) + 0.01
    assert spread_by_water_filling(feature_map, torch.zeros_like(features), prior).abs().max() < 1e-12


def test_class_maps_are_scaled_and_non_negative_and_empty_where_nothing_is_seen() -> None:
    feature_map, _, weight, _, source, target = problem()
    classes = torch.stack([source, target], dim=1)
    maps = class_maps(feature_map, weight[classes])
    assert maps.min() >= 0
    torch.testing.assert_close(maps.amax(dim=(2, 3)), torch.ones(6, 2, dtype=torch.float64), atol=1e-6, rtol=0)
    nothing = class_maps(feature_map, -weight.abs()[classes])
    assert nothing.abs().max() == 0
    assert (prior_of(nothing) == 1).all()
    assert prior_of(maps).min() > 0


def test_the_mask_is_the_union_of_both_classes_and_grows_along_the_path() -> None:
    maps = torch.tensor([[[[1.0, 0.3, 0.0]], [[0.0, 0.05, 0.7]]]])
    masks = [edit_mask(maps, torch.tensor([step]), (0.1, 0.5))[0, 0, 0].tolist() for step in (0.0, 0.6, 0.8, 1.0)]
    assert masks == [[1, 0, 1], [1, 0, 1], [1, 1, 1], [1, 1, 1]]
    random = torch.rand(4, 2, 6, 6)
    areas = torch.stack([edit_mask(random, torch.full((4,), i / 20)).mean(dim=(1, 2, 3)) for i in range(21)])
    assert (areas.diff(dim=0) >= 0).all()
    soft = edit_mask(random, torch.full((4,), 0.7), soft=True)
    hard = edit_mask(random, torch.full((4,), 0.7))
    assert ((soft > 0.5) == (hard > 0.5)).all()
