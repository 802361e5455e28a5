"""The corpus of bad input: each is told in one line with its place and a remedy, at once, and leaves nothing behind."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from data_cases import chat

from trainer.config import Recipe, UserError
from trainer.data.prepare import prepare

GOOD = json.dumps(chat("hi", "yo")).encode() + b"\n"


def prompt(**values: object) -> bytes:
    return json.dumps(values).encode() + b"\n"


def messages(*turns: object) -> bytes:
    return prompt(messages=list(turns))


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}

# name: (file name, bytes, what the message must hold, settings of the source)
CORPUS: dict[str, tuple[str, bytes, tuple[str, ...], dict[str, object]]] = {
    "bad json": ("d.jsonl", GOOD + b'{"messages": nope}\n', ("d.jsonl:2:14:", "bad JSON", "on_bad_row: skip"), {}),
    "cut last line": ("d.jsonl", GOOD + GOOD[:-20], ("d.jsonl:2:", "cut short", "remove"), {}),
    "two on a line": ("d.jsonl", GOOD.strip() + GOOD, ("d.jsonl:1:", "one object a line"), {}),
    "a list as row": ("d.jsonl", b"[1]\n", ("d.jsonl:1:", "must be a JSON object"), {}),
    "nul": ("d.jsonl", GOOD[:20] + b"\0" + GOOD[20:], ("d.jsonl:1:", "NUL", "encoding"), {}),
    "duplicate key": (
        "d.jsonl",
        b'{"messages": [], "messages": []}\n',
        ("d.jsonl:1:", "messages: key given twice"),
        {},
    ),
    "too deep": ("d.jsonl", b'{"messages": ' + b"[" * 100_000 + b"\n", ("d.jsonl:1:", "nested too deep"), {}),
    "utf-16": ("d.jsonl", GOOD.decode().encode("utf-16"), ("d.jsonl:1: byte 0", "encoding: utf-16"), {}),
    "latin-1": ("d.jsonl", GOOD + GOOD.replace(b"hi", b"h\xe9"), ("d.jsonl:2: byte", "0xe9", "encoding:"), {}),
    "surrogate": ("d.jsonl", GOOD.replace(b"hi", b"\\ud800"), ("d.jsonl:1:", r"lone surrogate \ud800"), {}),
    "empty file": ("d.jsonl", b"", ("d.jsonl: empty file",), {}),
    "only blank lines": ("d.jsonl", b"\n\n", ("d.jsonl: no rows",), {}),
    "missing field": ("d.jsonl", prompt(message=[]), ("d.jsonl:1:messages: missing", "fields: {messages"), {}),
    "wrong type": ("d.jsonl", prompt(messages="hello"), ("d.jsonl:1:messages: 'hello'", "JSON list"), {}),
    "no messages": ("d.jsonl", prompt(messages=[]), ("d.jsonl:1:messages", "no messages"), {}),
    "unknown role": (
        "d.jsonl",
        messages({"role": "bot", "content": "x"}),
        ("messages[0].role: 'bot'", "use one of"),
        {},
    ),
    "number content": ("d.jsonl", messages(USER, {**ANSWER, "content": 3}), ("messages[1].content: 3", "string"), {}),
    "image part": (
        "d.jsonl",
        messages({**USER, "content": [{"type": "image"}]}, ANSWER),
        ("content[0]", "text parts"),
        {},
    ),
    "bad weight": ("d.jsonl", messages(USER, {**ANSWER, "weight": -1}), ("messages[1].weight: -1", "use 0 or 1"), {}),
    "empty answer": (
        "d.jsonl",
        messages(USER, {**ANSWER, "content": " "}),
        ("messages[1].content", "empty answer"),
        {},
    ),
    "no answer": ("d.jsonl", messages(USER), ("d.jsonl:1:messages", "no assistant turn"), {}),
    "late system": ("d.jsonl", messages(USER, {"role": "system", "content": "x"}, ANSWER), ("[1].role: 'system'",), {}),
    "fully masked": (
        "d.jsonl",
        messages(USER, {**ANSWER, "weight": 0}),
        ("no example has a target", "1 fully masked"),
        {},
    ),
    "over-long": (
        "d.jsonl",
        GOOD + messages(USER, {**ANSWER, "content": "a" * 999}),
        ("d.jsonl:2: 1", "max_length"),
        {},
    ),
    "immense": (
        "d.jsonl",
        messages(USER, {**ANSWER, "content": "a" * 10_000_000}),
        ("d.jsonl:1: over", "max_length"),
        {},
    ),
    "all dropped": (
        "d.jsonl",
        messages(USER, {**ANSWER, "content": "a" * 999}),
        ("empty after filtering", "1 over model.max_length"),
        {"truncation": "drop"},
    ),
    "right cuts all": (
        "d.jsonl",
        messages({**USER, "content": "a" * 999}, ANSWER),
        ("no example has a target", "1 truncated"),
        {"truncation": "right"},
    ),
    "too many skipped": (
        "d.jsonl",
        GOOD + b"x\n" * 5,
        ("sources.s.max_bad_rows: 2", "the first: ", "d.jsonl:2:1"),
        {"on_bad_row": "skip", "max_bad_rows": 2},
    ),
    "json broken": ("d.json", b'[{"a": 1},\n {"a": }]', ("d.json:2:8: bad JSON",), {}),
    "json cut": ("d.json", b'[{"a": 1},\n {"a": 1', ("d.json:2:", "cut short"), {}),
    "json of lines": ("d.json", GOOD + GOOD, ("d.json:", "named .jsonl"), {}),
    "json two lists": ("d.json", b'{"a": [], "b": []}', ("d.json:1:", "second list"), {}),
    "csv columns": ("d.csv", b"prompt,completion\na\n", ("d.csv:2: 1 columns",), {"format": "prompt-completion"}),
    "csv header twice": ("d.csv", b"text,text\na,b\n", ("d.csv:1: text: column named twice",), {}),
    "csv quotes": ("d.csv", b'prompt,completion\n"a"b,c\n', ("d.csv:2: bad CSV",), {"format": "prompt-completion"}),
    "parquet": ("d.parquet", b"PAR1 nonsense", ("d.parquet:1: not readable as Parquet",), {}),
    "gzip broken": ("d.jsonl.gz", gzip.compress(GOOD * 100)[:40], ("d.jsonl.gz: broken gzip",), {}),
    "gzip bomb": ("d.jsonl.gz", gzip.compress((b" " * 999 + b"\n") * 80_000), ("d.jsonl.gz: gzip that grows",), {}),
    "unknown kind": ("d.xlsx", b"x", ("d.xlsx: unknown kind of file", ".jsonl"), {}),
    "unknown label": (
        "d.jsonl",
        prompt(text="a", label="maybe"),
        ("label: 'maybe'", "model.labels"),
        {"format": "text-label"},
    ),
}


@pytest.mark.parametrize("case", CORPUS)
def test_bad_input_is_one_line_with_place_and_remedy(
    case: str, tmp_path: Path, recipe_on: Callable[..., Recipe]
) -> None:
    name, data, expected, settings = CORPUS[case]
    (tmp_path / name).write_bytes(data)
    extra: dict[str, object] = {}
    if settings.get("format") == "text-label":
        extra = {
            "model": {"kind": "classification", "labels": ["no", "yes"]},
            "top": {"objective": {"name": "classification"}},
        }
    message = failure(recipe_on(tmp_path / name, **extra, **settings), tmp_path / "cache")
    for part in expected:
        assert part in message


def failure(recipe: Recipe, cache: Path) -> str:
    """The message of the UserError; checks that it is one line, prompt, and that no half-made data stay."""
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        prepare(recipe, cache)
    assert time.monotonic() - started < 10
    assert "\n" not in str(caught.value)
    assert not [path for path in (cache.iterdir() if cache.exists() else []) if path.is_dir()]
    return str(caught.value)


def test_first_fault_is_told_with_the_number_of_all(tmp_path: Path, recipe_on: Callable[..., Recipe]) -> None:
    (tmp_path / "d.jsonl").write_bytes(GOOD + b"x\n" + GOOD + b'{"messages": 3}\n' + b"y\n")
    message = failure(recipe_on(tmp_path / "d.jsonl"), tmp_path / "cache")
    assert "d.jsonl:2:1:" in message and "(3 bad in 5 rows read)" in message


def test_paths_that_are_no_data(tmp_path: Path, recipe_on: Callable[..., Recipe]) -> None:
    cache = tmp_path / "cache"
    missing = failure(recipe_on(tmp_path / "none.jsonl"), cache)
    assert "sources.s.path" in missing and "none.jsonl: no such file" in missing
    (tmp_path / "folder").mkdir()
    assert "holds no data file" in failure(recipe_on(tmp_path / "folder"), cache)
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "pipe, socket or device" in failure(recipe_on(tmp_path / "pipe.jsonl"), cache)
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    assert "gone.jsonl" in failure(recipe_on(tmp_path / "gone.jsonl"), cache)
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "mixed" / "b.csv").write_bytes(b"prompt,completion\na,b\n")
    assert "share none with a.jsonl" in failure(recipe_on(tmp_path / "mixed"), cache)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path: Path, recipe_on: Callable[..., Recipe]) -> None:
    (tmp_path / "d.jsonl").write_bytes(GOOD)
    (tmp_path / "d.jsonl").chmod(0)
    assert "permission denied" in failure(recipe_on(tmp_path / "d.jsonl"), tmp_path / "cache")


def test_a_line_without_end_is_refused(
    tmp_path: Path, recipe_on: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.data.files.MAX_LINE_BYTES", 1 << 20)
    (tmp_path / "d.jsonl").write_bytes(GOOD + b'{"a": "' + b"x" * (1 << 21) + b'"}\n')
    assert "d.jsonl:2: line over 1 MiB" in failure(recipe_on(tmp_path / "d.jsonl"), tmp_path / "cache")


def test_model_and_template_faults(tmp_path: Path, recipe_on: Callable[..., Recipe]) -> None:
    (tmp_path / "d.jsonl").write_bytes(GOOD)
    (tmp_path / "empty").mkdir()
    (tmp_path / "t.jinja").write_text("x" * 70_000)
    cases = {
        "no such file or folder": {"path": str(tmp_path / "no-model")},
        "holds no tokenizer": {"path": str(tmp_path / "empty")},
        "model.chat_template: ": {"chat_template": str(tmp_path / "t.jinja")},
    }
    for expected, model in cases.items():
        assert expected in failure(recipe_on(tmp_path / "d.jsonl", model=model), tmp_path / "cache")


def test_settings_that_the_format_would_ignore(tmp_path: Path, recipe_on: Callable[..., Recipe]) -> None:
    (tmp_path / "d.jsonl").write_bytes(GOOD)
    wrong = failure(recipe_on(tmp_path / "d.jsonl", fields={"mesages": "x"}), tmp_path / "cache")
    assert "sources.s.fields.mesages" in wrong and "did you mean 'messages'" in wrong


def test_a_cache_that_cannot_be_written(tmp_path: Path, recipe_on: Callable[..., Recipe]) -> None:
    (tmp_path / "d.jsonl").write_bytes(GOOD)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache: .*TUNESMITH_CACHE"):
        prepare(recipe_on(tmp_path / "d.jsonl"), tmp_path / "file" / "cache")
