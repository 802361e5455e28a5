"""Shard files: read strictly, written whole; hostile ones are refused before their size can hurt; room is asked for."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from checkpoint_cases import checkpoints, single
from safetensors.torch import load_file

from trainer.checkpoint import CheckpointError, newest, open_checkpoint, save, space, store, verify
from trainer.checkpoint.shard_file import PAGE, check_index, header, read_index, write
from trainer.checkpoint.space import check_room, check_start, expected
from trainer.config.errors import UserError
from trainer.config.schema import Optimizer
from trainer.world import World

SHARD = "rank-00000-of-00001.safetensors"
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def shard(path: Path, head: Any, data: bytes = b"\0" * 8, length: int | None = None) -> Path:
    """A file with this header, given as JSON or as text."""
    text = head.encode() if isinstance(head, str) else json.dumps(head).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


HOSTILE: dict[str, tuple[Any, str]] = {
    "no object": ([1, 2], "not an object"),
    "no JSON": ("{", "Expecting"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "twice": ('{"a": %s, "a": %s}' % ((json.dumps(ENTRY),) * 2), "twice"),
    "gap": ({"a": ENTRY | {"shape": [1], "data_offsets": [4, 8]}}, "gap at byte"),
    "overlap": ({"a": ENTRY, "b": ENTRY | {"shape": [1], "data_offsets": [4, 8]}}, "overlap at byte"),
    "beyond": ({"a": ENTRY | {"shape": [4], "data_offsets": [0, 16]}}, "tensors up to byte"),
    "short": ({"a": ENTRY | {"shape": [1], "data_offsets": [0, 4]}}, "tensors up to byte"),
    "other size": ({"a": ENTRY | {"shape": [3]}}, "8 bytes for F32"),
    "huge shape": ({"a": ENTRY | {"shape": [1 << 62, 1 << 62]}}, "bytes for F32"),
    "negative": ({"a": ENTRY | {"shape": [-2], "data_offsets": [8, 0]}}, "not lists of counts"),
    "booleans": ({"a": ENTRY | {"shape": [True, 2]}}, "not lists of counts"),
    "floats": ({"a": ENTRY | {"data_offsets": [0, 8.0]}}, "not lists of counts"),
    "dtype": ({"a": ENTRY | {"dtype": "F8"}}, "bytes for F8"),
    "dtype list": ({"a": ENTRY | {"dtype": "O"}}, "bytes for O"),
    "further key": ({"a": ENTRY | {"hook": 1}}, "not dtype, shape and data_offsets"),
    "no entry": ({"a": None}, "not dtype, shape and data_offsets"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused(tmp_path: Path, name: str) -> None:
    head, message = HOSTILE[name]
    with pytest.raises(ValueError, match=message):
        read_index(shard(tmp_path / "x", head))


@pytest.mark.parametrize("length", [0, 1 << 20, 99_999_999, 1 << 40, (1 << 64) - 1])
def test_a_header_longer_than_its_file_is_not_read(tmp_path: Path, length: int) -> None:
    with pytest.raises(ValueError, match=r"header of|Expecting"):
        read_index(shard(tmp_path / "x", {"a": ENTRY}, length=length))
    (tmp_path / "y").write_bytes(b"\1\0\0")
    with pytest.raises(ValueError, match="header of"):
        read_index(tmp_path / "y")


def test_a_header_is_no_longer_than_its_tensors_need(tmp_path: Path) -> None:
    """A bomb of 90 MB with valid entries is refused before it is parsed: in less than a second, in little memory."""
    path = shard(tmp_path / "x", '{"a": ' + json.dumps(ENTRY) + " " * 90_000_000 + "}")
    begun = time.perf_counter()
    tracemalloc.start()
    with pytest.raises(ValueError, match="a header of 90"):
        check_index(path, {"a": ("F32", [2])})
    assert time.perf_counter() - begun < 1
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    assert check_index(shard(tmp_path / "y", {"a": ENTRY}), {"a": ("F32", [2])})["a"][2:] == (8 + 61, 8 + 69)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"a": ("F32", [2]), "b": ("F32", [1])}, "b: absent in its header, F32"),
        ({}, r"a: F32 \[2\] in its header, absent in the manifest"),
        ({"a": ("I32", [2])}, r"a: F32 \[2\] in its header, I32"),
        ({"a": ("F32", [1, 2])}, r"a: F32 \[2\] in its header, F32 \[1, 2\]"),
    ],
)
def test_a_header_that_is_not_the_manifests_is_refused(tmp_path: Path, expected: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_index(shard(tmp_path / "x", {"a": ENTRY}), expected)


def test_a_shard_with_a_right_digest_and_another_header_is_refused(tmp_path: Path) -> None:
    """Whoever can write the manifest can write its digests: the header is compared all the same."""
    checkpoints(tmp_path, 1)
    path = newest(tmp_path)[0]
    file = path / SHARD
    data = file.read_bytes().replace(b"exp_avg/body.bias", b"exp_avg/body.bios")
    file.write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][SHARD]["sha256"] = hashlib.sha256(data).hexdigest()
    text = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(text)
    (path / "manifest.sha256").write_text(f"{hashlib.sha256(text).hexdigest()}  manifest.json\n")
    with pytest.raises(CheckpointError, match=r"exp_avg/body.bias@0: absent in its header"):
        verify(path)


def test_a_file_cut_after_it_was_verified_is_an_error_not_a_crash(tmp_path: Path) -> None:
    checkpoints(tmp_path, 1)
    with open_checkpoint(tmp_path) as reader:
        reader.tensor("param", "norm")
        os.truncate(newest(tmp_path)[0] / SHARD, PAGE // 4)
        with pytest.raises(CheckpointError, match="changed after it was verified"):
            for kind in reader.kinds:
                for name in reader.names(kind):
                    reader.tensor(kind, name)


@pytest.mark.parametrize("offset", [0, 1])
def test_memory_that_is_not_aligned_goes_through_the_page_cache(tmp_path: Path, offset: int) -> None:
    """The filesystem refuses direct writing from it (EINVAL); the file is the same."""
    memory = memoryview(mmap.mmap(-1, 4 * PAGE))
    memory[:] = os.urandom(4 * PAGE)
    chunks = [memory[offset : 2 * PAGE + offset], memory[2 * PAGE + offset : 3 * PAGE + offset]]
    size = 2 * PAGE + 100
    record = write(tmp_path / "x", size, chunks)
    data = (tmp_path / "x").read_bytes()
    assert data == bytes(memory[offset : size + offset])
    assert record == {"size": size, "sha256": hashlib.sha256(data).hexdigest()}
    with pytest.raises(FileExistsError):
        write(tmp_path / "x", size, chunks)
    with pytest.raises(OSError, match="bytes were given"):
        write(tmp_path / "y", 5 * PAGE, chunks)


def test_headers_are_what_the_library_reads(tmp_path: Path) -> None:
    head = header({"b@0": ("F64", [3]), "ä/√": ("BF16", [0, 2]), "c": ("BOOL", [1])})
    assert len(head) % 64 == 0
    (tmp_path / "x").write_bytes(head + b"\0" * 25)
    assert {name: tuple(value.shape) for name, value in load_file(tmp_path / "x").items()} == {
        "b@0": (3,), "ä/√": (0, 2), "c": (1,)
    }  # fmt: skip
    with pytest.raises(ValueError, match="more than safetensors reads"):
        header({"x" * 101_000_000: ("F32", [1])})


def test_room_is_asked_for_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    free = os.statvfs(tmp_path)
    check_room(tmp_path / "not" / "yet", 1000, 5, "a checkpoint")
    with pytest.raises(CheckpointError, match=r"needs 1000000000\.0 GB, .* has [0-9.]+ [GM]B free: .*checkpoint.keep"):
        check_room(tmp_path / "not" / "yet", 10**18, 5, "a checkpoint")
    if free.f_files:
        with pytest.raises(CheckpointError, match=r"needs 1000000000000 files, .* has room for \d+"):
            check_room(tmp_path, 1000, 10**12, "a checkpoint")
    engine = checkpoints(tmp_path, 1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(store, "needed", lambda shards, ranges: (10**18, 5))
    with pytest.raises(CheckpointError, match=r"the checkpoint of step 2 needs"):
        save(tmp_path, 2, engine, World(), {})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_start_is_refused_where_not_even_one_checkpoint_fits(tmp_path: Path, monkeypatch, caplog) -> None:
    engine = single()
    size, ranges = expected(engine, {}, [Optimizer(name="sgd"), Optimizer(name="adamw")])
    path = save(tmp_path, 0, engine, World(), {})
    assert size == 3 * 56 * 4 and ranges == 15  # 56 values in five parameters, with two moments each
    assert (
        expected(engine, {"ema": [slot.owner.view(-1) for slot in engine.slots()]}, [Optimizer(name="lion")])[0] == size
    )
    assert size < sum(file.stat().st_size for file in path.iterdir()) < space.needed([size], ranges)[0]
    check_start(tmp_path, 3, engine, World(), [Optimizer()], {})
    monkeypatch.setattr(space, "free_bytes", lambda folder: (folder, 3_000_000, None))
    check_start(tmp_path, 3, engine, World(), [Optimizer()], {})
    assert "checkpoint.keep: 3: 3 more of 1.1 MB each are to come" in caplog.text
    monkeypatch.setattr(space, "free_bytes", lambda folder: (folder, 1_000_000, None))
    with pytest.raises(UserError, match="a checkpoint of this run needs"):
        check_start(tmp_path, 3, engine, World(), [Optimizer()], {})
