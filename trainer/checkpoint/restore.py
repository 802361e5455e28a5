"""Load: verified before anything is written, the newest good one by itself, and never from zero in silence."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.checkpoint.agreement import agreed
from trainer.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    Manifest,
    check_files,
    encode,
    newest,
    read_manifest,
    step_of,
)
from trainer.checkpoint.ranges import (
    DTYPES,
    PARAMETER,
    Shadows,
    counters,
    entries,
    set_counters,
    shadow_entries,
    state_tensors,
)
from trainer.checkpoint.reader import Reader
from trainer.config.errors import UserError
from trainer.engine.base import Engine, Slot
from trainer.world import World

log = logging.getLogger(__name__)

Prepare = Callable[[dict[str, Any]], None]


class Loaded(dict[str, Any]):
    """The run's state as it was saved; and from which folder and step it came, and why newer ones were refused."""

    def __init__(self, state: dict[str, Any], path: Path, step: int, refused: tuple[str, ...]) -> None:
        super().__init__(state)
        self.path = path
        self.step = step
        self.refused = refused


def load(
    where: Path,
    engine: Engine,
    world: World,
    prepare: Prepare | None = None,
    *,
    optimizer: bool = True,
    shadows: Callable[[], Shadows] = dict,
) -> Loaded:
    """Restore the engine from a checkpoint, or from the newest good one of a folder of checkpoints.

    Nothing is written to the engine before every byte of the checkpoint was compared with its digest (the ranks share
    that work). In a folder, a bad one is skipped with a warning for the next older. Raises CheckpointError with every
    reason if none is good, or none is there: starting from zero is for the caller to decide, by `newest(folder) == []`.
    `prepare` gets the verified state before the engine is touched: there the caller gives the engine the optimizer of
    the saved stage, or raises. Without `optimizer`, values alone are read (to evaluate or export). `shadows`, asked
    after `prepare`, gives the tensors that further kinds are read into; kinds that it does not name are passed over.
    Raises UserError where the trainable parameters, the optimizer or the shadows differ from the saved ones.
    """
    with open_checkpoint(where, world) as reader:
        if prepare is not None:
            prepare(reader.manifest.state)
        _check_parameters(reader, engine, world)
        beside = shadows()
        agreed(world, lambda: _check_shadows(reader, engine, beside))
        if optimizer:
            _restore(reader, engine, world)
        else:
            agreed(world, lambda: _fill_values(reader, engine))
            engine.after_load()
        agreed(world, lambda: _fill_shadows(reader, engine, beside))
        return Loaded(reader.manifest.state, reader.folder, reader.manifest.step, reader.refused)


def open_checkpoint(where: Path, world: World | None = None) -> Reader:
    """A reader of one checkpoint's folder, or of the newest good one in a folder of checkpoints, every byte verified.

    Called by every rank of `world` (default: one process alone). `reader.refused` says why newer ones were passed over.
    Raises CheckpointError with every reason if none is good, or none is there.
    """
    world = world or World()
    one = step_of(where) is not None
    names = agreed(world, lambda: [path.name for path in newest(where)] if world.is_main and not one else [])[0]
    refused: list[str] = []
    for path in [where] if one else [where / name for name in names]:
        try:
            return Reader(path, _verify_together(path, world), tuple(refused))
        except CheckpointError as error:
            if world.is_main:
                log.warning("checkpoint refused: %s", error)
            refused.append(str(error))
    reasons = "; ".join(refused) or "there is none"
    raise CheckpointError(f"{where}: no usable checkpoint: {reasons}: restore one, or start a new run elsewhere")


def _verify_together(path: Path, world: World) -> Manifest:
    """`manifest.verify` with the digests of the shards shared out over the ranks."""
    manifests: list[Manifest] = []

    def check() -> str:
        manifest = read_manifest(path)
        manifests.append(manifest)
        check_files(path, manifest, sorted(manifest.files)[world.rank :: world.size])
        return encode(manifest)[1].decode()

    if len(set(agreed(world, check))) > 1:
        raise CheckpointError(f"{path / MANIFEST}: ranks read different contents: the folder must be shared")
    return manifests[0]


def _restore(reader: Reader, engine: Engine, world: World) -> None:
    engine.prepare_state()
    agreed(world, lambda: _check_states(reader.folder, reader.manifest, reader, engine))
    agreed(world, lambda: _fill(reader.manifest, reader, engine))
    engine.after_load()
    agreed(world, lambda: _check_counters(reader.manifest, engine))


