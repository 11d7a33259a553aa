"""Which attributes an edit changes besides the one that was asked for, and does it drag along what merely goes with it?

Source: evaluation, sections 3.6, 6.4 and 6.5; DiVE (Rodriguez et al. 2021) for MNAC, DiME (Jeanneret et al. 2022) for
CD. Decisions are those of a multi-label network on the same images before and after, [B, L] bool; labels are counted
from 0. All numbers are float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attributes_changed(before: Tensor, after: Tensor, without: int | None = None) -> Tensor:
    """Number of labels that are decided otherwise after the edit, whose mean over images is MNAC (6.4).

    Args:
        before: Decisions on the images, [B, L] bool.
        after: Decisions on their edits, [B, L] bool.
        without: A label that does not count, which is the one that was asked for; None counts all.

    Returns:
        [B], 0 to L.

    Raises:
        ValueError: If the two are not decisions of the same shape, or there is no such label.
    """
    changed = _decisions(before) != _decisions(after, like=before)
    if without is not None:
        _check_label(without, changed.shape[1])
        changed[:, without] = False
    return changed.sum(dim=1).double()


def collateral(before: Tensor, after: Tensor, index: int) -> Tensor:
    """``attributes_changed`` in the eyes of the explained network itself, without the asked label ``index``, [B] (3.6).

    Raises:
        ValueError: As ``attributes_changed``.
    """
    return attributes_changed(before, after, without=index)


def attribute_correlations(labels: Tensor, asked: int) -> Tensor:
    """Pearson correlation of every label with the asked one over a table of labels (6.5, c_data).

    Args:
        labels: One row per image, [N, L], of any two numbers such as 0 and 1 or -1 and 1.
        asked: Index of the asked label.

    Returns:
        [L] in [-1, 1]; 0 where a label, or the asked one, is the same in all rows.

    Raises:
        ValueError: If the table has fewer than two rows, or there is no such label.
    """
    if labels.ndim != 2 or len(labels) < 2:
        raise ValueError(f"Correlations need labels [N, L] of at least two images, got {list(labels.shape)}.")
    _check_label(asked, labels.shape[1])
    values = labels.double()
    constant = (values == values[:1]).all(dim=0)
    centred = values - values.mean(dim=0)
    centred = centred / centred.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    found = (centred * centred[:, asked : asked + 1]).sum(dim=0).clamp(-1, 1)
    return found.masked_fill(constant | constant[asked], 0.0)


def correlation_difference(before: Tensor, after: Tensor, asked: int, table_correlations: Tensor) -> float:
    """How far the labels that change together are from those that go together in the data: CD (6.5), lower is better.

    A sum over labels, so it grows with their number L: divide by L to compare oracles.

    Args:
        before: The oracle's decisions on the images, [B, L] bool.
        after: Its decisions on the edits, [B, L] bool.
        asked: Index of the asked label.
        table_correlations: ``attribute_correlations`` of the labels of the data, [L].

    Returns:
        A number from 0 to 2 L.

    Raises:
        ValueError: If there are fewer than two images, or the shapes do not fit.
    """
    change = _decisions(after).double() - _decisions(before, like=after).double()
    if table_correlations.shape != change.shape[1:]:
        raise ValueError(
            f"{change.shape[1]} decisions an image need as many correlations, got {list(table_correlations.shape)}."
        )
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
