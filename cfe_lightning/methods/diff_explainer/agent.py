"""The agent of DiffExplainer: a linear map from semantic codes to the classifier's features, and the step it implies.

Source: DiffExplainer (MICCAI 2024, arXiv 2406.15182). The map and the classifier's last layer are both linear, so the
agent's gradient is known in closed form and a step changes the agent's margin by an exact amount. Pure functions.

Shapes: N samples, B images, D entries of the code, F features, K classes.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.adam import adam
from torchmetrics.functional import classification

from cfe_lightning.decisions import kl_between_logits, margin

#: What the agent is fitted to: the classifier's features ("l1", "mse") or its decisions ("kl").
Alignment = Literal["l1", "mse", "kl"]
#: The metric in which a step is the shortest one: raw codes, entries in units of their spread, or codes in units of
#: their covariance, which keeps the edit plausible under the data.
StepMetric = Literal["identity", "diagonal", "covariance"]
METRICS: tuple[StepMetric, ...] = ("identity", "diagonal", "covariance")

#: Settings of ``torch.optim.Adam`` in the form of its function, which has no defaults.
_ADAM: dict[str, Any] = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, amsgrad=False, maximize=False)
#: Standard deviation up to which an entry of the code counts as constant.
_SMALLEST_SPREAD = 1e-8


class CodeStatistics(NamedTuple):
    """Mean [D], standard deviation [D], which is positive, and covariance [D, D] of the codes, in float64."""

    mean: Tensor
    spread: Tensor
    covariance: Tensor


def code_statistics(codes: Tensor) -> CodeStatistics:
    """Measures mean, spread and covariance of codes [N, D]; constant entries get the spread 1."""
    codes = codes.double()
    mean = codes.mean(dim=0)
    covariance = (codes - mean).T @ (codes - mean) / max(len(codes) - 1, 1)
    spread = covariance.diagonal().sqrt()
    spread = torch.where(spread > _SMALLEST_SPREAD, spread, 1.0)
    return CodeStatistics(mean, spread, covariance)


def fit_ridge(codes: Tensor, features: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Regresses features [N, F] on standardised codes [N, D], in float64; returns weight [F, D] and bias [F].

    The squared weights are penalised by ``penalty`` times the number of samples; the bias is not penalised.
    """
    codes, features = codes.double(), features.double()
    code_mean, feature_mean = codes.mean(dim=0), features.mean(dim=0)
    centred = codes - code_mean
    gram = centred.T @ centred
    gram.diagonal().add_(penalty * len(codes))
    weight = torch.linalg.solve(gram, centred.T @ (features - feature_mean)).T
    return weight, feature_mean - weight @ code_mean


