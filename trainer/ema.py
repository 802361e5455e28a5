"""Exponential moving average of the trained weights, kept beside this rank's slots.

avg <- d avg + (1 - d) w after each step, with d = min(decay, (1 + t) / (10 + t)) at the t-th update (the warm-up of
TensorFlow's ExponentialMovingAverage), so that the first weights do not weigh on a short run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trainer.engine.base import Engine, Slot, flat

KIND = "ema"  # of the averages in a checkpoint, beside `param`


class NoEMA:
    """The absent average."""

    shadows: Mapping[str, list[Tensor]] = {}

    def observe(self, slots: Iterator[Slot]) -> None:
        """See the values after the update."""

    def follow(self) -> None:
        """Begin anew from the weights as they are."""

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps beside the averages."""
        return None

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Restore what `state` returned."""

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Evaluation sees the trained weights."""
        yield


class EMA(NoEMA):
    """Averages in fp32, one flat tensor for each slot in the engine's order."""

    def __init__(self, engine: Engine, decay: float, evaluate: bool) -> None:
        self.engine, self.decay, self.evaluate = engine, decay, evaluate
        self.updates = 0
        self.averages: list[Tensor] = []
        self.follow()

    @property
    def shadows(self) -> Mapping[str, list[Tensor]]:  # type: ignore[override]
        """What a checkpoint saves and fills: {kind: one tensor a slot}."""
        return {KIND: self.averages}

    @torch.no_grad()
    def follow(self) -> None:
        """Begin anew from the weights as they are."""
        self.updates = 0
        self.averages = [flat(slot.owner).to(torch.float32, copy=True) for slot in self.engine.slots()]

    @torch.no_grad()
    def observe(self, slots: Iterator[Slot]) -> None:
        """Move every average towards the weights after the update."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        values = [flat(slot.owner).float() for slot in slots]
        torch._foreach_lerp_(self.averages, values, 1 - decay)
        self.updates += 1

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps beside the averages."""
        return {"updates": self.updates}

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Restore what `state` returned; a checkpoint without an average lets it begin anew."""
        self.updates = int(state["updates"]) if state else 0

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """The model holds the averages meanwhile, if the recipe wants them evaluated; afterwards the very weights."""
        if not self.evaluate:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for slot, average in zip(self.engine.slots(), self.averages, strict=True):
            value = flat(slot.owner)
            kept = value.clone()
            value.copy_(average)
            average.copy_(kept)  # fp32 as the owners are: nothing is rounded on the way there and back
        self.engine.after_load()
