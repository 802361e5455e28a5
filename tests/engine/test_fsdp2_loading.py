"""Each rank reads and holds its own part of the base model, and trains to the very bits of the whole loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engines_agree import walk, whole_parameters
from tiny import run_ranks, tiny_llama

from trainer.config.schema import Engine, Model, Optimizer, Recipe, Stage, Tuning
from trainer.model.build import build_unread
from trainer.model.load import DTYPES
from trainer.model.probes import verify_trainee
from trainer.world import World, connected, environment_world

SETTINGS = Optimizer(lr=1e-2, clip=0.5, weight_decay=0.1)
CASES: dict[str, dict[str, Any]] = {
    "full": {"tuning": {"method": "full"}, "model": {"dtype": "float32"}},
    "full-bf16-replicated": {"tuning": {"method": "full"}, "engine": {"shard_size": 1}},
    "last-layers": {"tuning": {"method": "last-layers", "layers": 1}},
    "lora-checkpointed": {"engine": {"activation_checkpointing": True, "prefetch": 2}},
    "lora-dropout-offloaded": {"engine": {"cpu_offload": True}, "model": {"attention_dropout": 0.2}},
}


def recipe(folder: str, loading: str, case: dict[str, Any]) -> Recipe:
    return Recipe(
        name="x",
        model=Model(path=folder, **({"dtype": "bfloat16"} | case.get("model", {}))),
        tuning=Tuning(**case.get("tuning", {"rank": 4})),
        engine=Engine(kind="fsdp2", loading=loading, **case.get("engine", {})),  # type: ignore[arg-type]
        sources={},
        stages=[Stage(name="s", mixture={})],
    )


def start(settings: Recipe, world: World) -> Any:
    from trainer.engine.fsdp2 import FSDP2Engine

    trainee = build_unread(settings, 2)
    assert bool(trainee.unread) == (settings.engine.loading == "sharded")
    return FSDP2Engine(trainee, SETTINGS, 1e-2, settings.engine, DTYPES[settings.model.dtype], world)


def compare(rank: int, folder: str, out: str) -> None:
    """Every case loaded whole and sharded: the local shards before and the losses, norms and weights after steps."""
    with connected(environment_world()) as world:
        for name, case in CASES.items():
            found = []
            for loading in ("whole", "sharded"):
                settings = recipe(folder, loading, case)
                engine = start(settings, world)
                state = torch.random.get_rng_state()
                shards = [p.to_local().clone() for p in engine.model.parameters()]
                buffers = [buffer.clone() for buffer in engine.model.buffers()]
                verify_trainee(engine.model, settings)  # forwards on sharded weights; leaves no trace
                engine.after_load()
                assert engine.model.training and torch.equal(torch.random.get_rng_state(), state)
                torch.manual_seed(world.rank)  # dropout
                result = walk(engine, world) | {"parameters": whole_parameters(engine, world)}
                found.append((shards, buffers, result))
            (first, held, expected), (second, also, result) = found
            for mine, other in ((first, second), (held, also)):
                assert len(mine) == len(other)
                assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(mine, other, strict=True)), name
            assert result == expected, name
            assert world.gather(len(second)) == [len(second)] * 2
    if rank == 0:
        Path(out).write_text(json.dumps(list(CASES)))


def test_sharded_and_whole_loading_train_to_the_same_bits(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    tiny_llama().to(torch.bfloat16).save_pretrained(folder, max_shard_size="40KB")
    run_ranks(2, compare, str(folder), str(tmp_path / "done.json"))
    assert json.loads((tmp_path / "done.json").read_text()) == list(CASES)


def figure(file: str, key: str) -> int:
    """A count that Linux keeps of this process; kB lines are given in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self", file).read_text().splitlines())
    value, _, unit = lines[key].strip().partition(" ")
    return int(value) * (1024 if unit else 1)


def measure(rank: int, small: str, large: str, out: str) -> None:
    """How far this rank's memory rises, and what it reads (mapped pages aside), from the recipe to the engine."""
    with connected(environment_world()) as world:
        rows = []
        for loading in ("sharded", "whole"):
            start(recipe(small, loading, CASES["full"]), world)  # imports, buffers of the process group
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
            resident, read = figure("status", "VmRSS"), figure("io", "rchar")
            engine = start(recipe(large, loading, CASES["full"]), world)
            risen = figure("status", "VmHWM") - resident
            held = sum(p.to_local().nbytes for p in engine.model.parameters())
            rows.append({"risen": risen, "read": figure("io", "rchar") - read, "held": held})
            del engine
        Path(out, f"{rank}.json").write_text(json.dumps(rows))


def test_no_rank_ever_holds_or_reads_the_whole_model(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "small")
    network = tiny_llama(vocab_size=4000, hidden_size=512, intermediate_size=1536, num_hidden_layers=8)
    network.save_pretrained(tmp_path / "large", max_shard_size="50MB")
    size = sum(p.nbytes for p in network.parameters())
    assert size > 100e6
    run_ranks(2, measure, str(tmp_path / "small"), str(tmp_path / "large"), str(tmp_path))
    for rank in range(2):
        sharded, whole = json.loads((tmp_path / f"{rank}.json").read_text())
        assert sharded["held"] == pytest.approx(size / 2, rel=0.01)
        assert size / 2 * 0.99 < sharded["read"] < size / 2 * 1.1
        assert size / 2 * 0.9 < sharded["risen"] < size / 2 * 1.4  # a chunk of 16 MB beside the shards
        assert whole["risen"] > size * 0.9  # so the measure would see it
