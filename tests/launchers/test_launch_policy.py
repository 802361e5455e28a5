"""What follows from how ranks ended, as pure functions: restarts, outcomes, the rank that hangs."""

from __future__ import annotations

import signal
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launchers.hang import LEARNED, PATIENCE, View, attribute, hanging, main_thread
from launchers.local import Launch, new_attempt, rank_environment
from launchers.machine import devices
from launchers.outcome import Ending, judge
from launchers.policy import NO_PROGRESS, SAME_PLACE, Failure, GiveUp, Restart, decide, without_progress
from launchers.watch import UNTOLD


def at(step: int | None, reached: int, saved: int = -1, section: str = "step") -> Failure:
    return Failure(1, "rank 1 died", section, step, (f"a:{step}", "b:2"), reached, saved)


def decisions(*failures: Failure, restarts: int = 10) -> list[str]:
    """`restart` or `give up` after each failure."""
    found = [decide(failures[: n + 1], restarts) for n in range(len(failures))]
    return ["restart" if isinstance(entry, Restart) else "give up" for entry in found]


def test_a_run_that_gets_on_is_restarted_until_the_limit() -> None:
    failures = [at(step, step - 1, step - 2) for step in (7, 9, 20, 21)]
    assert decisions(*failures) == ["restart"] * 4
    assert decisions(*failures, restarts=3) == ["restart"] * 3 + ["give up"]
    assert decide(failures, 10) == Restart(0.0)  # at once


def test_the_same_step_twice_is_a_poison_batch() -> None:
    last = decide([at(7, 6, 4), at(7, 6, 4)], 10)
    assert isinstance(last, GiveUp)
    assert last.reason == (
        "failed 2 times at step 7 without getting beyond it; its examples: a:7, b:2; mend them, or pass over the step "
        "with guard.skip_steps=[7]"
    )


def test_the_same_step_again_after_progress_is_another_fault() -> None:
    # 7, then 12 (beyond it), then 7 again after a rollback of checkpoints: nothing was gained since 12
    assert decisions(at(7, 6), at(12, 11), at(7, 6), at(12, 11)) == ["restart", "restart", "restart", "give up"]


def test_starts_that_fail_twice_and_faults_without_progress() -> None:
    assert decisions(at(None, 0, section="load"), at(None, 0, section="load")) == ["restart", "give up"]
    assert decisions(at(30, 29), at(20, 19), at(25, 24)) == ["restart", "restart", "give up"]
    delays = [decide([at(30, 29), at(20, 19)], 10), decide([at(30, 29)], 10)]
    assert delays == [Restart(2.0), Restart(0.0)]


def test_a_newer_checkpoint_is_progress_though_the_step_is_not() -> None:
    assert decisions(at(30, 29, 0), at(20, 19, 10), at(20, 19, 15)) == ["restart"] * 3


failures = st.builds(
    at,
    st.one_of(st.none(), st.integers(1, 30)),
    st.integers(0, 30),
    st.integers(-1, 30),
    st.sampled_from(["step", "evaluation", "checkpoint"]),
)


@given(st.lists(failures, min_size=1, max_size=30), st.integers(0, 12))
def test_no_run_is_restarted_for_ever(history: list[Failure], limit: int) -> None:
    found = decide(history, limit)
    if len(history) > limit:
        assert isinstance(found, GiveUp)
    if isinstance(found, Restart):
        stalled = without_progress(history)
        assert len(stalled) < NO_PROGRESS
        assert sum(entry.place == history[-1].place for entry in stalled) < SAME_PLACE
        assert 0 <= found.delay <= 60
    # a failure beyond everything before it is always met by a restart
    beyond = replace(history[-1], reached=31)
    if len(history) < limit:
        assert decide([*history, beyond], limit) == Restart(0.0)


def ending(rank: int, code: int, time: float = 1.0, told: str = "", **place: Any) -> Ending:
    ended = {"message": told, "time": time} if told else None
    return Ending(rank, code, time, {**UNTOLD, "section": "step", "step": 7, **place, "ended": ended})


KILLED = ending(1, -signal.SIGKILL, 2.0)
LOST = ending(0, 1, 1.9, "RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:5")
ABORTED = ending(0, -signal.SIGABRT, 2.5)


@pytest.mark.parametrize(
    ("endings", "settings", "kind", "rank", "words"),
    [
        ([ending(0, 0), ending(1, 0)], {"completed": True}, "complete", None, ""),
        ([ABORTED, ending(1, 0)], {"completed": True}, "complete", None, ""),
        ([ending(0, 0), ending(1, 0)], {"already": True}, "complete", None, ""),
        ([ending(0, 0), ending(1, 0)], {}, "failed", 0, "does not say `complete`"),
        ([ABORTED, ending(1, 0)], {"already": True}, "failed", 0, "rank 0 was ended by SIGABRT at step 7"),
        ([ending(0, 75), ending(1, 75)], {}, "preempted", None, ""),
        ([ending(0, 75), ending(1, -signal.SIGTERM)], {}, "preempted", None, ""),
        ([LOST, KILLED], {}, "failed", 1, "rank 1 was ended by SIGKILL at step 7"),  # the loss was told first
        ([ABORTED, ending(1, 1, 2.0, "ValueError: bad")], {}, "failed", 1, "rank 1 at step 7: ValueError: bad"),
        ([LOST, ending(1, 13, 2.0)], {}, "failed", 1, "rank 1 left with exit code 13 at step 7"),
        ([LOST, KILLED], {"out_of_memory": {1}}, "failed", 1, "out of memory: the kernel killed rank 1 at step 7"),
        ([LOST, ending(1, 2, 1.0, "sources.a: bad row")], {}, "refused", 1, "sources.a: bad row"),
        ([ending(0, 2, 1.0, "output: in use", section="start")], {"completed": True}, "refused", 0, "output: in use"),
        ([ending(0, 2, 1.0, "report: bad", section="finish")], {"completed": True}, "complete", None, ""),
        ([LOST, KILLED], {"stop": "SIGTERM"}, "preempted", 1, "SIGTERM; rank 1 was ended by SIGKILL"),
        ([ending(0, -15), ending(1, 130)], {"stop": "SIGINT"}, "preempted", 1, "SIGINT"),
        ([ending(0, 1, told="OSError: disk full"), ending(1, 75)], {"stop": "SIGTERM"}, "failed", 0, "disk full"),
        ([replace(KILLED, rank=0, killed=True), KILLED], {}, "failed", 1, "SIGKILL"),
    ],
)  # fmt: skip
def test_outcomes(endings: list[Ending], settings: dict[str, Any], kind: str, rank: int | None, words: str) -> None:
    found = judge(endings, **({"completed": False} | settings))
    assert (found.kind, found.rank) == (kind, rank)
    assert words in found.reason


