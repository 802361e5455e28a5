"""Saving in the background: what is published is the copied state, one save at a time, and no failure stays unseen."""

from __future__ import annotations

import errno
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import FlatEngine, in_threads, logical, ok, single, train

from trainer.checkpoint import CheckpointError, image, load, newest, saver, verify
from trainer.checkpoint.lease import LeaseLostError, acquire
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.store import Store
from trainer.config.errors import UserError
from trainer.config.schema import Checkpoint
from trainer.fault import FAIL_POINT
from trainer.world import World


class Gate:
    """Holds a save in flight before it is published, until it is opened; then it lets pass or raises."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        self.error: OSError | None = None

    def __call__(self) -> None:
        self.reached.set()
        assert self.open.wait(20)
        if self.error is not None:
            raise self.error


class Events(list[tuple[int, str, Any]]):
    """What the saver told."""

    def __call__(self, step: int, name: str, detail: Any) -> None:
        self.append((step, name, detail))

    def named(self, name: str) -> list[tuple[int, Any]]:
        return [(step, detail) for step, found, detail in self if found == name]


@pytest.fixture
def gate() -> Any:
    gate = Gate()
    yield gate
    gate.open.set()


def gated(folder: Path, gate: Gate, events: Events, **settings: Any) -> Saver:
    return Saver(Store(folder, settings=Checkpoint(**settings), before=gate), World(), events)


def finish(saver: Saver) -> None:
    """Let the thread end without the main thread's having looked at it."""
    flight = saver._flight
    assert flight is not None
    flight.thread.join(20)
    assert flight.done


def test_what_is_published_is_the_state_at_the_time_of_the_save(tmp_path: Path, gate: Gate) -> None:
    events, source = Events(), single()
    saver = gated(tmp_path, gate, events)
    train(source, 3)
    expected = logical([source])
    state = {"loader": {"drawn": [1, 2]}}
    saver.save(3, source, state)
    assert gate.reached.wait(20)
    state["loader"]["drawn"].append(3)
    train(source, 2, first=3)  # goes on over the copied tensors while their copy is being written
    saver.poll()
    assert events == [] and newest(tmp_path) == [] and saver.published == -1  # no success before it is durable
    gate.open.set()
    finish(saver)
    assert newest(tmp_path) and events == []  # the thread tells nothing by itself
    saver.poll()
    saver.poll()
    assert [(step, name, detail["path"]) for step, name, detail in events] == [(3, "checkpoint", "step-00000003")]
    assert saver.published == 3
    target = single(1)
    assert load(tmp_path, target, World()) == {"loader": {"drawn": [1, 2]}}
    assert logical([target]) == expected


def test_training_waits_for_the_copy_where_it_would_change_it(tmp_path: Path, monkeypatch) -> None:
    let, copying = threading.Event(), image._copy

    def held_copy(*arguments: Any) -> None:
        assert let.wait(20)
        copying(*arguments)

    monkeypatch.setattr(image, "_copy", held_copy)
    engine, events = single(), Events()
    saver = Saver(Store(tmp_path), World(), events)
    saver.copied()  # nothing is in flight
    train(engine, 2)
    expected = logical([engine])
    started = time.perf_counter()
    saver.save(2, engine, {})
    assert time.perf_counter() - started < 0.2
    threading.Timer(0.3, let.set).start()
    saver.copied()
    assert time.perf_counter() - started >= 0.3
    train(engine, 1, first=2)
    saver.wait()
    assert events.named("checkpoint")[0][1]["blocking"] >= 0.3
    target = single(1)
    load(tmp_path, target, World())
    assert logical([target]) == expected
    let.clear()
    saver.save(3, engine, {})
    train(engine, 1, first=3)  # does not wait: the copy would be of two states
    let.set()
    saver.wait()
    assert "changed while it was copied" in events.named("checkpoint_failed")[0][1]["error"]
    assert [path.name[-1] for path in newest(tmp_path)] == ["2"]


def test_both_ways_of_saving_write_the_same_bytes(tmp_path: Path) -> None:
    source = single()
    train(source, 3)
    for name, asynchronous in (("now", False), ("later", True)):
        saver = Saver(Store(tmp_path / name, settings=Checkpoint(asynchronous=asynchronous)), World(), Events())
        saver.save(3, source, {"a": 1})
        saver.wait()
    files = [
        {path.name: path.read_bytes() for path in newest(tmp_path / name)[0].iterdir()} for name in ("now", "later")
    ]
    assert files[0] == files[1] and len(files[0]) == 3


