"""Batches of the toy's images, and numbers out of an evaluation's rows."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch.utils.data import DataLoader
from toy import ToyData

from cfe_lightning.evaluation.evaluate import evaluate
from cfe_lightning.evaluation.summary import ResultRow
from cfe_lightning.explanation import Explainer
from cfe_lightning.metrics.case import Measures

FAST = Measures(curve_steps=0)


def toy_batches(batch_size: int = 5, num_classes: int = 2, wrong: int = 0) -> list[dict[str, Any]]:
    """Twelve toy images; the first ``wrong`` ones carry the label of the next class."""
    dataset = ToyData(num_images=12, num_classes=num_classes).dataset("test")
    for index in range(wrong):
        dataset.labels[index] = (dataset.labels[index] + 1) % num_classes  # type: ignore[attr-defined]
    return list(DataLoader(dataset, batch_size=batch_size))


def only(rows: list[ResultRow]) -> ResultRow:
    (row,) = rows
    return row


def row_of(
    explainers: Mapping[str, Explainer], batches: Iterable[dict[str, Any]], *, measures: Measures = FAST, **options: Any
) -> ResultRow:
    """The row of a single explainer."""
    return only(evaluate(explainers, batches, measures=measures, **options).rows)


def value(row: ResultRow, key: str) -> float:
    measured = row.measurements[key]
    assert measured.status == "ok", (key, measured)
    assert measured.value is not None
    return measured.value
