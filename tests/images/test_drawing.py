"""Colours, arrows and grids of pictures whose pixels are known."""

from __future__ import annotations

import pytest
import torch

from cfe_lightning import images


def test_a_signed_difference_is_red_for_brighter_and_blue_for_darker() -> None:
    change = torch.tensor([0.5, -0.5, 0.0, 0.25]).view(1, 1, 1, 4).expand(1, 3, 1, 4)
    colours = images.signed_difference(change)[0, :, 0].T
    wanted = torch.tensor([[1.0, -1, -1], [-1, -1, 1], [1, 1, 1], [1, 0, 0]])
    torch.testing.assert_close(colours, wanted)
    assert torch.equal(images.signed_difference(change, scale=1.0)[0, :, 0, 0], torch.tensor([1.0, 0.0, 0.0]))


def test_a_change_of_hue_alone_is_seen() -> None:
    change = torch.tensor([0.4, -0.2, -0.2]).view(1, 3, 1, 1)
    assert torch.equal(images.signed_difference(change).flatten(), torch.tensor([1.0, -1.0, -1.0]))


def test_no_change_is_white() -> None:
    assert torch.equal(images.signed_difference(torch.zeros(2, 3, 2, 2)), torch.ones(2, 3, 2, 2))


def test_a_heat_map_goes_from_black_to_white() -> None:
    heat = images.heat_map(torch.tensor([0.0, 1.0, 2.0, 3.0]).view(1, 1, 1, 4))[0, :, 0].T
    assert torch.equal(heat, torch.tensor([[-1.0, -1, -1], [1, -1, -1], [1, 1, -1], [1, 1, 1]]))
    assert torch.isfinite(images.heat_map(torch.zeros(1, 1, 2, 2))).all()


def test_arrows_are_means_of_cells() -> None:
    motion = torch.zeros(1, 2, 24, 36)
    motion[0, 0, :2, :3] = 3.0
    coarse = images.arrows(motion)
    assert coarse.shape == (1, 2, 12, 12)
    assert coarse[0, 0, 0, 0] == 3
    assert coarse.sum() == 3
    assert images.arrows(torch.ones(1, 2, 5, 40)).shape == (1, 2, 5, 12)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_arrow_points_where_its_motion_goes(channels: int) -> None:
    motion = torch.zeros(2, 2, 240, 240)
    motion[0, 1, 100:120, 100:120] = 5.0
    drawn = images.draw_motion(torch.zeros(2, channels, 240, 240), motion)
    assert drawn.shape == (2, 3, 240, 240)
    ink = ((drawn.amax(dim=1) - drawn.amin(dim=1)) > 0.5).float()
    assert ink[1].sum() == 0
    rows, columns = torch.nonzero(ink[0], as_tuple=True)
    # One and a half cells of 20 pixels from left to right, with the head at the right end.
    assert abs(float(columns.float().mean()) - 110) < 8
    assert columns.max() - columns.min() == pytest.approx(30, abs=2)
    assert rows[columns > 120].max() - rows[columns > 120].min() > rows[columns < 115].max() - rows[columns < 115].min()


def test_a_grid_has_a_row_for_every_image_and_a_column_for_every_batch() -> None:
    grey, colour = torch.zeros(3, 1, 4, 5), torch.full((3, 3, 4, 5), -1.0)
    laid = images.grid([grey, colour], padding=1)
    assert laid.shape == (3, 3 * 6, 2 * 7)
    assert (laid[:, 1:5, 1:6] == 0).all()
    assert (laid[:, 1:5, 8:13] == -1).all()
    assert (laid[:, 0] == 1).all()
