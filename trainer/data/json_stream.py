"""JSON as data needs it: duplicate keys and lone surrogates are errors, and a list is read element by element."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from trainer.config.errors import UserError

MAX_ELEMENT = 64 << 20  # characters of one element; a longer one is not a row
SPACE = " \t\r\n"


class DuplicateKey(ValueError):
    """An object that holds a key twice: which value counts would be a guess."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise DuplicateKey(f"{twice}: key given twice in one object")
    return values


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def parse_row(text: str) -> dict[str, Any]:
    """One JSON object from one line. Raises JSONDecodeError, or ValueError with the reason."""
    values = DECODER.decode(text)
    if not isinstance(values, dict):
        raise ValueError(f"a row must be a JSON object, this is a {_kind(values)}")
    refuse_surrogates(text, values)
    return values


def refuse_surrogates(text: str, values: Any) -> None:
    """Raise ValueError where an escape such as \\ud800 stands alone: it is no character and cannot be tokenised."""
    if "\\ud" not in text and "\\uD" not in text:
        return
    try:
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"lone surrogate {code} in a string, half of a broken character") from error


def _kind(value: Any) -> str:
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), "value")


def stream_list(chunks: Iterable[str], path: str) -> Iterator[tuple[int, Any]]:
    """(line, element) of the list that a JSON file is, or that is the one list in the object that it is.

    Holds one element in memory. Raises UserError with file:line:column, since nothing can be read past a fault.
    """
    reader = _Reader(iter(chunks), path)
    opening = reader.peek()
    if opening == "[":
        yield from reader.elements()
    elif opening == "{":
        yield from reader.members()
    else:
        raise reader.error("is neither a list nor an object; write a JSON list of rows, or name it .jsonl")
    if reader.peek():
        raise reader.error("more after the end; a file with one object a line must be named .jsonl")


class _Reader:
    """A cursor over text that arrives in pieces."""

    def __init__(self, chunks: Iterator[str], path: str) -> None:
        self.chunks, self.path = chunks, path
        self.text, self.at, self.ended = "", 0, False
        self.line, self.line_start = 1, 0  # of `text[0]`: its line, and how far into that line it lies

    def error(self, message: str, at: int | None = None) -> UserError:
        line, column = self.place(self.at if at is None else at)
        return UserError(f"{self.path}:{line}:{column}: {message}")

    def place(self, at: int) -> tuple[int, int]:
        before = self.text[:at]
        newlines = before.count("\n")
        column = at - before.rfind("\n") if newlines else at + 1 + self.line_start
        return self.line + newlines, column

    def more(self) -> bool:
        """Drop what is behind the cursor and take at least as much again as is held; False at the end."""
        if self.ended:
            return False
        self.line, column = self.place(self.at)
        self.line_start = column - 1
        pieces, wanted = [self.text[self.at :]], len(self.text) - self.at
        while wanted >= 0 and not self.ended:
            piece = next(self.chunks, None)
            self.ended = piece is None
            pieces.append(piece or "")
            wanted -= len(piece or "")
        self.text, self.at = "".join(pieces), 0
        return True

    def peek(self) -> str:
        """The next character that is not white space, without taking it; "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in SPACE:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def take(self, wanted: str) -> str:
        found = self.peek()
        if not found:
            raise self.error(f"the file is cut short (no {' or '.join(wanted)}); complete it")
        if found not in wanted:
            raise self.error(f"bad JSON: {found!r} where {' or '.join(wanted)} must stand; mend the file")
        self.at += 1
        return found

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # A fault far from the end of what is held is a fault; close to it, the rest may only be missing.
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - 16
                if cut and self._grow():
                    continue
                reason = "the file is cut short" if error.pos >= len(self.text.rstrip()) else "bad JSON"
                raise self.error(f"{reason} ({error.msg}); mend the file", error.pos) from error
            except (DuplicateKey, ValueError) as error:
                raise self.error(f"{error}; mend the file") from error
            except RecursionError as error:
                raise self.error("nested too deep; a row is flat or nearly so") from error
            if end == len(self.text) and self._grow():
                continue  # a number or word may go on in the next piece
            try:
                refuse_surrogates(self.text[self.at : end], value)
            except ValueError as error:
                raise self.error(f"{error}; mend the file") from error
            self.at = end
            return value

    def _grow(self) -> bool:
        if len(self.text) - self.at > MAX_ELEMENT:
            raise self.error(f"one element over {MAX_ELEMENT >> 20} MiB; a row is one example")
        return self.more()

    def elements(self) -> Iterator[tuple[int, Any]]:
        self.take("[")
        if self.peek() == "]":
            self.at += 1
            return
        while True:
            self.peek()
            line = self.place(self.at)[0]
            yield line, self.value()
            if self.take(",]") == "]":
                return

    def members(self) -> Iterator[tuple[int, Any]]:
        self.take("{")
        lists: list[str] = []
        while self.peek() != "}":
            name = self.value()
            self.take(":")
            if self.peek() != "[":
                self.value()
            elif lists:
                raise self.error(f"{name}: a second list beside {lists[0]!r}; keep one list of rows in the file")
            else:
                lists.append(str(name))
                yield from self.elements()
            if self.peek() != "}":
                self.take(",")
        self.at += 1
        if not lists:
            raise self.error("one object without a list of rows; a file with one object a line must be named .jsonl")
