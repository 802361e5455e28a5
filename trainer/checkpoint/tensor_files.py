"""safetensors files written one tensor at a time, so that no more than one of them is in memory."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.durable import write_file
from trainer.checkpoint.ranges import DTYPES
from trainer.checkpoint.shard_file import CHUNK, header

SHARD_BYTES = 5_000_000_000  # of a file of an exported model, as the hub's own models have it


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written: known before it is made."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: Path, planned: Sequence[Planned], make: Callable[[str], Tensor], digest: Any = None
) -> dict[str, str]:
    """Write one synced safetensors file, asking `make` for each tensor when its turn comes; returns {name: SHA-256}.

    `digest` (of hashlib) is fed all bytes of the file. Raises ValueError where a tensor is not as planned.
    """
    planned = sorted(planned, key=lambda tensor: -tensor.dtype.itemsize)  # wide types first keeps every tensor aligned
    head = header({tensor.name: (DTYPES[tensor.dtype], list(tensor.shape)) for tensor in planned})
    digests = {}
    with path.open("xb") as file:

        def put(data: Any) -> None:
            file.write(data)
            if digest is not None:
                digest.update(data)

        put(head)
        for tensor in planned:
            made = make(tensor.name)
            if (made.dtype, tuple(made.shape)) != (tensor.dtype, tensor.shape):
                raise ValueError(f"{tensor.name}: {made.dtype} {tuple(made.shape)}, planned as {tensor}")
            raw = as_bytes(made)
            digests[tensor.name] = hashlib.sha256(raw).hexdigest()
            for offset in range(0, len(raw), CHUNK):
                put(raw[offset : offset + CHUNK])
            del made, raw  # before the next is made: one at a time
        file.flush()
        os.fsync(file.fileno())
    return digests


def write_model(
    folder: Path, planned: Sequence[Planned], make: Callable[[str], Tensor], limit: int = SHARD_BYTES
) -> dict[str, str]:
    """Write the weights of a Hugging Face folder: one file, or several of at most `limit` bytes each with their index.

    A larger tensor has a file of its own. Returns {name: SHA-256}.
    """
    files: list[list[Planned]] = [[]]
    size = 0
    for tensor in planned:
        if files[-1] and size + tensor.size > limit:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.size
    if len(files) == 1:
        return write_tensors(folder / "model.safetensors", files[0], make)
    digests: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, part in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        digests |= write_tensors(folder / name, part, make)
        weight_map |= {tensor.name: name for tensor in part}
    total = sum(tensor.size for tensor in planned)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_file(folder / "model.safetensors.index.json", (json.dumps(index, indent=2) + "\n").encode())
    return digests


def as_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order, on the CPU; a copy only where they do not lie so already."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


def digest_of(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, as `write_tensors` returns it."""
    return hashlib.sha256(as_bytes(tensor)).hexdigest()
