"""``ledger.jsonl``: the ids of the examples that made up each step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.tracking.journal import append_line

FILE_NAME = "ledger.jsonl"


class Ledger:
    """Appends ``{"step", "stage", "ids"}`` rows; one process writes. The last row of a step counts.

    A row that a kill cut off is removed on opening, one that a full disk cut off at once: none is ever joined to the
    next. Raises OSError where the file cannot be written, and what `guard` raises, where the folder is another run's.
    """

    def __init__(self, folder: Path, guard: Callable[[], None] = lambda: None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path, self._guard = folder / FILE_NAME, guard
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        os.ftruncate(self._file, path.read_bytes().rfind(b"\n") + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row."""
        self._guard()
        append_line(self._file, (json.dumps(row) + "\n").encode())

    def sync(self) -> None:
        """Return once every row is on the disk (fsync)."""
        os.fsync(self._file)

    def close(self) -> None:
        """Sync and close; closing twice is harmless."""
        if self._file >= 0:
            self.sync()
            os.close(self._file)
            self._file = -1


def read_ledger(folder: Path) -> dict[int, dict[str, Any]]:
    """{step: its last row}, of whole lines only."""
    lines = (folder / FILE_NAME).read_bytes().split(b"\n")[:-1]
    return {row["step"]: row for row in map(json.loads, lines)}
