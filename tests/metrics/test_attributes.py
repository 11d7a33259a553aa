"""Tests of ``cfe_lightning.metrics.attributes`` on tables whose numbers are computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchmetrics.functional import pearson_corrcoef

from cfe_lightning.metrics.attributes import attribute_correlations, attributes_changed, correlation_difference

#: Labels q, a and b of four images, and what an oracle sees before and after edits of four others.
TABLE = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0], [0, 1, 1]])
BEFORE = torch.tensor([[0, 0, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1]]).bool()
AFTER = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0], [0, 0, 0]]).bool()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5


def test_collateral_leaves_the_asked_label_out() -> None:
    before, after = torch.tensor([[1, 0, 1, 0]]).bool(), torch.tensor([[1, 1, 0, 0]]).bool()
    assert attributes_changed(before, after, 1).tolist() == [1]
    assert attributes_changed(before, after, 2).tolist() == [1]
    assert attributes_changed(before, after, 0).tolist() == [2]
    assert attributes_changed(before, before, 1).tolist() == [0]


def test_attributes_changed_of_the_document() -> None:
    changed = attributes_changed(BEFORE, AFTER)
    assert changed.dtype == torch.float64
    assert changed.tolist() == [2, 1, 2, 2]
    assert float(changed.mean()) == 1.75
    # Every edit changes the first, as it was asked to.
    assert attributes_changed(BEFORE, AFTER, without=0).tolist() == [1, 0, 1, 1]


def test_counting_changes_nothing_of_what_it_counts() -> None:
    before, after = BEFORE.clone(), AFTER.clone()
    attributes_changed(before, after, 0)
    assert torch.equal(before, BEFORE)
    assert torch.equal(after, AFTER)


def test_correlations_of_the_document() -> None:
    found = attribute_correlations(TABLE, 0)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([1, 0.577350, 0], abs=1e-6)
    # CelebA writes -1 for 0.
    torch.testing.assert_close(attribute_correlations(TABLE * 2 - 1, 0), found)


def test_correlations_of_the_changes_of_the_document() -> None:
    change = AFTER.int() - BEFORE.int()
    assert change.tolist() == [[1, 1, 0], [1, 0, 0], [-1, -1, 0], [-1, 0, -1]]
    assert attribute_correlations(change, 0).tolist() == pytest.approx([1, 0.707107, 0.577350], abs=1e-6)


def test_the_correlation_difference_of_the_document() -> None:
    expected = abs(0.577350 - 0.707107) + 0.577350
    assert expected == pytest.approx(0.707107, abs=1e-6)
    found = correlation_difference(BEFORE, AFTER, 0, attribute_correlations(TABLE, 0))
    assert found == pytest.approx(0.707107, abs=1e-6)


def test_edits_correlated_as_the_data_differ_by_nothing() -> None:
    labels = drawn(60, 5)
    # From nothing to the labels themselves: what changes is the table.
    found = correlation_difference(torch.zeros_like(labels), labels, 3, attribute_correlations(labels, 3))
    assert found == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("asked", [0, 2])
def test_correlations_are_those_of_torchmetrics(asked: int) -> None:
    labels = drawn(50, 4).double()
    expected = [pearson_corrcoef(labels[:, index], labels[:, asked]).item() for index in range(4)]
    assert attribute_correlations(labels, asked).tolist() == pytest.approx(expected, abs=1e-9)


def test_a_constant_goes_with_nothing() -> None:
    labels = drawn(19, 3).double()
    labels[:, 1] = 0.1  # whose mean over 19 rows is not quite 0.1
    assert attribute_correlations(labels, 0)[1] == 0
    assert attribute_correlations(labels, 1).tolist() == [0, 0, 0]
    # Edits that never change the asked attribute are as far away as the data's own correlations reach.
    still = correlation_difference(BEFORE, BEFORE, 0, attribute_correlations(TABLE, 0))
    assert still == pytest.approx(1.577350, abs=1e-6)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Decisions are boolean, \[B, L\], got \[4, 3\] of torch.float32"):
        attributes_changed(BEFORE.float(), AFTER)
    with pytest.raises(ValueError, match=r"Decisions are boolean, \[4, 3\], got \[3, 3\]"):
        attributes_changed(BEFORE, AFTER[:3])
    for index in (-1, 3):
        with pytest.raises(ValueError, match=f"There is no label {index} among 3"):
            attributes_changed(BEFORE, AFTER, index)
        with pytest.raises(ValueError, match=f"There is no label {index} among 3"):
            attribute_correlations(TABLE, index)
    with pytest.raises(ValueError, match=r"at least two images, got \[1, 3\]"):
        correlation_difference(BEFORE[:1], AFTER[:1], 0, torch.zeros(3))
    with pytest.raises(ValueError, match=r"3 decisions an image need as many correlations, got \[2\]"):
        correlation_difference(BEFORE, AFTER, 0, torch.zeros(2))
