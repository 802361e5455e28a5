"""What watches the numbers of a run: steps without a finite gradient, loss spikes, copies that differ between ranks."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from trainer.config.schema import Spike

FEWEST = 8  # losses before anything is called a spike
IN_A_ROW = 3  # spikes after which the loss is taken for a new level: a change of data, no accident
MAD_TO_DEVIATION = 1.4826  # of a normal distribution (Rousseeuw & Croux 1993, sec. 1)
LEAST_SPREAD = 0.01  # of the median: losses that hardly differ would make every move a spike


class SpikeWatch:
    """Calls a loss a spike that lies more than `deviations` robust deviations above the median of the last `window`.

    Median and median absolute deviation, so that a spike neither hides nor poisons the yardstick; spikes do not enter
    the window. The losses are those of whole global steps, so every rank judges alike.
    """

    def __init__(self, settings: Spike) -> None:
        self.policy, self.deviations = settings.policy, settings.deviations
        self.losses: deque[float] = deque(maxlen=settings.window)
        self.in_a_row = 0

    @property
    def forbids(self) -> bool:
        """Whether a spike's update is left out."""
        return self.policy in ("skip", "rollback")

    def judge(self, loss: float) -> bool:
        """Take the loss of one step; True where it is a spike. One that is not finite is the gradient's to refuse."""
        if not math.isfinite(loss):
            return False
        if len(self.losses) >= FEWEST and loss > self.limit():
            self.in_a_row += 1
            if self.in_a_row < IN_A_ROW:
                return True
            self.losses.clear()  # a new level
        self.in_a_row = 0
        self.losses.append(loss)
        return False

    def limit(self) -> float:
        """The highest loss that is no spike."""
        return spike_limit(self.losses, self.deviations)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"losses": list(self.losses), "in_a_row": self.in_a_row}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.losses.clear()
        self.losses.extend(state["losses"])
        self.in_a_row = int(state["in_a_row"])


class NoSpikeWatch(SpikeWatch):
    """The absent watch: calls nothing a spike."""

    def __init__(self) -> None:
        super().__init__(Spike())

    def judge(self, loss: float) -> bool:
        """No loss is a spike."""
        return False


def spike_limit(losses: Iterable[float], deviations: float) -> float:
    """median + deviations * 1.4826 * MAD, the spread no less than a hundredth of the median."""
    values = list(losses)
    middle = median(values)
    spread = MAD_TO_DEVIATION * median(abs(value - middle) for value in values)
    return middle + deviations * max(spread, LEAST_SPREAD * abs(middle))


def odd_ones(digests: Mapping[int, str], truth: str | None = None) -> list[int]:
    """The ranks whose digest differs: from `truth` where one is known, else from the majority; all where none has one.

    Of two ranks that differ nobody can say which is right; both are named then.
    """
    if truth is None:
        counts: dict[str, int] = {}
        for digest in digests.values():
            counts[digest] = counts.get(digest, 0) + 1
        best = max(counts.values())
        if best * 2 <= len(digests) and len(counts) > 1:
            return sorted(digests)
        truth = next(digest for digest, count in counts.items() if count == best)
    return sorted(rank for rank, digest in digests.items() if digest != truth)
