"""Checkpoints of replicated and hybrid FSDP2: written once, read by one process and back, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint_ranks import SETTINGS, contents, train, trainee
from tiny import run_ranks

from trainer.checkpoint import load, save
from trainer.checkpoint.manifest import newest
from trainer.config.schema import Engine
from trainer.engine.single import SingleEngine
from trainer.world import World, connected, environment_world


def exchange(rank: int, shard_size: int, root: str) -> None:
    from trainer.engine.fsdp2 import FSDP2Engine

    folder = Path(root)
    with connected(environment_world()) as world:
        settings = Engine(kind="fsdp2", shard_size=shard_size)

        def engine(seed: int) -> Any:
            return FSDP2Engine(trainee("full", seed), SETTINGS, 1e-2, settings, torch.float32, world)

        first = engine(1)
        train(first, world, 70, 1, 4)
        assert load(folder / "one", first, world).step == 2
        save(folder / "many", 2, first, world, {})
        train(first, world, 2, 2, 4)
        save(folder / "many", 4, first, world, {})
        onward = train(first, world, 4, 2, 4)
        again = engine(2)
        assert load(folder / "many", again, world).step == 4
        assert train(again, world, 4, 2, 4) == onward
        if world.is_main:
            (folder / "onward.json").write_text(json.dumps(onward))


@pytest.mark.parametrize(("ranks", "shard_size"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_replicas_are_written_once_and_read_by_all(tmp_path: Path, ranks: int, shard_size: int) -> None:
    source = SingleEngine(trainee("full", 0), SETTINGS, 1e-2, World())
    train(source, World(), 0, 2, 4)
    save(tmp_path / "one", 2, source, World(), {})
    run_ranks(ranks, exchange, shard_size, str(tmp_path))
    assert contents(tmp_path / "many" / "step-00000002") == contents(tmp_path / "one" / "step-00000002")
    one, many = (
        sum(file.stat().st_size for file in (tmp_path / name / "step-00000002").glob("*.safetensors"))
        for name in ("one", "many")
    )
    assert many < 1.2 * one  # headers aside nothing is there twice
    back = SingleEngine(trainee("full", 5), SETTINGS, 1e-2, World())
    assert load(tmp_path / "many", back, World()).step == 4
    save(tmp_path / "back", 4, back, World(), {})
    assert contents(tmp_path / "back" / "step-00000004") == contents(newest(tmp_path / "many")[0])
    onward = json.loads((tmp_path / "onward.json").read_text())
    assert train(back, World(), 4, 2, 4) == pytest.approx(onward, rel=1e-6)
