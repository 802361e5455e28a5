"""The ledger stays whole: a row that a kill or a full disk cut is never joined to the next."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from trainer.tracking.ledger import Ledger, read_ledger


def test_a_row_cut_by_a_kill_goes_on_opening(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write({"step": 1, "ids": ["a"]})
    ledger.write({"step": 2, "ids": ["b"]})
    ledger.close()
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    assert set(read_ledger(tmp_path)) == {1}
    again = Ledger(tmp_path)
    again.write({"step": 2, "ids": ["c"]})
    again.write({"step": 1, "ids": ["d"]})
    again.close()
    assert {step: row["ids"] for step, row in read_ledger(tmp_path).items()} == {1: ["d"], 2: ["c"]}


def test_a_row_that_does_not_fit_is_taken_back(tmp_path: Path) -> None:
    """A real limit of the kernel's, in a child: the write ends in the middle of the row."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60, resource.RLIM_INFINITY))
            ledger = Ledger(tmp_path)
            ledger.write({"step": 1, "ids": ["a"]})
            with pytest.raises(OSError, match="too large"):
                ledger.write({"step": 2, "ids": ["b" * 100]})
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            ledger.write({"step": 2, "ids": ["c"]})
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert {step: row["ids"] for step, row in read_ledger(tmp_path).items()} == {1: ["a"], 2: ["c"]}
