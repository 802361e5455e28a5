"""Bootstrap resamples of a mean or of any corpus measure, and the interval that they give.

Efron and Tibshirani 1993, *An Introduction to the Bootstrap*: resamples chapter 6, percentile interval 13.3, BCa
14.3. A corpus measure is a function of example indices, so that it is computed anew on the resampled examples
(Koehn 2004) and no mean of sentence scores stands in for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np

from trainer.config.errors import UserError
from trainer.measures.pairs import check_pairs

IndexMetric = Callable[[np.ndarray], float]  # example indices [resampled examples] -> value
Method = Literal["percentile", "bca"]

_CHUNK = 2**20  # indices drawn at a time: 8 MiB, and as much for the values gathered by them


def check_options(n: int, resamples: int, confidence: float, method: str) -> None:
    """Raises UserError for an empty set of examples or an option out of range."""
    if n < 1:
        raise UserError(f"examples: {n}: a comparison or an interval needs at least one")
    if resamples < 100:
        raise UserError(f"resamples: {resamples}: give at least 100, better 10000")
    if not 0.0 < confidence < 1.0:
        raise UserError(f"confidence: {confidence}: give a number between 0 and 1, such as 0.95")
    if method not in ("percentile", "bca"):
        raise UserError(f"interval method: {method!r}: give percentile or bca")


def finite_values(values: Sequence[float], name: str) -> np.ndarray:
    """``values`` as float64 [examples]. Raises UserError where there are none or one is not a finite number."""
    array = np.asarray(values, dtype=np.float64)  # [examples]
    if array.ndim != 1 or array.size == 0:
        raise UserError(f"{name}: shape {array.shape}: give one value per example and at least one example")
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise UserError(f"{name}[{bad[0]}]: {array[bad[0]]}: every value must be finite; drop or mend that example")
    return array


def draws(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Example indices drawn with replacement, in chunks [resamples of the chunk, n]; memory does not grow with either.

    The draws depend on ``n``, ``resamples`` and ``seed`` alone.
    """
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // n)
    for start in range(0, resamples, rows):
        yield generator.integers(0, n, size=(min(rows, resamples - start), n))


def resampled_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means [resamples] of ``values`` [examples] over bootstrap resamples."""
    return np.concatenate([values[indices].mean(axis=1) for indices in draws(len(values), resamples, seed)])


def resampled_metric(metric: IndexMetric, n: int, resamples: int, seed: int) -> np.ndarray:
    """Values [resamples] of a corpus measure over bootstrap resamples of ``n`` examples.

    Raises UserError where the measure is not finite on a resample.
    """
    found = np.array([metric(row) for indices in draws(n, resamples, seed) for row in indices], dtype=np.float64)
    if not np.isfinite(found).all():
        raise UserError(f"metric: not finite on {int((~np.isfinite(found)).sum())} resamples: give a defined value")
    return found


def left_out_means(values: np.ndarray) -> np.ndarray:
    """Mean of ``values`` without each example in turn [examples]; needs two examples."""
    return (values.sum() - values) / (len(values) - 1)


def left_out_metric(metric: IndexMetric, n: int) -> np.ndarray:
    """A corpus measure without each example in turn [examples]; needs two examples."""
    everyone = np.arange(n)
    return np.array([metric(np.delete(everyone, position)) for position in range(n)], dtype=np.float64)


def percentile_bounds(distribution: np.ndarray, confidence: float) -> tuple[float, float]:
    """The central ``confidence`` of the resampled values (Efron and Tibshirani 1993, equation 13.5)."""
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(distribution, [tail, 1.0 - tail])
    return float(low), float(high)


def bca_bounds(
    distribution: np.ndarray, estimate: float, left_out: np.ndarray, confidence: float
) -> tuple[float, float]:
    """Bias-corrected and accelerated interval (Efron and Tibshirani 1993, equations 14.9 to 14.15).

    ``left_out`` [examples] holds the jackknife values. Ties with the estimate count half in the bias correction: a mean
    of zeros and ones has many, and leaving them out would shift the interval.
    """
    normal = NormalDist()
    slack = 1e-12 * max(1.0, abs(estimate))
    below = float((distribution < estimate - slack).mean() + 0.5 * (np.abs(distribution - estimate) <= slack).mean())
    edge = 0.5 / len(distribution)  # a share of 0 or 1 has no finite normal quantile
    bias = normal.inv_cdf(min(max(below, edge), 1.0 - edge))
    gap = left_out.mean() - left_out  # [examples]
    spread = float((gap**2).sum())
    acceleration = float((gap**3).sum()) / (6.0 * spread**1.5) if spread > slack**2 else 0.0
    tail = (1.0 - confidence) / 2.0
    shares = []
    for share in (tail, 1.0 - tail):
        shifted = bias + normal.inv_cdf(share)
        shares.append(normal.cdf(bias + shifted / (1.0 - acceleration * shifted)))
    low, high = np.quantile(distribution, shares)
    return float(low), float(high)


def ratio_by_index(numerators: Sequence[float], denominators: Sequence[float]) -> IndexMetric:
    """Sum over sum of any resample: the loss per target from each example's summed loss and its count of targets.

    Raises UserError for unequal lengths, no examples, values that are not finite or a count that is not positive.
    """
    check_pairs(numerators, denominators, "numerators", "denominators", empty=False)
    top, bottom = finite_values(numerators, "numerators"), finite_values(denominators, "denominators")  # [examples]
    if (bottom <= 0).any():
        raise UserError(f"denominators[{int(np.argmin(bottom))}]: {bottom.min()}: give positive counts only")
    return lambda indices: float(top[indices].sum() / bottom[indices].sum())


def perplexity_by_index(loss_sums: Sequence[float], target_counts: Sequence[float]) -> IndexMetric:
    """Perplexity of any resample: exp of the summed loss (nats) over the targets. Raises as ``ratio_by_index``."""
    loss = ratio_by_index(loss_sums, target_counts)
    return lambda indices: math.exp(loss(indices))
