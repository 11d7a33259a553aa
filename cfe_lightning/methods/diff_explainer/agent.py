"""The student of DiffExplainer: a linear map from semantic codes to a classifier's features, and the step it implies.

Pure functions. Source: "DiffExplainer", MICCAI 2024, and its specification, sections 4 and 5. Everything is linear, so
the agent's gradient is known in closed form and one step has an exact effect on the agent.

Shapes: N samples, B images, D entries of the code, F features, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.adam import adam
from torchmetrics.functional import classification

from cfe_lightning.decisions import kl_between_logits

#: What the agent is fitted to: the classifier's features (l1, mse), or its decisions (kl).
Alignment = Literal["l1", "mse", "kl"]
#: The metric in which a step is the shortest one: codes as they are, per entry in units of its spread, or in units of
#: the codes' covariance, which keeps the edit plausible under the data.
StepMetric = Literal["identity", "diagonal", "covariance"]
METRICS: tuple[StepMetric, ...] = ("identity", "diagonal", "covariance")


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeStatistics:
    """Where codes lie.

    Attributes:
        mean: [D] float64.
        spread: Standard deviations [D], positive.
        covariance: [D, D].
    """

    mean: Tensor
    spread: Tensor
    covariance: Tensor


def code_statistics(codes: Tensor) -> CodeStatistics:
    """Mean, spread and covariance of codes [N, D]; entries that never change get the spread 1."""
    codes = codes.double()
    mean = codes.mean(dim=0)
    covariance = (codes - mean).T @ (codes - mean) / max(len(codes) - 1, 1)
    spread = covariance.diagonal().sqrt()
    return CodeStatistics(mean=mean, spread=torch.where(spread > 1e-8, spread, 1.0), covariance=covariance)


def fit_ridge(codes: Tensor, features: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Least squares with a penalty on the weights, in float64.

    Args:
        codes: Standardised, [N, D].
        features: What they should give, [N, F].
        penalty: In units of the number of samples; the bias is not penalised.

    Returns:
        Weight [F, D] and bias [F].
    """
    codes, features = codes.double(), features.double()
    code_mean, feature_mean = codes.mean(dim=0), features.mean(dim=0)
    centred = codes - code_mean
    gram = centred.T @ centred
    gram.diagonal().add_(penalty * len(codes))
    weight = torch.linalg.solve(gram, centred.T @ (features - feature_mean)).T
    return weight, feature_mean - weight @ code_mean


