"""What one engine saves every other reads and saves again, bit for bit, whatever the number of ranks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint_ranks import batch_of, contents
from tiny import run_ranks, tiny_llama
from torch.nn.functional import cross_entropy

from trainer.checkpoint import load, save
from trainer.checkpoint.manifest import newest
from trainer.config import UserError
from trainer.config.schema import Engine, Optimizer, Tuning
from trainer.engine.single import SingleEngine
from trainer.model.blocks import blocks
from trainer.model.methods import apply_method
from trainer.model.root import Trainee
from trainer.world import World, connected, environment_world

SETTINGS = Optimizer(lr=3e-3, clip=0.5, weight_decay=0.1)
ZERO: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 5000},
    "zero2-aligned": {"stage": 2, "parameter_alignment": True, "round_robin_gradients": True},
    "zero2-offloaded": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero3-kept": {"stage": 3},
    "zero3-offloaded": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    },
}
# Each engine hands on to the next; every one of the four reads from two others.
CHAIN = ("fsdp2", "zero1", "zero2", "zero3", "fsdp2", "zero3", "zero1", "zero3", "zero2", "fsdp2")


def trainee(method: str, seed: int) -> Trainee:
    tuning = Tuning(method=method, rank=3)  # type: ignore[arg-type]
    network: Any = tiny_llama(seed if method == "full" else 0)  # a frozen base is not in a checkpoint
    return Trainee(apply_method(network, tuning, blocks(network), seed)).train()


def engine_of(name: str, method: str, dtype: torch.dtype, world: World, folder: Path, seed: int) -> Any:
    """An engine by name over another model than the one that was saved."""
    if name == "single":
        return SingleEngine(trainee(method, seed), SETTINGS, 3e-3, world, dtype)
    if name == "fsdp2":
        from trainer.engine.fsdp2 import FSDP2Engine

        return FSDP2Engine(trainee(method, seed), SETTINGS, 3e-3, Engine(kind="fsdp2"), dtype, world)
    from trainer.engine.deepspeed import DeepSpeedEngine

    file = folder / f"{name}-{world.rank}.json"
    file.write_text(json.dumps({"zero_optimization": ZERO[name]}))
    settings = Engine(kind="deepspeed", config=str(file))
    return DeepSpeedEngine(trainee(method, seed), SETTINGS, 3e-3, settings, dtype, world)


def train(engine: Any, world: World, first: int, steps: int) -> list[float]:
    """Global losses of steps over four micro-batches dealt to the ranks."""
    losses = []
    for step in range(first, first + steps):
        total = 0.0
        mine = [batch_of(10 * step + micro) for micro in range(4)][world.rank :: world.size]
        for index, batch in enumerate(mine):
            loss = engine.model(batch, lambda h, head, b=batch: cross_entropy(head(h), b.targets, reduction="sum")) / 56
            engine.backward(loss, last=index == len(mine) - 1)
            total += float(loss.detach())
        engine.step(1.0, pull=lambda slots: None)
        losses.append(world.sum({"loss": total})["loss"])
    return losses


def saved(engine: Any, world: World, folder: Path, step: int) -> None:
    save(folder, step, engine, world, {})
    world.barrier()


# ---------------------------------------------------------------- a chain of engines, training in between


def chain(rank: int, root: str, method: str, dtype: str) -> None:
    folder, losses = Path(root), {}
    with connected(environment_world()) as world:
        source = folder / "0-single"
        for index, name in enumerate(CHAIN, 1):
            engine = engine_of(name, method, getattr(torch, dtype), world, folder, seed=index)
            train(engine, world, 90, 1)  # gathers weights and makes state, all of it to be overwritten
            assert load(source, engine, world).step == index
            saved(engine, world, folder / f"{index}-{name}-read", index)
            losses[str(index)] = train(engine, world, index, 1)
            source = folder / f"{index}-{name}"
            saved(engine, world, source, index + 1)
    if rank == 0:
        (folder / "losses.json").write_text(json.dumps(losses))


def walk_chain(folder: Path, method: str, dtype: str) -> None:
    """Save from one process, hand on from engine to engine, load into one process again."""
    first = engine_of("single", method, getattr(torch, dtype), World(), folder, seed=0)
    train(first, World(), 0, 1)
    save(folder / "0-single", 1, first, World(), {})
    run_ranks(2, chain, str(folder), method, dtype)
    source = "0-single"
    for index, name in enumerate(CHAIN, 1):
        written = contents(newest(folder / source)[0])
        assert contents(newest(folder / f"{index}-{name}-read")[0]) == written, (source, name)
        source = f"{index}-{name}"
        assert contents(newest(folder / source)[0]) != written
    back = engine_of("single", method, getattr(torch, dtype), World(), folder, seed=99)
    load(folder / source, back, World())
    save(folder / "back", 99, back, World(), {})
    assert contents(newest(folder / "back")[0]) == contents(newest(folder / source)[0])
    straight = train(first, World(), 1, len(CHAIN))
    found = json.loads((folder / "losses.json").read_text())
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    assert [found[str(i)][0] for i in range(1, len(CHAIN) + 1)] == pytest.approx(straight, rel=tolerance)


@pytest.mark.timeout(300)
def test_checkpoints_go_from_engine_to_engine_bit_for_bit(tmp_path: Path) -> None:
    walk_chain(tmp_path, "full", "float32")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("method", "dtype"), [("lora", "float32"), ("full", "bfloat16"), ("lora", "bfloat16")])
def test_so_do_adapters_and_low_precision(method: str, dtype: str, tmp_path: Path) -> None:
    walk_chain(tmp_path, method, dtype)


# ---------------------------------------------------------------- every pair, and other numbers of ranks


ENGINES = ("fsdp2", *ZERO)


def write_all(rank: int, root: str, method: str) -> None:
    """Each engine's own training, saved."""
    with connected(environment_world()) as world:
        for name in ENGINES:
            engine = engine_of(name, method, torch.float32, world, Path(root), seed=7)
            train(engine, world, 0, 2)
            saved(engine, world, Path(root) / f"{world.size}-{name}", 2)


