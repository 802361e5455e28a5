"""Is there room for a checkpoint? Asked before anything of it is written."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path

from trainer.checkpoint.agreement import agreed
from trainer.checkpoint.manifest import CheckpointError, newest
from trainer.checkpoint.ranges import Shadows, shadow_entries
from trainer.config.errors import UserError
from trainer.config.memory import optimizer_bytes
from trainer.config.schema import Optimizer
from trainer.engine.base import Engine, Piece
from trainer.world import World

log = logging.getLogger(__name__)

SMALL_FILES = 1 << 20  # bytes for seal, hint, folder and journal rows beside the shards and the manifest
_BYTES_OF_A_RANGE = 256  # in the manifest


def needed(shards: list[int], ranges: int) -> tuple[int, int]:
    """Bytes and files of a checkpoint with shards of these sizes and so many ranges."""
    return sum(shards) + ranges * _BYTES_OF_A_RANGE + SMALL_FILES, len(shards) + 4  # folder, manifest, seal, hint


def free_bytes(folder: Path) -> tuple[Path, int, int | None]:
    """The nearest folder that exists, the bytes an ordinary user may write there, and the files (None: no limit)."""
    while not folder.exists():
        folder = folder.parent
    status = os.statvfs(folder)
    return folder, status.f_bavail * status.f_frsize, status.f_favail if status.f_files else None


def check_room(folder: Path, size: int, files: int, what: str) -> None:
    """Raise CheckpointError with the numbers where `folder`'s filesystem has not `size` bytes or `files` inodes free.

    A quota may still be tighter: a write that fails tells of that.
    """
    folder, free, inodes = free_bytes(folder)
    if free < size:
        raise CheckpointError(
            f"output: {what} needs {shown(size)}, {folder} has {shown(free)} free: free some space, lower "
            "checkpoint.keep, or choose another `output`"
        )
    if inodes is not None and inodes < files:
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


def check_start(
    folder: Path, keep: int, engine: Engine, world: World, optimizers: Sequence[Optimizer], shadows: Shadows
) -> None:
    """Before the first step, on all ranks: raise UserError where not even one checkpoint would fit; warn where `keep`
    do not."""
    rows = agreed(world, lambda: list(expected(engine, shadows, optimizers)))

    def check() -> None:
        size, files = needed([size for size, _ in rows], sum(ranges for _, ranges in rows))
        try:
            check_room(folder, size, files, "a checkpoint of this run")
        except CheckpointError as error:
            raise UserError(str(error)) from error
        missing = keep + 1 - len(newest(folder))  # the new one is whole before an old one goes
        free = free_bytes(folder)[1]
        if free < missing * size:
            text = "checkpoint.keep: %d: %d more of %s each are to come, %s has %s free"
            log.warning(text, keep, missing, shown(size), folder, shown(free))

    agreed(world, lambda: check() if world.is_main else None)


def expected(engine: Engine, shadows: Shadows, optimizers: Sequence[Optimizer]) -> tuple[int, int]:
    """Bytes and ranges of this rank's file once the optimizer has its state, before it has made a step.

    The largest of several stages' optimizers counts. Muon's state of a matrix that is cut is taken for AdamW's.
    """
    slots = list(engine.slots())
    pieces = [piece for slot in slots if engine.writes(slot) for piece in slot.pieces]
    shapes = {piece.name: _shape(piece) for piece in pieces}
    values = sum(slot.value(piece).nbytes for slot in slots if engine.writes(slot) for piece in slot.pieces)
    beside = sum(part.view.nbytes for parts in shadow_entries(slots, shadows) for part in parts)
    state = max(optimizer_bytes(optimizer, shapes) for optimizer in optimizers)
    return values + beside + state, len(pieces) * (3 + len(shadows))


def _shape(piece: Piece) -> tuple[int, ...]:
    return piece.shape if piece.numel == math.prod(piece.shape) else (piece.numel,)
