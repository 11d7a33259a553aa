"""Tests of ``cfe_lightning.metrics.equal_strength`` on a classifier whose probability is known at every place."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.metrics.equal_strength import smallest_edit


def by_brightness(image: Tensor) -> Tensor:
    """The probability of class 1 is the sigmoid of four times the mean."""
    mean = 4 * image.mean(dim=(1, 2, 3))
    return torch.stack([torch.zeros_like(mean), mean], dim=1)


def way(*levels: float, count: int = 2) -> Tensor:
    return torch.tensor(levels).view(1, -1, 1, 1, 1).expand(count, -1, 3, 8, 8).contiguous()


@pytest.mark.parametrize("confidence", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("levels", [(-0.8, 0.8), (-0.8, -0.6, 0.3, 0.35, 0.9)])
def test_it_stops_where_the_classifier_is_as_sure_as_asked(levels: tuple[float, ...], confidence: float) -> None:
    found = smallest_edit(by_brightness, way(*levels), torch.ones(2).long(), confidence, bisections=12)
    assert found.reached.all()
    expected = math.log(confidence / (1 - confidence)) / 4
    # To within two grey levels, and never on the wrong side.
    assert (found.edit.mean(dim=(1, 2, 3)) >= expected - 1e-6).all()
    assert (found.edit.mean(dim=(1, 2, 3)) <= expected + 2 / 127.5).all()
    assert torch.equal(found.edit, images.saved(found.edit))


def test_of_several_crossings_the_first_counts() -> None:
    path = way(-0.8, 0.4, -0.8, 0.8)
    found = smallest_edit(by_brightness, path, torch.ones(2).long(), 0.5)
    assert (found.position < 1 / 3).all()


def test_at_the_start_already_and_never() -> None:
    path = torch.cat([way(0.7, 0.9, count=1), way(-0.9, -0.2, count=1), way(-0.9, 0.9, count=1)])
    found = smallest_edit(by_brightness, path, torch.ones(3).long(), 0.5)
    assert found.reached.tolist() == [True, False, True]
    assert found.position.tolist()[:2] == [0.0, 1.0]
    assert torch.equal(found.edit[0], images.saved(path[0, 0]))
    assert torch.equal(found.edit[1], images.saved(path[1, -1]))


def test_every_image_has_its_own_target() -> None:
    found = smallest_edit(by_brightness, way(0.8, -0.8), torch.tensor([0, 1]), 0.6)
    assert found.reached.all()
    assert found.position[0] > 0.5
    assert found.position[1] == 0


def test_one_frame_is_all_there_is() -> None:
    found = smallest_edit(by_brightness, way(0.5), torch.ones(2).long(), 0.5)
    assert found.reached.all()
    assert (found.position == 0).all()


def test_the_size_of_batches_plays_no_role() -> None:
    path = torch.cat([way(-0.8, 0.5), way(-0.4, 0.9)])
    once, often = (smallest_edit(by_brightness, path, torch.ones(4).long(), 0.7, max_batch=n) for n in (256, 3))
    assert torch.equal(once.edit, often.edit)
