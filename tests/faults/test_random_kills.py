"""kill -9 at random moments of training that saves at every step: no fail-point knows when.

A process with everything imported forks a child for each trial; the child takes the lease, goes on from the newest good
checkpoint and saves at each step, in the background or not; the parent kills it after a random time. Then every
published folder must be good, the newest at least the last that the child was told of, and what is in it must be
what an undisturbed run holds at that step.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoint_cases import logical, single, train
from fault_cases import STRAY

from trainer.checkpoint import load
from trainer.checkpoint.lease import acquire
from trainer.checkpoint.manifest import newest, step_of, verify
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.store import Store
from trainer.config.schema import Checkpoint
from trainer.world import World

STEPS = 40


def child(folder: Path, told: int, asynchronous: bool) -> None:
    """Train from the newest good checkpoint to the end, saving each step; each published step goes to `told`."""
    lease = acquire(folder.parent)
    settings = Checkpoint(keep=2, asynchronous=asynchronous)

    def tell(step: int, name: str, detail: Any) -> None:
        if name == "checkpoint":
            os.write(told, f"{step}\n".encode())

    engine, world = single(), World()
    saver = Saver(Store(folder, lease, settings), world, tell)
    step = load(folder, engine, world).step if newest(folder) else 0
    while step < STEPS:
        saver.copied()  # as the step does, before anything changes
        train(engine, 1, step)
        step += 1
        saver.poll()
        saver.save(step, engine, {"position": step})
    saver.wait()
    saver.close()
    lease.release()


def trial(folder: Path, draw: random.Random, longest: float) -> tuple[bool, list[int]]:
    """One child and its kill; (whether it ended first, the steps it was told are published)."""
    reading, writing = os.pipe()
    asynchronous = draw.random() < 0.6
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child(folder, writing, asynchronous)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    time.sleep(draw.random() * longest)
    os.kill(pid, signal.SIGKILL)
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with os.fdopen(reading) as file:
        told = [int(line) for line in file]
    assert ended in (0, -signal.SIGKILL), "the child failed by itself"
    return ended == 0, told


def run_trials(root: Path, count: int, seed: int) -> dict[str, int]:
    """`count` kills; returns how often what happened. Asserts after each that nothing is corrupt, mixed or lost."""
    draw = random.Random(seed)
    engine = single()
    expected = {0: logical([engine])}
    for step in range(STEPS):
        train(engine, 1, step)
        expected[step + 1] = logical([engine])
    started = time.monotonic()
    chains, kills, between, highest = 0, 0, 0, 0
    folder = root / "chain-0" / "checkpoints"
    folder.parent.mkdir()
    while kills < count:
        finished, told = trial(folder, draw, 0.25)
        kills += not finished
        highest = max([highest, *told])
        found = newest(folder)
        for path in found:
            verify(path)  # a published folder is a good one, whenever its writer died
        step = step_of(found[0]) if found else 0
        assert step is not None and step >= highest, f"published step {highest} is lost: newest is {step}"
        back = single(seed=5)
        if found:
            assert load(folder, back, World()).step == step
            assert logical([back]) == expected[step], f"step {step} is not what it was"
        between += not finished and any(STRAY.search(path.name) for path in folder.glob(".*"))
        if finished or step == STEPS:
            chains, highest = chains + 1, 0
            folder = root / f"chain-{chains}" / "checkpoints"
            folder.parent.mkdir()
    return {"kills": kills, "chains": chains, "inside a save": between, "seconds": round(time.monotonic() - started)}


def test_forty_kills_lose_nothing(tmp_path: Path) -> None:
    found = run_trials(tmp_path, 40, seed=1)
    assert found["inside a save"] > 0  # the kills do meet saves
    print(found)


@pytest.mark.faults
@pytest.mark.timeout(1500)
def test_a_thousand_kills_lose_nothing(tmp_path: Path) -> None:
    found = run_trials(tmp_path, 1000, seed=2)
    assert found["inside a save"] > 100
    print(found)
