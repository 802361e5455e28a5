"""Reading a verified checkpoint: any range of any logical tensor, whatever ranges and ranks it was written in.

    with open_checkpoint(run / "checkpoints") as reader:          # or the folder of one checkpoint
        for name in reader.names("param"):
            tensor = reader.tensor("param", name)                 # whole, on the CPU, in its own shape and dtype

No engine is needed, and one tensor at a time is in memory.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from pathlib import Path

import torch
from torch import Tensor

from trainer.checkpoint.manifest import CheckpointError, Manifest, Range, TensorRecord, contents
from trainer.checkpoint.ranges import DTYPES, PARAMETER
from trainer.checkpoint.shard_file import CHUNK, WIDTHS, Index, check_index

TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


class Reader:
    """Reads ranges of a verified checkpoint. A context manager: it holds files."""

    def __init__(self, folder: Path, manifest: Manifest, refused: tuple[str, ...] = ()) -> None:
        self.folder, self.manifest = folder, manifest
        self.refused = refused  # why newer ones were passed over
        self.tensors: dict[tuple[str, str], TensorRecord] = {(t.kind, t.name): t for t in manifest.tensors}
        self.states: dict[str, set[str]] = {}  # parameter -> kinds of its optimizer state
        self._parts: dict[tuple[str, str], tuple[list[Range], list[int]]] = {}
        for key, tensor in self.tensors.items():
            parts = sorted((part for part in tensor.ranges if part.numel), key=lambda part: part.start)
            self._parts[key] = parts, [part.start for part in parts]
            kinds = self.states.setdefault(tensor.name, set())
            if tensor.kind != PARAMETER and tensor.kind not in manifest.shadows:
                kinds.add(tensor.kind)
        self._expected = contents(manifest)
        self._files: dict[str, tuple[int, Index]] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *details: object) -> None:
        while self._files:
            os.close(self._files.popitem()[1][0])

    @property
    def kinds(self) -> list[str]:
        """What is held of the parameters: `param`, the optimizer's (`exp_avg`, ...), shadows (`ema`, ...)."""
        return list(dict.fromkeys(kind for kind, _ in self.tensors))

    def names(self, kind: str = PARAMETER) -> list[str]:
        """The names of the tensors of a kind, in the order of the first rank's parameters."""
        return [name for found, name in self.tensors if found == kind]

    def dtype(self, kind: str, name: str) -> torch.dtype:
        """The dtype in which a tensor is saved."""
        return TORCH_DTYPES[self.tensors[kind, name].dtype]

    def tensor(self, kind: str, name: str) -> Tensor:
        """One whole logical tensor on the CPU, in its saved shape and dtype. Raises KeyError where there is none."""
        record = self.tensors[kind, name]
        out = torch.empty(record.numel, dtype=TORCH_DTYPES[record.dtype])
        self.read(kind, name, 0, out)
        return out.view(record.shape)

    def read(self, kind: str, name: str, start: int, out: Tensor) -> None:
        """Fill the 1-D `out` with elements [start, start + len(out)) of the flattened tensor, in place.

        Raises CheckpointError where the file is not the one that was verified.
        """
        tensor = self.tensors[kind, name]
        parts, starts = self._parts[kind, name]
        done = 0
        while done < out.numel():
            part = parts[bisect_right(starts, start + done) - 1]
            first = start + done - part.start
            count = min(part.numel - first, out.numel() - done)
            self._fill(part.file, tensor.key(part.start), first, out[done : done + count])
            done += count

    def _fill(self, name: str, key: str, first: int, out: Tensor) -> None:
        file, index = self._open(name)
        dtype, _, begin, _ = index[key]
        begin += first * WIDTHS[dtype]
        saved = TORCH_DTYPES[dtype]
        if out.device.type == "cpu" and out.is_contiguous() and out.dtype == saved:
            self._pread(file, name, begin, out)
            return
        step = CHUNK // WIDTHS[dtype]
        for offset in range(0, out.numel(), step):
            piece = torch.empty(min(step, out.numel() - offset), dtype=saved)
            self._pread(file, name, begin + offset * WIDTHS[dtype], piece)
            out[offset : offset + piece.numel()].copy_(piece)

    def _pread(self, file: int, name: str, begin: int, out: Tensor) -> None:
        data = out.view(torch.uint8).numpy().data
        while data:
            done = os.preadv(file, [data], begin)
            if not done:
                raise CheckpointError(f"{self.folder / name}: ends before byte {begin}: changed after it was verified")
            data, begin = data[done:], begin + done

    def _open(self, name: str) -> tuple[int, Index]:
        if name not in self._files:
            path = self.folder / name
            try:
                index = check_index(path, self._expected[name])
            except ValueError as error:
                raise CheckpointError(f"{path}: {error}") from error
            self._files[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC), index
        return self._files[name]
