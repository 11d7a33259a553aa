"""Attributes that an edit changes besides the asked one, and their correlations compared with those of the data.

MNAC is of DiVE (arXiv 2103.10226), CD of DiME (arXiv 2203.15636). Decisions are those of a multi-label network on the
same images before and after an edit, [B, L] bool; labels are counted from 0. All numbers are float64.
"""

from functools import partial

import torch
from torch import Tensor

from cfe_lightning.metrics.case import Case, Kept
from cfe_lightning.metrics.metric import rows
from cfe_lightning.metrics.statistics import Measurement, undefined

COLLATERAL = rows("""
needs: counterfactual multi_label
key         better  range     meaning
collateral  lower   [0, L-1]  other labels of the classifier that changed with the one asked for
""")
ORACLE = rows("""
needs: counterfactual
key          better  range     needs   published  meaning
mnac         lower   [0, A]    oracle  flipped
    attributes that changed in the eyes of the oracle, the one asked for included
mnac_others  lower   [0, A-1]  asked   flipped    as mnac without the attribute asked for
cd           lower   [0, 2A]   table   flipped
    how differently attributes go along in edits and in the data, summed over attributes
cd_mean      lower   [0, 2]    table   flipped    cd per attribute
""")


def measure_collateral(case: Case) -> dict[str, Tensor]:
    """Counts the other labels of the explained network that change with the asked one, [B] by metric key."""
    spec = case.judge.spec
    assert spec.label is not None, "the need multi_label is met"
    # A label is decided at one half.
    before, after = (case.judge.label_probabilities(image) > 0.5 for image in (case.image, case.shown))
    return {"collateral": attributes_changed(before, after, spec.class_names.index(spec.label))}


def measure_oracle(case: Case) -> dict[str, Tensor]:
    """Counts the attributes that change in the eyes of the oracle, [B] by metric key, and keeps its decisions."""
    oracle, asked = case.instruments.oracle, case.instruments.asked
    if oracle is None:
        return {}
    before, after = (oracle.label_probabilities(image) > 0.5 for image in (case.image, case.shown))
    found = {"mnac": attributes_changed(before, after)}
    if asked is not None:
        found["mnac_others"] = attributes_changed(before, after, asked)
    # Correlations exist for a set only.
    if "table" in case.available:
        found |= {"attributes/before": before.cpu(), "attributes/after": after.cpu()}
    return found


def summarise(kept: Kept) -> dict[str, Measurement]:
    """Compares the correlations of changed attributes with those of the data."""
    asked, correlations = kept.instruments.asked, kept.instruments.correlations
    decided = kept.rows["attributes"]
    if not decided or asked is None or correlations is None:
        return {}

    # Population.
    total, num_labels = decided["before"].shape
    before, after = decided["before"][kept.members], decided["after"][kept.members]
    if len(before) < 2:
        return dict.fromkeys(("cd", "cd_mean"), undefined("fewer than 2 counterfactuals", total, kept.population))

    # Sum and mean over labels.
    cd = correlation_difference(before, after, asked, correlations.cpu())
    measured = partial(Measurement, n_used=len(before), n_total=total, population=kept.population)
    return {"cd": measured(value=cd), "cd_mean": measured(value=cd / num_labels)}


def attributes_changed(before: Tensor, after: Tensor, without: int | None = None) -> Tensor:
    """Counts the labels that are decided otherwise after the edit, [B] from 0 to L; the mean over images is MNAC.

    The label ``without``, such as the asked one, does not count; None counts all.

    Raises:
        ValueError: If the two are not decisions of the same shape, or there is no such label.
    """
    changed = _decisions(before) != _decisions(after, like=before)
    if without is not None:
        _check_label(without, changed.shape[1])
        changed[:, without] = False
    return changed.sum(dim=1).double()


def attribute_correlations(labels: Tensor, asked: int) -> Tensor:
    """Computes the Pearson correlation of every label with that of index ``asked``, [L] in [-1, 1].

    Labels are rows per image, [N, L], of any two numbers such as 0 and 1 or -1 and 1. A label that is the same in all
    rows has correlation 0.

    Raises:
        ValueError: If the table has fewer than two rows, or there is no such label.
    """
    if labels.ndim != 2 or len(labels) < 2:
        raise ValueError(f"Correlations need labels [N, L] of at least two images, got {list(labels.shape)}.")
    _check_label(asked, labels.shape[1])
    # A constant's computed mean may differ from it by rounding, so constants are found by comparison.
    values = labels.double()
    constant = (values == values[:1]).all(dim=0)
    centred = values - values.mean(dim=0)
    centred = centred / centred.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    found = (centred * centred[:, asked : asked + 1]).sum(dim=0).clamp(-1, 1)
    return found.masked_fill(constant | constant[asked], 0.0)


def correlation_difference(before: Tensor, after: Tensor, asked: int, table_correlations: Tensor) -> float:
    """Sums the differences of correlations with the label ``asked`` between changes and the data: CD, lower is better.

    The sum is from 0 to 2 L: divide by the number L of labels to compare oracles. ``table_correlations`` are the
    ``attribute_correlations`` of the labels of the data, [L].

    Raises:
        ValueError: If there are fewer than two images, or the shapes do not fit.
    """
    change = _decisions(after).double() - _decisions(before, like=after).double()
    if table_correlations.shape != change.shape[1:]:
        raise ValueError(
            f"{change.shape[1]} decisions an image need as many correlations, got {list(table_correlations.shape)}."
        )
    # Changes are -1, 0 or 1.
    found = attribute_correlations(change, asked)
    return float((table_correlations.to(found) - found).abs().sum())


def _decisions(values: Tensor, like: Tensor | None = None) -> Tensor:
    if values.dtype != torch.bool or values.ndim != 2 or (like is not None and values.shape != like.shape):
        expected = "[B, L]" if like is None else str(list(like.shape))
        raise ValueError(
            f"Decisions are boolean, {expected}, got {list(values.shape)} of {values.dtype}: compare probabilities "
            "with 0.5 first."
        )
    return values


def _check_label(index: int, num_labels: int) -> None:
    if not 0 <= index < num_labels:
        raise ValueError(f"There is no label {index} among {num_labels}.")
