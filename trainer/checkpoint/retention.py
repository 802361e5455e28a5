"""Which checkpoints stay: the newest, the best by a metric, and every n-th for ever."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from trainer.config.schema import Checkpoint
from trainer.measures import metric_named


def doomed(steps: Iterable[int], scores: Mapping[int, float], settings: Checkpoint) -> list[int]:
    """The steps whose checkpoints are to go, oldest first.

    `steps` are those on disk up to the one just published, `scores` the metric by step where it was measured. Never
    among them: the newest (it is known to be good), the `keep` newest, the `keep_best` best by `metric` (of equals the
    earliest, so one that is best stays until a better one is on the disk), multiples of `keep_every`.
    """
    held = sorted(set(steps))
    kept = set(held[-max(settings.keep, 1) :])
    if settings.keep_best:
        kept.update(best(held, scores, settings.metric)[: settings.keep_best])
    if settings.keep_every:
        kept.update(step for step in held if step % settings.keep_every == 0)
    return [step for step in held if step not in kept]


def best(steps: Iterable[int], scores: Mapping[int, float], metric: str) -> list[int]:
    """The steps with a finite score, the best first, of equals the earlier first.

    Raises UserError for a metric whose direction nobody knows.
    """
    sign = -1.0 if metric_named(metric.rpartition("/")[2]).direction == "higher" else 1.0
    scored = [step for step in steps if math.isfinite(scores.get(step, math.nan))]
    return sorted(scored, key=lambda step: (sign * scores[step], step))


def scores_of(rows: Iterable[Mapping[str, Any]], metric: str) -> dict[int, float]:
    """`suite/metric`, or `metric` of the first suite that gives it, by step, from the eval rows of a journal.

    The journal is the durable record of what was measured: nothing else needs to be written for retention.
    """
    suite, _, name = metric.rpartition("/")
    found: dict[int, float] = {}
    for row in rows:
        metrics = row.get("metrics") if row.get("kind") == "eval" else None
        if isinstance(metrics, Mapping) and name in metrics and suite in ("", row.get("suite")):
            found.setdefault(int(row["step"]), float(metrics[name]))
    return found
