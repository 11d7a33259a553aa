"""Numbers with intervals from numbers per image: bootstrap, Wilson, and a result that is never NaN.

A per-image tensor marks an image on which its metric is undefined with NaN. Such images are left out and counted here,
and a ``Measurement`` holds a finite value or says why not.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Status = Literal["ok", "skipped", "undefined"]

#: Two-sided 95 % quantile of the standard normal distribution.
_Z = 1.959963984540054
#: Resampling indices held in memory at once.
_CHUNK = 4_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One reported number, or the reason why there is none.

    Attributes:
        status: ``ok``; ``skipped`` where it was not computed; ``undefined`` where it has no value on these images.
        value: Mean over ``n_used`` images (or another statistic of them); None unless ``ok``.
        low: Lower end of the 95 % interval; None where there is no interval.
        high: Upper end of the 95 % interval; None where there is no interval.
        n_used: Number of images that entered the value.
        n_total: Number of images that were explained.
        population: Name of the images that were meant to enter: ``all``, ``correct`` or ``flipped``.
        reason: Reason why there is no value; a remark for readers if there is one.

    Raises:
        ValueError: If an ``ok`` value is not finite, or any other status gives no reason.
    """

    status: Status = "ok"
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n_used: int = 0
    n_total: int = 0
    population: str = "all"
    reason: str = ""

    def __post_init__(self) -> None:
        if self.status == "ok" and (self.value is None or not math.isfinite(self.value)):
            raise ValueError(f"A measurement with status ok needs a finite value, got {self.value}.")
        if self.status != "ok" and (self.value is not None or not self.reason):
            raise ValueError(f"A measurement with status {self.status} needs a reason and no value.")


def skipped(reason: str) -> Measurement:
    """Builds the measurement of a number that was not computed."""
    return Measurement(status="skipped", reason=reason)


def undefined(reason: str, n_total: int = 0, population: str = "all") -> Measurement:
    """Builds the measurement of a number that does not exist on these images."""
    return Measurement(status="undefined", reason=reason, n_total=n_total, population=population)


def wilson(successes: int, total: int) -> tuple[float, float]:
    """Computes the 95 % Wilson interval of a rate.

    Raises:
        ValueError: If ``total`` is not positive or ``successes`` lies outside [0, total].
    """
    if total < 1 or not 0 <= successes <= total:
        raise ValueError(f"A rate needs 0 <= successes <= total and a positive total, got {successes} of {total}.")
    # Centre and half width of the score interval.
    rate, square = successes / total, _Z**2 / total
    centre = (rate + square / 2) / (1 + square)
    half = _Z / (1 + square) * math.sqrt(rate * (1 - rate) / total + square / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_means(values: Tensor, resamples: int = 1000, seed: int = 0) -> Tensor:
    """Computes column means of R = ``resamples`` draws of N rows with replacement, [N, M] -> [R, M] float64.

    NaN entries are left out; a mean is NaN where a draw holds no defined value of a column. The draw depends on N,
    ``resamples`` and ``seed`` only, so explainers measured on the same images are paired.
    """
    num_images = values.shape[0]
    if num_images == 0:
        return values.new_full((resamples, values.shape[1]), torch.nan, dtype=torch.float64, device="cpu")
    defined = ~values.isnan()
    filled = torch.where(defined, values, 0).to("cpu", torch.float64)
    weights = defined.to("cpu", torch.float64)

    # Draws in chunks, as counts of images.
    generator = torch.Generator().manual_seed(seed)
    chunk = max(1, min(resamples, _CHUNK // max(1, num_images)))
    means = []
    for start in range(0, resamples, chunk):
        drawn = torch.randint(num_images, (min(chunk, resamples - start), num_images), generator=generator)
        ones = torch.ones(drawn.shape, dtype=torch.float64)
        counts = torch.zeros_like(ones).scatter_add_(1, drawn, ones)
        means.append((counts @ filled) / (counts @ weights))
    return torch.cat(means)


def interval(samples: Tensor) -> tuple[float | None, float | None]:
    """Finds the central 95 % of bootstrap samples [R]; (None, None) if none of them is finite."""
    finite = samples[samples.isfinite()]
    if len(finite) == 0:
        return None, None
    low, high = torch.quantile(finite.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def summarise(
    per_image: Mapping[str, Tensor],
    populations: Mapping[str, str] | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Measurement]:
    """Computes means with intervals of several per-image metrics of the same images.

    Args:
        per_image: Values [N] by name; boolean tensors are rates and get a Wilson interval, others a bootstrap one.
        populations: Names of the populations by name of the values; ``all`` where there is none.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.
    """
    # Rates, then means from the same draws of images.
    population = defaultdict(lambda: "all", populations or {})
    rates = {name: _rate(values, population[name]) for name, values in per_image.items() if values.dtype == torch.bool}
    floats = {name: values.double() for name, values in per_image.items() if name not in rates}
    means = {}
    if floats:
        matrix = torch.stack(list(floats.values()), dim=1)
        samples = bootstrap_means(matrix, resamples, seed)
        columns = zip(floats, matrix.T, samples.T, strict=True)
        means = {name: _mean(values, drawn, population[name]) for name, values, drawn in columns}
    return {name: (rates | means)[name] for name in per_image}


def _rate(hits: Tensor, population: str) -> Measurement:
    total, successes = len(hits), int(hits.sum())
    if total == 0:
        return undefined(_nothing_left(population), 0, population)
    low, high = wilson(successes, total)
    return Measurement(value=successes / total, low=low, high=high, n_used=total, n_total=total, population=population)


def _mean(values: Tensor, samples: Tensor, population: str) -> Measurement:
    defined = values[~values.isnan()]
    if len(defined) == 0:
        return undefined(_nothing_left(population), len(values), population)
    value = float(defined.mean())
    if not math.isfinite(value):
        return undefined("an image has an infinite value", len(values), population)
    # One image says nothing about the spread between images.
    low, high = interval(samples) if len(defined) > 1 else (None, None)
    return Measurement(value=value, low=low, high=high, n_used=len(defined), n_total=len(values), population=population)


def statistic(
    per_image: Tensor, function: Callable[[Tensor], Tensor], why_undefined: str, *, resamples: int = 1000, seed: int = 0
) -> Measurement:
    """Computes a function of the mean over images, such as the area under an accuracy curve, with a bootstrap interval.

    Args:
        per_image: Values [N, M], such as hits of image n at strength m.
        function: Maps means [..., M] to the statistic [...]; NaN where it is undefined.
        why_undefined: Reason to report where the statistic is undefined.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.
    """
    # The statistic of the means, not the mean of statistics.
    num_images = len(per_image)
    value = float(function(per_image.double().mean(dim=0)))
    if not math.isfinite(value):
        return undefined(why_undefined, num_images)
    low = high = None
    if num_images > 1:
        low, high = interval(function(bootstrap_means(per_image.double(), resamples, seed)))
    return Measurement(value=value, low=low, high=high, n_used=num_images, n_total=num_images)


def _nothing_left(population: str) -> str:
    return "not defined on any image" if population == "all" else f"not defined on any image of population {population}"
