"""What stops a tokenizer or a template that cannot be worked with, and what its process may use."""

from __future__ import annotations

import resource
from pathlib import Path

from trainer.config.errors import UserError

RENDER_SECONDS = 2.0  # CPU time for one conversation; one of 1,000 characters takes under a millisecond
RENDER_BYTES = 256 << 20  # of the whole rendering process, of which Python and Jinja are some 70 MiB
CONVERSATION_BYTES = 16 << 20  # as JSON: a larger one would not leave room for its own rendering


class TokenizerFault(UserError):
    """A fault of the tokenizer or its template, the same for every row: no policy for bad rows may skip it."""


def confine() -> None:
    """Bound this process from here on: memory to RENDER_BYTES in all, nothing written to a file, no core.

    Memory is bounded by RLIMIT_DATA (brk and private mappings, Linux 4.7 on), counted from what is in use now: the
    address space of the libraries says nothing about memory.
    """
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    status = dict(line.split(":", 1) for line in lines if line.startswith("Vm"))
    data, resident = (int(status[key].split()[0]) << 10 for key in ("VmData", "VmRSS"))
    for kind, most in (
        (resource.RLIMIT_DATA, data + max(RENDER_BYTES - resident, 32 << 20)),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        resource.setrlimit(kind, (most, most))
