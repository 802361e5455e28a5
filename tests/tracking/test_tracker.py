from __future__ import annotations

from pathlib import Path

import pytest

from trainer.tracking import QuietTracker, Tracker, open_run, read_rows, read_run


def test_rows_are_in_the_journal_before_they_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_run(tmp_path, name="x")
    tracker = Tracker(tmp_path, 2, console=False)
    seen = []
    monkeypatch.setattr(tracker._console, "row", lambda row: seen.append(row == read_rows(tmp_path)[-1]))
    tracker.step({"step": 1, "loss": 1.0})
    tracker.eval({"step": 1, "suite": "s", "metrics": {"f1": 0.5}})
    tracker.event(1, "checkpoint", "step-00000001")
    tracker.sync()
    tracker.close("preempted")
    tracker.close("complete")  # the first close stands
    assert seen == [True, True, True]
    assert read_run(tmp_path)["status"] == "preempted"


@pytest.mark.parametrize("by_class", [False, True])
def test_other_ranks_write_and_show_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], by_class: bool) -> None:
    tracker = QuietTracker() if by_class else Tracker(tmp_path, 9, wandb="online", console=True, main=False)
    tracker.step({"step": 1, "loss": 1.0})
    tracker.eval({"step": 1, "suite": "s", "metrics": {}})
    tracker.event(1, "resume")
    tracker.sync()
    tracker.close("complete")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""
