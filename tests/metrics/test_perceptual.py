"""Tests of ``cfe_lightning.metrics.perceptual``: the check number of evaluation, section 4.2."""

from __future__ import annotations

import pytest
import torch

from cfe_lightning.metrics.perceptual import feature_distance


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
