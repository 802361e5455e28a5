"""The record of a run: rows appended to ``metrics.jsonl``, and the one reader that everything else is fed from."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer.config.errors import RunError
from trainer.tracking.redact import known_secrets, redact

FILE_NAME = "metrics.jsonl"
Row = dict[str, Any]

# JSON has no NaN or infinity: they are written as these strings and read back as floats.
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_TEXT_KEYS = {"kind", "stage", "suite", "name", "detail"}
# Keys of an evaluation row that are not metrics, for rows whose metrics stand at the top level.
_EVAL_FACTS = {"kind", "step", "suite", "time", "n", "seconds", "stage", "metrics"}


class Journal:
    """Appends rows to ``<folder>/metrics.jsonl``; one process writes, any number may read meanwhile.

    Each row is one line of strict JSON with ``kind`` (step, eval or event) and ``time`` (unix seconds). NaN and
    infinities are written as the strings "nan", "inf" and "-inf". Opening a file whose end was cut by a kill
    truncates it to its last whole row and records the event ``journal-repaired``.

    Raises OSError where the file cannot be written; a row that did not fit is taken back first, so that the
    file stays whole; and what `guard` raises, where the folder is another run's by now.
    """

    def __init__(self, folder: Path, guard: Callable[[], None] = lambda: None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self._guard = folder / FILE_NAME, guard
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        self._secrets = known_secrets(os.environ)
        self._repair()

    def step(self, row: Mapping[str, Any]) -> Row:
        """Append the row of one optimizer step; returns it as readers will see it."""
        return self._append("step", row)

    def eval(self, row: Mapping[str, Any]) -> Row:
        """Append one suite's evaluation: ``{step, suite, metrics: {name: value}}``."""
        return self._append("eval", row)

    def event(self, step: int, name: str, detail: Any = None) -> Row:
        """Append an event; secrets in ``detail`` are redacted."""
        return self._append("event", {"step": step, "name": name, "detail": redact(detail, self._secrets)})

    def sync(self) -> None:
        """Return once every row is on the disk (fsync)."""
        os.fsync(self._file)

    def close(self) -> None:
        """Sync and close; closing twice is harmless."""
        if self._file >= 0:
            self.sync()
            os.close(self._file)
            self._file = -1

    def _append(self, kind: str, row: Mapping[str, Any]) -> Row:
        self._guard()
        whole = {"kind": kind, **row, "time": round(time.time(), 3)}
        whole["kind"] = kind
        line = encode_row(whole)
        append_line(self._file, line)
        return decode_row(line)

    def _repair(self) -> None:
        content = self.path.read_bytes()
        keep, last_step = _whole_rows(content)
        if keep == len(content):
            return
        os.ftruncate(self._file, keep)
        lost = len(content) - keep
        self.event(last_step, "journal-repaired", f"{lost} bytes of a cut row removed from the end of {FILE_NAME}")


class QuietJournal:
    """The journal of a rank that keeps no record."""

    def step(self, row: Mapping[str, Any]) -> Row:
        return {"kind": "step", **row}

    def eval(self, row: Mapping[str, Any]) -> Row:
        return {"kind": "eval", **row}

    def event(self, step: int, name: str, detail: Any = None) -> Row:
        return {"kind": "event", "step": step, "name": name, "detail": detail}

    def sync(self) -> None:
        """Nothing to write."""

    def close(self) -> None:
        """Nothing to close."""


def encode_row(row: Mapping[str, Any]) -> bytes:
    """One line of strict JSON; numbers of numpy and torch become plain ones, non-finite ones strings."""
    return (json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", errors="replace")


def decode_row(line: bytes | str) -> Row:
    """The row of a line, with "nan", "inf" and "-inf" back as floats in step and eval rows.

    Raises ValueError where the line is not a JSON object with a ``kind``.
    """
    row = json.loads(line)
    if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
        raise ValueError("not a row: an object with a 'kind' is needed")
    return row if row["kind"] == "event" else _numbers(row)


def scan_rows(folder: Path) -> tuple[list[Row], list[str]]:
    """Every row of the file in file order, and a ``file:line: reason`` for each line that is none.

    A last line without its newline is being written or was cut: it is neither a row nor a problem. No file, no rows.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return [], []
    rows, problems = [], []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            rows.append(decode_row(line))
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
    return rows, problems


def supersede(rows: Iterable[Row]) -> list[Row]:
    """Rows by step, without those that a resumed run made again.

    Of the step rows of one step, and of the eval rows of one step and suite, the last written stays; events are
    history and all stay. Rows of equal step keep the order in which they were written.
    """
    kept: dict[tuple[Any, ...], tuple[int, Row]] = {}
    for position, row in enumerate(rows):
        kind, step = row["kind"], row.get("step", 0)
        key = (kind, position) if kind == "event" else (kind, step, row.get("suite"))
        kept[key] = (position, row)
    ordered = sorted(kept.values(), key=lambda entry: (entry[1].get("step") or 0, entry[0]))
    return [row for _, row in ordered]


def read_rows(folder: Path) -> list[Row]:
    """The rows of a run's record, live or finished, as ``supersede`` leaves them; no file gives no rows.

    Raises RunError naming file and line where a whole line is not a row.
    """
    rows, problems = scan_rows(folder)
    if problems:
        raise RunError(f"{problems[0]}: remove the line, or restore the file")
    return supersede(rows)


def eval_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """The numeric metrics of an eval row: its ``metrics``, or numbers that stand at its top level."""
    metrics = row.get("metrics")
    entries = (
        metrics.items() if isinstance(metrics, Mapping) else ((k, v) for k, v in row.items() if k not in _EVAL_FACTS)
    )
    return {name: float(value) for name, value in entries if _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and torch: a scalar gives a number, an array nested lists
        return _plain(value.tolist())
    raise TypeError(f"a row holds a {type(value).__name__}: only numbers, strings, lists and mappings can be recorded")


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: entry if key in _TEXT_KEYS else _numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_numbers(entry) for entry in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _whole_rows(content: bytes) -> tuple[int, int]:
    """Length of the longest prefix that ends in a whole row (a crash may leave zeros or half a line), and its step."""
    end = content.rfind(b"\n") + 1
    while end > 0:
        start = content.rfind(b"\n", 0, end - 1) + 1
        try:
            return end, int(decode_row(content[start:end]).get("step") or 0)
        except ValueError:
            end = start
    return 0, 0


def append_line(file: int, line: bytes) -> None:
    """Write a line whole or not at all: a full disk must not leave half a row for the next one to join.

    Raises OSError, with the file as it was.
    """
    position = os.fstat(file).st_size
    try:
        while line:
            line = line[os.write(file, line) :]
    except OSError:
        os.ftruncate(file, position)
        raise
