"""Real processes over gloo: what one process saves FSDP2 reads, and the other way round, bit for bit."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import run_ranks, tiny_llama
from torch import Tensor, nn

from trainer.checkpoint import load, save, verify
from trainer.checkpoint.manifest import newest
from trainer.checkpoint.reader import Reader
from trainer.config.schema import Engine, Optimizer, Tuning
from trainer.data.batch import Batch
from trainer.engine.single import SingleEngine
from trainer.model.blocks import blocks
from trainer.model.methods import apply_method
from trainer.model.root import Trainee
from trainer.world import World, connected, environment_world

METHODS = ("full", "last-layers")
SETTINGS = Optimizer(lr=1e-2, clip=0.5, weight_decay=0.1)


def trainee(method: str, seed: int) -> Trainee:
    tuning = Tuning(method=method, layers=None if method == "full" else 1)  # type: ignore[arg-type]
    network: Any = tiny_llama(seed if method == "full" else 0)  # a frozen base is not in a checkpoint
    return Trainee(apply_method(network, tuning, blocks(network), seed)).train()


def batch_of(seed: int) -> Batch:
    """Two sequences of eight random tokens, every one but the first a target."""
    ids = torch.randint(3, 259, (2, 8), generator=torch.Generator().manual_seed(seed))
    index = torch.tensor([row * 8 + t for row in range(2) for t in range(7)])
    return Batch(
        ids=ids,
        positions=torch.arange(8).expand(2, 8).contiguous(),
        lengths=torch.tensor([8, 8], dtype=torch.int32),
        packed=False,
        target_index=index,
        targets=ids.reshape(-1)[index + 1],
        weights=torch.ones(14),
        target_task=torch.zeros(14, dtype=torch.int64),
        target_example=index // 8,
        tasks=("t",),
        example_ids=("a", "b"),
    )


def train(engine: Any, world: World, first: int, steps: int, micros: int = 2) -> list[float]:
    """Global losses of steps over micro-batches dealt to the ranks, at least one to each."""
    losses = []
    for step in range(first, first + steps):
        total = 0.0
        mine = [batch_of(10 * step + micro) for micro in range(micros)][world.rank :: world.size]
        for index, batch in enumerate(mine):

            def loss_of(selected: Tensor, head: nn.Module, batch: Batch = batch) -> Tensor:
                return F.cross_entropy(head(selected), batch.targets, reduction="sum") / (14 * micros)

            loss = engine.model(batch, loss_of)
            engine.backward(loss, last=index == len(mine) - 1)
            total += loss.item()
        engine.step(1.0, pull=lambda slots: None)
        losses.append(world.sum({"loss": total})["loss"])
    return losses


def contents(path: Path) -> dict[str, Any]:
    """SHA-256 of every logical tensor of a checkpoint, and the counters: what does not depend on ranks."""
    manifest = verify(path)
    found: dict[str, Any] = {"counters": manifest.counters}
    with Reader(path, manifest) as reader:
        for tensor in manifest.tensors:
            out = torch.full((math.prod(tensor.shape),), math.nan)
            reader.read(tensor.kind, tensor.name, 0, out)
            assert torch.isfinite(out).all()
            found[f"{tensor.kind}/{tensor.name}"] = hashlib.sha256(out.numpy().tobytes()).hexdigest()
    return found


def two_ranks(rank: int, root: str) -> None:
    with connected(environment_world()) as world:
        for method in METHODS:
            exchange(Path(root, method), method, world)


def exchange(folder: Path, method: str, world: World) -> None:
    """Read what one process wrote, save it again, go on; load that and go on again; meet a damaged shard."""
    from trainer.engine.fsdp2 import FSDP2Engine

    def engine(seed: int) -> Any:
        return FSDP2Engine(trainee(method, seed), SETTINGS, 1e-2, Engine(kind="fsdp2"), torch.float32, world)

    first = engine(1)
    train(first, world, 70, 1)  # gathers the root and makes state, all of it to be overwritten
    assert load(folder / "one", first, world).step == 2
    save(folder / "two", 2, first, world, {})
    losses = train(first, world, 2, 2)
    save(folder / "two", 4, first, world, {"losses": losses})
    onward = train(first, world, 4, 2)
    again = engine(2)
    assert load(folder / "two", again, world) == {"losses": losses}
    assert train(again, world, 4, 2) == onward  # same engine, same ranks: bit for bit
    damaged = folder / "two" / "step-00000004" / "rank-00001-of-00002.safetensors"
    world.barrier()
    if world.is_main:
        (folder / "onward.json").write_text(json.dumps(onward))
        data = damaged.read_bytes()
        damaged.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    world.barrier()
    fallen = load(folder / "two", engine(3), world)
    assert fallen.step == 2 and damaged.name in fallen.refused[0]
    world.barrier()
    if world.is_main:
        damaged.write_bytes(data)


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of `exchange`, both methods in one start of two processes."""
    root = tmp_path_factory.mktemp("exchange")
    for method in METHODS:
        source = SingleEngine(trainee(method, 0), SETTINGS, 1e-2, World())
        train(source, World(), 0, 2)
        save(root / method / "one", 2, source, World(), {})
    run_ranks(2, two_ranks, str(root))
    return root


@pytest.mark.parametrize("method", METHODS)
def test_one_process_and_fsdp2_read_each_other(exchanged: Path, method: str) -> None:
    folder = exchanged / method
    assert contents(folder / "two" / "step-00000002") == contents(folder / "one" / "step-00000002")
    back = SingleEngine(trainee(method, 5), SETTINGS, 1e-2, World())
    assert load(folder / "two", back, World()).step == 4
    save(folder / "back", 4, back, World(), {})
    assert contents(folder / "back" / "step-00000004") == contents(newest(folder / "two")[0])
    onward = json.loads((folder / "onward.json").read_text())
    assert train(back, World(), 4, 2) == pytest.approx(onward, rel=1e-6)
