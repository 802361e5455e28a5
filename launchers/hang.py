"""Which rank hangs, from what each last told of itself. Pure functions of the ranks' pulses."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launchers.machine import STATES
from trainer.heartbeat import stretch

# Seconds of silence that are let pass where no step is in work. Imports, data and models take what they take; a save
# waits for the storage; an evaluation beats at each batch.
PATIENCE = {
    "start": 600.0,
    "data": 7200.0,
    "load": 7200.0,
    "first step": 600.0,
    "evaluation": 600.0,
    "checkpoint": 3600.0,
    "finish": 3600.0,
}
LEARNED = 5.0  # times the longest silence seen so far in the same stretch of work
COLLECTIVE_FRAMES = ("torch/distributed/", "deepspeed/comm/")
INNERMOST = 4  # frames looked at for those
_FRAME = re.compile(r'^\s+File "(?P<file>[^"]+)", line (?P<line>\d+|\?\?\?) in (?P<name>.+)$')


@dataclass(frozen=True)
class View:
    """One rank as the supervisor sees it."""

    rank: int
    place: Mapping[str, Any]  # of its pulse
    idle: float  # seconds since it last beat
    state: str = ""  # of its process, as /proc has it
    frames: tuple[str, ...] = ()  # of its main thread, innermost first: "file:line name"

    @property
    def waits(self) -> bool:
        """Whether it waits for other ranks, as far as it told."""
        return self.place["waits"] is not None

    @property
    def in_collective(self) -> bool:
        """Whether its innermost frames are those of a collective: an engine's, which are not told."""
        return any(part in frame for frame in self.frames[:INNERMOST] for part in COLLECTIVE_FRAMES)

    def patience(self, hang_seconds: float) -> float:
        """Seconds of silence that are still no hang."""
        name = stretch(self.place)
        longest = float(self.place["longest"].get(name, 0.0))
        return max(hang_seconds, PATIENCE.get(name, 0.0), LEARNED * longest)


@dataclass(frozen=True)
class Verdict:
    """Who hangs and why one thinks so."""

    ranks: list[int]
    reason: str
    details: list[str] = field(default_factory=list)  # a line for each rank


def hanging(views: Sequence[View], hang_seconds: float) -> list[View]:
    """The ranks that have been silent for too long; none as long as a silent rank may be waiting for one at work.

    A rank that waits is only suspected where every other rank waits too, or is silent beyond its patience.
    """
    over = [view for view in views if view.idle > view.patience(hang_seconds)]
    at_work = [view for view in views if view not in over and not view.waits]
    return [view for view in over if not view.waits] or ([] if at_work else over)


def attribute(views: Sequence[View], hang_seconds: float) -> Verdict:
    """The rank that the others wait for, by the first of these that tells ranks apart: a stopped process; one blocked
    in the kernel; one that waits for nobody; one whose stack is outside of any collective; the least advanced.

    Looked for among those that are silent for half their patience: the culprit may have beaten last.
    """
    suspects = [view for view in views if view.idle > view.patience(hang_seconds) / 2]
    fewest = min(view.place["collectives"] for view in views)
    tests: list[tuple[str, Callable[[View], bool]]] = [
        ("its process is stopped", lambda view: view.state in ("T", "t")),
        ("its process is blocked in the kernel", lambda view: view.state == "D"),
        ("it waits for no other rank", lambda view: not view.waits),
        ("its stack is outside of any collective", lambda view: not view.in_collective),
        ("it has entered the fewest collectives", lambda view: view.place["collectives"] == fewest),
    ]
    why = "the only rank" if len(views) == 1 else "no rank stands out"
    for reason, holds in tests:
        found = [view for view in suspects if holds(view)]
        if found and (len(found) < len(views) or found[0].state in STATES):
            suspects, why = found, reason
            break
    return Verdict(
        [view.rank for view in suspects],
        f"{ranks_text([view.rank for view in suspects])} hung: {describe(suspects[0])} ({why})",
        [f"rank {view.rank}: {describe(view)}" for view in views],
    )


def describe(view: View) -> str:
    """Where a rank is, in words."""
    place = view.place
    where = place["section"] + (f" {place['step']}" if place["step"] is not None and place["section"] == "step" else "")
    if place["step"] is not None and place["section"] != "step":
        where += f" at step {place['step']}"
    parts = [f"silent for {view.idle:.0f} s in {where}"]
    if view.waits:
        parts.append(f"waiting in {place['waits']}")
    if place["collective"]:
        parts.append(f"last collective: {place['collective']} (number {place['collectives']})")
    if view.state in STATES:
        parts.append(STATES[view.state])
    if view.frames:
        parts.append(f"at {view.frames[0]}")
    return ", ".join(parts)


def ranks_text(ranks: Sequence[int]) -> str:
    """`rank 1`, or `ranks 0, 2`."""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def main_thread(stacks: str) -> tuple[str, ...]:
    """The main thread's frames, innermost first, of what faulthandler wrote last: threads come newest first, so the
    main one is the last."""
    blocks: list[list[str]] = []
    for line in stacks.splitlines():
        if line.startswith(("Thread ", "Current thread ")):
            blocks.append([])
        elif blocks and (found := _FRAME.match(line)):
            blocks[-1].append(f"{found['file']}:{found['line']} {found['name']}")
    return tuple(blocks[-1]) if blocks else ()
