"""Is the run better than its base, metric by metric? Two results of one suite, paired by example id."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.config import UserError
from trainer.evaluation.results import Result
from trainer.measures import metric_named
from trainer.measures.resampling import IndexMetric, perplexity_by_index, ratio_by_index
from trainer.measures.significance import Verdict, paired_bootstrap, paired_bootstrap_by_index

LARGEST_LOSS = 700.0  # nats; exp of a little more overflows a float64


def verdict(
    base_result: Mapping[str, Any],
    run_result: Mapping[str, Any],
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> list[Verdict]:
    """One paired bootstrap for each metric that both results have; `better` knows the metric's direction.

    Metrics of single examples are compared by their means. Loss, perplexity, macro-F1, BLEU and chrF are of the corpus,
    so they are computed anew on every resample of the examples. A value that is not finite gives a verdict without
    a test. Raises UserError where the results are not of the same examples, naming the first that differs.
    """
    order = paired_positions(base_result["ids"], run_result["ids"], str(run_result["suite"]))
    base, run = _Side(base_result, order), _Side(run_result, range(len(order)))
    _check_references(base, run, run_result)
    verdicts = []
    for name, value in run_result["metrics"].items():
        if name not in base_result["metrics"]:
            continue
        options: dict[str, Any] = {
            "metric": name,
            "lower_is_better": metric_named(name).direction == "lower",
            "confidence": confidence,
            "resamples": resamples,
            "seed": seed,
        }
        values = (float(base_result["metrics"][name]), float(value))
        if not all(map(math.isfinite, values)) or not (base.testable(name) and run.testable(name)):
            verdicts.append(_untested(name, len(order), values, confidence))
        elif metric_named(name).level == "example":
            verdicts.append(paired_bootstrap(base.per_example(name), run.per_example(name), **options))
        else:
            functions = base.by_index(name), run.by_index(name)
            verdicts.append(paired_bootstrap_by_index(*functions, len(order), **options))
    return verdicts


def paired_positions(first: Sequence[str], second: Sequence[str], suite: str) -> list[int]:
    """For each id of `second` its position in `first`. Raises UserError naming the first id that has no partner."""
    if list(first) == list(second):
        return list(range(len(first)))
    remedy = "evaluate both on the same data (same source, limit and file)"
    position = {name: index for index, name in enumerate(first)}
    for side, ids in (("baseline", first), ("run", second)):
        if len(set(ids)) != len(ids):
            twice = next(name for index, name in enumerate(ids) if name in ids[:index])
            raise UserError(f"suite {suite}: example {twice!r}: twice in the {side}, so it cannot be paired; {remedy}")
    for name in second:
        if name not in position:
            raise UserError(f"suite {suite}: example {name!r}: not in the baseline's evaluation; {remedy}")
    known = set(second)
    for name in first:
        if name not in known:
            raise UserError(f"suite {suite}: example {name!r}: only in the baseline's evaluation; {remedy}")
    return [position[name] for name in second]


class _Side:
    """One result with its examples in the common order."""

    def __init__(self, result: Mapping[str, Any], order: Sequence[int]) -> None:
        self._result = result
        self._order = order

    def per_example(self, name: str) -> list[float]:
        """Values of a metric, or of `weight`, in the common order."""
        return self._ordered(self._result["per_example"][name])

    def texts(self, key: str) -> list[str]:
        """`predictions` or `references` in the common order."""
        return self._ordered(self._result[key])

    def _ordered(self, values: Sequence[Any]) -> list[Any]:
        return [values[position] for position in self._order]

    def testable(self, name: str) -> bool:
        """Whether every resample of the metric is a finite number."""
        if name not in ("loss", "perplexity"):
            return True
        losses = self.per_example("loss")
        return all(math.isfinite(loss) and loss < LARGEST_LOSS for loss in losses)

    def by_index(self, name: str) -> IndexMetric:
        """The corpus metric of any resample."""
        if name in ("loss", "perplexity"):
            weights = self.per_example("weight")
            sums = [loss * weight for loss, weight in zip(self.per_example("loss"), weights, strict=True)]
            return (ratio_by_index if name == "loss" else perplexity_by_index)(sums, weights)
        function = metric_named(name).by_index
        assert function is not None
        return function(self.texts("predictions"), self.texts("references"))


def _check_references(base: _Side, run: _Side, result: Result | Mapping[str, Any]) -> None:
    """One id with two references means that the data changed between the evaluations."""
    if "references" not in result:
        return
    for name, ours, theirs in zip(result["ids"], run.texts("references"), base.texts("references"), strict=True):
        if ours != theirs:
            raise UserError(
                f"suite {result['suite']}: example {name!r}: its reference changed since the baseline was evaluated; "
                "delete the baseline's result and evaluate again"
            )


def _untested(name: str, n: int, values: tuple[float, float], confidence: float) -> Verdict:
    baseline, candidate = values
    summary = f"{name}: {candidate:.4g} against {baseline:.4g} for the baseline: not finite, so no test."
    nan, gap = math.nan, candidate - baseline
    return Verdict(name, n, baseline, candidate, gap, nan, nan, confidence, nan, "none: not finite", None, summary)
