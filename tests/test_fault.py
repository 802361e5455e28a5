"""Faults on purpose: the specification is read right, counts per process, and each action does what it says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from trainer.config import UserError
from trainer.fault import EXIT_CODE, FAIL_POINT, Fault, InjectedFault, fail_point, parse_faults
from trainer.launched import ATTEMPT


def test_the_specification() -> None:
    assert parse_faults("shards") == [Fault("shards")]
    assert parse_faults("shards:rank=1:nth=2:raise; step:step=7:hang") == [
        Fault("shards", "raise", 2, {"rank": "1"}),
        Fault("step", "hang", 1, {"step": "7"}),
    ]


@pytest.mark.parametrize("text", ["shards:explode", "shards:kill:raise", "shards:nth=soon"])
def test_a_malformed_one_is_told(text: str) -> None:
    with pytest.raises(UserError, match=f"{FAIL_POINT}: '{text}'"):
        parse_faults(text)


def test_conditions_and_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAIL_POINT, "there:rank=1:attempt=2:nth=2:raise")
    monkeypatch.setenv("RANK", "0")
    for _ in range(3):
        fail_point("there")
    monkeypatch.setenv("RANK", "1")
    fail_point("there")  # of attempt 1: does not count
    monkeypatch.setenv(ATTEMPT, "2")
    fail_point("elsewhere")
    fail_point("there")
    with pytest.raises(InjectedFault, match="at there"):
        fail_point("there")
    fail_point("there")  # once, not from then on


def test_a_fact_is_a_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAIL_POINT, "step:step=3:full")
    fail_point("step", step=2)
    with pytest.raises(OSError, match="No space left on device"):
        fail_point("step", step=3)


@pytest.mark.parametrize(("action", "code"), [("kill", -signal.SIGKILL), ("exit", EXIT_CODE)])
def test_deadly_actions(action: str, code: int) -> None:
    program = "from trainer.fault import fail_point\nfail_point('here')\n"
    environment = os.environ | {FAIL_POINT: f"here:{action}"}
    assert subprocess.run([sys.executable, "-c", program], env=environment, timeout=60, check=False).returncode == code
