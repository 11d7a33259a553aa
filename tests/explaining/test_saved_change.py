import pytest
import torch
import toy
from torch import Tensor

from cfe_lightning.explaining.saved_change import (
    MILD,
    REGIONS,
    SPREAD,
    SavedChange,
    changed_area,
    frame_mask,
    measure,
    strongest_region,
)
from cfe_lightning.explanation import Explanation
from cfe_lightning.metrics.robustness import TRANSFORMATIONS


def level(value: float, *shape: int) -> Tensor:
    """Makes images of one level of 255."""
    return torch.full(shape, value / 255 * 2 - 1)


def explained(image: Tensor, counterfactual: Tensor | None, target: Tensor) -> Explanation:
    classifier = toy.toy_classifier(2)
    return Explanation(
        image=image,
        logits=classifier(image),
        target=target,
        attribution=torch.ones_like(image[:, :1]),
        counterfactual=counterfactual,
        counterfactual_logits=None if counterfactual is None else classifier(counterfactual),
    )


def test_a_change_of_nine_by_nine_pixels_has_the_shares_that_were_put_in():
    # 4 of 81 pixels change; 3 units of 4 lie in the upper left ninth.
    image = level(100, 1, 3, 9, 9)
    counterfactual = image.clone()
    for y, x in ((0, 0), (1, 1), (2, 2), (8, 8)):
        counterfactual[..., y, x] = level(140, 1)
    (row,) = measure(explained(image, counterfactual, torch.tensor([1])), toy.toy_classifier(2), torch.tensor([False]))
    assert row.area == pytest.approx(4 / 81)
    assert row.place == ("upper left", pytest.approx(0.75))
    assert (row.survives, row.lost_under) == (None, None)
    assert row.attribution == (SPREAD, None)


def test_more_than_eight_levels_is_a_change_and_eight_are_none():
    # Every level, so that no rounding of floats decides.
    before = (torch.arange(240.0) / 255 * 2 - 1).view(1, 1, 1, 240)
    for step, share in ((8, 0.0), (9, 1.0), (-8, 0.0), (-9, 1.0)):
        first, second = (before, before + 2 * step / 255) if step > 0 else (before - 2 * step / 255, before)
        assert float(changed_area(first, second)) == share


