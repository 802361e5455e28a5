"""How an attempt ended, from how its ranks ended. A pure function."""

from __future__ import annotations

import re
import signal
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from launchers.hang import Verdict
from trainer.signals import STOP_SIGNALS, STOPPED

REFUSED = 2  # the exit code of a user's mistake
INTERRUPTED = 130
STARTING = ("start", "data", "load")  # sections in which there is nothing to save
MEANINGS = {
    signal.SIGKILL: "kill -9 by a person, a batch system or the kernel",
    signal.SIGSEGV: "a crash in native code; its Python stack is in the log",
    signal.SIGABRT: "an abort in native code; its Python stack is in the log",
    signal.SIGBUS: "a bus error; a full disk or /dev/shm under mapped memory does that",
    signal.SIGFPE: "an arithmetic fault in native code",
    signal.SIGILL: "an instruction that this processor lacks",
    signal.SIGXCPU: "the limit of processor time",
    signal.SIGXFSZ: "the limit of file size",
}
# What a rank tells when another one is gone: true, and not the cause.
_LOST_PEER = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|closed by peer|remote process exited|socket timeout|"
    r"peer .*(closed|gone)|ncclRemoteError|ncclSystemError|store.*(closed|timed out)",
    flags=re.IGNORECASE,
)


@dataclass(frozen=True)
class Ending:
    """How one rank ended, and where it was by then."""

    rank: int
    code: int  # exit code, or minus the signal
    time: float
    place: Mapping[str, Any] = field(default_factory=dict)
    killed: bool = False  # by the supervisor, after something else had gone wrong

    @property
    def told(self) -> str:
        """The error it left with, in its own words."""
        return (self.place.get("ended") or {}).get("message", "")

    @property
    def moment(self) -> float:
        """When it went wrong."""
        return (self.place.get("ended") or {}).get("time", self.time)


@dataclass(frozen=True)
class Outcome:
    """What became of an attempt."""

    kind: Literal["complete", "preempted", "refused", "failed"]
    reason: str = ""
    rank: int | None = None  # the first one that failed


def judge(
    endings: Sequence[Ending],
    *,
    completed: bool,
    already: bool = False,
    stop: str = "",
    hung: Verdict | None = None,
    out_of_memory: Collection[int] = (),
) -> Outcome:
    """The outcome of an attempt all of whose ranks have ended.

    `completed`: the run's own record says that it was completed in this attempt; whatever a rank ended with after that
    is no failure. But where a rank refused to begin, it was another run in that folder. `already`: it says so, and said
    so before. `stop`: the signal that asked for an end. `hung`: why the supervisor killed all ranks.
    """
    refused = any(e.code == REFUSED and not e.killed and e.place.get("section", "start") in STARTING for e in endings)
    if completed and not refused:
        return Outcome("complete")
    stopped = bool(stop) or any(e.code == STOPPED for e in endings)
    # a rank that is leaving already has no handlers any more: a second signal ends it, and that is no failure
    ends = {0, STOPPED, *(-number for number in STOP_SIGNALS if stopped)}
    failed = sorted((e for e in endings if not e.killed and e.code not in ends), key=_precedence)
    if hung is not None:
        outcome = Outcome("failed", hung.reason, hung.ranks[0])
        return Outcome("preempted", f"{stop}, but {hung.reason}") if stop else outcome
    if not failed:
        if stopped and any(e.code or e.killed for e in endings):
            return Outcome("preempted", stop)
        if already:
            return Outcome("complete")
        return Outcome("failed", "all ranks left with exit code 0, but the run's record does not say `complete`", 0)
    first = failed[0]
    reason = explain(first, out_of_memory)
    if first.code == REFUSED:
        return Outcome("refused", first.told or reason, first.rank)
    if stop and (first.code < 0 or first.code == INTERRUPTED or first.place.get("section", "start") in STARTING):
        return Outcome("preempted", stop if first.code == INTERRUPTED else f"{stop}; {reason}", first.rank)
    return Outcome("failed", reason, first.rank)


def _precedence(ending: Ending) -> tuple[int, float]:
    """The likeliest cause first. A killed or crashed rank makes its peers tell of lost connections, and may make them
    abort while they leave; of equals the earlier one."""
    if ending.code < 0 and ending.code != -signal.SIGABRT:
        kind = 0
    elif ending.code > 0 and not _LOST_PEER.search(ending.told):
        kind = 1
    else:
        kind = 2 if ending.code < 0 else 3
    return kind, ending.moment


def explain(ending: Ending, out_of_memory: Collection[int] = ()) -> str:
    """One line: which rank, where, why."""
    who = f"rank {ending.rank}"
    step = ending.place.get("step")
    where = f" at step {step}" if step is not None else f" in its part `{ending.place.get('section', 'start')}`"
    if ending.code < 0:
        number = -ending.code
        name = signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"
        if ending.rank in out_of_memory:
            return f"out of memory: the kernel killed {who}{where} ({name})"
        meaning = f" ({MEANINGS[signal.Signals(number)]})" if number in MEANINGS else ""
        return f"{who} was ended by {name}{where}{meaning}"
    if ending.told:
        return f"{who}{where}: {ending.told}"
    return f"{who} left with exit code {ending.code}{where}, without a word"
