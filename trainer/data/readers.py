"""Rows with their place, streamed from JSONL, JSON, CSV, TSV, Parquet, a folder of them, or a hub dataset."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError
from trainer.config.problems import clean
from trainer.config.schema import Source
from trainer.data.files import MAX_LINE_BYTES, decode, is_local, kind_of, lines, source_files, text_chunks
from trainer.data.hub import offline_if_unreachable
from trainer.data.json_stream import DuplicateKey, parse_row, stream_list

PARQUET_ROWS = 256  # rows held at once; a row group may be far larger


@dataclass(frozen=True)
class Row:
    """A row as read: its file and line (rows count from 1 in Parquet and hub data), and its fields."""

    file: str
    line: int
    values: dict[str, Any]

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class BadRow:
    """A row that could not be read; ``message`` is a whole error line with its place and remedy."""

    file: str
    line: int
    message: str


def read_rows(source: Source, key: str) -> Iterator[Row | BadRow]:
    """Every row of a source in a fixed order, at most ``source.limit``, holding one row (or batch) in memory.

    ``key`` (`sources.<name>.path`) names the source in errors. Raises UserError for what concerns a whole file:
    a missing, empty or unreadable one, a wrong encoding mark, broken gzip or Parquet, files with different fields.
    """
    if is_local(source.path, key):
        root = Path(source.path).expanduser()
        if is_dataset_folder(root):
            rows = _read_hub(source, key)
        else:
            rows = _read_files(source_files(source.path, key), source.encoding)
    else:
        rows = _read_hub(source, key)
    return itertools.islice(rows, source.limit)


def is_dataset_folder(root: Path) -> bool:
    """Whether a folder was written by ``datasets``' `save_to_disk`."""
    return (root / "dataset_info.json").is_file() or (root / "dataset_dict.json").is_file()


def _read_files(files: list[Path], encoding: str) -> Iterator[Row | BadRow]:
    known: tuple[Path, set[str]] | None = None
    for path in files:
        first = True
        for row in READERS[kind_of(path) or ""](path, encoding):
            if first and isinstance(row, Row) and len(files) > 1:
                first = False
                known = known or (path, set(row.values))
                _check_fields(known, path, set(row.values))
            yield row


def _check_fields(known: tuple[Path, set[str]], path: Path, fields: set[str]) -> None:
    """Files of one folder must share a field, else they are different data sets that lie together by accident."""
    if known[1] and not known[1] & fields:
        raise UserError(
            f"{path}: its fields ({_listed(fields)}) share none with {known[0].name} ({_listed(known[1])}); "
            "give each kind of data its own source"
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(clean(name) for name in sorted(names)[:6])


def _read_jsonl(path: Path, encoding: str) -> Iterator[Row | BadRow]:
    coded = "utf-8" if encoding == "utf-16" else encoding
    for number, start, data in lines(path, encoding):
        if not data.strip():
            continue
        place = f"{path}:{number}"
        try:
            values = parse_row(decode(data, coded, place, start))
        except UserError as error:
            yield BadRow(str(path), number, str(error))
        except json.JSONDecodeError as error:
            yield BadRow(str(path), number, f"{place}:{error.colno}: {_json_problem(error, data)}")
        except (DuplicateKey, RecursionError, ValueError) as error:
            reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
            yield BadRow(str(path), number, f"{place}:1: {reason}; mend the line")
        else:
            yield Row(str(path), number, values)


def _json_problem(error: json.JSONDecodeError, data: bytes) -> str:
    if b"\0" in data:
        return (
            "holds NUL bytes; the file is damaged or of another encoding: set the source's `encoding:` or remove them"
        )
    if error.msg == "Extra data":
        return "more than one JSON value on the line; write one object a line"
    if error.msg.startswith("Unterminated") or error.pos >= len(error.doc.rstrip()) - 1:
        return f"bad JSON, the line is cut short ({error.msg}); complete or remove it"
    return f"bad JSON ({error.msg}) near {error.doc[error.pos : error.pos + 20]!r}; write one JSON object a line"


def _read_json(path: Path, encoding: str) -> Iterator[Row | BadRow]:
    for line, value in stream_list(text_chunks(path, encoding), str(path)):
        if isinstance(value, dict):
            yield Row(str(path), line, value)
        else:
            yield BadRow(str(path), line, f"{path}:{line}: {_shown(value)}: a row must be an object; write {{...}}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _read_delimited(delimiter: str) -> Callable[[Path, str], Iterator[Row | BadRow]]:
    def read(path: Path, encoding: str) -> Iterator[Row | BadRow]:
        csv.field_size_limit(MAX_LINE_BYTES)
        coded = "utf-8" if encoding == "utf-16" else encoding
        texts = (decode(data, coded, f"{path}:{line}", start) + "\n" for line, start, data in lines(path, encoding))
        table = csv.reader(texts, delimiter=delimiter, strict=True)
        header = _next_row(table, path)
        if header is None or not any(name.strip() for name in header):
            raise UserError(f"{path}:1: no header; the first line must name the columns")
        if len(set(header)) != len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise UserError(f"{path}:1: {twice}: column named twice; give each its own name")
        before = table.line_num
        while (row := _next_row(table, path)) is not None:
            line, before = before + 1, table.line_num
            if not row:
                continue
            if len(row) != len(header):
                message = f"{path}:{line}: {len(row)} columns where the header has {len(header)}; quote or mend the row"
                yield BadRow(str(path), line, message)
            else:
                yield Row(str(path), line, dict(zip(header, row, strict=True)))

    return read


def _next_row(table: Any, path: Path) -> list[str] | None:
    """The next row; broken quoting has no next row to go on with, so it is an error of the file."""
    try:
        return next(table, None)
    except csv.Error as error:
        raise UserError(f"{path}:{table.line_num}: bad CSV ({error}); mend the quotes") from error


def _read_parquet(path: Path, encoding: str) -> Iterator[Row | BadRow]:
    import pyarrow as pa  # 0.3 s, and only for this kind of file
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=PARQUET_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(str(path), number, values)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}:{number + 1}: not readable as Parquet ({reason}); write the file again") from error


def load_hub(source: Source, key: str) -> Any:
    """The hub (or local folder) dataset of a source, through ``datasets.load_dataset``.

    Raises UserError where it, its subset, split or revision cannot be had.
    """
    folder = Path(source.path).expanduser()
    if not folder.exists():
        offline_if_unreachable()
    import datasets  # 0.7 s, and only for hub data

    try:
        if is_dataset_folder(folder):
            loaded = datasets.load_from_disk(str(folder))
            return loaded[source.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return datasets.load_dataset(
            source.path, name=source.subset, split=source.split, revision=source.revision, streaming=source.streaming
        )
    except Exception as error:  # the hub client lets its HTTP library's own errors through
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        asked = f"{source.path} (subset {source.subset}, split {source.split}, revision {source.revision})"
        raise UserError(
            f"{key}: {asked}: cannot be loaded: {reason[:200]}; check id, subset, split and revision, or the network"
        ) from error


def _read_hub(source: Source, key: str) -> Iterator[Row | BadRow]:
    for number, values in enumerate(load_hub(source, key), start=1):
        yield Row(source.path, number, dict(values))


READERS: dict[str, Callable[[Path, str], Iterator[Row | BadRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_delimited(","),
    ".tsv": _read_delimited("\t"),
    ".parquet": _read_parquet,
}
