"""Checkpoints that mean harm, sealed anew by whoever changed them: digests prove that nothing broke, not who wrote."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bounds import pickled_command

SHARD = "rank-00000-of-00001.safetensors"
KEY = "param/w@0"
HEADER = {KEY: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}


def good() -> dict[str, Any]:
    """The manifest of a checkpoint with one tensor of four numbers."""
    part = {"file": SHARD, "start": 0, "numel": 4}
    tensor = {"kind": "param", "name": "w", "shape": [4], "dtype": "F32", "whole": False, "ranges": [part]}
    return {
        "format": 1, "step": 1, "world_size": 1, "files": {}, "tensors": [tensor], "counters": {"w": {"step": 1.0}},
        "state": {"step": 1},
    }  # fmt: skip


def write(folder: Path, shard: bytes, manifest: Any) -> None:
    """A whole checkpoint; where the manifest is a mapping without files, the shard's digest is put in."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SHARD).write_bytes(shard)
    if isinstance(manifest, dict) and not manifest["files"]:
        manifest["files"] = {SHARD: {"size": len(shard), "sha256": hashlib.sha256(shard).hexdigest()}}
    data = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(data)
    seal(folder)


def seal(folder: Path) -> None:
    digest = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    (folder / "manifest.sha256").write_text(f"{digest}  manifest.json\n")


def shard_of(header: Any = HEADER, data: bytes = bytes(16), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


Make = Callable[[Path, Path], None]  # (the checkpoint's folder, the canary)


def shard(content: bytes | Callable[[Path], bytes]) -> Make:
    def make(folder: Path, canary: Path) -> None:
        write(folder, content if isinstance(content, bytes) else content(canary), good())

    return make


def manifest(**changes: Any) -> Make:
    def make(folder: Path, canary: Path) -> None:
        write(folder, shard_of(), good() | changes)

    return make


def tensor(**changes: Any) -> Make:
    return manifest(tensors=[good()["tensors"][0] | changes])


def raw(content: bytes | Callable[[Path], bytes]) -> Make:
    def make(folder: Path, canary: Path) -> None:
        write(folder, shard_of(), content if isinstance(content, bytes) else content(canary))

    return make


def beside(name: str, change: Callable[[Path, Path], None]) -> Make:
    """A good checkpoint, and something at this name."""

    def make(folder: Path, canary: Path) -> None:
        write(folder, shard_of(), good())
        (folder / name).unlink(missing_ok=True)
        change(folder / name, canary)

    return make


def zipped(canary: Path) -> bytes:
    place = canary.with_name("zip")
    with zipfile.ZipFile(place, "w") as archive:
        archive.writestr("archive/data.pkl", pickled_command(canary))
    return place.read_bytes()


def million() -> bytes:
    text = b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(1_000_000))
    return shard_of(b"{" + text + b"}")


def drop(path: Path, canary: Path) -> None:
    path.write_bytes(pickled_command(canary))


def large(path: Path, canary: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 30)


DEEP = b"[" * 100_000 + b"]" * 100_000
CHECKPOINTS: dict[str, tuple[Make, str]] = {
    "pickle as a shard": (shard(pickled_command), SHARD),
    "zip of a pickle as a shard": (shard(zipped), SHARD),
    "pickle as the manifest": (raw(pickled_command), "manifest.json: not JSON"),
    "optimizer.pt beside": (beside("optimizer.pt", drop), "foreign"),
    "rng_state.pth beside": (
        beside("rng_state.pth", drop),
        "foreign",
    ),
    "shard a link": (beside(SHARD, lambda p, c: p.symlink_to("/etc/passwd")), "not a regular file"),
    "shard a pipe": (beside(SHARD, lambda p, c: os.mkfifo(p)), "not a regular file"),
    "manifest a pipe": (beside("manifest.json", lambda p, c: os.mkfifo(p)), "not a regular file"),
    "manifest of 1 GiB": (beside("manifest.json", large), "larger than any manifest"),
    "seal of 1 GiB": (beside("manifest.sha256", large), "larger than any manifest"),
    "header of 2^63 bytes": (shard(shard_of(length=1 << 63)), SHARD),
    "header past the end": (shard(shard_of(length=1 << 20)), SHARD),
    "header of a million names": (shard(million()), SHARD),
    "header nested 100,000 deep": (shard(shard_of(b'{"a":' + DEEP + b"}")), SHARD),
    "header's key twice": (shard(shard_of(b'{"a":1,"a":1}')), SHARD),
    "tensors overlap": (shard(shard_of(HEADER | {"x": HEADER[KEY]})), SHARD),
    "offset negative": (shard(shard_of({KEY: HEADER[KEY] | {"data_offsets": [-16, 0]}})), SHARD),
    "offsets past the end": (shard(shard_of({KEY: HEADER[KEY] | {"data_offsets": [0, 1 << 40]}})), SHARD),
    "another dtype than told": (shard(shard_of({KEY: HEADER[KEY] | {"dtype": "I32"}})), SHARD),
    "another tensor than told": (shard(shard_of({"param/v@0": HEADER[KEY]})), SHARD),
    "manifest nested 100,000 deep": (raw(b'{"format": 1, "state": ' + DEEP + b"}"), "manifest.json"),
    "manifest a list": (raw(b"[]"), "manifest.json"),
    "manifest with a number of a million digits": (raw(b'{"format": ' + b"9" * 1_000_000 + b"}"), "manifest.json"),
    "a later format": (manifest(format=10**9), "later version"),
    "file climbs": (manifest(files={"../../" + SHARD: {"size": 1, "sha256": "0" * 64}}), "manifest.json"),
    "file absolute": (manifest(files={"/etc/passwd": {"size": 1, "sha256": "0" * 64}}), "manifest.json"),
    "range in a file elsewhere": (tensor(ranges=[{"file": "../" + SHARD, "start": 0, "numel": 4}]), "manifest.json"),
    "range negative": (tensor(ranges=[{"file": SHARD, "start": -4, "numel": 4}]), "manifest.json"),
    "ranges without end": (tensor(ranges=[{"file": SHARD, "start": 0, "numel": 1 << 62}]), "manifest.json"),
    "shape overflows": (tensor(shape=[1 << 62, 1 << 62]), "manifest.json"),
    "shape of 100,000 dimensions": (tensor(shape=[1] * 100_000), "manifest.json"),
    "dtype of objects": (tensor(dtype="OBJ"), "manifest.json"),
    "kind climbs": (tensor(kind="../../x"), "manifest.json"),
    "name of a million letters": (tensor(name="w" * 1_000_000), "manifest.json"),
    "step negative": (manifest(step=-1), "manifest.json"),
    "unknown keys": (manifest(__reduce__=["os.system"]), "manifest.json"),
}