def fit_offset(logits: Tensor, wanted: Tensor) -> Tensor:
    """Fits one constant per class, [K], added to logits [N, K] so that KL(wanted || logits) is smallest.

    An agent fitted to features ranks images like the classifier long before it shares the classifier's threshold. The
    offset moves the threshold and leaves every direction as it is. The problem is convex.
    """
    logits = logits.detach().double()
    target = wanted.detach().double().softmax(dim=1)
    with torch.enable_grad():
        offset = torch.zeros(logits.shape[1], dtype=torch.float64, device=logits.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([offset], max_iter=100, line_search_fn="strong_wolfe")

        # Equal to the divergence up to a constant.
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(logits + offset, target)
            loss.backward()
            return loss

        optimizer.step(closure)

    # A common shift of all logits changes no probability.
    offset = offset.detach()
    return offset - offset.mean()


def alignment_loss(features: Tensor, wanted: Tensor, logits: Tensor, wanted_logits: Tensor, kind: Alignment) -> Tensor:
    """Measures the distance of agent and classifier, []: by features [N, F], or KL(classifier || agent) by logits."""
    if kind == "kl":
        return kl_between_logits(wanted_logits, logits)
    return F.l1_loss(features, wanted) if kind == "l1" else F.mse_loss(features, wanted)


def alignment_gradient(
    features: Tensor, wanted: Tensor, wanted_logits: Tensor, head: tuple[Tensor, Tensor], kind: Alignment
) -> Tensor:
    """Differentiates ``alignment_loss`` by the agent's features, [N, F]; ``head`` is weight and bias of the logits."""
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
    """Trains an agent further with Adam on the ``alignment_loss``, in place; every process of a run computes the same.

    The gradient is written out and Adam is called as a function. A batch costs only a few small products, so autograd
    and the bookkeeping of an optimiser would take most of the time.

    The codes [N, D] are standardised. Features [N, F], logits [N, K] and the head between them, weight [K, F] and bias
    [K], are the classifier's. Every epoch is a pass over the codes in another order.
    """
    # The bias is the weight of an entry that is always 1: one tensor to update instead of two.
    codes = F.pad(codes, (0, 1), value=1.0)
    weight = torch.cat([agent.weight, agent.bias[:, None]], dim=1).detach()
    mean, square, taken = torch.zeros_like(weight), torch.zeros_like(weight), weight.new_zeros(())

    # Epochs.
    options = _ADAM | {"lr": learning_rate, "fused": True}
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        order = torch.randperm(len(codes), generator=generator).to(codes.device)
        shuffled = (values[order].split(batch_size) for values in (codes, features, logits))
        for code, wanted, wanted_logits in zip(*shuffled, strict=True):
            gradient = alignment_gradient(code @ weight.T, wanted, wanted_logits, head, kind)
            adam([weight], [gradient.T @ code], [mean], [square], [], [taken], **options)

    # Back into the layer.
    with torch.no_grad():
        agent.weight.copy_(weight[:, :-1])
        agent.bias.copy_(weight[:, -1])


def metric_matrix(kind: StepMetric, statistics: CodeStatistics, shrinkage: float = 0.05) -> Tensor:
    """Returns the matrix G of a step metric, [D, D] float64; ``shrinkage`` is the identity's share in "covariance"."""
    covariance = statistics.covariance
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    if kind == "identity":
        return identity
    if kind == "diagonal":
        return statistics.spread.square().diag()
    # The identity is scaled to the mean variance.
    return (1 - shrinkage) * covariance + shrinkage * covariance.diagonal().mean() * identity


def unit_step(gradient: Tensor, matrix: Tensor) -> Tensor:
    """Returns the shortest change of codes [B, D] in a metric [D, D] that moves a margin with this gradient by 1."""
    step = gradient @ matrix
    return step / (step * gradient).sum(dim=1, keepdim=True)


def travelled(step: Tensor, covariance: Tensor) -> Tensor:
    """Measures changes of the code [B, D] in standard deviations of the data along the change's own line, [B]."""
    length = step.norm(dim=1)
    along = ((step @ covariance) * step).sum(dim=1).clamp_min(1e-30).sqrt() / length
    return length / along


def agreement(logits: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Measures how well an agent's logits [N, K] predict the decisions of the classifier's logits [N, K].

    Returns:
        ``auc``, ``accuracy``, ``sensitivity``, ``specificity`` and ``f1`` (of class 1 for two classes, otherwise the
        mean over classes), ``kl`` (classifier || agent) and ``margin_correlation``.
    """
    # Decisions.
    num_classes, truth, p = logits.shape[1], wanted.argmax(dim=1), logits.softmax(dim=1)
    options: dict[str, Any] = {"task": "multiclass", "num_classes": num_classes, "average": "macro"}
    if num_classes == 2:
        p, options = p[:, 1], {"task": "binary"}
    values: dict[str, Any] = {
        "auc": classification.auroc(p, truth, **options),
        "accuracy": classification.accuracy(p, truth, **options | {"average": "micro"}),
        "sensitivity": classification.recall(p, truth, **options),
        "specificity": classification.specificity(p, truth, **options),
        "f1": classification.f1_score(p, truth, **options),
    }

    # Margins over the runner-up, signed by the order of the two classes: unsigned, all the classifier's are positive.
    other = wanted.scatter(1, truth[:, None], -torch.inf).argmax(dim=1)
    sign = torch.where(truth < other, 1.0, -1.0).to(logits)
    margins = [sign * margin(one, truth, other) for one in (logits, wanted)]
    values["kl"] = kl_between_logits(wanted, logits)
    values["margin_correlation"] = torch.corrcoef(torch.stack(margins))[0, 1]
    return values
