"""A rank in reserve: started and with everything imported, it waits until the one whose place it takes has died.

Importing is most of a restart (measured: see docs/launching.md). The supervisor holds the other end of a pipe; one line
of JSON on it calls the rank in, its end sends it home.
"""

from __future__ import annotations

import json
import os
import sys

from trainer.launched import RESERVE


def in_reserve() -> bool:
    """Whether this process was started to wait."""
    return RESERVE in os.environ


def await_call() -> None:
    """Return when the supervisor calls, with the environment and the log of the attempt that this rank now belongs to.

    Leaves with exit code 0 where the supervisor needs it no more.
    """
    with os.fdopen(int(os.environ.pop(RESERVE)), encoding="utf-8") as line:
        text = line.readline()
    if not text:
        sys.exit(0)
    call = json.loads(text)
    log = os.open(call["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.environ.update(call["environment"])
