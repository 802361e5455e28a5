"""What a good checkpoint is: its manifest, and the proof that the files are the ones it names. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.checkpoint.durable import REPLACED, sha256
from trainer.checkpoint.shard_file import WIDTHS, check_index
from trainer.config.errors import RunError, UserError

FORMAT = 2  # 1 had no `generation` and no `shadows`; it is read for ever (tests/checkpoint/golden)
MANIFEST = "manifest.json"
SEAL = "manifest.sha256"  # as sha256sum writes it, so that `sha256sum -c` checks the manifest by hand
LARGEST_MANIFEST = 1 << 29  # bytes; 8,000 tensors on 512 ranks make about 0.3 GB
_SMALL_MANIFEST = 1 << 20  # bytes; beyond it a manifest is at most four times the shards that it describes

STEP_PREFIX = "step-"
_STEP = re.compile(re.escape(STEP_PREFIX) + r"(\d{8,18})")
_SHARD = r"^rank-\d{5}-of-\d{5}\.safetensors$"


class CheckpointError(RunError):
    """A checkpoint that cannot be written or used, told in one line that names the file."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileRecord(_Record):
    """Size in bytes and SHA-256 (hex) of a shard file."""

    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Range(_Record):
    """Where elements [start, start + numel) of the flattened tensor lie."""

    file: str = Field(pattern=_SHARD)
    start: int = Field(ge=0)
    numel: int = Field(ge=0)


class TensorRecord(_Record):
    """One logical tensor: a parameter (kind `param`), an optimizer state of it (kind `exp_avg`, ...), or a shadow of it
    (kind `ema`, ...).

    A `whole` tensor (8-bit states: blocks of codes and their scales) has a shape of its own and cannot be cut.
    """

    kind: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    name: str = Field(min_length=1, max_length=1024)
    shape: list[Annotated[int, Field(ge=0)]] = Field(max_length=16)
    dtype: Literal[tuple(WIDTHS)]  # type: ignore[valid-type]
    whole: bool
    ranges: list[Range]

    def key(self, start: int) -> str:
        """The key of a range in its shard file."""
        return shard_key(self.kind, self.name, start, whole=self.whole)

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)


class Manifest(_Record):
    """The index of one checkpoint: files with digests, tensors with ranges, per-parameter counters, the run's state.

    `generation` is that of the lease under which it was written (0: without one); `shadows` are the kinds that belong
    to no optimizer.
    """

    format: int = Field(ge=1, le=FORMAT)
    step: int = Field(ge=0)
    world_size: int = Field(ge=1)
    generation: int = Field(0, ge=0)
    shadows: list[str] = []
    files: dict[str, FileRecord]
    tensors: list[TensorRecord]
    counters: dict[str, dict[str, int | float]]
    state: dict[str, Any]


def shard_key(kind: str, name: str, start: int, *, whole: bool) -> str:
    """`exp_avg/name@start` for a range, `whole/state1/name` for a tensor that is not cut."""
    return f"whole/{kind}/{name}" if whole else f"{kind}/{name}@{start}"


def shard_name(rank: int, size: int) -> str:
    """The file of one rank."""
    return f"rank-{rank:05d}-of-{size:05d}.safetensors"


def step_name(step: int) -> str:
    """The folder of one checkpoint."""
    return f"{STEP_PREFIX}{step:08d}"


def step_of(path: Path) -> int | None:
    """The step that a checkpoint folder's name tells; None for any other name."""
    found = _STEP.fullmatch(path.name)
    return int(found[1]) if found else None


def newest(folder: Path) -> list[Path]:
    """The published checkpoints, newest step first, good or not; by name, never by a clock or the `latest` hint.

    A checkpoint that stepped aside for a rewrite which was then killed counts in place of the missing one.
    """
    if not folder.exists():
        return []
    found: dict[int, Path] = {}
    for path in folder.iterdir():
        aside = path.name.startswith(REPLACED)
        step = step_of(path.with_name(path.name.removeprefix(REPLACED)))
        if step is not None and not (aside and step in found):
            found[step] = path
    return [found[step] for step in sorted(found, reverse=True)]


def encode(manifest: Manifest) -> tuple[bytes, bytes]:
    """The bytes of the manifest and of its seal. Raises ValueError on a state with NaN, TypeError on one not JSON."""
    text = json.dumps(manifest.model_dump(), allow_nan=False, ensure_ascii=False, indent=0) + "\n"
    data = text.encode()
    return data, _seal(data)


