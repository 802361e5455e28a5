"""The tensors of an engine, and those kept beside them, as named flat ranges: what a rank saves and loads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.manifest import CheckpointError, shard_key
from trainer.config.errors import UserError
from trainer.engine.base import Engine, Slot, flat

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
PARAMETER = "param"

Shadows = Mapping[str, Sequence[Tensor]]
"""kind -> one 1-D local tensor for each slot of `engine.slots()`, in order; as long as the slot's owner, any dtype."""


@dataclass(frozen=True)
class Entry:
    """A range of one logical tensor as it lives in memory: `view` is 1-D and writable."""

    kind: str
    name: str
    start: int
    shape: tuple[int, ...]  # of the logical tensor
    whole: bool
    view: Tensor

    @property
    def key(self) -> str:
        return shard_key(self.kind, self.name, self.start, whole=self.whole)

    @property
    def label(self) -> str:
        return f"{self.kind}/{self.name}"


def entries(slot: Slot) -> Iterator[Entry]:
    """The slot's values and its optimizer state, piece by piece. Raises UserError where 8-bit state would be cut."""
    tensors = state_tensors(slot)
    blocks = any(not t.is_floating_point() or flat(t).numel() != flat(slot.owner).numel() for t in tensors.values())
    for piece in slot.pieces:
        yield Entry(PARAMETER, piece.name, piece.start, piece.shape, False, slot.value(piece))
        if blocks:
            if len(slot.pieces) > 1 or piece.numel != math.prod(piece.shape):
                raise UserError(
                    f"optimizer.name: 8-bit state of {piece.name} cannot be cut into ranges: use adamw, or one process"
                )
            for kind, tensor in tensors.items():
                yield Entry(kind, piece.name, 0, tuple(tensor.shape), True, flat(tensor))
        else:
            for kind in tensors:
                yield Entry(kind, piece.name, piece.start, piece.shape, False, slot.moment(kind, piece))


def owned(engine: Engine, shadows: Shadows) -> tuple[list[Entry], dict[str, dict[str, int | float]]]:
    """What this rank saves: the ranges of its slots and of their shadows, and each parameter's counters.

    Raises UserError where 8-bit state would be cut; CheckpointError where a counter is not finite, or where a shadow
    is not what it should be.
    """
    parts: list[Entry] = []
    steps: dict[str, dict[str, int | float]] = {}
    slots = list(engine.slots())
    beside = shadow_entries(slots, shadows)
    for slot, extra in zip(slots, beside, strict=True):
        if not engine.writes(slot):
            continue
        parts += [*entries(slot), *extra]
        if set(shadows) & {PARAMETER, *slot.state}:
            raise CheckpointError(f"shadows: {sorted(shadows)}: a kind is the engine's own")
        values = counters(slot)
        for piece in slot.pieces:
            if not all(math.isfinite(value) for value in values.values()):
                raise CheckpointError(f"{piece.name}: counters {values}: not finite: not saved")
            steps[piece.name] = values
    return parts, steps


def shadow_entries(slots: Sequence[Slot], shadows: Shadows) -> list[list[Entry]]:
    """The ranges of the shadows, slot by slot. Raises CheckpointError where they do not fit the slots."""
    for kind, tensors in shadows.items():
        lengths = [tensor.numel() for tensor in tensors if tensor.dim() == 1]
        if lengths != [flat(slot.owner).numel() for slot in slots]:
            raise CheckpointError(f"shadows: {kind}: not one 1-D tensor for each slot, as long as its owner")
    return [
        [
            Entry(kind, p.name, p.start, p.shape, False, tensors[index][p.offset : p.offset + p.numel])
            for kind, tensors in shadows.items()
            for p in slot.pieces
        ]
        for index, slot in enumerate(slots)
    ]


def state_tensors(slot: Slot) -> dict[str, Tensor]:
    """The optimizer's tensors of the slot, without counters."""
    return {kind: value for kind, value in slot.state.items() if isinstance(value, Tensor) and not _counts(value, slot)}


def counters(slot: Slot) -> dict[str, int | float]:
    """The optimizer's scalars of the slot (`step`), whether it keeps them as numbers or as 0-dimensional tensors."""
    scalars: dict[str, int | float] = {}
    for key, value in slot.state.items():
        if isinstance(value, Tensor) and _counts(value, slot):
            scalars[key] = value.item()
        elif isinstance(value, int | float):
            scalars[key] = value
    return scalars


def set_counters(slot: Slot, values: dict[str, int | float]) -> None:
    """Write scalars back in the form that the optimizer has them in."""
    for key, value in values.items():
        live: Any = slot.state[key]
        if isinstance(live, Tensor):
            live.fill_(value)
        else:
            slot.state[key] = type(live)(value)


def _counts(value: Tensor, slot: Slot) -> bool:
    return value.dim() == 0 and slot.owner.dim() > 0
