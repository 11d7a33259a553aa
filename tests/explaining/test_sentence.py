from typing import Any

import pytest

from cfe_lightning.explaining.row import Row
from cfe_lightning.explaining.sentence import measured_sentence, place
from cfe_lightning.explaining.values import percent, short_percent


def row(**changes: Any) -> dict[str, Any]:
    return {
        **{"name": "x.png", "status": "ok", "predicted": "dog", "target": "cat", "flipped": True},
        **{"p_target_before": 0.04, "p_target_saved": 0.91, "flipped_saved": True, "changed_area": 0.031},
        **{"where": "upper left", "where_share": 0.8, "survives": ["jpeg90", "blur1"], "lost_under": []},
        **changes,
    }


NOT_FLIPPED = {"flipped": False, "flipped_saved": False, "survives": None, "lost_under": None}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {},
            "Changing 3.1% of the pixels, 80% of the change in the upper left, moved 'cat' from 0.04 to 0.91; survives "
            "JPEG and blur.",
        ),
        (
            {"where": "top", "survives": ["jpeg90", "blur1", "down_up"]},
            "Changing 3.1% of the pixels, 80% of the change at the top, moved 'cat' from 0.04 to 0.91; survives JPEG, "
            "blur and shrinking.",
        ),
        (
            {"where": "spread over the picture", "where_share": None, "survives": [], "lost_under": ["jpeg90"]},
            "Changing 3.1% of the pixels, spread over the picture, moved 'cat' from 0.04 to 0.91; does not survive "
            "JPEG.",
        ),
        (
            {"where": "right", "survives": ["blur1"], "lost_under": ["jpeg90", "down_up"]},
            "Changing 3.1% of the pixels, 80% of the change on the right, moved 'cat' from 0.04 to 0.91; survives "
            "blur; does not survive JPEG or shrinking.",
        ),
        (
            {"survives": None, "lost_under": None, "p_target_before": 0.001, "p_target_saved": 0.9999},
            "Changing 3.1% of the pixels, 80% of the change in the upper left, moved 'cat' from <0.01 to >0.99.",
        ),
        (
            NOT_FLIPPED | {"p_target_saved": 0.3},
            "Changing 3.1% of the pixels, 80% of the change in the upper left, moved 'cat' only from 0.04 to 0.30: not "
            "flipped.",
        ),
        (
            NOT_FLIPPED | {"p_target_saved": 0.0401},
            "Changing 3.1% of the pixels, 80% of the change in the upper left, left 'cat' at 0.04: not flipped.",
        ),
        (
            NOT_FLIPPED | {"p_target_saved": 0.01},
            "Changing 3.1% of the pixels, 80% of the change in the upper left, moved 'cat' the wrong way, from 0.04 to "
            "0.01: not flipped.",
        ),
        (
            NOT_FLIPPED | {"flipped": True, "p_target_saved": 0.49},
            "Changing 3.1% of the pixels, 80% of the change in the upper left, moved 'cat' only from 0.04 to 0.49: the "
            "flip is lost when saved.",
        ),
        (
            {"changed_area": 0.0, "survives": None},
            "Changing no pixel by more than 8 of 255 grey levels, 80% of the change in the upper left, moved 'cat' "
            "from 0.04 to 0.91.",
        ),
        (
            NOT_FLIPPED | {"changed_area": 0.0, "where": None, "where_share": None, "p_target_saved": 0.04},
            "Nothing changed in the saved picture: 'cat' stays at 0.04, not flipped.",
        ),
        (
            {"changed_area": 0.0, "where": None, "p_target_before": 0.49, "p_target_saved": 0.51},
            "Nothing changed in the saved picture; rounding it to 8 bits moved 'cat' from 0.49 to 0.51.",
        ),
        (
            {"survives": None, "p_target_before": 0.496, "p_target_saved": 0.504},
            "Changing 3.1% of the pixels, 80% of the change in the upper left, moved 'cat' from 0.496 to 0.504.",
        ),
        (
            {"survives": None, "p_target_before": 0.99981, "p_target_saved": 0.99992},
            "Changing 3.1% of the pixels, 80% of the change in the upper left, moved 'cat' from 0.9998 to 0.9999.",
        ),
        (
            {"survives": None, "p_target_before": 0.5, "p_target_saved": 0.5},
            "Changing 3.1% of the pixels, 80% of the change in the upper left, moved 'cat' from 0.50 to 0.50.",
        ),
        (
            {"predicted": "cat", "flipped": None, "flipped_saved": None, "p_target_before": 0.93},
            "Taken for 'cat' already (0.93): nothing to flip.",
        ),
        (
            {"target": "<script>'\n", "survives": None},
            "Changing 3.1% of the pixels, 80% of the change in the upper left, moved '<script>'\n' from 0.04 to 0.91.",
        ),
        (
            {"p_target_saved": None, "attribution_where": "left", "attribution_share": 0.5},
            "50% of the attribution lies on the left.",
        ),
        (
            {"p_target_saved": None, "attribution_where": "spread over the picture", "attribution_share": None},
            "The attribution is spread over the picture.",
        ),
    ],
)
def test_a_sentence_for_everything_that_can_happen(changes: dict[str, Any], sentence: str):
    assert measured_sentence(Row(row(**changes))) == sentence


def test_what_was_not_measured_has_no_sentence():
    assert measured_sentence(Row({"name": "x.png", "status": "failed", "error": "broken"})) is None
    assert measured_sentence(Row(row(p_target_saved=None))) is None
    old = row()
    for key in ("changed_area", "where", "where_share", "survives", "lost_under"):
        del old[key]
    assert measured_sentence(Row(old)) is None


def test_shares_are_neither_nothing_nor_everything_unless_they_are():
    shares = (0, 0.0001, 0.0005, 0.031, 0.0994, 0.0996, 0.5, 0.9949, 0.9951, 1)
    shown = ["0.0%", "<0.1%", "0.1%", "3.1%", "9.9%", "10%", "50%", "99%", ">99%", "100%"]
    assert [short_percent(share) for share in shares] == shown
    shown = ["0%", "<1%", "<1%", "3%", "10%", "10%", "50%", "99%", ">99%", "100%"]
    assert [percent(share, 0) for share in shares] == shown
    # On the edge itself, too.
    assert [percent(0.005, 0), percent(0.995, 0), percent(0.9995), short_percent(0.995)] == [
        *("<1%", ">99%", ">99.9%", ">99%"),
    ]


def test_every_region_has_its_preposition():
    assert [place(name) for name in ("lower right", "centre", "bottom", "left")] == [
        *("in the lower right", "in the centre", "at the bottom", "on the left"),
    ]
