"""Progress on the terminal, fed by finished rows only: it is told what happened and can change nothing."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from trainer.tracking.journal import Row, eval_metrics

if TYPE_CHECKING:
    from rich.progress import Progress

_STAGE_WIDTH = 16
_RECENT_STEPS = 20  # the remaining time is the mean of so many last steps, times the steps to go


class Console:
    """A bar with loss, tokens/s, remaining time, learning rate and gradient norm; evaluations and events above it.

    Where the output is no terminal, one plain line is printed for the first and last step and whenever
    ``every_seconds`` have passed or ``every_steps`` steps are done since the last. A reader that goes away (a closed
    pipe, a lost terminal) silences the console and nothing else.
    """

    def __init__(
        self,
        total_steps: int,
        enabled: bool = True,
        *,
        stream: TextIO | None = None,
        every_seconds: float = 10.0,
        every_steps: int = 50,
    ) -> None:
        self.total_steps = total_steps
        self.enabled = enabled
        self._stream = stream if stream is not None else sys.stdout
        self._every_seconds, self._every_steps = every_seconds, every_steps
        self._seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._bar: Progress | None = None
        self._printed_at, self._printed_step = float("-inf"), -1

    def row(self, row: Row) -> None:
        """Show one finished row of the journal."""
        if not self.enabled:
            return
        try:
            if row["kind"] == "step":
                self._step(row)
            else:
                self._line(describe_eval(row) if row["kind"] == "eval" else describe_event(row))
        except OSError:  # EPIPE or EIO: nobody reads; the journal has it all
            self.enabled = False

    def close(self) -> None:
        """Leave the terminal as it was found; closing twice is harmless."""
        bar, self._bar = self._bar, None
        if bar is not None and self.enabled:
            try:
                bar.stop()
            except OSError:  # as above: the terminal is gone
                self.enabled = False

    def _step(self, row: Row) -> None:
        seconds = row.get("seconds")
        if isinstance(seconds, int | float):
            self._seconds.append(float(seconds))
        step, now = int(row["step"]), time.monotonic()
        remaining = self.remaining(step)
        if self._stream.isatty():
            bar, stage = self._progress(), str(row.get("stage", "train"))[:_STAGE_WIDTH]
            # columns are parted by a space; the figures get what stage, bar and "12/300" leave of the line
            taken = len(stage) + 1 + _bar_width(bar.console.width) + 1 + 2 * len(str(self.total_steps)) + 2
            text = describe_step(row, remaining, most=bar.console.width - taken)
            bar.update(bar.task_ids[0], completed=step, text=text, stage=stage)
            return
        due = now - self._printed_at >= self._every_seconds or step - self._printed_step >= self._every_steps
        if due or step >= self.total_steps:
            self._printed_at, self._printed_step = now, step
            self._print(f"step {step}/{self.total_steps}  {describe_step(row, remaining)}")

    def remaining(self, step: int) -> float | None:
        """Seconds to go at the pace of the last steps; None before the first."""
        if not self._seconds:
            return None
        return max(0, self.total_steps - step) * sum(self._seconds) / len(self._seconds)

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            self._print(text)

    def _print(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        print(text.encode(encoding, errors="replace").decode(encoding), file=self._stream, flush=True)

    def _progress(self) -> Progress:
        if self._bar is None:
            # rich costs 0.1 s to import and only a terminal needs it
            from rich.console import Console as Terminal
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            terminal = Terminal(file=self._stream)
            self._bar = Progress(
                TextColumn("{task.fields[stage]}", markup=False),
                BarColumn(bar_width=_bar_width(terminal.width)),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                console=terminal,
                refresh_per_second=4,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._bar.add_task("train", total=self.total_steps, text="", stage="train")
            self._bar.start()
        return self._bar


def describe_step(row: Mapping[str, Any], remaining: float | None, most: int | None = None) -> str:
    """The figures that the row has, in one line of at most ``most`` characters, the last ones left out first: loss,
    tokens/s, remaining time, learning rate, gradient norm."""
    parts = [
        ("loss", number(row.get("loss"))),
        ("tok/s", number(row.get("tokens_per_second"), digits=0)),
        ("left", None if remaining is None else duration(remaining)),
        ("lr", number(row.get("lr"))),
        ("grad", number(row.get("grad_norm"))),
    ]
    shown = ["SKIPPED"] if row.get("skipped") else []
    shown += [f"{name} {value}" for name, value in parts if value is not None]
    while most is not None and len(shown) > 1 and len("  ".join(shown)) > most:
        shown.pop()
    return "  ".join(shown)


def _bar_width(terminal_width: int) -> int:
    return 24 if terminal_width >= 120 else 8


def describe_eval(row: Mapping[str, Any]) -> str:
    """One line for an evaluation row."""
    metrics = "  ".join(f"{name} {number(value)}" for name, value in eval_metrics(row).items())
    return f"[step {row.get('step')}] {row.get('suite', 'evaluation')}: {metrics or 'no metrics'}"


def describe_event(row: Mapping[str, Any]) -> str:
    """One line for an event row."""
    detail = row.get("detail")
    if isinstance(detail, Mapping):
        detail = ", ".join(f"{key} {value}" for key, value in detail.items())
    return f"[step {row.get('step')}] {row.get('name')}" + ("" if detail in (None, "") else f": {detail}")


def number(value: Any, digits: int | None = None) -> str | None:
    """Four significant digits (or ``digits`` after the point, thousands parted); None for what is no number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    if digits is not None:
        return f"{value:,.{digits}f}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """``mm:ss`` or ``h:mm:ss``."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes:02d}:{whole % 60:02d}"
