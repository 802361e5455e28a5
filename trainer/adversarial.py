"""Passes of one micro-batch: one clean pass here; adversarial passes take their place behind the same interface."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from trainer.data.batch import Batch


@dataclass(frozen=True)
class Pass:
    """One forward and backward over a micro-batch."""

    share: float = 1.0  # factor of this pass's loss; the shares of a micro-batch's passes sum to 1
    last: bool = True  # whether no further pass over this micro-batch follows
    clean: bool = True  # clean passes are the ones whose loss is reported


class NoAdversary:
    """The absent adversary: one clean pass."""

    def passes(self, embeddings: nn.Module, batch: Batch) -> Iterator[Pass]:
        """Yield the passes of one micro-batch; a perturbing pass hooks the OUTPUT of `embeddings` while it runs."""
        yield Pass()
