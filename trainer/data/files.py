"""Opening the user's files: what a path is, gzip under a guard, decoding that never replaces a byte in silence."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import hashlib
import io
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from trainer.config.errors import UserError

MAX_LINE_BYTES = 64 << 20  # a longer line is not a training example, and reading it would fill memory
BOMB_BYTES = 64 << 20  # gzip is judged only once it has given this much
BOMB_RATIO = 200  # text compresses 3 to 20 times; the format's own limit is about 1030
BINARY_SUFFIXES = (".parquet",)
TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF32_BE: "utf-32",
}


def kind_of(path: Path) -> str | None:
    """The reader of a file by its name: `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`; None where no reader fits."""
    name = path.name.lower()
    name = name.removesuffix(".gz")
    for suffix in (*TEXT_SUFFIXES, *BINARY_SUFFIXES):
        if name.endswith(suffix):
            return ".jsonl" if suffix == ".ndjson" else suffix
    return None


def is_local(path: str, key: str) -> bool:
    """Whether a source path is on this machine (else it is a hub id `name` or `organisation/name`).

    Raises UserError naming ``key`` where it looks like a file and does not exist.
    """
    if "\0" in path:
        raise UserError(f"{key}: {path[:60]!r}: holds a NUL character; give a plain path or a hub id")
    try:
        if Path(path).expanduser().exists():
            return True
    except OSError as error:
        raise UserError(f"{key}: {path[:80]}: cannot be looked at ({error.strerror}); check its permissions") from error
    looks_like_file = path.startswith(("/", "./", "../", "~")) or path.endswith("/") or path.count("/") > 1
    if looks_like_file or kind_of(Path(path)) or Path(path).suffix in (".gz", ".txt"):
        raise UserError(f"{key}: {path}: no such file or folder; check the path (relative ones start at {os.getcwd()})")
    return False


def source_files(path: str, key: str) -> list[Path]:
    """The regular files behind a local source path: itself, or the folder's files of one kind each, sorted by name.

    Raises UserError for a FIFO, a device, an unreadable or empty file, a folder without data, an unknown kind.
    """
    root = Path(path).expanduser()
    if root.is_dir():
        files = _folder_files(root, key)
    else:
        files = [root]
    for file in files:
        _check_file(file, key)
    return files


def _folder_files(root: Path, key: str) -> list[Path]:
    try:
        entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith((".", "_")))
    except OSError as error:
        raise UserError(f"{key}: {root}: cannot be listed ({error.strerror}); check its permissions") from error
    files = [entry for entry in entries if kind_of(entry) and not entry.is_dir()]
    if not files:
        raise UserError(f"{key}: {root}: holds no data file; put .jsonl, .json, .csv, .tsv or .parquet files there")
    return files


def _check_file(path: Path, key: str) -> None:
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{key}: {path}: cannot be read ({error.strerror}); check the link or permissions") from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{key}: {path}: is a pipe, socket or device; copy the data into a regular file")
    if kind_of(path) is None:
        raise UserError(f"{key}: {path}: unknown kind of file; name it .jsonl, .json, .csv, .tsv or .parquet (.gz)")
    if not os.access(path, os.R_OK):
        raise UserError(f"{key}: {path}: permission denied; make it readable")
    if status.st_size == 0:
        raise UserError(f"{key}: {path}: empty file; give a file with rows")


def content_digest(files: list[Path]) -> str:
    """SHA-256 over the names and bytes of the files, in order: the source's fingerprint."""
    total = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as stream:
                one = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"data: {path}: cannot be read ({error.strerror}); check its permissions") from error
        total.update(f"{path.name if len(files) > 1 else kind_of(path)}\0{one}\n".encode())
    return total.hexdigest()


