"""What this process does when it is told to stop, and when the one that started it dies.

Before a run has taken over, a signal ends the process at once, in order and with a word: there is nothing to save.
From then on it only sets a flag, which all ranks agree on at a step boundary.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from dataclasses import dataclass, field
from typing import Any

from trainer.launched import SUPERVISOR

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
STOPPED = 75  # EX_TEMPFAIL: the exit code of a run that wants to be started again
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


class StoppedEarly(BaseException):
    """A signal before the run had taken over; not an Exception, so that no handler of faults takes it for one."""

    exit_code = STOPPED


@dataclass
class StopSignal:
    """Set by SIGTERM, SIGINT, SIGUSR1 or SIGUSR2; read, agreed over ranks, at a step boundary."""

    name: str = ""
    event: threading.Event = field(default_factory=threading.Event)

    def install(self) -> StopSignal:
        """Catch the four signals; the handler only sets the flag, however often they come."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._set)
        return self

    def _set(self, number: int, frame: Any) -> None:
        if not self.name:  # a second signal may interrupt the first one's handler, inside of the event's own lock
            self.name = signal.Signals(number).name
            self.event.set()

    @property
    def raised(self) -> bool:
        return self.event.is_set()


def stop_early() -> None:
    """Let the four signals raise StoppedEarly until a StopSignal takes their place."""
    for number in STOP_SIGNALS:
        signal.signal(number, _raise_stopped)


def _raise_stopped(number: int, frame: Any) -> None:
    for other in STOP_SIGNALS:
        signal.signal(other, signal.SIG_IGN)  # a second one must not break into the leaving
    name = signal.Signals(number).name
    raise StoppedEarly(f"stopped by {name} before the run had begun: nothing to save; start the same command again")


def follow_launcher() -> None:
    """End with whoever started this rank, so that its death leaves no orphan (Linux; elsewhere nothing happens).

    The ranks of `tunesmith launch` are killed with it: what they could still save depends on all of them. torchrun dies
    of signals that it does not know, such as SIGUSR1, and leaves its ranks behind; they take that for a SIGTERM.
    """
    if os.environ.get(SUPERVISOR):
        die_with_parent(signal.SIGKILL, int(os.environ[SUPERVISOR]))
    elif os.environ.get("TORCHELASTIC_RUN_ID"):
        die_with_parent(signal.SIGTERM, os.getppid())


def die_with_parent(number: signal.Signals = signal.SIGKILL, parent: int | None = None) -> None:
    """Have the kernel send a signal to this process when its parent dies; at once if `parent` is dead already."""
    if sys.platform != "linux":
        return
    expected = os.getppid() if parent is None else parent
    if ctypes.CDLL(None, use_errno=True).prctl(_SET_PARENT_DEATH_SIGNAL, int(number), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != expected:
        os.kill(os.getpid(), number)  # it died before the kernel was asked
