"""The tensors of an engine as named flat ranges: what a rank writes into its shard, and how ranges are read back.

A shard is a safetensors file, written here in one pass of bytes and digest (the library's writer would leave the digest
to a second pass), read by the library.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from trainer.checkpoint.durable import fail_point
from trainer.checkpoint.manifest import CheckpointError, Manifest, TensorRecord, shard_key
from trainer.config.errors import UserError
from trainer.engine.base import Slot, flat

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
PARAMETER = "param"

_LARGEST_HEADER = 100_000_000  # bytes; the safetensors library refuses to read more
_CHUNK = 1 << 24  # bytes hashed and written at a time


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


def write_shard(path: Path, parts: list[Entry]) -> dict[str, Any]:
    """Write the ranges as a synced safetensors file; returns {size, sha256}.

    Raises CheckpointError on a value that is not finite: no such state is ever published.
    """
    parts = sorted(parts, key=lambda part: -part.view.element_size())  # wide types first keeps every tensor aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in parts:
        begin, end = end, end + part.view.numel() * part.view.element_size()
        shape = list(part.shape) if part.whole else [part.view.numel()]
        if part.key in header or part.view.dtype not in DTYPES:
            raise CheckpointError(f"{part.key}: {part.view.dtype}: named twice, or of a dtype that cannot be saved")
        header[part.key] = {"dtype": DTYPES[part.view.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _LARGEST_HEADER:
        raise CheckpointError(f"{path.name}: header of {len(text)} bytes: more than safetensors reads back")
    digest = hashlib.sha256()
    with path.open("xb") as file:
        _write(file, len(text).to_bytes(8, "little") + text, digest)
        for index, part in enumerate(parts):
            if index == len(parts) // 2:
                file.flush()
                fail_point("shard")
            _check_finite(part)
            raw = part.view.cpu().contiguous().view(torch.uint8).numpy()
            for offset in range(0, len(raw), _CHUNK):
                _write(file, raw[offset : offset + _CHUNK].data, digest)
        file.flush()
        os.fsync(file.fileno())
        return {"size": file.tell(), "sha256": digest.hexdigest()}


class Reader:
    """Reads ranges of a verified checkpoint, whatever ranges it was written in. A context manager: it holds files."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.tensors: dict[tuple[str, str], TensorRecord] = {}
        self.states: dict[str, set[str]] = {}  # parameter -> kinds of its optimizer state
        self._folder = folder
        self._parts = {}
        for tensor in manifest.tensors:
            parts = sorted((part for part in tensor.ranges if part.numel), key=lambda part: part.start)
            self.tensors[tensor.kind, tensor.name] = tensor
            self.states.setdefault(tensor.name, set()).update({tensor.kind} - {PARAMETER})
            self._parts[tensor.kind, tensor.name] = parts, [part.start for part in parts]
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *details: object) -> None:
        self._stack.close()

    def read(self, kind: str, name: str, start: int, out: Tensor) -> None:
        """Fill the 1-D `out` with elements [start, start + len(out)) of the flattened tensor, in place."""
        tensor = self.tensors[kind, name]
        parts, starts = self._parts[kind, name]
        done = 0
        while done < out.numel():
            part = parts[bisect_right(starts, start + done) - 1]
            first = start + done - part.start
            last = min(part.numel, first + out.numel() - done)
            file, key = self._open(part.file), tensor.key(part.start)
            data = file.get_tensor(key).view(-1)[first:last] if tensor.whole else file.get_slice(key)[first:last]
            out[done : done + last - first].copy_(data)
            done += last - first

    def _open(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = self._stack.enter_context(safe_open(self._folder / name, framework="pt"))
        return self._files[name]


def _counts(value: Tensor, slot: Slot) -> bool:
    return value.dim() == 0 and slot.owner.dim() > 0


def _check_finite(part: Entry) -> None:
    if part.view.numel() and part.view.is_floating_point():
        smallest, largest = torch.aminmax(part.view)  # both carry NaN; no mask as large as the tensor
        if not (torch.isfinite(smallest) and torch.isfinite(largest)):
            raise CheckpointError(f"{part.label}: holds values that are not finite: not saved")


def _write(file: BinaryIO, data: bytes | memoryview, digest: Any) -> None:
    digest.update(data)
    file.write(data)
