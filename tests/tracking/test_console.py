from __future__ import annotations

import io
import math

import pytest

from trainer.tracking.console import Console, describe_event, describe_step, duration, number

STEP = {
    "kind": "step",
    "step": 1,
    "loss": 2.34567,
    "tokens_per_second": 1234.5,
    "lr": 2e-4,
    "grad_norm": 1.5,
    "seconds": 2.0,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_every_so_many_steps_and_the_last() -> None:
    out = io.StringIO()
    console = Console(25, stream=out, every_seconds=1e9, every_steps=10)
    for step in range(1, 26):
        console.row({**STEP, "step": step})
    console.row({"kind": "eval", "step": 25, "suite": "held-out", "metrics": {"exact_match": 0.875}})
    console.row({"kind": "event", "step": 25, "name": "checkpoint", "detail": {"folder": "x"}})
    console.close()
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines[:4]] == ["1/25", "11/25", "21/25", "25/25"]
    assert lines[0] == "step 1/25  loss 2.346  tok/s 1,234  left 00:48  lr 0.0002  grad 1.5"
    assert lines[4:] == ["[step 25] held-out: exact_match 0.875", "[step 25] checkpoint: folder x"]


def test_remaining_time_after_a_resume_uses_this_process_pace() -> None:
    console = Console(100, stream=io.StringIO())
    console.row({**STEP, "step": 90, "seconds": 3.0})
    assert console.remaining(90) == pytest.approx(30.0)


def test_a_terminal_gets_a_bar_with_lines_above_it() -> None:
    out = Terminal()
    console = Console(10, stream=out)
    console.row({**STEP, "step": 3, "stage": "[bold]triage"})
    console.row({"kind": "event", "step": 3, "name": "resume", "detail": "[red]not markup"})
    console.close()
    console.close()
    text = out.getvalue()
    assert "[step 3] resume: [red]not markup" in text and "[bold]triage" in text
    assert "3/10" in text and "loss 2.346" in text and "…" not in text
    assert describe_step(STEP, 9.0, most=40) == "loss 2.346  tok/s 1,234  left 00:09"


def test_a_reader_that_goes_away_silences_the_console_alone() -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    console = Console(10, stream=Broken())
    console.row(STEP)
    console.row(STEP)
    console.close()
    assert console.enabled is False


def test_an_ascii_stream_gets_every_line() -> None:
    raw = io.BytesIO()
    console = Console(10, stream=io.TextIOWrapper(raw, encoding="ascii"))
    console.row({"kind": "event", "step": 1, "name": "warning", "detail": "naïve"})
    assert raw.getvalue() == b"[step 1] warning: na?ve\n"


def test_disabled_prints_nothing() -> None:
    out = io.StringIO()
    Console(10, enabled=False, stream=out).row(STEP)
    assert out.getvalue() == ""


def test_numbers_and_durations() -> None:
    assert [number(value) for value in (0.000123456, 12345.6, math.nan, None, True)] == [
        "0.0001235", "12,346", "nan", None, None,
    ]  # fmt: skip
    assert [duration(seconds) for seconds in (0, 59.6, 3600, 3725)] == ["00:00", "01:00", "1:00:00", "1:02:05"]
    assert describe_step({"loss": 1.0, "skipped": True}, None) == "SKIPPED  loss 1"
    assert describe_event({"step": 4, "name": "resume"}) == "[step 4] resume"
