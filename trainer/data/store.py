"""Tokenised sources on disk: plain .npy arrays that are mapped, not read, and a JSON description."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.errors import UserError
from trainer.config.owner import check_owner
from trainer.config.resources import cache_folder as user_cache
from trainer.data.encode import Encoded
from trainer.heartbeat import waiting

log = logging.getLogger(__name__)

COUNTS = ("rows", "kept", "skipped_bad", "dropped_long", "truncated", "no_target", "tokens", "target_tokens")
ARRAYS = ("ids", "weights", "offsets", "labels", "files", "lines")


def cache_folder() -> Path:
    """Where prepared data lies: `data` in the user's cache."""
    return user_cache() / "data"


@dataclass(frozen=True)
class TokenisedSource:
    """The examples of one source, tokenised. Arrays are memory maps."""

    name: str
    task: str
    objective: str
    counts: dict[str, int]  # COUNTS, by name
    fingerprint: str  # SHA-256 of the source's content
    key: str  # of the cache: content, settings, tokenizer and code together
    file_names: tuple[str, ...]
    ids: np.ndarray  # (tokens,) int32, all examples one behind the other
    weights: np.ndarray  # (tokens,) uint8, or float32 where turns have weights of their own
    offsets: np.ndarray  # (examples + 1,) int64
    labels: np.ndarray  # (examples,) int32, -1 where there is none
    files: np.ndarray  # (examples,) int32: index into file_names
    lines: np.ndarray  # (examples,) int64: line in that file

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(examples,) int64: tokens of each example."""
        return np.diff(self.offsets)

    @property
    def targets(self) -> np.ndarray:
        """(examples,) int64: positions with a loss (target tokens; 1 where the target is a class)."""
        if self.objective == "classification":
            return np.ones(len(self), np.int64)
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(self.weights) > 0, dtype=np.int64)])
        return np.diff(before[self.offsets])

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray, int]:
        """(ids (length,) int32, weights (length,) float32, label or -1) of one example."""
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.ids[span], self.weights[span].astype(np.float32), int(self.labels[index])

    def example_id(self, index: int) -> str:
        """`source:line`, or `source/file:line` where the source has several files."""
        file = f"/{self.file_names[int(self.files[index])]}" if len(self.file_names) > 1 else ""
        return f"{self.name}{file}:{int(self.lines[index])}"

    def first(self, limit: int | None) -> TokenisedSource:
        """The first ``limit`` examples (all for None)."""
        if limit is None or limit >= len(self):
            return self
        return replace(
            self,
            offsets=self.offsets[: limit + 1],
            labels=self.labels[:limit],
            files=self.files[:limit],
            lines=self.lines[:limit],
        )


class _Growing:
    """An .npy file that grows: its header has room for any length and is written at the end."""

    HEADER = 128

    def __init__(self, path: Path, dtype: str) -> None:
        self.dtype, self.length = np.dtype(dtype), 0
        self.stream = path.open("wb")
        self.stream.write(b"\0" * self.HEADER)

    def append(self, values: np.ndarray) -> None:
        self.stream.write(np.ascontiguousarray(values, dtype=self.dtype).tobytes())
        self.length += len(values)

    def close(self) -> None:
        text = f"{{'descr': '{self.dtype.str}', 'fortran_order': False, 'shape': ({self.length},), }}"
        self.stream.seek(0)  # NPY format 1.0: magic, version, header length, header padded with spaces to 64 bytes
        self.stream.write(b"\x93NUMPY\x01\x00" + (self.HEADER - 10).to_bytes(2, "little"))
        self.stream.write(text.ljust(self.HEADER - 11).encode("ascii") + b"\n")
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()


class Writer:
    """Collects examples into a folder, holding no more than one of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.arrays = {
            name: _Growing(folder / f"{name}.npy", dtype)
            for name, dtype in zip(ARRAYS, ("<i4", "<f4", "<i8", "<i4", "<i4", "<i8"), strict=True)
        }
        self.arrays["offsets"].append(np.zeros(1, np.int64))
        self.counts = dict.fromkeys(COUNTS, 0)
        self.fractional = False
        self.file_names: dict[str, int] = {}

    def add(self, example: Encoded, file: str, line: int) -> None:
        self.arrays["ids"].append(example.ids)
        self.arrays["weights"].append(example.weights)
        self.counts["tokens"] += len(example.ids)
        self.counts["target_tokens"] += 1 if example.label >= 0 else int((example.weights > 0).sum())
        self.counts["kept"] += 1
        self.fractional = self.fractional or bool(((example.weights != 0) & (example.weights != 1)).any())
        self.arrays["offsets"].append(np.array([self.counts["tokens"]]))
        self.arrays["labels"].append(np.array([example.label]))
        self.arrays["files"].append(np.array([self.file_names.setdefault(file, len(self.file_names))]))
        self.arrays["lines"].append(np.array([line]))

    def close(self, description: dict[str, Any]) -> None:
        """Finish the arrays and write meta.json last: a folder that has it is whole."""
        for array in self.arrays.values():
            array.close()
        if not self.fractional:
            self._as_bytes()
        names = [Path(name).name for name in self.file_names]
        meta = {**description, "counts": self.counts, "file_names": names}
        meta["bytes"] = {name: (self.folder / f"{name}.npy").stat().st_size for name in ARRAYS}
        with (self.folder / "meta.json").open("w", encoding="utf-8") as stream:
            json.dump(meta, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())

    def _as_bytes(self) -> None:
        """Weights of 0 and 1 alone take one byte a token instead of four."""
        path, small = self.folder / "weights.npy", self.folder / "weights.small"
        wide = _mapped(path)
        array = _Growing(small, "|u1")
        for start in range(0, len(wide), 1 << 20):
            array.append(wide[start : start + (1 << 20)])
        array.close()
        del wide
        small.replace(path)


