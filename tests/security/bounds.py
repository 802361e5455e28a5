"""What a refusal may cost, and the sign that code was run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS, BYTES = 1.0, 200 << 20


@contextmanager
def bounded(seconds: float = SECONDS, most: int = BYTES) -> Iterator[None]:
    """Assert that the block takes at most so much CPU time and so much more resident memory, at its highest."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before, began = _kib("VmRSS"), time.process_time()
    yield
    used, grown = time.process_time() - began, (_kib("VmHWM") - before) << 10
    assert used < seconds, f"{used:.2f} s"
    assert grown < most, f"{grown >> 20} MiB"


def _kib(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key + ":")))


def pickled_command(canary: Path) -> bytes:
    """A pickle that makes the canary file wherever it is loaded: protocol 0, `posix.system`."""
    return b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
