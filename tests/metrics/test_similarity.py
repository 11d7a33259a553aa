"""Tests of ``cfe_lightning.metrics.similarity`` on numbers computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from cfe_lightning.metrics.similarity import cosine, feature_distance, verified


def test_cosines_of_the_document() -> None:
    one, other = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 1.0], [-1.0, 0.0]])
    found = cosine(one, other)
    assert found.tolist() == pytest.approx([0.707107, -1.0], abs=1e-5)
    assert float(found.mean()) == pytest.approx(-0.146447, abs=1e-5)


def test_face_similarity_and_verification_of_the_document() -> None:
    one, other = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 1.0], [-1.0, 0.0]])
    cosines = cosine(one, other)
    assert verified(cosines).tolist() == [True, False]
    assert float(verified(cosines).float().mean()) == 0.5
    assert float(cosines.mean()) == pytest.approx(-0.146447, abs=1e-6)


def test_the_threshold_itself_is_not_enough() -> None:
    assert verified(torch.tensor([0.5, 0.5001, 0.3])).tolist() == [False, True, False]
    assert verified(torch.tensor([0.5, 0.5001, 0.3]), threshold=0.2).all()


@pytest.mark.parametrize("value", [math.nan, 1.1, -math.inf])
def test_what_is_no_cosine_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"Cosines lie in \[-1, 1\]"):
        verified(torch.tensor([0.3, value]))


def test_the_documents_number() -> None:
    one, other = (torch.tensor(values).view(1, 2, 1, 1) for values in ((3.0, 4.0), (4.0, 3.0)))
    assert feature_distance([one], [other]).item() == pytest.approx(0.08)


def test_it_is_zero_for_the_same_symmetric_and_a_mean_over_stages() -> None:
    generator = torch.Generator().manual_seed(0)
    one = [torch.randn(3, 4, 5, 5, generator=generator), torch.randn(3, 8, 2, 2, generator=generator)]
    other = [torch.randn(3, 4, 5, 5, generator=generator), one[1]]
    assert feature_distance(one, one).tolist() == [0, 0, 0]
    there, back = feature_distance(one, other), feature_distance(other, one)
    assert torch.equal(there, back)
    assert (there > 0).all()
    # The second stage is the same: it halves the mean.
    torch.testing.assert_close(there * 2, feature_distance(one[:1], other[:1]))
    # Brightness of a map says nothing, its direction does.
    torch.testing.assert_close(feature_distance([3 * one[0]], [one[0]]), torch.zeros(3), rtol=0, atol=1e-6)
