"""Save: every act agreed by all ranks, published by one rename.

Each rank writes its shard into a staging folder, all agree that they did, rank 0 writes the manifest and renames.
Asynchronous saving and fencing belong between the first act and the second.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from trainer.checkpoint.agreement import agreed
from trainer.checkpoint.durable import (
    clean,
    publish_folder,
    remove_folder,
    staging_folder,
    sync,
    write_file,
)
from trainer.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    SEAL,
    STEP_PREFIX,
    CheckpointError,
    FileRecord,
    Manifest,
    Range,
    TensorRecord,
    check_coverage,
    encode,
    newest,
    shard_name,
    step_name,
    step_of,
)
from trainer.checkpoint.ranges import DTYPES, counters, entries, write_shard
from trainer.engine.base import Engine
from trainer.fault import fail_point
from trainer.tracking.run_record import replace_file
from trainer.world import World

log = logging.getLogger(__name__)

HINT = "latest"  # names the newest folder for people and scripts; loading scans and never reads it


def save(folder: Path, step: int, engine: Engine, world: World, state: dict[str, Any], keep: int = 3) -> Path:
    """Publish `folder/step-00000050`: values, optimizer state and step counters of all ranks, and `state` as JSON.

    Called by every rank; `state` is rank 0's (it is the run's, not a rank's). Afterwards the `keep` newest checkpoints
    up to this step stay. If any rank fails, all raise the same CheckpointError, nothing is published and older ones are
    as before. A checkpoint that is already there for this step is replaced.
    Raises UserError where the optimizer's state cannot be cut into ranges.
    """
    fail_point("before")
    target = folder / step_name(step)
    name = agreed(world, lambda: _stage(target) if world.is_main else "")[0]
    staging = folder / name
    try:
        fail_point("staged")
        shards = agreed(world, lambda: _write_rank(staging, engine, world))
        fail_point("shards")
        agreed(world, lambda: _publish(staging, target, step, shards, state) if world.is_main else None)
    except Exception:
        if world.is_main:
            remove_folder(staging)
        raise
    if world.is_main:
        _tidy(folder, target, keep)
    return target


def _stage(target: Path) -> str:
    target.parent.mkdir(parents=True, exist_ok=True)
    clean(target.parent, STEP_PREFIX)
    return staging_folder(target).name


def _write_rank(staging: Path, engine: Engine, world: World) -> dict[str, Any]:
    """Write this rank's shard; returns its digest and what it holds, as JSON."""
    slots = [slot for slot in engine.slots() if engine.writes(slot)]
    parts = [part for slot in slots for part in entries(slot)]
    steps = {piece.name: counters(slot) for slot in slots for piece in slot.pieces}
    for name, values in steps.items():
        if not all(math.isfinite(value) for value in values.values()):
            raise CheckpointError(f"{name}: counters {values}: not finite: not saved")
    name = shard_name(world.rank, world.size)
    record = write_shard(staging / name, parts)
    held = [[p.kind, p.name, list(p.shape), DTYPES[p.view.dtype], p.whole, p.start, p.view.numel()] for p in parts]
    return {"file": name, "record": record, "held": held, "counters": steps}


def _publish(staging: Path, target: Path, step: int, shards: list[dict[str, Any]], state: dict[str, Any]) -> None:
    manifest = _merge(step, shards, state)
    check_coverage(manifest)
    data, seal = encode(manifest)
    write_file(staging / MANIFEST, data)
    fail_point("manifest")
    write_file(staging / SEAL, seal)
    sync(staging)
    fail_point("rename")
    publish_folder(staging, target)
    fail_point("renamed")


def _merge(step: int, shards: list[dict[str, Any]], state: dict[str, Any]) -> Manifest:
    """One manifest of all ranks' reports. Raises CheckpointError where they contradict one another."""
    found: dict[tuple[str, str], TensorRecord] = {}
    steps: dict[str, dict[str, int | float]] = {}
    for shard in shards:
        for kind, name, shape, dtype, whole, start, numel in shard["held"]:
            fresh = TensorRecord(kind=kind, name=name, shape=shape, dtype=dtype, whole=whole, ranges=[])
            record = found.setdefault((kind, name), fresh)
            if (record.shape, record.dtype, record.whole) != (shape, dtype, whole):
                raise CheckpointError(
                    f"{kind}/{name}: {shape} {dtype} on one rank, {record.shape} {record.dtype} on another"
                )
            record.ranges.append(Range(file=shard["file"], start=start, numel=numel))
        for name, values in shard["counters"].items():
            if steps.setdefault(name, values) != values:
                raise CheckpointError(f"{name}: optimizer counters {values} on one rank, {steps[name]} on another")
    files = {shard["file"]: FileRecord(**shard["record"]) for shard in shards}
    return Manifest(
        format=FORMAT,
        step=step,
        world_size=len(shards),
        files=files,
        tensors=list(found.values()),
        counters=steps,
        state=state,
    )


def _tidy(folder: Path, target: Path, keep: int) -> None:
    """Move the hint and drop old checkpoints. The checkpoint is safe by now, so a failure here is a warning."""
    step = step_of(target) or 0
    try:
        replace_file(folder / HINT, target.name + "\n")
        older = [path for path in newest(folder) if (step_of(path) or 0) <= step]
        for path in older[max(keep, 1) :]:
            fail_point("rotate")
            remove_folder(path)
    except OSError as error:
        log.warning("checkpoint %s is saved, but tidying up after it failed: %s", target, error)
    for path in newest(folder):
        if (step_of(path) or 0) > step:
            log.warning("%s is newer than the step just saved: if it is good, the next resume takes it", path)
