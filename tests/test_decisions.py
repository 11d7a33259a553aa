"""Winners, margins and divergences of logits that were computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from cfe_lightning.decisions import (
    alternative_class,
    decides_for,
    kl_between_logits,
    kl_from_uniform,
    lead,
    leads,
    margin,
    probability,
    runner_up,
    target_margin,
)

# Winner.


def test_the_runner_up_is_never_the_predicted_class() -> None:
    torch.manual_seed(0)
    logits = torch.randn(200, 4)
    logits[:50, 1:] = 0  # ties
    assert not (runner_up(logits) == logits.argmax(dim=1)).any()
    assert not decides_for(torch.zeros(1, 3), torch.tensor([0])).any()


def test_the_alternative_is_never_the_own_class_and_uniform_over_the_others():
    torch.manual_seed(0)
    label = torch.zeros(3000, dtype=torch.int64)
    counts = alternative_class(label, 4).bincount(minlength=4)
    assert counts[0] == 0
    chi_square = ((counts[1:] - 1000.0).square() / 1000).sum()
    assert chi_square < 13.8  # 0.1 % level, two degrees of freedom


def test_two_classes_have_one_alternative():
    assert alternative_class(torch.tensor([0, 1, 1]), 2).tolist() == [1, 0, 0]


@pytest.mark.parametrize("question", [decides_for, probability, lead, target_margin, leads])
def test_a_path_is_answered_like_its_steps(question) -> None:
    logits, target = torch.randn(5, 4, 3), torch.tensor([0, 1, 2, 0, 1])
    for step, along in zip(logits.unbind(dim=1), question(logits, target).unbind(dim=1), strict=True):
        assert torch.equal(question(step, target), along)
    assert torch.equal(question(logits, 2), question(logits, torch.full((5,), 2)))


# Margins.


def test_leading_takes_more_than_a_tie() -> None:
    probabilities = torch.tensor([[[0.5, 0.5], [0.509, 0.491], [0.511, 0.489]], [[0.2, 0.8], [0.5, 0.5], [0.8, 0.2]]])
    found = leads(probabilities.log(), torch.tensor([0, 1]))
    assert found.tolist() == [[False, False, True], [True, False, False]]
    assert not leads(torch.tensor([[[0.4, 0.35, 0.25]]]).log(), torch.tensor([1])).any()


def test_margins_by_hand() -> None:
    logits, target = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0]]), torch.tensor([0, 2])
    assert margin(logits, target, torch.tensor([1, 0])).tolist() == [2, 1]
    assert lead(logits, target).tolist() == [1, -4]


def test_the_margin_of_two_classes_is_their_difference() -> None:
    logits = torch.tensor([[[1.0, 4.0]], [[2.0, -3.0]]])
    assert target_margin(logits, 1).tolist() == [[3], [-5]]
    assert target_margin(logits, 0).tolist() == [[-3], [5]]


@pytest.mark.parametrize("target", range(3))
def test_the_margin_of_three_classes_is_the_log_odds(target: int) -> None:
    logits = torch.tensor([0.0, math.log(2), math.log(5)])
    odds = [1 / 7, 2 / 6, 5 / 3][target]
    assert target_margin(logits, target).item() == pytest.approx(math.log(odds), abs=1e-6)


# Divergences.


def test_kl_is_zero_for_shifted_logits_and_positive_otherwise():
    logits = torch.randn(4, 5)
    assert kl_between_logits(logits, logits + 3).item() == pytest.approx(0, abs=1e-6)
    assert kl_between_logits(logits, torch.randn(4, 5)).item() > 0


def test_kl_from_uniform_has_its_closed_form():
    probabilities = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    expected = [0.0, 0.5 * torch.log(torch.tensor(0.5 / 0.9)) + 0.5 * torch.log(torch.tensor(0.5 / 0.1))]
    torch.testing.assert_close(kl_from_uniform(probabilities.log()), torch.tensor(expected), atol=1e-6, rtol=0)
    assert kl_from_uniform(torch.zeros(1, 3) + 5).item() == 0