def test_every_ninth_has_its_name():
    maps = torch.zeros(9, 1, 9, 9)
    for index in range(9):
        maps[index, 0, 3 * (index // 3) + 1, 3 * (index % 3) + 1] = 2.0
    assert strongest_region(maps) == [(name, 1.0) for name in REGIONS]


def test_a_region_is_named_from_twice_its_share_of_the_area():
    even = torch.ones(1, 1, 9, 9)
    assert strongest_region(even) == [(SPREAD, None)]
    # The centre's 9 of 81 pixels with weight w hold 9 w / (72 + 9 w): two ninths at w = 16 / 7.
    for weight, expected in ((2.2, SPREAD), (2.4, "centre")):
        even[..., 3:6, 3:6] = weight
        assert strongest_region(even)[0][0] == expected
    assert strongest_region(torch.zeros(2, 1, 5, 7)) == [(None, None), (None, None)]
    # Sides that three does not divide, and a picture smaller than the grid.
    assert strongest_region(torch.ones(1, 1, 1, 1)) == [(SPREAD, None)]
    corner = torch.zeros(1, 1, 32, 20)
    corner[..., 31, 19] = 1
    assert strongest_region(corner) == [("lower right", 1.0)]


def test_the_frame_is_an_eighth_of_every_side_and_of_every_slice():
    frame = frame_mask(16, 8)
    assert (int(frame[:2].sum()), int(frame[2:14].sum()), int(frame[14:].sum())) == (16, 24, 16)
    assert int((~frame_mask(32, 32)).sum()) == 24 * 24
    montage = frame_mask(32, 32, 4)
    assert torch.equal(montage[:16, :16], frame_mask(16, 16))
    assert torch.equal(montage[16:, 16:], frame_mask(16, 16))
    assert bool(frame_mask(2, 2).all())


def test_a_flip_survives_what_leaves_the_decision_and_others_are_not_asked(monkeypatch: pytest.MonkeyPatch):
    # Class k has the brighter k-th half: a wide margin survives everything.
    image, flip = level(100, 3, 3, 16, 16), level(100, 3, 3, 16, 16)
    image[..., :8] = level(200, 1)
    flip[..., 8:] = level(200, 1)
    given = explained(image, flip, torch.tensor([1, 1, 0]))
    classifier = toy.toy_classifier(2)
    batches: list[int] = []

    def counting(pixels: Tensor) -> Tensor:
        batches.append(len(pixels))
        return classifier(pixels)

    rows = measure(given, counting, torch.tensor([True, True, False]))  # type: ignore[arg-type]
    assert batches == [2] * (2 * len(MILD)), "one call for all flips"
    assert [row.survives for row in rows] == [list(MILD), list(MILD), None]
    assert [row.lost_under for row in rows] == [[], [], None]

    # JPEG that turns the counterfactual back, and a blur that turns the image itself over.
    def turned_back(pixels: Tensor) -> Tensor:
        return image[: len(pixels)].clone()

    def exchanged(pixels: Tensor) -> Tensor:
        return pixels.flip(3)

    monkeypatch.setitem(TRANSFORMATIONS, "jpeg90", turned_back)
    monkeypatch.setitem(TRANSFORMATIONS, "blur1", exchanged)
    row = measure(given, classifier, torch.tensor([True, False, False]))[0]
    assert (row.survives, row.lost_under) == (["down_up"], ["jpeg90"])
    for name in MILD:
        monkeypatch.setitem(TRANSFORMATIONS, name, exchanged)
    row = measure(given, classifier, torch.tensor([True, False, False]))[0]
    assert (row.survives, row.lost_under) == (None, None)


def test_without_a_counterfactual_only_the_attribution_is_measured():
    given = explained(level(100, 2, 3, 16, 16), None, torch.tensor([1, 1]))
    given.attribution = torch.zeros(2, 1, 16, 16)
    given.attribution[0, :, 14, 1] = 1
    rows = measure(given, toy.toy_classifier(2), None)
    assert rows[0].attribution == ("lower left", 1.0)
    assert rows[1] == SavedChange(
        attribution=(None, None), area=None, place=(None, None), survives=None, lost_under=None
    )
    assert rows[0].area is None


def test_an_image_that_is_not_finite_does_not_spoil_the_others():
    image = level(100, 2, 3, 9, 9)
    counterfactual = image.clone()
    counterfactual[0] = torch.nan
    counterfactual[1, :, 0, 0] = 1.0
    rows = measure(
        explained(image, counterfactual, torch.tensor([1, 1])), toy.toy_classifier(2), torch.tensor([True, False])
    )
    assert (rows[1].area, rows[1].place[0]) == (pytest.approx(1 / 81), "upper left")


def test_a_ninth_of_a_montage_is_one_of_every_slice():
    # The lower right of all four slices: of the whole montage these lie in four different ninths.
    strength = torch.zeros(1, 1, 18, 18)
    for row in (8, 17):
        for column in (8, 17):
            strength[..., row, column] = 1
    assert strongest_region(strength, 4) == [("lower right", 1.0)]
    assert strongest_region(strength) != [("lower right", 1.0)]
    image = level(100, 1, 3, 18, 18)
    given = explained(image, image + strength * 80 / 255, torch.tensor([1]))
    given.attribution = strength
    (row,) = measure(given, toy.toy_classifier(2), torch.tensor([False]), num_slices=4)
    assert row.place == ("lower right", pytest.approx(1.0))
    assert row.attribution == ("lower right", 1.0)


def test_the_last_digit_of_a_machine_decides_no_region():
    tied = torch.zeros(2, 1, 9, 9, dtype=torch.float64)
    tied[:, :, 1, 1], tied[:, :, 7, 7] = 1.0, torch.tensor([[1 + 1e-14], [1 - 1e-14]], dtype=torch.float64)
    assert [where for where, _ in strongest_region(tied)] == ["upper left"] * 2


def test_whoever_asks_for_a_frame_again_gets_the_same():
    assert frame_mask(16, 8) is frame_mask(16, 8)
    assert frame_mask(16, 8) is not frame_mask(16, 16)