def test_a_save_due_meanwhile_is_skipped_counted_and_told(tmp_path: Path, gate: Gate, monkeypatch) -> None:
    monkeypatch.setattr(saver, "PATIENCE", 0.2)
    events, engine = Events(), single()
    writer = gated(tmp_path, gate, events, keep_every=3)
    train(engine, 1)
    writer.save(1, engine, {})
    buffer = writer._buffer
    for step, least, most in ((2, 0.2, 2.0), (4, 0.0, 0.15)):  # patience is spent once for a save in flight
        started = time.perf_counter()
        writer.save(step, engine, {})
        assert least <= time.perf_counter() - started < most
    assert events.named("checkpoint_skipped") == [
        (2, {"in_flight": 1, "skipped": 1}), (4, {"in_flight": 1, "skipped": 2})
    ]  # fmt: skip
    assert sum(thread.name.startswith("checkpoint-") for thread in threading.enumerate()) == 1
    threading.Timer(0.3, gate.open.set).start()
    writer.save(6, engine, {})  # one that must stay for ever is waited for
    writer.wait()
    assert [path.name[-1] for path in newest(tmp_path)] == ["6", "1"]
    assert writer._buffer is buffer  # one copy's memory, used again
    assert [step for step, _ in events.named("checkpoint")] == [1, 6] and writer.failures == 0


def test_a_failure_is_seen_counted_and_at_the_limit_raised(tmp_path: Path, gate: Gate) -> None:
    events, engine = Events(), single()
    saver = gated(tmp_path, gate, events, failure_limit=2)
    gate.open.set()
    saver.save(1, engine, {})
    saver.wait()
    gate.error = OSError(errno.ENOSPC, "No space left on device")
    saver.save(2, engine, {})
    finish(saver)
    assert saver.failed and saver.published == 1
    saver.raise_failure()
    assert not saver.failed
    assert [(step, detail["in_row"]) for step, detail in events.named("checkpoint_failed")] == [(2, 1)]
    assert "No space left" in events[-1][2]["error"]
    gate.error = None
    saver.save(3, engine, {})
    saver.wait()
    assert saver.failures == 0  # in a row
    gate.error = OSError(errno.EIO, "Input/output error")
    saver.save(4, engine, {})
    saver.wait()
    saver.save(5, engine, {})
    finish(saver)
    with pytest.raises(CheckpointError, match=r"step 5: checkpoints fail, 2 in a row: .*Input/output error"):
        saver.raise_failure()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001", "step-00000003"]
    for path in newest(tmp_path):
        verify(path)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize(("failing", "published"), [(0, True), (1, True), (2, False)])
def test_the_last_save_is_tried_once_more_and_must_succeed(
    tmp_path: Path, asynchronous: bool, failing: int, published: bool
) -> None:
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        if len(calls) <= failing:
            raise OSError(errno.ENOSPC, "No space left on device")

    events = Events()
    settings = Checkpoint(asynchronous=asynchronous, failure_limit=1)
    saver = Saver(Store(tmp_path, settings=settings, before=fail), World(), events)
    if published:
        saver.save_last(7, single(), {})
        assert newest(tmp_path)[0].name == "step-00000007"
    else:
        with pytest.raises(CheckpointError, match=r"step 7: checkpoints fail, the last one"):
            saver.save_last(7, single(), {})
        assert list(tmp_path.iterdir()) == []
    assert len(events.named("checkpoint_failed")) == failing
    assert len(events.named("checkpoint")) == int(published)


def test_the_last_save_takes_the_place_of_one_that_failed_in_flight(tmp_path: Path, gate: Gate) -> None:
    events, engine = Events(), single()
    saver = gated(tmp_path, gate, events, failure_limit=1)
    gate.open.set()
    gate.error = OSError(errno.EIO, "Input/output error")
    saver.save(4, engine, {})
    finish(saver)
    gate.error = None
    saver.save_last(4, engine, {})
    assert newest(tmp_path)[0].name == "step-00000004" and saver.published == 4
    saver.save_last(4, engine, {})  # durable already
    assert [name for _, name, _ in events] == ["checkpoint_failed", "checkpoint"]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_one_rank_that_cannot_save_fails_the_save_of_all(tmp_path: Path, asynchronous: bool) -> None:
    def work(world: World) -> list[Any]:
        events = Events()
        saver = Saver(Store(tmp_path, settings=Checkpoint(asynchronous=asynchronous)), world, events)
        engine = FlatEngine(world)
        engine.train(1)
        saver.save(1, engine, {})
        saver.wait()
        if world.rank == 1:
            engine.optimizer.state[engine.master]["exp_avg"][3] = float("nan")
        saver.save(2, engine, {})
        saver.wait()
        return events

    for events in ok(in_threads(2, work)):
        assert [(step, name) for step, name, _ in events] == [(1, "checkpoint"), (2, "checkpoint_failed")]
        assert "not finite" in events[1][2]["error"] and "rank 1 of 2" in events[1][2]["error"]
    assert [path.name[-1] for path in newest(tmp_path)] == ["1"]