def view(rank: int, idle: float, waits: str | None = None, state: str = "S", **facts: Any) -> View:
    frames = facts.pop("frames", ())
    place = {**UNTOLD, "section": "step", "step": 9, "done": 8, "waits": waits, "collective": "all_reduce", **facts}
    return View(rank, place, idle, state, frames)


def test_patience_is_learned_and_differs_by_section() -> None:
    assert view(0, 0).patience(60) == 60
    assert view(0, 0, longest={"step": 30.0}).patience(60) == LEARNED * 30
    assert view(0, 0, section="checkpoint").patience(60) == PATIENCE["checkpoint"]
    assert view(0, 0, done=None).patience(60) == PATIENCE["first step"]
    assert view(0, 0, section="evaluation").patience(3600) == 3600


def test_who_waits_for_one_at_work_is_no_suspect() -> None:
    waiting = view(0, 300, "all_reduce")
    assert hanging([waiting, view(1, 200, section="checkpoint")], 60) == []
    assert hanging([waiting, view(1, 10)], 60) == []
    assert [v.rank for v in hanging([waiting, view(1, 300)], 60)] == [1]
    assert [v.rank for v in hanging([waiting, view(1, 300, "gather")], 60)] == [0, 1]
    assert hanging([view(0, 59), view(1, 59)], 60) == []


@pytest.mark.parametrize(
    ("views", "ranks", "why"),
    [
        ([view(0, 61, "all_reduce"), view(1, 61)], [1], "it waits for no other rank"),
        ([view(0, 61), view(1, 59.9, state="T")], [1], "its process is stopped"),
        ([view(0, 61, state="T"), view(1, 61, state="T")], [0, 1], "its process is stopped"),
        ([view(0, 61), view(1, 61, state="D")], [1], "blocked in the kernel"),
        (
            [view(0, 61, frames=("/x/torch/distributed/fsdp/a.py:3 wait",)), view(1, 60, frames=("b.py:1 f",))],
            [1],
            "its stack is outside of any collective",
        ),
        (
            [view(0, 61, "all_reduce", collectives=9, frames=("torch/distributed/c.py:1 f",)),
             view(1, 61, "gather", collectives=8, frames=("torch/distributed/c.py:2 g",))],
            [1],
            "fewest collectives",
        ),
        ([view(0, 61), view(1, 61)], [0, 1], "no rank stands out"),
        ([view(0, 61)], [0], "the only rank"),
    ],
)  # fmt: skip
def test_attribution(views: list[View], ranks: list[int], why: str) -> None:
    found = attribute(views, 60)
    assert found.ranks == ranks
    assert why in found.reason
    assert "step 9" in found.reason
    assert len(found.details) == len(views)


def test_the_main_thread_of_a_dump() -> None:
    dump = (
        'Thread 0x1 [checkpoint] (most recent call first):\n  File "/a/queue.py", line 3 in get\n\n'
        'Current thread 0x2 [python] (most recent call first):\n  File "/a/b.py", line 12 in inner\n'
        '  File "/a/<c>.py", line ??? in outer\n'
    )
    assert main_thread(dump) == ("/a/b.py:12 inner", "/a/<c>.py:??? outer")
    assert main_thread("") == ()


def test_the_ranks_environment(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "TUNESMITH_ALLOCATOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of a torchrun around it")
    launch = Launch(tmp_path, ("train",), nproc=64)
    found = rank_environment(launch, 3, 2, tmp_path, tmp_path, "why")
    assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"], found["TUNESMITH_ATTEMPT"]) == (
        "3",
        "3",
        "64",
        "2",
    )
    assert found["OMP_NUM_THREADS"] == "1"
    assert found["TUNESMITH_ALLOCATOR"] == "set"  # no rank starts itself anew
    assert found["TUNESMITH_RESTART"] == "why"
    assert "TORCHELASTIC_RUN_ID" not in found
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert rank_environment(launch, 3, 2, tmp_path, tmp_path, "")["OMP_NUM_THREADS"] == "5"


def test_attempts_are_counted_over_the_life_of_a_run(tmp_path: Any) -> None:
    assert [new_attempt(tmp_path)[0] for _ in range(3)] == [1, 2, 3]
    (tmp_path / "logs" / "attempt-100").mkdir()
    (tmp_path / "logs" / "attempt-notes").mkdir()
    assert new_attempt(tmp_path) == (101, tmp_path / "logs" / "attempt-101")


@pytest.mark.parametrize(("visible", "count"), [("0,1", 2), ("", 0), ("-1", 0), ("GPU-a", 1)])
def test_visible_devices(visible: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices() == count
