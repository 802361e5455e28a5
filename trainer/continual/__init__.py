"""What pulls on gradient shards so that earlier tasks are not forgotten. Replay is data, and lives in `data`."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.engine.base import Slot


class NoAnchor:
    """The absent anchor: pulls nothing, observes nothing."""

    def pull(self, slots: Iterator[Slot]) -> None:
        """Add to the gradients of this rank's slots, after clipping and before the update."""

    def observe(self, slots: Iterator[Slot]) -> None:
        """See the values after the update."""

    def penalties(self) -> dict[str, float]:
        """{anchor: penalty} of the last pull, for the record."""
        return {}