def _mapped(path: Path) -> np.ndarray:
    # An empty array cannot be mapped, and pickled objects are never read.
    empty = path.stat().st_size <= _Growing.HEADER
    return np.load(path, mmap_mode=None if empty else "r", allow_pickle=False)


def read(folder: Path, name: str, task: str) -> TokenisedSource | None:
    """The tokenised source in a folder; None where it is absent, unfinished or not of the sizes that it records."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if any((folder / f"{array}.npy").stat().st_size != size for array, size in meta["bytes"].items()):
            return None
        arrays = {array: _mapped(folder / f"{array}.npy") for array in ARRAYS}
        return TokenisedSource(
            name,
            task,
            meta["objective"],
            meta["counts"],
            meta["fingerprint"],
            folder.name,
            tuple(meta["file_names"]),
            **arrays,
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("prepared data in %s cannot be read (%s) and are made again", folder, error)
        return None


def open_or_build(
    cache: Path, key: str, name: str, task: str, build: Callable[[Writer], dict[str, Any]]
) -> TokenisedSource:
    """The source under ``key``, built by one process while the others that ask for it wait.

    ``build`` fills a Writer and returns the description; its UserError is raised in every process that waits.
    """
    check_owner(cache, "cache")
    folder = cache / key
    if (found := read(folder, name, task)) is not None:
        return found
    asked = time.time()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{key}.lock"):
            if (found := read(folder, name, task)) is None:
                _raise_known_error(cache / f"{key}.error", asked)
                _build(cache, folder, build)
                found = read(folder, name, task)
    except OSError as error:
        raise UserError(
            f"cache: {cache}: cannot be written ({error.strerror or error}); make room, or set TUNESMITH_CACHE"
        ) from error
    if found is None:
        raise UserError(f"cache: {folder}: cannot be read back; remove the folder or set TUNESMITH_CACHE")
    return found


def _build(cache: Path, folder: Path, build: Callable[[Writer], dict[str, Any]]) -> None:
    staging = Path(tempfile.mkdtemp(prefix=".building-", dir=cache))
    error_file = cache / f"{folder.name}.error"
    try:
        writer = Writer(staging)
        writer.close(build(writer))
        error_file.unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)  # unfinished or damaged, since it could not be read
        try:
            staging.rename(folder)
        except OSError:
            if not (folder / "meta.json").is_file():  # else a process on a file system without locks was first
                raise
    except UserError as error:
        error_file.write_text(str(error), encoding="utf-8")
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _raise_known_error(path: Path, asked: float) -> None:
    """Raise what another process found while this one waited; an older error may have been mended since."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_mtime >= asked:
            raise UserError(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as stream:
        try:
            with waiting("lock of the cache"):
                fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            log.warning("no file locks on %s (%s): each process prepares the data for itself", path.parent, error)
        yield
