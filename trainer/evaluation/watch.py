"""Has an evaluated metric stopped improving? The rule of early stopping, and the look-up that plateaus share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trainer.config import UserError
from trainer.config.schema import EarlyStopping
from trainer.measures import Direction, metric_named

Metrics = Mapping[str, Mapping[str, float]]
"""{suite: {metric: value}} of one evaluation; suites in the order of the recipe."""


def find_metric(metrics: Metrics, name: str) -> float | None:
    """The value of `suite/metric`, or of `metric` in the first suite that has it; None where nothing here gives it.

    None is no error: a suite may run more rarely than the others (`every`), and config.check has made sure that some
    suite gives the metric.
    """
    suite, _, metric = name.rpartition("/")
    for candidate, values in metrics.items():
        if suite in ("", candidate) and metric in values:
            return float(values[metric])
    return None


def direction_of(name: str) -> Direction:
    """Which way `suite/metric` or `metric` is better. Raises UserError for an unknown metric."""
    return metric_named(name.rpartition("/")[2]).direction


class Watcher:
    """Counts evaluations without gain: patience of them in a row, and the stage stops (Prechelt 1998, criterion UP).

    A gain is a value better than the best so far by more than `min_delta`, in the metric's own unit. A value that is
    not finite is never a gain.
    """

    def __init__(self, metric: str, direction: Direction, patience: int, min_delta: float = 0.0) -> None:
        if direction not in ("higher", "lower") or patience < 1 or not min_delta >= 0:
            raise ValueError(f"direction {direction!r}, patience {patience}, min_delta {min_delta}: out of range")
        self.metric = metric
        self.direction = direction
        self.patience = patience
        self.min_delta = min_delta
        self.best: float | None = None
        self.waited = 0

    @classmethod
    def from_settings(cls, settings: EarlyStopping) -> Watcher:
        """The watcher that a stage's `until.early_stopping` declares. Raises UserError for an unknown metric."""
        return cls(settings.metric, direction_of(settings.metric), settings.patience, settings.min_delta)

    @property
    def stopped(self) -> bool:
        """Whether patience has run out."""
        return self.waited >= self.patience

    def observe(self, metrics: Metrics) -> bool:
        """Take one evaluation into account; True where the stage should stop. Without the metric nothing is counted."""
        value = find_metric(metrics, self.metric)
        if value is not None:
            if self._gains(value):
                self.best, self.waited = value, 0
            else:
                self.waited += 1
        return self.stopped

    def _gains(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self.best is None:
            return True
        gain = value - self.best if self.direction == "higher" else self.best - value
        return gain > self.min_delta

    def state(self) -> dict[str, Any]:
        """JSON: the best value and the evaluations waited since, with the metric they belong to."""
        return {"metric": self.metric, "best": self.best, "waited": self.waited}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`. Raises UserError where it is another metric's."""
        if state["metric"] != self.metric:
            raise UserError(
                f"until.early_stopping.metric: {self.metric!r}: the checkpoint watched {state['metric']!r}; keep it, "
                "or start a new run"
            )
        self.best = None if state["best"] is None else float(state["best"])
        self.waited = int(state["waited"])
