"""The same rows from every kind of file."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import Source, UserError
from trainer.data import hub
from trainer.data.json_stream import stream_list
from trainer.data.readers import Row, read_rows

ROWS = [{"prompt": f"q{n} é\u2028", "completion": 'a, "b"\nc'} for n in range(3)]


def read(path: Path, **settings: Any) -> list[dict[str, Any]]:
    source = Source(path=str(path), format="prompt-completion", **settings)
    rows = list(read_rows(source, "sources.s.path"))
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.values for row in rows if isinstance(row, Row)]


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_all(folder: Path) -> dict[str, Path]:
    import csv

    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = {
        name: folder / name
        for name in ("a.jsonl", "b.ndjson.gz", "c.json", "d.json", "e.csv", "f.tsv", "g.parquet", "h.jsonl", "i.jsonl")
    }
    paths["a.jsonl"].write_text("\ufeff" + jsonl(ROWS).replace("\n", "\r\n").rstrip(), encoding="utf-8", newline="")
    paths["b.ndjson.gz"].write_bytes(gzip.compress(jsonl(ROWS).encode()))
    paths["c.json"].write_text(json.dumps(ROWS, indent=2), encoding="utf-8")
    paths["d.json"].write_text(json.dumps({"version": {"n": 1}, "data": ROWS, "end": "x"}), encoding="utf-8")
    for name, delimiter in (("e.csv", ","), ("f.tsv", "\t")):
        with paths[name].open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, ["prompt", "completion"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), paths["g.parquet"])
    paths["h.jsonl"].write_text(jsonl(ROWS), encoding="utf-16")
    paths["i.jsonl"].write_text(jsonl(ROWS), encoding="gb18030")
    return paths


ENCODINGS = {"h.jsonl": "utf-16", "i.jsonl": "gb18030"}


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    for name, path in write_all(tmp_path).items():
        assert read(path, encoding=ENCODINGS.get(name, "utf-8")) == ROWS, name


def test_a_folder_is_its_files_in_order_and_limit_cuts(tmp_path: Path) -> None:
    write_all(tmp_path)
    for name in ENCODINGS:
        (tmp_path / name).unlink()
    (tmp_path / "README.md").write_text("not data")
    assert read(tmp_path) == ROWS * 7
    assert read(tmp_path, limit=4) == ROWS + ROWS[:1]


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    paths = write_all(tmp_path)
    source = Source(path=str(paths["e.csv"]), format="prompt-completion")
    assert [row.line for row in read_rows(source, "k")] == [2, 4, 6]  # quoted values with a line break take two lines
    (tmp_path / "j.jsonl").write_text("\n" + jsonl(ROWS[:1]) + "\n" + jsonl(ROWS[:1]), encoding="utf-8")
    source = Source(path=str(tmp_path / "j.jsonl"), format="prompt-completion")
    assert [row.line for row in read_rows(source, "k")] == [2, 4]


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_code_path_on_a_local_folder(tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    from trainer.data import readers

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "train.jsonl").write_text(jsonl(ROWS), encoding="utf-8")
    source = Source(path=str(tmp_path / "org"), format="prompt-completion", streaming=streaming)
    assert [dict(row) for row in readers.load_hub(source, "sources.s.path")] == ROWS
    wrong = source.model_copy(update={"split": "nosuch"})
    with pytest.raises(UserError, match="split nosuch"):
        list(readers.load_hub(wrong, "sources.s.path"))


def test_a_hub_dataset_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = Source(path="some-organisation/no-such-set", format="text")
    with pytest.raises(UserError, match=r"sources\.s\.path: some-organisation/no-such-set.*cannot be loaded"):
        list(read_rows(source, "sources.s.path"))


def test_an_unreachable_hub_is_told_at_once_and_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    hub.offline_if_unreachable.cache_clear()
    started = time.monotonic()
    assert hub.offline_if_unreachable() and os.environ["HF_HUB_OFFLINE"] == "1"
    assert time.monotonic() - started < hub.SECONDS + 1
    hub.offline_if_unreachable.cache_clear()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3), max_leaves=5
)


@given(
    rows=st.lists(st.dictionaries(st.text(), json_values, max_size=3), max_size=6),
    size=st.integers(1, 30),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
)
def test_a_json_list_is_read_the_same_in_any_pieces(
    rows: list[dict[str, Any]], size: int, indent: int | None, ascii_only: bool
) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert [value for _, value in stream_list(pieces, "f.json")] == rows
