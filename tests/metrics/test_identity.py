"""Tests of ``cfe_lightning.metrics.identity``: the check numbers of evaluation, section 6.1."""

from __future__ import annotations

import math

import pytest
import torch

from cfe_lightning.metrics.identity import verified
from cfe_lightning.metrics.realism import cosine


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
