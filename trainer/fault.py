"""Faults on purpose: named points at which the environment can make a rank die, raise, leave, hang, stop or swell.

    TUNESMITH_FAIL_POINT="shards"                             kill -9 at the first passing of `shards`, on every rank
    TUNESMITH_FAIL_POINT="shards:rank=1:nth=2:raise"          rank 1 raises at its second passing
    TUNESMITH_FAIL_POINT="step:step=7:hang;rename:attempt=2"  at step 7 every rank loops; attempt 2 dies at `rename`

Parts are joined by colons: the point's name, conditions, last the action (default `kill`). Conditions: `rank`; `nth`,
the n-th passing of this process that meets the other conditions (default 1); `attempt`, which `tunesmith launch` counts
from 1 over the life of a run; and any fact that the point gives, such as `step`. Several faults are joined by
semicolons.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from trainer.config.errors import UserError
from trainer.launched import ATTEMPT

FAIL_POINT = "TUNESMITH_FAIL_POINT"
SLOW = 3.0  # seconds of the action `slow`: a storage that lags
EXIT_CODE = 13  # of the action `exit`: no code that anything else ends with


class InjectedFault(RuntimeError):
    """What the action `raise` raises."""


@dataclass(frozen=True)
class Fault:
    """One fault of the environment: where, under which conditions, what."""

    point: str
    action: str = "kill"
    nth: int = 1
    conditions: Mapping[str, str] = field(default_factory=dict)

    def meets(self, point: str, facts: Mapping[str, str]) -> bool:
        """Whether a passing of `point` with these facts is one that counts."""
        return self.point == point and all(facts.get(key) == value for key, value in self.conditions.items())


def parse_faults(text: str) -> list[Fault]:
    """The faults of `TUNESMITH_FAIL_POINT`. Raises UserError for an unknown action or a malformed `nth`."""
    faults = []
    for entry in filter(None, (part.strip() for part in text.split(";"))):
        point, *rest = entry.split(":")
        conditions = dict(part.split("=", 1) for part in rest if "=" in part)
        actions = [part for part in rest if "=" not in part] or ["kill"]
        nth = conditions.pop("nth", "1")
        if len(actions) > 1 or actions[0] not in ACTIONS or not nth.isdigit():
            known = ", ".join(ACTIONS)
            raise UserError(f"{FAIL_POINT}: {entry!r}: write point:key=value:action; actions are {known}; nth a number")
        faults.append(Fault(point, actions[0], int(nth), conditions))
    return faults


_passed: dict[tuple[str, int], int] = {}
_lock = threading.Lock()  # a checkpoint's writer thread passes points too


def fail_point(name: str, **facts: object) -> None:
    """Do what the environment asks for at this point: nothing, in all but tests of what survives it."""
    text = os.environ.get(FAIL_POINT)
    if not text:
        return
    known = {"rank": os.environ.get("RANK", "0"), "attempt": os.environ.get(ATTEMPT, "1")}
    known |= {key: str(value) for key, value in facts.items()}
    for index, fault in enumerate(parse_faults(text)):
        if not fault.meets(name, known):
            continue
        with _lock:
            key = (text, index)
            _passed[key] = _passed.get(key, 0) + 1
            due = _passed[key] == fault.nth
        if due:
            ACTIONS[fault.action](name)


def _kill(point: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)  # as a power cut would: no handler runs, nothing is flushed


def _raise(point: str) -> NoReturn:
    raise InjectedFault(f"fault injected at {point}")


def _full(point: str) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), point)


def _broken(point: str) -> NoReturn:
    raise OSError(errno.EIO, os.strerror(errno.EIO), point)


def _slow(point: str) -> None:
    time.sleep(SLOW)


def _exit(point: str) -> NoReturn:
    os._exit(EXIT_CODE)


def _hang(point: str) -> NoReturn:
    while True:
        time.sleep(0.01)  # Python goes round for ever and other threads go on, without a whole core being burnt


def _hold(point: str) -> NoReturn:
    library = ctypes.PyDLL(None)  # PyDLL keeps the interpreter's lock during the call, as a careless extension does
    while True:
        library.sleep(3600)


def _stop(point: str) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _memory(point: str) -> NoReturn:
    held = []
    while True:
        held.append(bytearray(16 << 20))  # until the kernel's patience ends: set a limit first (cgroup, ulimit -v)


ACTIONS: dict[str, Callable[[str], None]] = {
    "kill": _kill,
    "raise": _raise,
    "full": _full,
    "broken": _broken,
    "slow": _slow,
    "exit": _exit,
    "hang": _hang,
    "hold": _hold,
    "stop": _stop,
    "memory": _memory,
}
