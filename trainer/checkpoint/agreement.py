"""Ranks that succeed or fail together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainer.checkpoint.manifest import CheckpointError
from trainer.config.errors import UserError
from trainer.world import World


def agreed(world: World, work: Callable[[], Any]) -> list[Any]:
    """Every rank's JSON result in rank order; an error on one rank is the same error on all, with the rank's name."""
    mine: dict[str, Any] = {}
    cause: Exception | None = None
    try:
        mine["value"] = work()
    except Exception as error:  # noqa: BLE001  whatever it is, no peer may wait for this rank; raised below on all
        own = isinstance(error, UserError | CheckpointError)
        mine = {
            "error": str(error) if own else f"{type(error).__name__}: {error}",
            "user": isinstance(error, UserError),
        }
        cause = error
    rows = world.gather(mine)
    failed = {rank: row for rank, row in enumerate(rows) if "error" in row}
    if not failed:
        return [row["value"] for row in rows]
    texts = {row["error"] for row in failed.values()}
    message = texts.pop() if len(texts) == 1 else "; ".join(f"rank {r}: {row['error']}" for r, row in failed.items())
    if len(failed) < world.size and len(failed) == 1:
        message = f"{message} (rank {next(iter(failed))} of {world.size})"
    raise (UserError if any(row["user"] for row in failed.values()) else CheckpointError)(message) from cause
