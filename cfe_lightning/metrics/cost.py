"""The cost of an explanation in time, classifier passes and memory."""

from functools import partial
from statistics import median

import torch
from torch import Tensor

from cfe_lightning.metrics.case import Case, Kept
from cfe_lightning.metrics.metric import rows
from cfe_lightning.metrics.statistics import Measurement

#: Number of batches without timing, during which devices and caches warm up.
_WARM_UP = 2

METRICS = rows("""
key                   title    better  range     needs  meaning
s_per_image           s/image  lower   s         -
    median over batches of one explanation, reading and measuring excluded
s_per_image_p95       -        lower   s         -      95th percentile over batches
classifier_forwards   calls    lower   [0, inf)  -      pictures shown to the classifier per image
classifier_backwards  -        lower   [0, inf)  -      gradients taken through the classifier per image
peak_memory           -        lower   MiB       cuda   largest memory of an explained batch on the GPU
""")


def measure(case: Case) -> dict[str, Tensor]:
    """Divides the classifier passes of a batch among its images, [B] by metric key."""
    ones = torch.ones(len(case.image))
    return {
        "classifier_forwards": ones * case.calls.forwards / len(ones),
        "classifier_backwards": ones * case.calls.backwards / len(ones),
    }


def summarise(kept: Kept) -> dict[str, Measurement]:
    """Summarises seconds over batches, and memory."""
    measured = partial(Measurement, n_used=kept.num_images, n_total=kept.num_images)
    # Short evaluations have no batches beyond the warm-up.
    seconds = sorted(kept.seconds[_WARM_UP:] or kept.seconds)
    found = {
        "s_per_image": measured(value=median(seconds)),
        "s_per_image_p95": measured(value=seconds[min(len(seconds) - 1, int(0.95 * len(seconds)))]),
    }
    if kept.peak_memory:
        found["peak_memory"] = measured(value=kept.peak_memory / 2**20)
    return found
