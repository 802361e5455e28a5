"""Whether a run that failed is started again: as long as it gets on. Pure functions of what has failed so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SAME_PLACE = 2  # failures at one place without progress between them: a poison batch, a bug
NO_PROGRESS = 3  # failures anywhere without progress between them
LONGEST_WAIT = 60.0  # seconds before a restart
IDS_SHOWN = 8


@dataclass(frozen=True)
class Failure:
    """How one attempt failed: who, where, and how far the run had come by then."""

    rank: int | None
    reason: str  # one line
    section: str = "start"  # of the rank that failed
    step: int | None = None  # the step in work, from 1
    ids: tuple[str, ...] = ()  # its examples
    reached: int = 0  # the last step that every rank had finished
    saved: int = -1  # the newest checkpoint's step

    @property
    def place(self) -> str:
        """Where it failed, in words: two failures at one place are taken for one fault."""
        return f"step {self.step}" if self.step is not None else self.section


@dataclass(frozen=True)
class Restart:
    """Start all ranks again after so many seconds."""

    delay: float


@dataclass(frozen=True)
class GiveUp:
    """Stop, for this reason and with this cure."""

    reason: str


def decide(failures: Sequence[Failure], max_restarts: int) -> Restart | GiveUp:
    """What follows the last of the failures of one `tunesmith launch`, in their order.

    Progress is a newer checkpoint, or a later step finished by all ranks, than at any failure before. A failure after
    progress is met by a restart at once; without progress it is taken for a lasting fault after SAME_PLACE failures at
    one place, or NO_PROGRESS anywhere.
    """
    stalled = without_progress(failures)
    last = failures[-1]
    same = sum(failure.place == last.place for failure in stalled)
    if same >= SAME_PLACE:
        return GiveUp(f"failed {same} times at {last.place} without getting beyond it{cure(last)}")
    if len(stalled) >= NO_PROGRESS:
        places = ", ".join(failure.place for failure in stalled)
        return GiveUp(f"failed {len(stalled)} times without progress, at {places}; last: {last.reason}")
    if len(failures) > max_restarts:
        return GiveUp(f"{max_restarts} restarts used up (--max-restarts)")
    return Restart(0.0 if len(stalled) == 1 else min(LONGEST_WAIT, 2.0 ** (len(stalled) - 1)))


def without_progress(failures: Sequence[Failure]) -> list[Failure]:
    """The failures since the run last got on, the one that came after that progress included."""
    stalled: list[Failure] = []
    reached, saved = -1, -2
    for failure in failures:
        if failure.reached > reached or failure.saved > saved:
            stalled = []
        stalled.append(failure)
        reached, saved = max(reached, failure.reached), max(saved, failure.saved)
    return stalled


def cure(failure: Failure) -> str:
    """What a user can do about a step that fails each time: its examples, and how to pass over them."""
    if failure.step is None:
        return ""
    shown = ", ".join(failure.ids[:IDS_SHOWN])
    more = f" and {len(failure.ids) - IDS_SHOWN} more" if len(failure.ids) > IDS_SHOWN else ""
    examples = f"; its examples: {shown}{more}" if shown else ""
    if "out of memory" in failure.reason.lower():
        return f"{examples}; lower batch.micro_tokens, or give the job more memory"
    return f"{examples}; mend them, or pass over the step with guard.skip_steps=[{failure.step}]"
