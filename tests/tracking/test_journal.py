from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.errors import RunError
from trainer.tracking.journal import FILE_NAME, Journal, decode_row, encode_row, eval_metrics, read_rows, supersede


def strict(text: str) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_rows_come_back_in_order_with_kind_and_time(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "new" / "run")
    journal.step({"step": 1, "loss": 2.5, "losses": {"triage": 2.5}})
    journal.eval({"step": 1, "suite": "held-out", "metrics": {"exact_match": 0.5}})
    journal.event(1, "checkpoint", "step-00000001")
    journal.sync()
    journal.close()
    journal.close()
    rows = read_rows(tmp_path / "new" / "run")
    assert [row["kind"] for row in rows] == ["step", "eval", "event"]
    assert all(row["time"] > 1.6e9 for row in rows)
    assert rows[0]["losses"] == {"triage": 2.5}


def test_non_finite_numbers_are_strict_json_and_come_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    shown = journal.step({"step": 1, "stage": "nan", "loss": math.nan, "losses": {"a": -math.inf}, "list": [math.inf]})
    journal.event(1, "skip", "nan")
    journal.close()
    written = strict((tmp_path / FILE_NAME).read_text().splitlines()[0])
    assert (written["loss"], written["losses"]["a"], written["list"]) == ("nan", "-inf", ["inf"])
    row, event = read_rows(tmp_path)
    assert math.isnan(row["loss"]) and row["losses"]["a"] == -math.inf and row["list"] == [math.inf]
    assert math.isnan(shown["loss"])  # what the console is given is what a reader would get
    assert row["stage"] == "nan" and event["detail"] == "nan"


def test_numpy_and_path_values_are_plain(tmp_path: Path) -> None:
    row = decode_row(
        encode_row({"kind": "step", "step": np.int64(3), "loss": np.float32("nan"), "a": np.ones(2), "p": tmp_path})
    )
    assert row["step"] == 3 and math.isnan(row["loss"]) and row["a"] == [1.0, 1.0] and row["p"] == str(tmp_path)
    with pytest.raises(TypeError, match="object"):
        encode_row({"kind": "step", "bad": object()})


@pytest.mark.parametrize("cut", [b'{"kind": "step", "st', b"\0\0\0\0", b'not json\n{"kind": "ste', b"\xff\xfe\n"])
def test_cut_end_is_repaired_and_recorded(tmp_path: Path, cut: bytes) -> None:
    journal = Journal(tmp_path)
    for step in (1, 2):
        journal.step({"step": step, "loss": 1.0})
    journal.close()
    whole = (tmp_path / FILE_NAME).read_bytes()
    (tmp_path / FILE_NAME).write_bytes(whole + cut)
    if b"\n" not in cut:
        assert [row["step"] for row in read_rows(tmp_path)] == [1, 2]  # a live file's last line may be half written
    journal = Journal(tmp_path)
    journal.step({"step": 3, "loss": 1.0})
    journal.close()
    content = (tmp_path / FILE_NAME).read_bytes()
    assert content.startswith(whole + b'{"kind": "event"')
    rows = read_rows(tmp_path)
    assert [(row["kind"], row["step"]) for row in rows] == [("step", 1), ("step", 2), ("event", 2), ("step", 3)]
    assert rows[2]["name"] == "journal-repaired" and str(len(cut)) in rows[2]["detail"]


def test_a_file_that_is_nothing_but_a_cut_line(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b'{"kind": "st')
    Journal(tmp_path).close()
    assert [row["name"] for row in read_rows(tmp_path)] == ["journal-repaired"]


def test_a_bad_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text('{"kind": "step", "step": 1}\n[1]\n{"kind": "step", "step": 2}\n')
    with pytest.raises(RunError, match=rf"{FILE_NAME}:2: not a row"):
        read_rows(tmp_path)
    assert read_rows(tmp_path / "absent") == []


@given(
    st.lists(st.tuples(st.sampled_from(["step", "eval", "event"]), st.integers(0, 6), st.sampled_from(["a", "b"]))),
)
def test_supersede_keeps_the_last_of_each_and_every_event(entries: list[tuple[str, int, str]]) -> None:
    rows = [
        {"kind": kind, "step": step, "written": place, **({"suite": suite} if kind == "eval" else {})}
        for place, (kind, step, suite) in enumerate(entries)
    ]
    kept = supersede(rows)

    def key(row: dict) -> tuple:
        return row["kind"], row["step"], row.get("suite")

    expected = [row for row in rows if row["kind"] == "event"]
    expected += list({key(row): row for row in rows if row["kind"] != "event"}.values())
    assert sorted(row["written"] for row in kept) == sorted(row["written"] for row in expected)
    assert kept == sorted(kept, key=lambda row: (row["step"], row["written"]))
    assert supersede(kept) == kept


@given(st.data())
def test_a_killed_and_resumed_run_reads_as_one_that_was_not(data: st.DataObject) -> None:
    total, rows, step = 8, [], 1
    for run in range(data.draw(st.integers(1, 4))):
        last = data.draw(st.integers(step, total))
        rows += [{"kind": "step", "step": done, "loss": done / 10, "run": run} for done in range(step, last + 1)]
        step = data.draw(st.integers(1, last))  # the checkpoint it resumes after lies somewhere before
    rows += [{"kind": "step", "step": done, "loss": done / 10, "run": "last"} for done in range(step, total + 1)]
    kept = supersede(rows)
    assert [(row["step"], row["loss"]) for row in kept] == [(done, done / 10) for done in range(1, total + 1)]
    assert all(row["run"] == "last" for row in kept if row["step"] >= step)


def test_metrics_of_an_eval_row_in_both_forms() -> None:
    nested = {"kind": "eval", "step": 1, "suite": "s", "metrics": {"loss": 2, "note": "x", "flag": True}}
    assert eval_metrics(nested) == {"loss": 2.0}
    flat = {"kind": "eval", "step": 1, "suite": "s", "time": 9.0, "n": 40, "seconds": 3.0, "loss": 2.0}
    assert eval_metrics(flat) == {"loss": 2.0}


def test_a_full_disk_leaves_whole_rows(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import resource, signal, sys
        from pathlib import Path
        from trainer.tracking.journal import Journal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        journal = Journal(Path(sys.argv[1]))
        try:
            for step in range(1000):
                journal.step({"step": step, "padding": "x" * 100})
        except OSError as error:
            print(error.errno)
        """
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 27  # EFBIG
    content = (tmp_path / FILE_NAME).read_bytes()
    assert content.endswith(b"\n") and 800 < len(content) <= 1000
    assert [row["step"] for row in read_rows(tmp_path)] == list(range(content.count(b"\n")))


def test_secrets_in_event_details_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "WANDB_API_KEY", "canary-0123456789")
    journal = Journal(tmp_path)
    journal.event(1, "failed", {"message": "401 for canary-0123456789", "password": "canary-b"})
    journal.close()
    assert "canary" not in (tmp_path / FILE_NAME).read_text()
