"""Data files that mean harm: name, bytes (or a maker), what must be said, settings of the source."""

from __future__ import annotations

import gzip
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
GOOD = json.dumps(CHAT).encode() + b"\n"
TEXT = {"format": "text"}


def bomb(inner: bytes, times: int) -> bytes:
    """gzip of so many copies, one behind the other, made without holding them."""
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=9) as file:
        for _ in range(times):
            file.write(inner)
    return out.getvalue()


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("../../evil.jsonl", GOOD)
    return out.getvalue()


def called(arguments: str) -> bytes:
    """A conversation whose answer is a call of a tool."""
    answer = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    return json.dumps({"messages": [CHAT["messages"][0], answer]}).encode()


def sparse(path: Path) -> None:
    """A terabyte of zeros that takes no room."""
    path.touch()
    os.truncate(path, 1 << 40)


def parquet_of(rows: int, text: str) -> Callable[[Path], None]:
    """A column of one long text, so many times, which Parquet stores once."""

    def make(path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))
        pq.write_table(pa.table({"text": column}), path)

    return make


DATA: dict[str, tuple[str, bytes | Callable[[Path], None], str, dict[str, Any]]] = {
    "a surrogate as bytes": ("d.jsonl", GOOD + GOOD.replace(b'"q"', b'"\xed\xa0\x80"'), "d.jsonl:2: byte", {}),
    "a surrogate escaped": ("d.jsonl", GOOD.replace(b'"q"', b'"\\udfff"'), "lone surrogate", {}),
    "a NUL escaped": ("d.jsonl", GOOD.replace(b'"q"', b'"\\u0000"') + b"x\n", "d.jsonl:2:", {}),
    "marks in the middle": ("d.jsonl", GOOD + b"\xef\xbb\xbf" + GOOD, "d.jsonl:2:", {}),
    "UTF-16 without a mark": ("d.jsonl", GOOD.decode().encode("utf-16-le"), "NUL bytes", {}),
    "UTF-32": ("d.jsonl", GOOD.decode().encode("utf-32"), "the file is utf-32", {}),
    "cut in a character": ("d.jsonl", GOOD + '{"messages": "é'.encode()[:-1], "d.jsonl:2: byte", {}),
    "a number of a million digits": ("d.jsonl", b'{"a": ' + b"9" * 1_000_000 + b"}\n", "d.jsonl:1:", {}),
    "NaN as a weight": ("d.jsonl", GOOD.replace(b'"a"}', b'"a", "weight": NaN}'), "messages[1].weight", {}),
    "100,000 keys": ("d.jsonl", json.dumps({str(n): n for n in range(100_000)}).encode(), "messages: missing", {}),
    "key of a million letters": ("d.jsonl", json.dumps({"x" * 1_000_000: 1}).encode(), "messages: missing", {}),
    "turns within turns": ("d.jsonl", b'{"messages": [[[[[]]]]]}\n', "messages[0]", {}),
    "a list 100,000 deep": ("d.json", b"[" * 100_000, "d.json:", {}),
    "an object 100,000 deep": ("d.jsonl", b'{"a":' * 100_000 + b"\n", "nested too deep", {}),
    "a call 900 deep": ("d.jsonl", called("[" * 900 + "]" * 900), "d.jsonl:1", {}),
    "gzip bomb of one line": ("d.jsonl.gz", bomb(b"x" * 1_000_000, 100), "gzip that grows", {}),
    "gzip in gzip": ("d.jsonl.gz", gzip.compress(gzip.compress(GOOD)), "d.jsonl.gz:1: byte", {}),
    "gzip followed by anything": ("d.jsonl.gz", gzip.compress(GOOD) + b"junk", "broken gzip", {}),
    "zip": ("d.jsonl", zipped(), "d.jsonl:1:", {}),
    "a line without end": ("d.jsonl", b'{"messages": "' + b"x" * (65 << 20), "line over 64 MiB", {}),
    "a terabyte": ("d.bin", sparse, "unknown kind of file", {}),
    "a quote that never closes": ("d.csv", b'text\n"' + b"x,\n" * 100_000, "bad CSV", TEXT),
    "100,000 columns": ("d.csv", b",".join(b"c%d" % n for n in range(100_000)) + b"\n1\n", "1 columns", TEXT),
    "Parquet with a torn footer": ("d.parquet", b"PAR1" + b"\xff" * 64 + b"\xff\xff\xff\x7fPAR1", "not readable", TEXT),
    "Parquet bomb": ("d.parquet", parquet_of(1_000_000, "x" * 100_000), "tokens, model.max_length is", TEXT),
}  # fmt: skip
