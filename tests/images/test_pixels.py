"""Sizes, 8-bit levels and montages of image tensors."""

from __future__ import annotations

import pytest
import torch

from cfe_lightning import images
from cfe_lightning.images import cut_montage, montage_side, resize, tile_montage

# Sizes and levels.


def test_resize_antialiases() -> None:
    stripes = torch.ones(1, 1, 64, 64)
    stripes[..., ::2] = -1
    assert resize(stripes, 8).abs().max() < 0.3
    assert resize(stripes[0], 8).shape == (1, 8, 8)
    assert resize(stripes, 64) is stripes


def test_bytes_are_rounded_not_truncated() -> None:
    levels = torch.tensor([-1.0, -1.2, 1.0, 1.5, 2 * 99.6 / 255 - 1, 2 * 99.4 / 255 - 1]).view(1, 1, 6)
    assert images.to_uint8(levels).flatten().tolist() == [0, 0, 255, 255, 100, 99]


# Montages.


def test_slices_stand_row_by_row() -> None:
    # Slice k has the values 100 k + 10 channel + row + column / 10.
    slices = torch.stack(
        [
            100.0 * k + 10 * torch.arange(2)[:, None, None] + torch.arange(3)[:, None] + torch.arange(4) / 10
            for k in range(4)
        ]
    )
    image = tile_montage(slices[None])
    assert image.shape == (1, 2, 6, 8)
    assert torch.equal(image[0, 1, 0], torch.cat([slices[0, 1, 0], slices[1, 1, 0]]))
    assert torch.equal(image[0, 1, 5], torch.cat([slices[2, 1, 2], slices[3, 1, 2]]))
    assert torch.equal(image[0, 0, :, 4], torch.cat([slices[1, 0, :, 0], slices[3, 0, :, 0]]))


@pytest.mark.parametrize("num_slices", [1, 4, 9, 16])
def test_cutting_and_tiling_are_inverse(num_slices: int) -> None:
    slices = torch.randn(2, num_slices, 3, 4, 5)
    image = tile_montage(slices)
    side = montage_side(num_slices)
    assert image.shape == (2, 3, 4 * side, 5 * side)
    assert torch.equal(cut_montage(image, num_slices), slices)
    assert torch.equal(tile_montage(cut_montage(image, num_slices)), image)


def test_one_slice_is_the_image() -> None:
    image = torch.randn(2, 3, 4, 4)
    assert torch.equal(cut_montage(image, 1)[:, 0], image)


@pytest.mark.parametrize("num_slices", [-4, 0, 2, 8])
def test_what_is_no_square(num_slices: int) -> None:
    message = rf"^A montage is a square and needs 1, 4, 9, 16, \.\.\. slices, got {num_slices}\.$"
    with pytest.raises(ValueError, match=message):
        cut_montage(torch.zeros(1, 1, 8, 8), num_slices)
    if num_slices >= 0:
        with pytest.raises(ValueError, match=message):
            tile_montage(torch.zeros(1, num_slices, 1, 2, 2))


@pytest.mark.parametrize(("height", "width"), [(8, 9), (9, 8)])
def test_what_cannot_be_cut(height: int, width: int) -> None:
    message = f"needs a height and width that 2 divides, got {height} x {width}: change the image size or the"
    with pytest.raises(ValueError, match=message):
        cut_montage(torch.zeros(1, 1, height, width), 4)
