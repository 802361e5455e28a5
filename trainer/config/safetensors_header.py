"""The header of a safetensors file, read as something that a stranger wrote. No torch."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

# Bytes of a header: room for 150,000 tensors in one file, parsed in 0.4 s. The format itself allows 100 MB, which is a
# gigabyte of Python objects.
MAX_HEADER_BYTES = 16 << 20
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
LONGEST_NAME, MOST_DIMENSIONS = 1024, 16


class Entry(NamedTuple):
    """One tensor: dtype by safetensors' name, shape, and its bytes [start, stop) in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name; together they fill it from the header to the end, once each.

    Raises ValueError, beginning with the file's name, for anything else: it is read before any library sees the file.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}: cut short, or no safetensors file")
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length >> 20} MiB, at most {MAX_HEADER_BYTES >> 20} are read")
            text = file.read(length)
        entries = json.loads(text, object_pairs_hook=_unique)
        if not isinstance(entries, dict):
            raise ValueError("the header is no object")
        entries.pop("__metadata__", None)
        tensors = {name: _entry(name, value, 8 + length) for name, value in entries.items()}
        _check_filled(tensors, 8 + length, size)
    except RecursionError as error:
        raise ValueError(f"{path.name}: the header is nested too deep") from error
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    return tensors


def _check_filled(tensors: dict[str, Entry], start: int, size: int) -> None:
    end = start
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            what = "a gap before" if entry.start > end else "an overlap at"
            raise ValueError(f"{what} tensor {name[:60]!r}")
        end = entry.stop
    if end != size:
        raise ValueError(f"its tensors end at byte {end}, the file at {size}: cut short or damaged")


def _entry(name: str, value: Any, head: int) -> Entry:
    shown = f"tensor {name[:60]!r}"
    if len(name) > LONGEST_NAME or not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown}: has not dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if (
        not lists
        or len(shape) > MOST_DIMENSIONS
        or any(type(n) is not int or not 0 <= n < 1 << 63 for n in shape + offsets)
    ):
        raise ValueError(f"{shown}: shape or data_offsets are not counts")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{shown}: unknown dtype {str(dtype)[:20]!r}")
    if math.prod(shape) * BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise ValueError(f"{shown}: {offsets[1] - offsets[0]} bytes for {dtype} of shape {shape}")
    return Entry(dtype, tuple(shape), offsets[0] + head, offsets[1] + head)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in the header")
    return found
