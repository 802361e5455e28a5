"""What the supervisor shows: rank 0's output as it comes, and its own words. A thread of its own writes, so that a
terminal that takes nothing (Ctrl-S, a full pipe) holds up nobody."""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
from pathlib import Path
from typing import BinaryIO

POLL = 0.2  # seconds between looks at rank 0's log
PARTING = 5.0  # seconds to show what is left at the end


class Terminal:
    """Follows one log at a time on stdout, and says lines on stderr."""

    def __init__(self) -> None:
        self._words: queue.SimpleQueue[str | Path] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._log: BinaryIO | None = None
        self._thread = threading.Thread(target=self._run, name="terminal", daemon=True)
        self._thread.start()

    def follow(self, log: Path) -> None:
        """Show this log from its start on, after what is left of the one before."""
        self._words.put(log)

    def say(self, text: str) -> None:
        """Show a line, after all of the log so far."""
        self._words.put(text)

    def close(self) -> None:
        """Show what is left, within PARTING seconds."""
        self._closing.set()
        self._thread.join(PARTING)

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # nobody reads any more: the logs have it all
            while not self._closing.wait(POLL):
                self._show()
            self._show()

    def _show(self) -> None:
        self._copy()
        while not self._words.empty():
            word = self._words.get()
            if isinstance(word, str):
                self._copy()
                print(f"tunesmith launch: {word}", file=sys.stderr, flush=True)
                continue
            if self._log is not None:
                self._log.close()
            self._log = word.open("rb")

    def _copy(self) -> None:
        if self._log is None:
            return
        while data := self._log.read(1 << 16):
            sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
