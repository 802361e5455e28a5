"""Is the candidate better than the baseline, or was it luck? Paired tests over one set of examples.

Both systems are scored on the same examples and every resample draws the same examples for both. Sources: bootstrap,
Efron and Tibshirani 1993; corpus measures on resampled examples, Koehn 2004; the p-value by the shifted distribution,
Berg-Kirkpatrick et al. 2012, section 2; sign-flip permutation, Efron and Tibshirani 1993, chapter 15; McNemar 1947
in its exact form.

Every p-value is two-sided. One estimated from R resamples is (1 + as extreme) / (1 + R), never zero (Davison and
Hinkley 1997, section 4.2.5). ``better`` is decided where p is at most 1 - confidence and the interval leaves out zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from trainer.config.errors import UserError
from trainer.measures.pairs import check_pairs
from trainer.measures.resampling import (
    IndexMetric,
    Method,
    bca_bounds,
    check_options,
    finite_values,
    left_out_means,
    left_out_metric,
    percentile_bounds,
    resampled_means,
    resampled_metric,
)

EXACT_PERMUTATION = 16  # examples: 2**16 sign patterns, half a MiB of sums


@dataclass(frozen=True)
class Interval:
    """A value with its confidence interval; with one example the interval is that value and says nothing."""

    value: float
    low: float
    high: float
    n: int
    confidence: float


@dataclass(frozen=True)
class Verdict:
    """Outcome of a paired comparison. ``difference`` is candidate minus baseline, also where lower is better."""

    metric: str
    n: int
    baseline: float
    candidate: float
    difference: float
    low: float  # bounds of the difference
    high: float
    confidence: float
    p_value: float
    method: str
    better: bool | None  # True: better, False: worse, None: undecided
    summary: str


def _verdict(
    metric: str,
    n: int,
    values: tuple[float, float],
    bounds: tuple[float, float],
    p_value: float,
    *,
    confidence: float,
    lower_is_better: bool,
    method: str,
) -> Verdict:
    baseline, candidate = values
    difference, (low, high) = candidate - baseline, bounds
    decided = p_value <= 1.0 - confidence and (low > 0.0 or high < 0.0)
    better = ((difference < 0.0) == lower_is_better) if decided else None
    outcome = {True: "better", False: "worse", None: "no difference shown"}[better]
    if n == 1:
        outcome = "one example shows no spread, so no verdict"
    move = "higher" if difference > 0 else "lower" if difference < 0 else "equal"
    by = "" if difference == 0 else f" by {abs(difference):.4g}"
    spread = f"{100 * confidence:g}% interval of the difference {low:.4g} to {high:.4g}"
    summary = (
        f"{metric}: {candidate:.4g} against {baseline:.4g} for the baseline, {move}{by} "
        f"({spread}, p = {p_value:.2g}, {n} examples): {outcome}."
    )
    return Verdict(metric, n, baseline, candidate, difference, low, high, confidence, p_value, method, better, summary)


def _at_least(values: np.ndarray, threshold: float) -> int:
    """Count of |values| >= threshold; sums in another order may fall short of a tie by rounding, hence the slack."""
    return int((np.abs(values) >= threshold - 1e-12 * max(1.0, threshold)).sum())


def _shifted_p_value(distribution: np.ndarray, difference: float, n: int) -> float:
    """Share of resampled differences that lie as far from the observed one as that lies from zero.

    Resampling cannot see past the examples: with n of them no sign-flip test gets below 2 / 2**n, so neither does this
    (five examples that all improved alike give 0.06, not 0.0001).
    """
    estimated = (1 + _at_least(distribution - difference, abs(difference))) / (1 + len(distribution))
    return min(1.0, max(estimated, 2.0 ** (1 - n)))


def _mean_pair(baseline: Sequence[float], candidate: Sequence[float]) -> tuple[np.ndarray, tuple[float, float]]:
    """Differences [examples] and the two means."""
    check_pairs(baseline, candidate, "baseline values", "candidate values", empty=False)
    first, second = finite_values(baseline, "baseline values"), finite_values(candidate, "candidate values")
    return second - first, (float(first.mean()), float(second.mean()))


def _mean_bounds(
    values: np.ndarray, distribution: np.ndarray, confidence: float, interval_method: Method
) -> tuple[float, float]:
    if interval_method == "bca" and len(values) > 1:
        return bca_bounds(distribution, float(values.mean()), left_out_means(values), confidence)
    return percentile_bounds(distribution, confidence)


def interval(
    values: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    interval_method: Method = "percentile",
    seed: int = 0,
) -> Interval:
    """Mean of per-example values with its bootstrap interval. Raises UserError for no or not finite values."""
    array = finite_values(values, "values")  # [examples]
    check_options(len(array), resamples, confidence, interval_method)
    low, high = _mean_bounds(array, resampled_means(array, resamples, seed), confidence, interval_method)
    return Interval(float(array.mean()), low, high, len(array), confidence)


def interval_by_index(
    metric: IndexMetric,
    n: int,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    interval_method: Method = "percentile",
    seed: int = 0,
) -> Interval:
    """A corpus measure over ``n`` examples with its bootstrap interval. Raises UserError as ``interval`` does."""
    check_options(n, resamples, confidence, interval_method)
    value = float(metric(np.arange(n)))
    distribution = resampled_metric(metric, n, resamples, seed)
    if interval_method == "bca" and n > 1:
        low, high = bca_bounds(distribution, value, left_out_metric(metric, n), confidence)
    else:
        low, high = percentile_bounds(distribution, confidence)
    return Interval(value, low, high, n, confidence)


def paired_bootstrap(
    baseline: Sequence[float],
    candidate: Sequence[float],
    *,
    metric: str = "score",
    lower_is_better: bool = False,
    confidence: float = 0.95,
    resamples: int = 10_000,
    interval_method: Method = "percentile",
    seed: int = 0,
) -> Verdict:
    """Compares the means of two systems' per-example values on the same examples, in the same order.

    Raises UserError for unequal lengths, no examples, values that are not finite or an option out of range.
    """
    differences, values = _mean_pair(baseline, candidate)
    n = len(differences)
    check_options(n, resamples, confidence, interval_method)
    distribution = resampled_means(differences, resamples, seed)
    return _verdict(
        metric,
        n,
        values,
        _mean_bounds(differences, distribution, confidence, interval_method),
        _shifted_p_value(distribution, float(differences.mean()), n),
        confidence=confidence,
        lower_is_better=lower_is_better,
        method=f"paired bootstrap, {interval_method}, {resamples} resamples, seed {seed}",
    )


def paired_bootstrap_by_index(
    baseline: IndexMetric,
    candidate: IndexMetric,
    n: int,
    *,
    metric: str = "score",
    lower_is_better: bool = False,
    confidence: float = 0.95,
    resamples: int = 10_000,
    interval_method: Method = "percentile",
    seed: int = 0,
) -> Verdict:
    """Compares two systems by a corpus measure, each given as a function of example indices (Koehn 2004).

    Such functions: ``text.bleu_by_index``, ``text.chrf_by_index``, ``labels.macro_f1_by_index``,
    ``resampling.ratio_by_index``. Raises UserError for no examples, an option out of range, or a measure that is not
    finite.
    """
    check_options(n, resamples, confidence, interval_method)
    everyone = np.arange(n)
    values = (float(baseline(everyone)), float(candidate(everyone)))

    def gap(indices: np.ndarray) -> float:
        return candidate(indices) - baseline(indices)

    difference = values[1] - values[0]
    distribution = resampled_metric(gap, n, resamples, seed)
    if interval_method == "bca" and n > 1:
        bounds = bca_bounds(distribution, difference, left_out_metric(gap, n), confidence)
    else:
        bounds = percentile_bounds(distribution, confidence)
    return _verdict(
        metric,
        n,
        values,
        bounds,
        _shifted_p_value(distribution, difference, n),
        confidence=confidence,
        lower_is_better=lower_is_better,
        method=f"paired bootstrap of a corpus measure, {interval_method}, {resamples} resamples, seed {seed}",
    )


def _sign_flip_p_value(differences: np.ndarray, resamples: int, seed: int) -> float:
    observed = abs(float(differences.sum()))
    n = len(differences)
    if n <= EXACT_PERMUTATION:
        sums = np.zeros(1)
        for difference in differences:
            sums = np.concatenate([sums + difference, sums - difference])  # [2**examples so far]
        return _at_least(sums, observed) / len(sums)
    generator = np.random.default_rng(seed)
    rows = max(1, 2**20 // n)  # 8 MiB of signs at a time
    extreme = 0
    for start in range(0, resamples, rows):
        signs = 2.0 * generator.integers(0, 2, size=(min(rows, resamples - start), n)) - 1.0
        extreme += _at_least(signs @ differences, observed)
    return (1 + extreme) / (1 + resamples)


def paired_permutation(
    baseline: Sequence[float],
    candidate: Sequence[float],
    *,
    metric: str = "score",
    lower_is_better: bool = False,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Verdict:
    """Sign-flip test: the share of sign patterns of the differences whose sum is as far from zero as the observed.

    All patterns up to 16 examples (exact), above it ``resamples`` random ones. The interval is the percentile
    bootstrap's. Raises UserError as ``paired_bootstrap`` does.
    """
    differences, values = _mean_pair(baseline, candidate)
    n = len(differences)
    check_options(n, resamples, confidence, "percentile")
    form = "exact" if n <= EXACT_PERMUTATION else f"{resamples} sign patterns, seed {seed}"
    return _verdict(
        metric,
        n,
        values,
        percentile_bounds(resampled_means(differences, resamples, seed), confidence),
        _sign_flip_p_value(differences, resamples, seed),
        confidence=confidence,
        lower_is_better=lower_is_better,
        method=f"paired permutation, {form}; percentile bootstrap interval",
    )


def mcnemar(
    baseline: Sequence[float], candidate: Sequence[float], *, metric: str = "accuracy", confidence: float = 0.95
) -> Verdict:
    """Exact McNemar test of right (1) and wrong (0) per example: binomial on the examples that one alone got right.

    The interval of the difference is Agresti and Min's (2005, Statistics in Medicine 24): Wald's with half an example
    added to each of the four cells. Raises UserError for other values, unequal lengths or no examples.
    """
    from scipy.stats import binomtest  # 1.4 s, and this test alone needs it

    differences, values = _mean_pair(baseline, candidate)
    for name, side in (("baseline values", baseline), ("candidate values", candidate)):
        for position, value in enumerate(side):
            if value not in (0, 1):
                raise UserError(f"{name}[{position}]: {value}: McNemar's test takes 0 or 1; use paired_bootstrap")
    check_options(len(differences), 100, confidence, "percentile")
    gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
    p_value = float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0
    total = len(differences) + 2.0
    centre = (gained - lost) / total
    error = math.sqrt(gained + lost + 1.0 - total * centre**2) / total
    reach = NormalDist().inv_cdf(0.5 + confidence / 2.0) * error
    return _verdict(
        metric,
        len(differences),
        values,
        (max(-1.0, centre - reach), min(1.0, centre + reach)),
        p_value,
        confidence=confidence,
        lower_is_better=False,
        method=f"exact McNemar, {gained} gained, {lost} lost; Agresti-Min interval",
    )
