"""Is there room for a checkpoint? Asked before anything of it is written."""

from __future__ import annotations

import os
from pathlib import Path

from trainer.checkpoint.manifest import CheckpointError

SMALL_FILES = 1 << 20  # bytes for seal, hint, folder and journal rows beside the shards and the manifest
_BYTES_OF_A_RANGE = 256  # in the manifest


def needed(shards: list[int], ranges: int) -> tuple[int, int]:
    """Bytes and files of a checkpoint with shards of these sizes and so many ranges."""
    return sum(shards) + ranges * _BYTES_OF_A_RANGE + SMALL_FILES, len(shards) + 4  # folder, manifest, seal, hint


def check_room(folder: Path, size: int, files: int, what: str) -> None:
    """Raise CheckpointError with the numbers where `folder`'s filesystem has not `size` bytes or `files` inodes free.

    Counted is what an ordinary user may use. A quota may still be tighter: a write that fails tells of that.
    """
    while not folder.exists():
        folder = folder.parent
    status = os.statvfs(folder)
    free, inodes = status.f_bavail * status.f_frsize, status.f_favail
    if free < size:
        raise CheckpointError(
            f"output: {what} needs {shown(size)}, {folder} has {shown(free)} free: free some space, lower "
            "checkpoint.keep, or choose another `output`"
        )
    if status.f_files and inodes < files:  # filesystems without a table of inodes say 0
        raise CheckpointError(
            f"output: {what} needs {files} files, {folder} has room for {inodes}: remove some files there, or choose "
            "another `output`"
        )


def shown(size: int) -> str:
    """Bytes for people."""
    for unit, width in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= width:
            return f"{size / width:.1f} {unit}"
    return f"{size} bytes"
