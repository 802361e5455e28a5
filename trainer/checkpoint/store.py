"""Save: every act agreed by all ranks, published by one rename.

All ranks say what they hold, rank 0 makes room and a staging folder, each rank writes its file there, all agree that
they did, rank 0 writes the manifest and renames. The acts are the same for a save that training waits for (`save`) and
for one in the background (`saver.Saver`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.checkpoint.agreement import agreed
from trainer.checkpoint.durable import (
    REPLACED,
    clean,
    publish_folder,
    remove_folder,
    staging_folder,
    sync,
    write_file,
)
from trainer.checkpoint.image import Direct, Layout, Snapshot
from trainer.checkpoint.lease import NO_LEASE, LeaseLostError, NoLease
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
from trainer.checkpoint.ranges import Shadows, owned
from trainer.checkpoint.retention import doomed
from trainer.checkpoint.space import check_room, needed
from trainer.config.schema import Checkpoint
from trainer.engine.base import Engine
from trainer.fault import fail_point
from trainer.tracking.run_record import replace_file
from trainer.world import World

log = logging.getLogger(__name__)

HINT = "latest"  # names the newest folder for people and scripts; loading scans and never reads it

Counters = dict[str, dict[str, int | float]]


@dataclass(frozen=True)
class Store:
    """Where checkpoints go, who may write there, and which stay."""

    folder: Path
    lease: NoLease = NO_LEASE
    settings: Checkpoint = field(default_factory=Checkpoint)
    before: Callable[[], None] = lambda: None  # brings to the disk what must not be older than a checkpoint


@dataclass(frozen=True)
class Content:
    """What this rank saves: the bytes of its file, and its parameters' counters."""

    file: Direct | Snapshot
    counters: Counters


def save(
    folder: Path,
    step: int,
    engine: Engine,
    world: World,
    state: dict[str, Any],
    keep: int = 3,
    *,
    shadows: Shadows | None = None,
) -> Path:
    """Publish `folder/step-00000050`: values, optimizer state and step counters of all ranks, their `shadows`, and
    `state` as JSON.

    Called by every rank; `state` is rank 0's (it is the run's, not a rank's). Afterwards the `keep` newest checkpoints
    up to this step stay. If any rank fails, all raise the same CheckpointError, nothing is published and older ones are
    as before. A checkpoint that is already there for this step is replaced.
    Raises UserError where the optimizer's state cannot be cut into ranges.
    """
    store, beside = Store(folder, settings=Checkpoint(keep=keep)), shadows or {}
    path = publish(store, step, lambda: direct(engine, beside), world, state, list(beside))
    if world.is_main:
        tidy(store, step, {})
    return path


def direct(engine: Engine, shadows: Shadows) -> Content:
    """This rank's content, read from the tensors while it is written."""
    parts, steps = owned(engine, shadows)
    return Content(Direct(Layout(parts)), steps)


def publish(
    store: Store, step: int, make: Callable[[], Content], world: World, state: dict[str, Any], shadows: list[str]
) -> Path:
    """The acts of a save; `make` gives this rank's content, and where it raises all ranks raise. See `save`."""
    target, mine = store.folder / step_name(step), shard_name(world.rank, world.size)
    made: list[Content] = []

    def describe() -> dict[str, Any]:
        fail_point("before", step=step)
        made.append(make())
        layout = made[0].file.layout
        return {"file": mine, "size": layout.size, "held": layout.held(), "counters": made[0].counters}

    shards = agreed(world, describe)
    plan: list[Manifest] = []

    def stage() -> str:
        plan.append(_merge(step, shards, state, store.lease.generation, shadows))
        return _stage(store, target, plan[0])

    staging = store.folder / agreed(world, lambda: stage() if world.is_main else "")[0]

    def write() -> dict[str, Any]:
        fail_point("staged", step=step)
        return made[0].file.write(staging / mine)

    def finish() -> None:
        fail_point("shards", step=step)
        if world.is_main:
            _publish(store, staging, target, plan[0], records)

    try:
        records = agreed(world, write)
        agreed(world, finish)
    except Exception:
        if world.is_main:
            remove_folder(staging)
        raise
    return target


def _stage(store: Store, target: Path, manifest: Manifest) -> str:
    store.lease.verify()
    store.folder.mkdir(parents=True, exist_ok=True)
    clean(store.folder, STEP_PREFIX, store.lease.generation)
    ranges = sum(len(tensor.ranges) for tensor in manifest.tensors)
    size, files = needed([record.size for record in manifest.files.values()], ranges)
    check_room(store.folder, size, files, f"the checkpoint of step {manifest.step}")
    return staging_folder(target, store.lease.generation).name


def _publish(store: Store, staging: Path, target: Path, plan: Manifest, records: list[dict[str, Any]]) -> None:
    files = dict(zip(plan.files, (FileRecord(**record) for record in records), strict=True))
    for name, record in files.items():
        path = staging / name
        if not path.exists() or path.stat().st_size != record.size:
            raise CheckpointError(f"{path}: not as its rank wrote it: the folder must be shared by all ranks")
    data, seal = encode(plan.model_copy(update={"files": files}))
    write_file(staging / MANIFEST, data)
    fail_point("manifest", step=plan.step)
    write_file(staging / SEAL, seal)
    sync(staging)
    store.before()
    fail_point("rename", step=plan.step)
    store.lease.verify()
    publish_folder(staging, target)
    fail_point("renamed", step=plan.step)


def _merge(
    step: int, shards: list[dict[str, Any]], state: dict[str, Any], generation: int, shadows: list[str]
) -> Manifest:
    """One manifest of all ranks' reports, their files still without digests. Raises CheckpointError where they
    contradict one another."""
    found: dict[tuple[str, str], TensorRecord] = {}
    steps: Counters = {}
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
    manifest = Manifest(
        format=FORMAT,
        step=step,
        world_size=len(shards),
        generation=generation,
        shadows=shadows,
        files={shard["file"]: FileRecord(size=shard["size"], sha256="0" * 64) for shard in shards},
        tensors=list(found.values()),
        counters=steps,
        state=state,
    )
    check_coverage(manifest)
    return manifest


def tidy(store: Store, step: int, scores: Mapping[int, float]) -> None:
    """Move the hint and drop what retention lets go. The checkpoint is safe by now, so a failure here is a warning."""
    folder, target = store.folder, step_name(step)
    try:
        store.lease.verify()
        replace_file(folder / HINT, target + "\n")
        paths = {step_of(path.with_name(path.name.removeprefix(REPLACED))): path for path in newest(folder)}
        steps = [found for found in paths if found is not None]
        for old in doomed((found for found in steps if found <= step), scores, store.settings):
            fail_point("rotate", step=step)
            remove_folder(paths[old])
    except (OSError, LeaseLostError) as error:
        log.warning("checkpoint %s is saved, but tidying up after it failed: %s", folder / target, error)
    for path in newest(folder):
        if (step_of(path) or 0) > step:
            log.warning("%s is newer than the step just saved: if it is good, the next resume takes it", path)
