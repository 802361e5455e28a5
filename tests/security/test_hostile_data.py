"""Data that mean harm are refused in one line with the place, in time and memory, also where several ranks ask."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from bounds import bounded
from hostile_data import DATA, GOOD, TEXT
from tiny import run_ranks

from trainer.config import Recipe, UserError, build_recipe
from trainer.data.prepare import prepare

SECONDS, BYTES = 6.0, 400 << 20  # of CPU time; a row may be as long as 64 MiB, and is then held several times


def recipe_on(path: Path, model: Path, **source: Any) -> Recipe:
    objective = {"objective": {"name": "language-modeling"}} if source.get("format") == "text" else {}
    settings = {"path": str(path), "format": "messages", **source}
    data = {"name": "x", "model": {"path": str(model), "max_length": 256}, "sources": {"s": settings}}
    return build_recipe({**data, **objective})


@pytest.mark.parametrize("name", DATA)
def test_refused(name: str, tmp_path: Path, tiny_folder: Path) -> None:
    file, content, part, settings = DATA[name]
    path = tmp_path / "data" / file
    path.parent.mkdir()
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    recipe = recipe_on(path, tiny_folder, **settings)
    with bounded(SECONDS, BYTES), pytest.raises(UserError) as caught:
        prepare(recipe, tmp_path / "cache")
    message = str(caught.value)
    assert part in message and file in message and message.isprintable() and len(message) < 600
    assert [entry.name for entry in (tmp_path / "data").iterdir()] == [file]


def ask(rank: int, path: str, model: str, cache: str) -> None:
    """Each rank prepares as a run does, before any process group exists; each must be told."""
    for file, part in (("pipe.jsonl", "pipe"), ("bad.jsonl", "bad.jsonl:2:"), ("folder", "holds no data file")):
        began = time.monotonic()
        try:
            prepare(recipe_on(Path(path) / file, Path(model)), Path(cache))
        except UserError as error:
            assert part in str(error), error
        else:
            raise AssertionError(f"rank {rank}: {file} was accepted")
        assert time.monotonic() - began < 60


def test_every_rank_is_told_and_none_waits(tmp_path: Path, tiny_folder: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "bad.jsonl").write_bytes(GOOD + b"{broken\n")
    (tmp_path / "folder").mkdir()
    run_ranks(2, ask, str(tmp_path), str(tiny_folder), str(tmp_path / "cache"))


def test_a_file_that_grows_out_of_its_row_limit_is_not_read_to_the_end(tmp_path: Path, tiny_folder: Path) -> None:
    """`limit` stops reading: what follows may be endless or broken."""
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "a"}\n' * 3 + b"{broken" * 1000)
    recipe = recipe_on(tmp_path / "d.jsonl", tiny_folder, limit=3, **TEXT)
    assert prepare(recipe, tmp_path / "cache")["s"].counts["kept"] == 3
