"""What a good checkpoint is: its manifest, and the proof that the files are the ones it names. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.checkpoint.durable import REPLACED, sha256
from trainer.config.errors import RunError, UserError

FORMAT = 1
MANIFEST = "manifest.json"
SEAL = "manifest.sha256"  # as sha256sum writes it, so that `sha256sum -c` checks the manifest by hand
LARGEST_MANIFEST = 1 << 29  # bytes; 8,000 tensors on 512 ranks make about 0.3 GB

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
    """One logical tensor: a parameter (kind `param`) or an optimizer state of it (kind `exp_avg`, ...).

    A `whole` tensor (8-bit states: blocks of codes and their scales) has a shape of its own and cannot be cut.
    """

    kind: str
    name: str
    shape: list[int]
    dtype: str
    whole: bool
    ranges: list[Range]

    def key(self, start: int) -> str:
        """The key of a range in its shard file."""
        return shard_key(self.kind, self.name, start, whole=self.whole)


class Manifest(_Record):
    """The index of one checkpoint: files with digests, tensors with ranges, per-parameter counters, the run's state."""

    format: int
    step: int = Field(ge=0)
    world_size: int = Field(ge=1)
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
    if present[MANIFEST] > LARGEST_MANIFEST or present[SEAL] > 1024:
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
    """Compare the named shards with their digests. Raises CheckpointError that names the first that differs."""
    for name in names:
        if sha256(folder / name) != manifest.files[name].sha256:
            raise CheckpointError(f"{folder / name}: SHA-256 differs from the manifest")


def check_coverage(manifest: Manifest) -> None:
    """Every tensor's ranges cover [0, numel) once each, in files of the checkpoint. Raises CheckpointError."""
    seen: set[tuple[str, str]] = set()
    for tensor in manifest.tensors:
        label = f"{tensor.kind}/{tensor.name}"
        if (tensor.kind, tensor.name) in seen:
            raise CheckpointError(f"{label}: listed twice")
        seen.add((tensor.kind, tensor.name))
        end = 0
        for part in sorted(tensor.ranges, key=lambda part: (part.start, part.numel)):
            if part.file not in manifest.files:
                raise CheckpointError(f"{label}: {part.file} is not a file of this checkpoint")
            if part.start != end:
                raise CheckpointError(f"{label}: {'gap' if part.start > end else 'overlap'} at element {end}")
            end += part.numel
        if end != math.prod(tensor.shape):
            raise CheckpointError(f"{label}: {end} of {math.prod(tensor.shape)} elements")


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
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    for name in manifest.files:
        if not re.fullmatch(_SHARD, name):
            raise CheckpointError(f"{path}: {name!r}: not the name of a shard")
    return manifest


def _seal(data: bytes) -> bytes:
    return f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}\n".encode()
