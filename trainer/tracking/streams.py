"""What goes to standard error, to logs or to a core dump, without the secrets of the environment."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from trainer.tracking.redact import known_secrets, redact


class RedactedStream:
    """A text stream that writes what it is given with secrets replaced; all else is the stream's own."""

    def __init__(self, stream: TextIO, secrets: list[str]) -> None:
        self._stream, self._secrets = stream, secrets

    def write(self, text: str) -> int:
        """Write ``text`` without secrets; gives the length that was asked for."""
        self._stream.write(redact(text, self._secrets))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each line without secrets."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def keep_secrets(debug: bool = False) -> None:
    """Put redaction before standard error, and so before logs, warnings and tracebacks of whatever thread.

    No core is dumped either, since it would hold the environment; with ``debug`` it is as the shell has it. Called
    before any logging handler is made. Calling it twice is harmless.
    """
    if not isinstance(sys.stderr, RedactedStream):
        sys.stderr = RedactedStream(sys.stderr, known_secrets(os.environ))
    if not debug:
        _, hard = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
