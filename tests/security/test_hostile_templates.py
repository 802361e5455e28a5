"""Chat templates that mean harm are stopped in the renderer's process: in time, within memory, without an effect."""

from __future__ import annotations

import contextlib
import re
import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hostile_templates import ENDLESS, ESCAPES, GREEDY, SPIN
from tiny import byte_tokenizer

from trainer.config import Source, UserError
from trainer.data import guard, renderer
from trainer.data.encode import Encoder
from trainer.data.formats import to_record
from trainer.data.guard import TokenizerFault
from trainer.data.readers import Row
from trainer.data.template import Conversation, dialect
from trainer.evaluation.generation import stop_ids

ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
TALK = Conversation("f.jsonl:7", ROW["messages"])


def failure(template: str) -> str:
    """What is said of a conversation under a template; it must be refused."""
    tokenizer: Any = byte_tokenizer(template)
    try:
        (answer,) = renderer.render(dialect(tokenizer, "sources.s"), [TALK], "assistant")
    except TokenizerFault as error:
        answer = error
    assert isinstance(answer, UserError)
    assert "\n" not in str(answer) and str(answer).startswith("f.jsonl:7: ") and "model.chat_template" in str(answer)
    return str(answer)


@pytest.mark.parametrize("name", ENDLESS)
def test_endless(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "RENDER_SECONDS", 0.3)
    template, expected = ENDLESS[name]
    assert expected in failure(template)


def test_two_seconds_are_two_seconds() -> None:
    renderer.start()
    assert renderer.whole(dialect(byte_tokenizer("{{ 1 }}"), "s"), ROW["messages"]) == "1"  # it has started
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    assert "runs for over 2 s" in failure(SPIN)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < 2.0 + 2.5  # what the process had used for its start counts here too
    assert time.monotonic() - began < renderer.CLOCK_SECONDS + 2


@pytest.mark.parametrize("name", GREEDY)
def test_greedy(name: str) -> None:
    template, expected = GREEDY[name]
    assert expected in failure(template)


def test_memory_of_the_process_stays_below_the_limit() -> None:
    """The most that any renderer held while the greedy templates ran: its own peak, looked at every few milliseconds.

    Not `ru_maxrss` of children: that begins with what the parent held when it forked.
    """
    peaks, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.003):
            for children in Path("/proc/self/task").glob("*/children"):
                with contextlib.suppress(OSError):  # a thread or a renderer that has just ended
                    for pid in children.read_text().split():
                        if b"render_process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                            found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
                            peaks.append(int(found[1]) << 10 if found else 0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for template, _ in GREEDY.values():
            failure(template)
    finally:
        done.set()
        watcher.join()
    assert 20 << 20 < max(peaks) < guard.RENDER_BYTES + (16 << 20)


@pytest.mark.parametrize("name", ESCAPES)
def test_escapes(name: str, tmp_path: Path) -> None:
    template, expected = ESCAPES[name]
    canary = tmp_path / "canary"
    assert expected in failure(template.replace("{canary}", str(canary)))
    assert not canary.exists()


def test_every_way_to_a_template_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training data, the prompts of an evaluation and the look for the end of a turn."""
    monkeypatch.setattr(guard, "RENDER_SECONDS", 0.3)
    tokenizer = byte_tokenizer(SPIN)
    encoder = Encoder(tokenizer, Source(path="x", format="messages"), "supervised", 512, "sources.s")
    record = to_record(Row("f.jsonl", 7, ROW), encoder.source)
    for ask in (
        lambda: encoder.encode([record]),
        lambda: encoder.generation_prompt(record),
        lambda: stop_ids(tokenizer),
    ):
        with pytest.raises(TokenizerFault, match="runs for over"):
            ask()


def test_nothing_in_the_package_renders_by_itself() -> None:
    """Only the renderer's process may touch Jinja: every other mention would be a way around the limits."""
    package = Path(guard.__file__).resolve().parents[1]
    found = {
        path.name
        for path in package.rglob("*.py")
        if any(word in path.read_text() for word in ("apply_chat_template", "render_jinja_template", "import jinja2"))
    }
    assert found <= {"template.py", "report.py", "report_evaluation.py"}  # reports: our own templates


def test_after_a_fault_the_next_template_is_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "RENDER_SECONDS", 0.3)
    failure(SPIN)
    chat = dialect(byte_tokenizer("{{ messages[0].content }}{{ strftime_now('') }}"), "s")
    assert renderer.whole(chat, ROW["messages"]) == "hi"


def test_the_process_has_no_secret_and_no_way_to_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canarycanarycanary")
    renderer._renderer.stop()
    renderer.whole(dialect(byte_tokenizer("{{ 2 }}"), "s"), ROW["messages"])
    process = renderer._renderer.process
    assert process is not None
    place = Path(f"/proc/{process.pid}")
    assert b"hf_canary" not in (place / "environ").read_bytes() + (place / "cmdline").read_bytes()
    limits = {line[:25].strip(): line[26:].split()[0] for line in (place / "limits").read_text().splitlines()}
    assert limits["Max file size"] == "0" and limits["Max data size"].isdigit()
    assert (place / "cwd").resolve() == Path("/")


def test_a_conversation_too_large_is_its_own_fault() -> None:
    chat = dialect(byte_tokenizer(), "s")
    large = Conversation("f.jsonl:1", [{"role": "user", "content": "x" * (17 << 20)}, ROW["messages"][1]])
    first, second, third = renderer.render(chat, [TALK, large, TALK], "assistant")
    assert not isinstance(first, UserError) and first == third
    assert "f.jsonl:1: a conversation of 17 MiB" in str(second)
