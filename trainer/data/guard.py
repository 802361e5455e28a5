"""What stops a tokenizer or a template that cannot be worked with."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from trainer.config.errors import UserError

RENDER_SECONDS = 5.0  # one conversation renders in under a millisecond; the sandbox itself limits no time


class TokenizerFault(UserError):
    """A fault of the tokenizer or its template, the same for every row: no policy for bad rows may skip it."""


@contextlib.contextmanager
def render_limit(place: str, seconds: float | None = None) -> Iterator[None]:
    """Stop a template that runs away, by an alarm; without effect outside a process's main thread.

    Raises TokenizerFault. An alarm that was set before goes on afterwards.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TokenizerFault(f"{place}: the chat template runs for over {seconds:g} s; mend `model.chat_template`")

    seconds = RENDER_SECONDS if seconds is None else seconds
    handler = signal.signal(signal.SIGALRM, stop)
    started = time.monotonic()
    earlier, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if earlier:
            signal.setitimer(signal.ITIMER_REAL, max(earlier - (time.monotonic() - started), 1e-3))