@contextlib.contextmanager
def opened(path: Path, encoding: str) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed where its name ends in `.gz`, past a UTF-8 byte-order mark.

    Raises UserError for another encoding's mark, for broken gzip and for anything that the system refuses.
    """
    try:
        with path.open("rb") as raw:
            is_gzip = path.name.lower().endswith(".gz")
            stream: BinaryIO = io.BufferedReader(_Gunzip(raw, path), 1 << 20) if is_gzip else raw
            _check_mark(stream, path, encoding)
            yield stream
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: broken gzip ({error}); compress or copy the file again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error


def _check_mark(stream: BinaryIO, path: Path, encoding: str) -> None:
    head = stream.peek(4)[:4]  # type: ignore[attr-defined]
    if not head:
        raise UserError(f"{path}: empty file; give a file with rows")
    if head.startswith(codecs.BOM_UTF8) and encoding == "utf-8":
        stream.read(3)
        return
    found = next((name for mark, name in MARKS.items() if head.startswith(mark)), None)
    if found is not None and found != encoding:
        remedy = "set `encoding: utf-16`" if found == "utf-16" else "save it as UTF-8"
        raise UserError(f"{path}:1: byte 0: the file is {found}, not {encoding}; {remedy} on the source")


class _Gunzip(io.RawIOBase):
    """Decompressed bytes, refused once they grow past BOMB_RATIO times what was read."""

    def __init__(self, raw: BinaryIO, path: Path) -> None:
        self.raw, self.path, self.given = raw, path, 0
        self.stream = gzip.GzipFile(fileobj=raw, mode="rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        self.given += len(data)
        if self.given > BOMB_BYTES and self.given > BOMB_RATIO * max(self.raw.tell(), 1):
            raise UserError(
                f"{self.path}: gzip that grows more than {BOMB_RATIO} times; unpack it yourself if it is meant to"
            )
        return len(data)


def decode(data: bytes, encoding: str, place: str, start: int) -> str:
    """One line's text; ``start`` is its first byte's offset in the file.

    Raises UserError naming the byte offset of the first byte that is not ``encoding``.
    """
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(_wrong_byte(data, error, encoding, place, start)) from error


def _wrong_byte(data: bytes, error: UnicodeDecodeError, encoding: str, place: str, start: int) -> str:
    byte = data[error.start : error.start + 1].hex()
    remedy = "save the file as UTF-8, or set the source's `encoding:` (latin-1, utf-16, gb18030)"
    return f"{place}: byte {start + error.start} (0x{byte}) is not {encoding}; {remedy}"


def lines(path: Path, encoding: str) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, byte offset, bytes without the line end) of each line, split at LF alone.

    UTF-16 is given re-coded as UTF-8. Raises UserError for a line over MAX_LINE_BYTES.
    """
    with opened(path, encoding) as stream:
        if encoding == "utf-16":
            yield from _wide_lines(path, stream)
            return
        start, number = stream.tell() if stream.seekable() else 0, 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise UserError(
                    f"{path}:{number}: line over {MAX_LINE_BYTES >> 20} MiB; one example a line, or a real list"
                )
            yield number, start, line.removesuffix(b"\n").removesuffix(b"\r")
            start += len(line)


def _wide_lines(path: Path, stream: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    text, number, start = io.TextIOWrapper(stream, encoding="utf-16", newline="\n"), 0, 0
    try:
        while line := text.readline(MAX_LINE_BYTES):
            number += 1
            data = line.encode("utf-8")
            yield number, start, data.removesuffix(b"\n").removesuffix(b"\r")
            start += len(data)
    except UnicodeError as error:
        raise UserError(f"{path}:{number + 1}: not utf-16 ({error}); set the source's `encoding:`") from error
    finally:
        text.detach()


def text_chunks(path: Path, encoding: str, size: int = 1 << 18) -> Iterator[str]:
    """The file's text in pieces of about ``size`` bytes, for readers that do not go line by line."""
    with opened(path, encoding) as stream:
        decoder, given, line = codecs.getincrementaldecoder(encoding)(), 0, 1
        while True:
            data = stream.read(size)
            pending = decoder.getstate()[0]
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                line += (pending + data)[: error.start].count(b"\n")
                message = _wrong_byte(pending + data, error, encoding, f"{path}:{line}", given - len(pending))
                raise UserError(message) from error
            given, line = given + len(data), line + text.count("\n")
            if text:
                yield text
            if not data:
                return
