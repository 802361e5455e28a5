"""A rank's file as bytes: all at once in host memory that is used again, or chunk by chunk without it."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import heartbeat
from trainer.checkpoint import shard_file
from trainer.checkpoint.manifest import CheckpointError
from trainer.checkpoint.ranges import DTYPES, Entry
from trainer.checkpoint.shard_file import CHUNK, PAGE
from trainer.fault import fail_point


class Layout:
    """Where each range lies in a rank's file. Raises CheckpointError for a range named twice or a dtype unknown."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = sorted(entries, key=lambda part: -part.view.element_size())  # wide types first: all are aligned
        self.versions = [part.view._version for part in self.entries]  # torch counts changes in place
        tensors: dict[str, tuple[str, list[int]]] = {}
        for part in self.entries:
            if part.key in tensors or part.view.dtype not in DTYPES:
                raise CheckpointError(f"{part.key}: {part.view.dtype}: named twice, or of a dtype that cannot be saved")
            tensors[part.key] = DTYPES[part.view.dtype], list(part.shape) if part.whole else [part.view.numel()]
        try:
            self.head = shard_file.header(tensors)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        sizes = (part.view.numel() * part.view.element_size() for part in self.entries)
        self.offsets = list(accumulate(sizes, initial=len(self.head)))  # of each range, and at last the file's size

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.offsets[-1]

    def held(self) -> list[list[Any]]:
        """For the manifest: kind, name, shape, dtype, whole, start, numel of each range."""
        return [
            [p.kind, p.name, list(p.shape), DTYPES[p.view.dtype], p.whole, p.start, p.view.numel()]
            for p in self.entries
        ]


class HostBuffer:
    """Page-aligned host memory, pinned where a GPU copies into it."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._memory = mmap.mmap(-1, -(-max(size, 1) // PAGE) * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)  # a tenth off the copy's time
        self.bytes = torch.frombuffer(self._memory, dtype=torch.uint8)  # [size, rounded up to whole pages]
        if device.type == "cuda":
            # not torch's pinned allocator: that rounds up to a power of two
            code = int(torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), self.bytes.numel(), 0))
            if code:
                raise CheckpointError(f"{self.bytes.numel()} bytes of host memory cannot be pinned: CUDA error {code}")
        self._pinned = device.type == "cuda"

    def release(self) -> None:
        """Unpin the memory; it is freed with its last view."""
        if self._pinned:
            self._pinned = False
            torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())

    def touch(self) -> None:
        """Have the system give the memory now: 0.5 s for 200 MB on a virtual machine, and a copy takes 0.02 s then."""
        self.bytes.numpy()[::PAGE] = 0


def mark(device: torch.device) -> Any:
    """The place in the GPU's current stream from which on the tensors hold what is to be copied; None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event


class Snapshot:
    """The whole file of a layout, copied: from here on updates of the tensors do not change it.

    A thread may make it; then nothing may change the tensors before it is made. On a GPU the copy goes by a stream of
    its own, beside the training, from the place of `after` on. Raises CheckpointError where a tensor changed meanwhile
    and torch knows of it.
    """

    def __init__(self, layout: Layout, buffer: HostBuffer, after: Any = None) -> None:
        self.layout, self._bytes = layout, buffer.bytes
        self._views = _views(layout, buffer.bytes)
        if after is None:
            _copy(layout, self._views, buffer.bytes)
        else:
            device = next((part.view.device for part in layout.entries if part.view.is_cuda), None)
            stream = torch.cuda.Stream(device)
            with torch.cuda.stream(stream):
                stream.wait_event(after)
                _copy(layout, self._views, buffer.bytes)
            stream.synchronize()
        fail_point("snapshot")
        for part, version in zip(layout.entries, layout.versions, strict=True):
            if part.view._version != version:
                raise CheckpointError(f"{part.label}: changed while it was copied: not saved")

    def write(self, path: Path) -> dict[str, Any]:
        """Write the file; returns {size, sha256}. Raises CheckpointError where a value is not finite."""
        for part, view in zip(self.layout.entries, self._views, strict=True):
            check_finite(part, view)
        end = -(-self.layout.size // PAGE) * PAGE
        memory = self._bytes.numpy().data
        chunks = (memory[start : min(start + CHUNK, end)] for start in range(0, end, CHUNK))
        return shard_file.write(path, self.layout.size, _passing(chunks))


class Direct:
    """The file of a layout straight from the tensors, through one chunk of memory: they must not change meanwhile."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def write(self, path: Path) -> dict[str, Any]:
        """Write the file; returns {size, sha256}. Raises CheckpointError where a value is not finite."""
        for part in self.layout.entries:
            check_finite(part, part.view)
        return shard_file.write(path, self.layout.size, _passing(self._chunks()))

    def _chunks(self) -> Iterator[memoryview]:
        chunk = torch.frombuffer(mmap.mmap(-1, CHUNK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)
        memory, filled = chunk.numpy().data, 0
        head = torch.frombuffer(bytearray(self.layout.head), dtype=torch.uint8)
        for raw in (head, *(part.view.contiguous().view(torch.uint8) for part in self.layout.entries)):
            done = 0
            while done < raw.numel():
                count = min(CHUNK - filled, raw.numel() - done)
                chunk[filled : filled + count].copy_(raw[done : done + count])
                done, filled = done + count, filled + count
                if filled == CHUNK:
                    yield memory
                    filled = 0
        if filled:
            yield memory[: -(-filled // PAGE) * PAGE]


def check_finite(part: Entry, view: Tensor) -> None:
    """Raise CheckpointError where a value is not finite: no such state is ever published."""
    if view.numel() and view.is_floating_point():
        smallest, largest = torch.aminmax(view)  # both carry NaN; no mask as large as the tensor
        if not (torch.isfinite(smallest) and torch.isfinite(largest)):
            raise CheckpointError(f"{part.label}: holds values that are not finite: not saved")


def _views(layout: Layout, image: Tensor) -> list[Tensor]:
    ends = layout.offsets[1:]
    return [
        image[start:end].view(part.view.dtype)
        for part, start, end in zip(layout.entries, layout.offsets[:-1], ends, strict=True)
    ]


def _copy(layout: Layout, views: list[Tensor], image: Tensor) -> None:
    image[: len(layout.head)].copy_(torch.frombuffer(bytearray(layout.head), dtype=torch.uint8))
    if views:
        torch._foreach_copy_(views, [part.view for part in layout.entries], non_blocking=True)


def _passing(chunks: Iterator[memoryview]) -> Iterator[memoryview]:
    for index, chunk in enumerate(chunks):
        yield chunk
        heartbeat.beat()  # where training waits for it; a thread's beats do not count
        if index == 0:
            fail_point("shard")  # a part of the file is written
