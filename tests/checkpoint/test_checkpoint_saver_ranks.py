"""Saving in the background on real processes: beside FSDP2's collectives, and where a rank dies or fails meanwhile."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import FlatEngine
from test_checkpoint_ranks import SETTINGS, contents, train, trainee
from tiny import _rank, free_ports, run_ranks

from trainer.checkpoint import load, newest, save, verify
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.store import Store
from trainer.config.schema import Checkpoint, Engine
from trainer.fault import FAIL_POINT
from trainer.world import World, connected, environment_world


def beside_training(rank: int, root: str) -> None:
    """Six steps, a save in flight at most of them; then the same steps with saves that training waits for."""
    from trainer.engine.fsdp2 import FSDP2Engine

    def engine(world: World) -> Any:
        return FSDP2Engine(trainee("full", 1), SETTINGS, 1e-2, Engine(kind="fsdp2"), torch.float32, world)

    with connected(environment_world()) as world:
        found: dict[str, Any] = {}
        for name, asynchronous in (("later", True), ("now", False)):
            events: list[Any] = []
            store = Store(Path(root, name), settings=Checkpoint(keep=9, asynchronous=asynchronous))
            saver = Saver(store, world, lambda *event, events=events: events.append(event))
            running, losses = engine(world), []
            for step in range(6):
                saver.copied()
                losses += train(running, world, step, 1)
                saver.reserve(running)
                saver.save(step + 1, running, {"step": step + 1})
                saver.poll()
            saver.save_last(6, running, {"step": 6})
            saver.close()
            found[name] = losses
            assert [(step, event) for step, event, _ in events] == [(n, "checkpoint") for n in range(1, 7)]
        again = engine(world)
        assert load(Path(root, "later"), again, world) == {"step": 6}
        save(Path(root, "again"), 6, again, world, {})
        if world.is_main:
            Path(root, "losses.json").write_text(json.dumps(found))


def test_beside_training_every_save_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    run_ranks(2, beside_training, str(tmp_path))
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert losses["later"] == losses["now"]
    for step in range(1, 7):
        name = f"step-{step:08d}"
        assert contents(tmp_path / "later" / name) == contents(tmp_path / "now" / name)
    assert contents(tmp_path / "again" / "step-00000006") == contents(tmp_path / "now" / "step-00000006")


def saving(rank: int, root: str, mode: str) -> None:
    """A good save at step 1; at step 2 rank 1 dies, or raises, while the save is in flight."""
    with connected(environment_world()) as world:
        events: list[Any] = []
        saver = Saver(Store(Path(root, "run")), world, lambda *event: events.append(event))
        engine = FlatEngine(world)
        saver.save(1, engine, {})
        saver.wait()
        if mode == "dies":
            os.environ[FAIL_POINT] = "shard:rank=1:kill"
        else:
            os.environ[FAIL_POINT] = "shard:rank=1:slow"
        saver.save(2, engine, {})
        try:
            if mode == "raises" and rank == 1:
                raise RuntimeError("training failed on one rank")
            saver.wait()
        finally:
            saver.close()
            Path(root, f"rank-{rank}").write_text(json.dumps([name for _, name, _ in events]))


@pytest.mark.parametrize("mode", ["dies", pytest.param("raises", marks=pytest.mark.slow)])
def test_a_rank_lost_in_a_save_neither_hangs_nor_fools_the_others(tmp_path: Path, mode: str) -> None:
    context, ports = multiprocessing.get_context("spawn"), free_ports(12)
    arguments = (str(tmp_path), mode)
    ranks = [context.Process(target=_rank, args=(rank, 2, ports, saving, arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + 60
    for process in ranks:
        process.join(max(0.1, deadline - time.monotonic()))
    codes = [process.exitcode for process in ranks]
    assert None not in codes, "a rank hangs"
    folder = tmp_path / "run"
    if mode == "dies":
        assert codes == [1, -9]
        assert [path.name[-1] for path in newest(folder)] == ["1"]
        assert json.loads((tmp_path / "rank-0").read_text()) == ["checkpoint"]
    else:  # both threads went on: the checkpoint is whole, and neither rank ends by an abort
        assert codes[1] == 1 and codes[0] in (0, 1)
        assert [path.name[-1] for path in newest(folder)] == ["2", "1"]
    for path in newest(folder):
        verify(path)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", *sorted(p.name for p in newest(folder))]