def test_state_that_cannot_be_cut_is_the_users_error_at_once(tmp_path: Path) -> None:
    def work(world: World) -> None:
        saver = Saver(Store(tmp_path), world, Events())
        engine = FlatEngine(world)
        engine.train(1)
        engine.optimizer.state[engine.master]["state1"] = torch.zeros(engine.master.numel(), dtype=torch.uint8)
        saver.save(1, engine, {})
        saver.wait()

    for result in in_threads(2, work):
        assert isinstance(result, UserError) and "optimizer.name" in str(result)
    assert list(tmp_path.iterdir()) == []


def test_memory_got_beside_the_training_is_the_memory_of_the_copy(tmp_path: Path) -> None:
    engine, saver = single(), Saver(Store(tmp_path), World(), Events())
    train(engine, 3)
    saver.reserve(engine)
    buffer = saver._buffer
    saver.save(3, engine, {})
    saver.wait()
    assert saver._buffer is buffer and buffer is not None
    assert verify(newest(tmp_path)[0]).step == 3
    train(engine, 1, first=3)
    saver.save(4, engine, {})
    saver.close()
    assert verify(newest(tmp_path)[0]).step == 4
    target = single(1)
    load(tmp_path, target, World())
    assert logical([target]) == logical([engine])


def test_a_lost_lease_publishes_nothing_and_stops(tmp_path: Path) -> None:
    lease = acquire(tmp_path)
    folder = tmp_path / "checkpoints"
    saver = Saver(Store(folder, lease), World(), Events())
    saver.save(1, single(), {})
    saver.wait()
    assert verify(newest(folder)[0]).generation == lease.generation == 1
    (tmp_path / ".lease" / "00000002").write_text("another's")  # as a taker makes it
    saver.save(2, single(), {})
    finish(saver)
    assert saver.failed
    with pytest.raises(LeaseLostError, match="another run has taken the folder over"):
        saver.raise_failure()
    with pytest.raises(LeaseLostError):
        saver.save_last(2, single(), {})
    assert [path.name[-1] for path in newest(folder)] == ["1"]
    lease.release()


def test_a_fenced_writer_finds_its_folder_gone(tmp_path: Path, gate: Gate) -> None:
    """Even one that was stopped between its last look at the lease and the rename."""
    folder = tmp_path / "checkpoints"
    late = acquire(tmp_path)

    class Sleeper(type(late)):  # type: ignore[misc]
        def verify(self) -> None:
            if (folder / "latest").exists() and list(folder.glob(".staging-*/manifest.sha256")):
                gate()

    first = Saver(Store(folder, late), World(), Events())
    first.save(1, single(), {})
    first.wait()
    late.__class__ = Sleeper
    first.save(2, single(), {})
    assert gate.reached.wait(20)
    late._beat("released".ljust(20))  # so that the next one need not wait out a silent heartbeat
    second = Saver(Store(folder, acquire(tmp_path)), World(), Events())  # nothing staged survives its coming
    gate.open.set()
    finish(first)
    assert first.failed and [path.name[-1] for path in newest(folder)] == ["1"]
    second.save(2, single(), {})
    second.wait()
    assert verify(newest(folder)[0]).generation == 2
    second.store.lease.release()


def test_faults_of_the_environment_reach_the_thread(tmp_path: Path, monkeypatch) -> None:
    events, engine = Events(), single()
    saver = Saver(Store(tmp_path), World(), events)
    for step, (fault, word) in enumerate({"shard": "full", "staged": "broken"}.items(), start=1):
        monkeypatch.setenv(FAIL_POINT, f"{fault}:step={step}:{word}" if fault == "staged" else f"{fault}:{word}")
        saver.save(step, engine, {})
        saver.wait()
    assert [detail["in_row"] for _, detail in events.named("checkpoint_failed")] == [1, 2]
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_many_chunks_is_the_same_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(image, "CHUNK", image.PAGE)
    engine = FlatEngine(World(), shapes={"body.weight": (70, 90), "head": (3,)})
    engine.train(1)
    for name, asynchronous in (("now", False), ("later", True)):
        saver = Saver(Store(tmp_path / name, settings=Checkpoint(asynchronous=asynchronous)), World(), Events())
        saver.save(1, engine, {})
        saver.wait()
        assert json.loads((newest(tmp_path / name)[0] / "manifest.json").read_text())["shadows"] == []
        target = FlatEngine(World(), seed=5, shapes=engine.shapes)
        load(tmp_path / name, target, World())
        assert logical([target]) == logical([engine])