def read_all(rank: int, root: str, method: str, sources: list[str], out: str) -> None:
    """Each source into each engine and saved again."""
    with connected(environment_world()) as world:
        names = ENGINES if world.size > 1 else ("single",)
        engines = {name: engine_of(name, method, torch.float32, world, Path(root), seed=8) for name in names}
        for source, (name, engine) in itertools.product(sources, engines.items()):
            load(Path(root) / source, engine, world)
            saved(engine, world, Path(out) / f"{source}-into-{world.size}-{name}", 2)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_pair_of_engines_and_ranks(method: str, tmp_path: Path) -> None:
    for size in (2, 4):
        run_ranks(size, write_all, str(tmp_path), method)
    sources = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert len(sources) == 2 * len(ENGINES)
    for size in (1, 2, 4):
        run_ranks(size, read_all, str(tmp_path), method, sources, str(tmp_path / "read"))
    expected = {source: contents(newest(tmp_path / source)[0]) for source in sources}
    found = list((tmp_path / "read").iterdir())
    assert len(found) == len(sources) * (1 + 2 * len(ENGINES))
    for path in found:
        source = path.name.partition("-into-")[0]
        assert contents(newest(path)[0]) == expected[source], path.name


# ---------------------------------------------------------------- what cannot be


def uneven(rank: int, root: str) -> None:
    with connected(environment_world(), alone=True) as world:
        engine = engine_of("zero2", "full", torch.float32, world, Path(root), seed=3)
        with pytest.raises(UserError, match=r"made different numbers of steps: use fsdp2 or single"):
            load(Path(root) / "uneven", engine, world)


def test_parameters_stepped_differently_often_cannot_share_a_partition(tmp_path: Path) -> None:
    engine = engine_of("single", "full", torch.float32, World(), tmp_path, seed=0)
    train(engine, World(), 0, 2)
    next(iter(engine.slots())).state["step"].fill_(1.0)  # type: ignore[union-attr]
    save(tmp_path / "uneven", 2, engine, World(), {})
    run_ranks(1, uneven, str(tmp_path))
