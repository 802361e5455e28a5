"""The supervisor's eyes: reads the ranks' pulses, finds the one that hangs, and gets the Python stacks of all."""

from __future__ import annotations

import contextlib
import signal
import time
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
        if not hanging(self._views(now), self.hang_seconds):
            return None
        states = {rank: process_state(self.ranks.pid(rank)) for rank in self.ranks.alive}
        self.write_stacks()
        views = self._views(now, states, frames=True)  # states from before the stacks: a stopped process goes on now
        return attribute(views, self.hang_seconds)

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

    def _views(self, now: float, states: dict[int, str] | None = None, frames: bool = False) -> list[View]:
        views = []
        for rank in self.ranks.alive:
            place = self.place(rank)
            idle = now - max(float(place.get("time", 0.0)), self._since)
            found = main_thread(_text(stacks_path(self.ranks.logs, rank))) if frames else ()
            views.append(View(rank, place, idle, (states or {}).get(rank, ""), found))
        return views


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
