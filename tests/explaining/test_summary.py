"""Statistics of hand-made rows."""

import pytest
from explained import failure, row

from cfe_lightning.explaining.summary import summarise


def test_flip_rates_have_wilson_intervals_and_leave_out_what_cannot_flip():
    rows = [row(f"{i}", flipped=i > 0, flipped_saved=i > 0) for i in range(10)]
    same = row("same", predicted="dog", flipped=None, flipped_saved=None, l1=0.9, note="already")
    summary = summarise([*rows, same, failure("x")])
    assert (summary["n_done"], summary["n_failed"], summary["n_already_target"]) == (11, 1, 1)
    # Wilson's interval of 9 flips in 10 images.
    assert summary["flip_rate"]["value"] == 0.9
    assert summary["flip_rate"]["interval"] == pytest.approx([0.5958, 0.9821], abs=1e-4)
    assert summary["l1"] == {"value": pytest.approx(0.02), "n": 10, "population": "all"}
    assert summary["delta_p"]["value"] == pytest.approx(0.7)
    assert "warning" not in summary


def test_flips_that_do_not_survive_saving_are_announced():
    rows = [row(f"{i}", flipped_saved=i > 0) for i in range(10)]
    assert summarise(rows)["flip_rate_saved"]["value"] == 0.9
    assert "smaller than one grey level" in summarise(rows)["warning"]


def test_what_cannot_be_computed_has_a_reason_and_no_number():
    summary = summarise([failure("x")])
    for key in ("flip_rate", "flip_rate_saved", "l1", "delta_p", "s_per_image"):
        assert "value" not in summary[key]
        assert summary[key]["undefined"]
