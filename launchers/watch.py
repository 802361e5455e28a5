"""The supervisor's eyes: reads the ranks' pulses, finds the one that hangs, and gets the Python stacks of all."""

from __future__ import annotations

import contextlib
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from launchers.hang import Verdict, View, attribute, hanging, main_thread
from launchers.local import Ranks
from launchers.machine import process_state
from trainer.heartbeat import STACK_SIGNAL, pulse_path, read_pulse, stacks_path

EVERY = 1.0  # seconds between looks
ABSENT = 10.0  # a supervisor that did not look for so long was held up itself, and so may the ranks have been
STACKS = 5.0  # seconds that ranks get to write their stacks

UNTOLD: dict[str, Any] = {  # the place of a rank that has not beaten yet
    "section": "start", "step": None, "waits": None, "collective": None, "collectives": 0, "done": None,
    "longest": {}, "ended": None, "ids": [],
}  # fmt: skip


class Watch:
    """Looks at the ranks of one attempt."""

    def __init__(self, ranks: Ranks, hang_seconds: float) -> None:
        self.ranks, self.hang_seconds = ranks, hang_seconds
        self._since = self._looked = time.monotonic()
        self._places: dict[int, dict[str, Any]] = {}

    def place(self, rank: int) -> dict[str, Any]:
        """Where a rank is or was when it ended."""
        # not begun, or being written at this moment: what was read before stands
        with contextlib.suppress(OSError, ValueError):
            self._places[rank] = read_pulse(pulse_path(self.ranks.pulses, rank))
        return self._places.get(rank, UNTOLD)

    def look(self) -> Verdict | None:
        """The rank that hangs, with the stacks of all written; None as long as all is well. Looks once a second."""
        now = time.monotonic()
        if self.hang_seconds <= 0 or now - self._looked < EVERY:
            return None
        if now - self._looked > ABSENT:
            self._since = now
        self._looked = now
        views = [self._view(rank, now) for rank in self.ranks.alive]
        if not hanging(views, self.hang_seconds):
            return None
        views = [replace(view, state=process_state(self.ranks.pid(view.rank))) for view in views]
        self.write_stacks()  # a stopped process goes on with that: what it tells from now on is no evidence
        return attribute([replace(view, frames=self._frames(view.rank)) for view in views], self.hang_seconds)

    def write_stacks(self) -> None:
        """Have every living rank that beats write its Python stacks into the attempt's folder; waits until it has.

        A stopped process runs on with this: the signal waits for it, and it is to be killed next.
        """
        paths = {}
        for rank in self.ranks.alive:
            if pulse_path(self.ranks.pulses, rank).exists():  # before, the signal would kill it
                paths[rank] = stacks_path(self.ranks.logs, rank)
                self.ranks.signal(STACK_SIGNAL, [rank])
                self.ranks.signal(signal.SIGCONT, [rank])
        end = time.monotonic() + STACKS
        sizes: dict[int, int] = {}
        while time.monotonic() < end:
            before, sizes = sizes, {rank: _size(path) for rank, path in paths.items()}
            if sizes == before and all(sizes.values()):
                return
            time.sleep(0.1)

    def _view(self, rank: int, now: float) -> View:
        place = self.place(rank)
        return View(rank, place, now - max(float(place.get("time", 0.0)), self._since))

    def _frames(self, rank: int) -> tuple[str, ...]:
        path = stacks_path(self.ranks.logs, rank)
        return main_thread(path.read_text(errors="replace")) if path.exists() else ()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
