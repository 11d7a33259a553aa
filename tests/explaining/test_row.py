"""The schema of a row: keys and columns in their order, kinds of values, and plain data."""

from typing import Any

import pytest
import torch
from explained import failure, row

from cfe_lightning.explaining.findings import Findings
from cfe_lightning.explaining.row import COLUMNS, Row, is_row
from cfe_lightning.explaining.saved_change import SavedChange

GIVEN: dict[str, Any] = {"name": "a.png", "source": [1, 2], "status": "ok", "seconds": 0.1234567, "folder": "images/a"}
KEYS = (
    "name source status predicted p_predicted_before p_predicted_after target p_target_before p_target_after "
    "p_predicted_saved p_target_saved flipped flipped_saved l1 note difference_scale motion_scale changed_area where "
    "where_share survives lost_under attribution_where attribution_share seconds folder files digests gains scores"
)


def findings(**changes: Any) -> Findings:
    """Makes findings about one image of class 0 with the target 1, explained by an attribution."""
    given: dict[str, Any] = {
        **{"predicted": torch.tensor(0), "target": torch.tensor(1), "before": torch.tensor([0.75, 0.25])},
        **{"after": None, "flipped": None, "strengths": None, "intended": None, "step_scores": {}, "scores": {}},
        **{"caveats": {}, "pictures": {}, "gains": {}, "class_names": ["cat", "dog"]},
    }
    return Findings(**given | changes)


def test_keys_and_columns_keep_their_order():
    made = Row.of(findings(), **GIVEN, files={}, digests={})
    assert " ".join(vars(made)) == KEYS, "no curve and no error, but null for what is not known"
    assert " ".join(COLUMNS) == (
        "name status predicted p_predicted_before p_predicted_after target p_target_before p_target_after "
        "p_predicted_saved p_target_saved flipped flipped_saved l1 changed_area where where_share survives lost_under "
        "attribution_where attribution_share sentence seconds note error image counterfactual difference attribution "
        "steps motion"
    )


def test_values_become_plain_data_with_six_digits():
    change = SavedChange(("left", 1 / 3), 1 / 7, ("top", 0.5), ["blur1"], [])
    path = torch.tensor([[0.75, 0.25], [0.1, 0.9]])
    made = Row.of(
        findings(change=change, strengths=torch.tensor([0, 1]).double(), path=path, gains={"x": torch.tensor(2.0)}),
        **GIVEN,
        files={"image": "image.png"},
        digests={},
    )
    assert (made.predicted, made.p_predicted_before, made.p_target_before) == ("cat", 0.75, 0.25)
    assert (made.seconds, made.source, made.gains) == (0.123457, [1, 2], {"x": 2.0})
    assert (made.changed_area, made.attribution_share, made.survives, made.lost_under) == (
        *(0.142857, 0.333333, ["blur1"], []),
    )
    assert vars(made)["curve"] == {"strength": [0.0, 1.0], "predicted": [0.75, 0.1], "target": [0.25, 0.9]}
    assert is_row(vars(made))


def test_a_line_stays_as_it_was_and_what_it_lacks_reads_as_none():
    line = {"later": [1], "name": "a.png", "status": "ok"}
    old = Row(line)
    assert list(vars(old).items()) == list(line.items())
    assert (old.name, old.where, old.files) == ("a.png", None, None)


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"predicted": None, "flipped": None, "l1": 3, "later": object()}, True),
        ({"curve": {"strength": [0.5], "target": [1], "scores": {"x": [2]}}}, True),
        ({"name": 5}, False),
        ({"status": "done"}, False),
        ({"status": []}, False),
        ({"folder": 5}, False),
        ({"l1": "0.5"}, False),
        ({"l1": True}, False),
        ({"flipped": 1}, False),
        ({"survives": "blur1"}, False),
        ({"files": ["image.png"]}, False),
        ({"files": {"image": 5}}, False),
        ({"scores": {"x": "5"}}, False),
        ({"curve": {"target": [0.5]}}, False),
        ({"curve": {"strength": [0.5], "target": ["x"]}}, False),
    ],
)
def test_a_line_is_a_row_if_its_values_have_the_declared_kinds(changes: dict[str, Any], fits: bool):
    assert is_row(vars(row("a.png")) | changes) is fits


def test_failures_need_a_name_and_a_reason():
    line = vars(failure("a.png"))
    assert is_row(line)
    assert not is_row(line | {"error": None})
    assert not is_row([line])
