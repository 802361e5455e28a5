"""The record of a run: the journal first; console and W&B are fed from what is in it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.config.errors import RunError
from trainer.tracking import wandb_feed
from trainer.tracking.console import Console
from trainer.tracking.journal import Journal, QuietJournal, Row, eval_metrics, read_rows
from trainer.tracking.ledger import Ledger
from trainer.tracking.redact import known_secrets, redact
from trainer.tracking.run_record import describe_environment, new_run_id, open_run, read_run, update_run, write_run

__all__ = [
    "Console",
    "Journal",
    "QuietTracker",
    "Tracker",
    "describe_environment",
    "eval_metrics",
    "known_secrets",
    "new_run_id",
    "open_run",
    "read_rows",
    "read_run",
    "redact",
    "update_run",
    "write_run",
]

log = logging.getLogger(__name__)


class Tracker:
    """What the training loop tells its finished rows to. It can slow or change nothing of the run.

    Each row is in ``metrics.jsonl`` before anybody sees it; the console shows the row as the journal holds it, and
    the W&B process reads the journal itself. With ``main`` false (every rank but the first) it writes and shows
    nothing. ``run.json`` must exist before (``open_run``) where W&B is on: the run's id is W&B's id.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        *,
        wandb: str = "off",
        project: str = "tunesmith",
        config: Mapping[str, Any] | None = None,
        console: bool = True,
        main: bool = True,
        ledger: bool = False,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.main = Path(folder), main
        self._closed, self._guard = False, guard
        self._last_step = 0
        self._journal: Journal | QuietJournal = Journal(self.folder, guard) if main else QuietJournal()
        self._ledger = Ledger(self.folder, guard) if main and ledger else None
        self._console = Console(total_steps, enabled=console and main)
        self._feed: wandb_feed.Feed | None = None
        if main and wandb != "off":
            record = read_run(self.folder)
            name = str(record.get("name") or self.folder.name)
            self._feed = wandb_feed.start(self.folder, wandb, project, name, str(record["id"]), config)

    def step(self, row: Mapping[str, Any]) -> None:
        """Record one optimizer step: DESIGN's ``step`` row, with ``step`` and what was measured."""
        self._last_step = int(row["step"])
        self._show(self._journal.step(row))
        if self._feed is not None:
            self._tell(self._feed.news())

    def eval(self, row: Mapping[str, Any]) -> None:
        """Record one suite's evaluation: ``{step, suite, metrics}``."""
        self._show(self._journal.eval(row))

    def event(self, step: int, name: str, detail: Any = None) -> None:
        """Record what happened at a step: resume, checkpoint, skip, early stop ..."""
        self._show(self._journal.event(step, name, detail))

    def ledger(self, row: Mapping[str, Any]) -> None:
        """Record the examples of a step, where the ledger is on: ``{step, stage, ids}``."""
        if self._ledger is not None:
            self._ledger.write(row)

    def sync(self) -> None:
        """Return once all rows are on the disk; called with each checkpoint."""
        self._journal.sync()
        if self._ledger is not None:
            self._ledger.sync()

    def close(self, status: str, feed_seconds: float = 30.0) -> None:
        """End the record with ``status`` (complete, failed, preempted) in ``run.json``; waits for W&B at most
        ``feed_seconds``. Closing twice is harmless."""
        if self._closed:
            return
        self._closed = True
        if self.main and self._ours():
            self.sync()
            update_run(self.folder, status=status)  # before the wait: a kill during the upload leaves the truth
        if self._feed is not None:
            self._tell(self._feed.finish(feed_seconds))
        self._console.close()
        self._journal.close()
        if self._ledger is not None:
            self._ledger.close()

    def _ours(self) -> bool:
        """Whether the folder is still this run's to write; said in the log where it is not."""
        try:
            self._guard()
        except RunError as error:
            log.error("how the run ended is not recorded: %s", error)
            return False
        return True

    def _show(self, row: Row) -> None:
        self._console.row(row)

    def _tell(self, news: list[str]) -> None:
        for sentence in news:
            self.event(self._last_step, "wandb", sentence)


class QuietTracker(Tracker):
    """A tracker that keeps and shows nothing: for every rank but the first, and for tests."""

    def __init__(self) -> None:
        super().__init__(Path(), 0, console=False, main=False)