def _check_parameters(reader: Reader, engine: Engine, world: World) -> None:
    """Trainable names, shapes and dtypes over all ranks against the saved ones; the same UserError on every rank."""
    own = {
        piece.name: f"{list(piece.shape)} {DTYPES[slot.owner.dtype]}"
        for slot in engine.slots()
        for piece in slot.pieces
    }
    live = {name: text for row in agreed(world, lambda: own) for name, text in row.items()}
    saved = {t.name: f"{t.shape} {t.dtype}" for t in reader.manifest.tensors if t.kind == PARAMETER}
    names = sorted(name for name in live.keys() | saved.keys() if live.get(name) != saved.get(name))
    if names:
        shown = "; ".join(
            f"{name}: saved {saved.get(name, 'not')}, trainable now {live.get(name, 'not')}" for name in names[:3]
        )
        raise UserError(
            f"{reader.folder}: {len(names)} parameters differ: {shown}: resume with the model and tuning it was saved "
            "with"
        )


def _check_shadows(reader: Reader, engine: Engine, shadows: Shadows) -> None:
    for part in (part for parts in shadow_entries(list(engine.slots()), shadows) for part in parts):
        record = reader.tensors.get((part.kind, part.name)) if part.kind in reader.manifest.shadows else None
        now = f"{list(part.shape)} {DTYPES[part.view.dtype]}"
        was = "none" if record is None else f"{record.shape} {record.dtype}"
        if was != now:
            raise UserError(
                f"{reader.folder}: {part.label}: {was} was saved, {now} is asked for: ask for what was saved"
            )


def _fill_shadows(reader: Reader, engine: Engine, shadows: Shadows) -> None:
    for parts in shadow_entries(list(engine.slots()), shadows):
        for part in parts:
            reader.read(part.kind, part.name, part.start, part.view)


def _check_states(path: Path, manifest: Manifest, reader: Reader, engine: Engine) -> None:
    """The optimizer's state kinds and dtypes against the saved ones, before anything is written."""
    for slot in engine.slots():
        if not _saved_state(manifest, reader, slot):
            continue
        for part in entries(slot):
            record = reader.tensors.get((part.kind, part.name))
            shape = None if record is None else tuple(record.shape)
            if record is None or (shape, record.dtype, record.whole) != (
                part.shape,
                DTYPES[part.view.dtype],
                part.whole,
            ):
                was = "absent" if record is None else f"{record.shape} {record.dtype}"
                now = f"{list(part.shape)} {DTYPES[part.view.dtype]}"
                raise UserError(
                    f"{path}: {part.label}: saved {was}, optimizer has {now}: resume with the same optimizer"
                )
        for piece in slot.pieces:
            saved = reader.states[piece.name] | manifest.counters[piece.name].keys()
            live = state_tensors(slot).keys() | counters(slot).keys()
            if saved != live:
                raise UserError(
                    f"{path}: {piece.name}: saved states {sorted(saved)}, optimizer has {sorted(live)}: "
                    "resume with the same optimizer"
                )


def _saved_state(manifest: Manifest, reader: Reader, slot: Slot) -> bool:
    """Whether the slot's parameters had optimizer state when saved (none before their first step).

    Raises UserError where the parameters of one slot, stepped as one, had made different numbers of steps.
    """
    steps = [manifest.counters.get(piece.name, {}) for piece in slot.pieces]
    if any(step != steps[0] for step in steps):
        raise UserError(
            f"engine.kind: {slot.pieces[0].name} and others made different numbers of steps: use fsdp2 or single"
        )
    return any(reader.states.get(piece.name) or manifest.counters.get(piece.name) for piece in slot.pieces)


def _fill(manifest: Manifest, reader: Reader, engine: Engine) -> None:
    for slot in engine.slots():
        if not _saved_state(manifest, reader, slot):
            slot.state.clear()  # as before its first step: the optimizer makes it anew
        for part in entries(slot):
            reader.read(part.kind, part.name, part.start, part.view)
        for piece in slot.pieces:
            if slot.state:
                set_counters(slot, manifest.counters[piece.name])


def _fill_values(reader: Reader, engine: Engine) -> None:
    for slot in engine.slots():
        for piece in slot.pieces:
            reader.read(PARAMETER, piece.name, piece.start, slot.value(piece))


def _check_counters(manifest: Manifest, engine: Engine) -> None:
    """The optimizer's own counters after the load: state that an engine hands out as a copy would show here."""
    for slot in engine.slots():
        for piece in slot.pieces:
            if counters(slot) != manifest.counters.get(piece.name, {}):
                raise CheckpointError(f"{piece.name}: counters {counters(slot)} after the load, not as saved")
