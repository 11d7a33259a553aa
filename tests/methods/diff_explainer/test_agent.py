"""Tests of ``cfe_lightning.methods.diff_explainer.agent``: closed forms against autograd and by hand."""

from __future__ import annotations

import copy
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from cfe_lightning.decisions import kl_between_logits
from cfe_lightning.methods.diff_explainer.agent import (
    METRICS,
    Alignment,
    StepMetric,
    agreement,
    alignment_gradient,
    alignment_loss,
    code_statistics,
    fit_offset,
    fit_ridge,
    metric_matrix,
    refine,
    travelled,
    unit_step,
)


def codes(count: int = 400, dim: int = 5) -> Tensor:
    """Draws correlated codes of very different spreads, [N, D]."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64) * torch.tensor([0.01, 0.1, 1, 3, 10])
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mixing + 4


def problem(num_classes: int = 3, batch: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(num_classes, 5, generator=generator, dtype=torch.float64)
    bias = torch.randn(num_classes, generator=generator, dtype=torch.float64)
    code = torch.randn(batch, 5, generator=generator, dtype=torch.float64)
    source = torch.arange(batch) % num_classes
    return weight, bias, code, source, (source + 1) % num_classes


def test_statistics_are_those_of_the_codes() -> None:
    given = codes()
    statistics = code_statistics(given)
    torch.testing.assert_close(statistics.mean, given.mean(dim=0))
    torch.testing.assert_close(statistics.spread, given.std(dim=0))
    torch.testing.assert_close(statistics.covariance, given.T.cov())


def test_an_entry_that_never_changes_can_be_divided_by() -> None:
    given = codes()
    given[:, 2] = 7
    assert code_statistics(given).spread[2] == 1


@pytest.mark.parametrize("kind", METRICS)
def test_a_step_changes_the_agents_margin_by_exactly_as_much_as_asked(kind: StepMetric) -> None:
    weight, bias, code, source, target = problem()
    matrix = metric_matrix(kind, code_statistics(codes()))
    gradient = weight[target] - weight[source]
    moved = code + 2.5 * unit_step(gradient, matrix)
    rows = torch.arange(len(code))
    margins = [(one @ weight.T + bias) for one in (code, moved)]
    change = [margin[rows, target] - margin[rows, source] for margin in margins]
    torch.testing.assert_close(change[1] - change[0], torch.full((6,), 2.5, dtype=torch.float64))


def test_a_step_is_the_shortest_one_in_its_metric() -> None:
    """Checks that the step is orthogonal, in the metric, to all changes that leave the margin alone."""
    weight, _, _, source, target = problem()
    matrix = metric_matrix("covariance", code_statistics(codes()), shrinkage=0.0)
    gradient = weight[target] - weight[source]
    step = unit_step(gradient, matrix)
    inverse = torch.linalg.inv(matrix)
    sideways = torch.randn(6, 5, dtype=torch.float64)
    sideways -= gradient * ((sideways * gradient).sum(dim=1) / gradient.square().sum(dim=1))[:, None]
    inner = ((step @ inverse) * sideways).sum(dim=1)
    torch.testing.assert_close(inner, torch.zeros(6, dtype=torch.float64), atol=1e-6, rtol=0)


def test_distances_are_standard_deviations_along_the_step() -> None:
    covariance = torch.diag(torch.tensor([4.0, 0.25], dtype=torch.float64))
    step = torch.tensor([[4.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert travelled(step, covariance).tolist() == [2.0, 2.0]


def test_the_metrics_are_those_of_the_specification() -> None:
    statistics = code_statistics(codes())
    torch.testing.assert_close(metric_matrix("identity", statistics), torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(metric_matrix("diagonal", statistics).diagonal(), statistics.spread**2)
    mixed = metric_matrix("covariance", statistics, shrinkage=0.2)
    expected = 0.8 * statistics.covariance + 0.2 * statistics.covariance.trace() / 5 * torch.eye(5)
    torch.testing.assert_close(mixed, expected)


def test_ridge_is_where_a_long_descent_ends() -> None:
    # Regression.
    given = code_statistics(codes())
    standardised = (codes() - given.mean) / given.spread
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    wanted = standardised @ torch.randn(5, 3, generator=generator, dtype=torch.float64) + noise
    weight, bias = fit_ridge(standardised, wanted, penalty=0.1)

    # Descent.
    variables = [torch.zeros(3, 5, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)]
    for variable in variables:
        variable.requires_grad_()
    optimizer = torch.optim.LBFGS(
        variables, max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        residual = standardised @ variables[0].T + variables[1] - wanted
        loss = residual.square().sum() / 400 + 0.1 * variables[0].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(weight, variables[0].detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(bias, variables[1].detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_the_offset_puts_the_threshold_where_the_classifier_has_it(num_classes: int) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(500, num_classes, generator=generator, dtype=torch.float64)
    planted = torch.linspace(-2, 3, num_classes, dtype=torch.float64)
    offset = fit_offset(logits, logits + planted)
    torch.testing.assert_close(offset, planted - planted.mean(), atol=1e-4, rtol=0)
    # On average, every class is as probable as for the classifier, whatever the logits are.
    wanted = torch.randn(500, num_classes, generator=generator, dtype=torch.float64) * 4
    said = (logits + fit_offset(logits, wanted)).softmax(dim=1).mean(dim=0)
    torch.testing.assert_close(said, wanted.softmax(dim=1).mean(dim=0), atol=1e-4, rtol=0)


def test_alignment_is_the_distance_it_is_called() -> None:
    said, wanted = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 1.0]])
    logits, decided = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.75, 0.25]]).log()
    assert alignment_loss(said, wanted, logits, decided, "l1").item() == 1.5
    assert alignment_loss(said, wanted, logits, decided, "mse").item() == 2.5
    # 0.75 log(0.75 / 0.5) + 0.25 log(0.25 / 0.5)
    assert alignment_loss(said, wanted, logits, decided, "kl").item() == pytest.approx(0.130812, abs=1e-6)


@pytest.mark.parametrize("kind", get_args(Alignment))
def test_the_gradient_of_the_alignment_is_autograds(kind: Alignment) -> None:
    said, wanted, decided = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4), torch.randn(6, 3)
    weight, bias = torch.randn(3, 4), torch.randn(3)
    loss = alignment_loss(said, wanted, said @ weight.T + bias, decided, kind)
    (expected,) = torch.autograd.grad(loss, said)
    torch.testing.assert_close(alignment_gradient(said, wanted, decided, (weight, bias), kind), expected)


@pytest.mark.parametrize("kind", ["l1", "kl"])
def test_refining_is_adam_on_the_alignment_in_every_order(kind: Alignment) -> None:
    code, wanted, decided = codes(count=40).float(), torch.randn(40, 4), torch.randn(40, 3)
    weight, bias = torch.randn(3, 4), torch.randn(3)
    agent = nn.Linear(5, 4)
    other = copy.deepcopy(agent)
    refine(agent, code, wanted, decided, (weight, bias), kind=kind, epochs=3, learning_rate=0.01, batch_size=16)

    # Adam and autograd.
    optimizer = torch.optim.Adam(other.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for rows in torch.randperm(40, generator=generator).split(16):
            said = other(code[rows])
            loss = alignment_loss(said, wanted[rows], said @ weight.T + bias, decided[rows], kind)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(agent.weight, other.weight, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(agent.bias, other.bias, atol=1e-5, rtol=1e-5)
    assert agent.weight.grad is None


def test_agreement_of_two_classes_counts_class_one_as_positive() -> None:
    wanted = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 3.0]])
    said = torch.tensor([[2.0, 0.0], [0.0, 0.5], [0.0, 1.0], [0.0, 2.0], [1.0, 0.0]])
    values = agreement(said, wanted)
    assert values["accuracy"].item() == pytest.approx(3 / 5)
    assert values["sensitivity"].item() == pytest.approx(2 / 3)
    assert values["specificity"].item() == pytest.approx(1 / 2)
    assert values["f1"].item() == pytest.approx(2 / 3)
    # Pairs (positive, negative): (1, -2), (1, .5), (2, -2), (2, .5) right, (-1, -2) right, (-1, .5) wrong.
    assert values["auc"].item() == pytest.approx(5 / 6)


def test_agreement_of_the_document() -> None:
    """Checks KL and accuracy of two images against values computed by hand."""
    wanted, said = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log(), torch.tensor([[0.8, 0.2], [0.4, 0.6]]).log()
    values = agreement(said, wanted)
    assert values["accuracy"].item() == 1
    assert values["kl"].item() == pytest.approx(0.064103, abs=1e-6)
    single = [kl_between_logits(wanted[i : i + 1], said[i : i + 1]).item() for i in range(2)]
    assert single == pytest.approx([0.036690, 0.091516], abs=1e-6)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_a_perfect_agent_agrees(num_classes: int) -> None:
    wanted = torch.randn(200, num_classes, generator=torch.Generator().manual_seed(0)).double()
    values = agreement(wanted, wanted)
    for name in ("accuracy", "sensitivity", "specificity", "f1", "margin_correlation"):
        assert values[name].item() == pytest.approx(1), name
    # One class against the rest: the probability of a class ranks images differently from the argmax.
    assert values["auc"].item() == pytest.approx(1) if num_classes == 2 else values["auc"].item() > 0.95
    assert values["kl"].item() == pytest.approx(0, abs=1e-9)
    assert agreement(-wanted, wanted)["margin_correlation"].item() < -0.99 if num_classes == 2 else True