def fit_offset(logits: Tensor, wanted: Tensor) -> Tensor:
    """The constant to be added to logits [N, K] that brings them nearest to others [N, K] in KL(wanted || logits), [K].

    An agent of the features ranks images as the classifier does long before it puts the threshold where the classifier
    has it; an offset mends that and leaves every direction as it is. The problem is convex.
    """
    logits = logits.detach().double()
    target = wanted.detach().double().softmax(dim=1)
    with torch.enable_grad():
        offset = torch.zeros(logits.shape[1], dtype=torch.float64, device=logits.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([offset], max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(logits + offset, target)
            loss.backward()
            return loss

        optimizer.step(closure)
    offset = offset.detach()
    return offset - offset.mean()


def alignment_loss(features: Tensor, wanted: Tensor, logits: Tensor, wanted_logits: Tensor, kind: Alignment) -> Tensor:
    """Distance of agent and classifier: features [N, F] and logits [N, K] of both; KL(classifier || agent)."""
    if kind == "kl":
        return kl_between_logits(wanted_logits, logits)
    return F.l1_loss(features, wanted) if kind == "l1" else F.mse_loss(features, wanted)


def alignment_gradient(
    features: Tensor, wanted: Tensor, wanted_logits: Tensor, head: tuple[Tensor, Tensor], kind: Alignment
) -> Tensor:
    """How ``alignment_loss`` changes with the agent's features, [N, F]; the head makes logits of them."""
    if kind == "kl":
        weight, bias = head
        logits = features @ weight.T + bias
        return (logits.softmax(dim=1) - wanted_logits.softmax(dim=1)) @ weight / len(logits)
    difference = features - wanted
    return (difference.sign() if kind == "l1" else 2 * difference) / difference.numel()


def refine(
    agent: nn.Linear,
    codes: Tensor,
    features: Tensor,
    logits: Tensor,
    head: tuple[Tensor, Tensor],
    *,
    kind: Alignment,
    epochs: int,
    learning_rate: float,
    batch_size: int = 64,
) -> None:
    """Trains an agent further with Adam, in place; the same on every process.

    The gradient is written out, and Adam is called as a function: that of so small a batch is a few products, and
    autograd and an optimiser's bookkeeping would take most of the time, which every process of a run spends again.

    Args:
        agent: [D] -> [F].
        codes: Standardised, [N, D].
        features: The classifier's, [N, F].
        logits: The classifier's, [N, K].
        head: Weight [K, F] and bias [K] that make logits of features.
        kind: See ``alignment_loss``.
        epochs: Passes over the codes, each in another order.
        learning_rate: Adam's.
        batch_size: Codes of one step.
    """
    # The bias is the weight of an entry that is always 1: one tensor to be moved instead of two.
    codes = F.pad(codes, (0, 1), value=1.0)
    weight = torch.cat([agent.weight, agent.bias[:, None]], dim=1).detach()
    mean, square, taken = torch.zeros_like(weight), torch.zeros_like(weight), weight.new_zeros(())
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        order = torch.randperm(len(codes), generator=generator).to(codes.device)
        shuffled = (values[order].split(batch_size) for values in (codes, features, logits))
        for code, wanted, wanted_logits in zip(*shuffled, strict=True):
            gradient = alignment_gradient(code @ weight.T, wanted, wanted_logits, head, kind)
            adam(
                [weight],
                [gradient.T @ code],
                [mean],
                [square],
                [],
                [taken],
                fused=True,
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=learning_rate,
                weight_decay=0.0,
                eps=1e-8,
                maximize=False,
            )
    with torch.no_grad():
        agent.weight.copy_(weight[:, :-1])
        agent.bias.copy_(weight[:, -1])


def metric_matrix(kind: StepMetric, statistics: CodeStatistics, shrinkage: float = 0.05) -> Tensor:
    """The matrix G of a step metric, [D, D] float64; ``shrinkage`` mixes the covariance with a multiple of identity."""
    covariance = statistics.covariance
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    if kind == "identity":
        return identity
    if kind == "diagonal":
        return statistics.spread.square().diag()
    return (1 - shrinkage) * covariance + shrinkage * covariance.diagonal().mean() * identity


def unit_step(gradient: Tensor, matrix: Tensor) -> Tensor:
    """The change of the code [B, D] that moves the agent's margin by 1 and is the shortest in a metric [D, D]."""
    step = gradient @ matrix
    return step / (step * gradient).sum(dim=1, keepdim=True)


def travelled(step: Tensor, covariance: Tensor) -> Tensor:
    """Length of changes [B, D] in standard deviations of the data along their own line, [B] (section 5.3)."""
    length = step.norm(dim=1)
    along = ((step @ covariance) * step).sum(dim=1).clamp_min(1e-30).sqrt() / length
    return length / along


def agreement(logits: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """How well an agent's logits [N, K] tell the classifier's decisions, given its logits [N, K].

    ``auc``, ``accuracy``, ``sensitivity``, ``specificity``, ``f1`` (of class 1 for two classes, else the mean over
    classes), ``kl`` (classifier || agent) and ``margin_correlation``.
    """
    num_classes, truth = logits.shape[1], wanted.argmax(dim=1)
    if num_classes == 2:
        p = logits.softmax(dim=1)[:, 1]
        values = {
            "auc": classification.binary_auroc(p, truth),
            "accuracy": classification.binary_accuracy(p, truth),
            "sensitivity": classification.binary_recall(p, truth),
            "specificity": classification.binary_specificity(p, truth),
            "f1": classification.binary_f1_score(p, truth),
        }
    else:
        p = logits.softmax(dim=1)
        values = {
            "auc": classification.multiclass_auroc(p, truth, num_classes),
            "accuracy": classification.multiclass_accuracy(p, truth, num_classes, average="micro"),
            "sensitivity": classification.multiclass_recall(p, truth, num_classes),
            "specificity": classification.multiclass_specificity(p, truth, num_classes),
            "f1": classification.multiclass_f1_score(p, truth, num_classes),
        }
    other = wanted.scatter(1, truth[:, None], -torch.inf).argmax(dim=1)
    # Oriented at random, or every margin of the classifier would be positive.
    sign = torch.where(truth < other, 1.0, -1.0).to(logits)
    margins = [
        sign * (one.gather(1, truth[:, None]) - one.gather(1, other[:, None])).squeeze(1) for one in (logits, wanted)
    ]
    values["kl"] = kl_between_logits(wanted, logits)
    values["margin_correlation"] = torch.corrcoef(torch.stack(margins))[0, 1]
    return values
