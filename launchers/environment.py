"""The environment that a training process should start in. It must be set before the process starts, hence the
re-exec."""

from __future__ import annotations

import os
import sys
from pathlib import Path

SWITCH = "TUNESMITH_ALLOCATOR"

# glibc gives large blocks back to the kernel at every free and takes them anew, page by page, at every step. Keeping
# them took an early loop from 95 to 161 tokens per second on a busy machine; with fused LoRA on a calm one the gain is
# within the noise. Huge pages (glibc.malloc.hugetlb) are left alone: their first touch cost about five times more.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "-1",
    "MALLOC_TOP_PAD_": str(64 << 20),
    "MALLOC_ARENA_MAX": "1",
}


def has_gpu() -> bool:
    """Whether an NVIDIA device is there; asks the file system, since importing torch would take a second."""
    return Path("/dev/nvidiactl").exists()


def cpu_environment() -> dict[str, str]:
    """Variables that a CPU run adds to its environment; none where the user has set the allocator or switched this
    off."""
    if has_gpu() or os.environ.get(SWITCH) == "off" or sys.platform != "linux":
        return {}
    return {key: value for key, value in KEEP_MEMORY.items() if key not in os.environ}


def restart_with(variables: dict[str, str]) -> None:
    """Replace this process by itself with more variables set; returns only where there is nothing to set."""
    if not variables or os.environ.get(SWITCH) == "set":
        return
    environment = {**os.environ, **variables, SWITCH: "set"}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
