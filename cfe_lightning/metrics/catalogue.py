"""All metrics that an evaluation can report, gathered from the modules that declare and compute them.

A new metric is a line in its module's table and an entry in what the module's ``measure`` returns.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from cfe_lightning.metrics import (
    attributes,
    cost,
    counterfactual,
    decomposition,
    equal_strength,
    faithfulness,
    localisation,
    path,
    realism,
    reconstruction,
    repetition,
    robustness,
    similarity,
)
from cfe_lightning.metrics.case import Case, Kept
from cfe_lightning.metrics.metric import Metric
from cfe_lightning.metrics.statistics import Measurement


class Group(NamedTuple):
    """Metrics that are computed together.

    Attributes:
        metrics: Table of the metrics.
        measure: Measures a batch and returns rows [B, ...] by metric key. A key with a slash keeps rows of another
            kind for ``summarise`` (see ``evaluation.measurer``).
        summarise: Measures what exists only for a set of images, by metric key; None if nothing does.
    """

    metrics: tuple[Metric, ...]
    measure: Callable[[Case], dict[str, Tensor]]
    summarise: Callable[[Kept], dict[str, Measurement]] | None = None

    @property
    def needs(self) -> frozenset[str]:
        """Returns the needs that all metrics of the group share; without them there is nothing to measure."""
        needs = [frozenset(metric.needs) for metric in self.metrics]
        return frozenset.intersection(*needs) if needs else frozenset()


#: Groups in the order of tables and of measuring. Reconstruction comes first: where rendering alone changes the
#: decision, the autoencoder is explained.
GROUPS = (
    Group(reconstruction.METRICS, reconstruction.measure),
    Group(decomposition.REMOVAL + decomposition.UNDECIDED, decomposition.measure, decomposition.summarise),
    Group(counterfactual.DECISION, counterfactual.measure_decision),
    Group(robustness.METRICS, robustness.measure, robustness.summarise),
    Group(attributes.COLLATERAL, attributes.measure_collateral),
    Group(realism.METRICS, realism.measure, realism.summarise),
    Group(similarity.IDENTITY, similarity.measure_identity),
    Group(attributes.ORACLE, attributes.measure_oracle, attributes.summarise),
    Group(similarity.PERCEPTION, similarity.measure_perception),
    Group(path.METRICS, path.measure),
    Group(counterfactual.SUFFICIENCY, counterfactual.measure_sufficiency),
    Group(counterfactual.CLOSENESS, counterfactual.measure_closeness),
    Group(repetition.CYCLES, repetition.measure_cycles),
    Group(repetition.DIVERSITY, repetition.measure_diversity),
    Group(repetition.SANITY, repetition.measure_sanity),
    Group(faithfulness.METRICS, faithfulness.measure),
    Group(localisation.METRICS, localisation.measure),
    Group(cost.METRICS, cost.measure, cost.summarise),
    Group((), equal_strength.measure),
)
#: All metrics but those at equal confidence.
METRICS: tuple[Metric, ...] = tuple(metric for group in GROUPS for metric in group.metrics)


def metrics_with(levels: Sequence[float]) -> tuple[Metric, ...]:
    """Lists all metrics in the order of tables; those at equal confidence come last, one set per probability."""
    return (*METRICS, *equal_strength.metrics_at(levels))