def verify(folder: Path) -> Manifest:
    """The manifest of a checkpoint of which every byte was compared with its digest.

    Raises CheckpointError that names the first bad file; UserError if a later version of this program wrote it.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest, manifest.files)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest after all checks but the shards' digests: seal, form, coverage, and which files are there."""
    present = _regular_files(folder)
    for name in (MANIFEST, SEAL):
        if name not in present:
            raise CheckpointError(f"{folder / name}: missing")
    shards = sum(size for name, size in present.items() if name not in (MANIFEST, SEAL))
    if present[MANIFEST] > min(LARGEST_MANIFEST, _SMALL_MANIFEST + 4 * shards) or present[SEAL] > 1024:
        raise CheckpointError(f"{folder / MANIFEST}: {present[MANIFEST]} bytes: larger than any manifest")
    data = (folder / MANIFEST).read_bytes()
    if (folder / SEAL).read_bytes() != _seal(data):
        raise CheckpointError(f"{folder / MANIFEST}: SHA-256 differs from {SEAL}")
    manifest = _parse(folder / MANIFEST, data)
    expected = set(manifest.files) | {MANIFEST, SEAL}
    for name in sorted(expected ^ set(present)):
        raise CheckpointError(f"{folder / name}: {'missing' if name in expected else 'foreign to this checkpoint'}")
    for name, record in manifest.files.items():
        if present[name] != record.size:
            raise CheckpointError(f"{folder / name}: {present[name]} bytes, the manifest says {record.size}")
    try:
        check_coverage(manifest)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / MANIFEST}: {error}") from error
    return manifest


def check_files(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Compare the named shards with their digests, and their headers with the manifest.

    Raises CheckpointError that names the first that differs.
    """
    expected = contents(manifest)
    paths = [folder / name for name in names]
    cores = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    with ThreadPoolExecutor(cores) as pool:  # hashing lets go of the interpreter's lock
        for path, digest in zip(paths, pool.map(sha256, paths), strict=True):
            if digest != manifest.files[path.name].sha256:
                raise CheckpointError(f"{path}: SHA-256 differs from the manifest")
    for path in paths:
        try:
            check_index(path, expected.get(path.name, {}))
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error


def contents(manifest: Manifest) -> dict[str, dict[str, tuple[str, list[int]]]]:
    """What each shard's header must say: file -> key -> dtype and shape."""
    found: dict[str, dict[str, tuple[str, list[int]]]] = {}
    for tensor in manifest.tensors:
        for part in tensor.ranges:
            shape = tensor.shape if tensor.whole else [part.numel]
            found.setdefault(part.file, {})[tensor.key(part.start)] = tensor.dtype, shape
    return found


def check_coverage(manifest: Manifest) -> None:
    """Every tensor's ranges cover [0, numel) once each, in files of the checkpoint. Raises CheckpointError."""
    seen: set[tuple[str, str]] = set()
    held = dict.fromkeys(manifest.files, 0)
    for tensor in manifest.tensors:
        label = f"{tensor.kind}/{tensor.name}"
        if (tensor.kind, tensor.name) in seen:
            raise CheckpointError(f"{label}: listed twice")
        seen.add((tensor.kind, tensor.name))
        if tensor.whole and len(tensor.ranges) != 1:
            raise CheckpointError(f"{label}: whole, but in {len(tensor.ranges)} ranges")
        end = 0
        for part in sorted(tensor.ranges, key=lambda part: (part.start, part.numel)):
            if part.file not in manifest.files:
                raise CheckpointError(f"{label}: {part.file} is not a file of this checkpoint")
            if part.start != end:
                raise CheckpointError(f"{label}: {'gap' if part.start > end else 'overlap'} at element {end}")
            end += part.numel
            held[part.file] += part.numel * WIDTHS[tensor.dtype]
        if end != tensor.numel:
            raise CheckpointError(f"{label}: {end} of {tensor.numel} elements")
    for name, size in held.items():
        if size > manifest.files[name].size:
            raise CheckpointError(f"{name}: {manifest.files[name].size} bytes cannot hold the {size} listed in it")


def _regular_files(folder: Path) -> dict[str, int]:
    """Name and size of what the folder holds. Raises CheckpointError on links, folders, devices: none belongs here."""
    if folder.is_symlink() or not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder")
    sizes = {}
    for path in folder.iterdir():
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        sizes[path.name] = status.st_size
    return sizes


def _parse(path: Path, data: bytes) -> Manifest:
    try:
        loose = json.loads(data)
        if isinstance(loose, dict) and isinstance(loose.get("format"), int) and loose["format"] > FORMAT:
            raise UserError(f"{path}: format {loose['format']}: written by a later version; use that to read it")
        manifest = Manifest.model_validate(loose)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: {where}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    for name in manifest.files:
        if not re.fullmatch(_SHARD, name):
            raise CheckpointError(f"{path}: {name!r}: not the name of a shard")
    return manifest


def _seal(data: bytes) -> bytes:
    return f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}\n".encode()
