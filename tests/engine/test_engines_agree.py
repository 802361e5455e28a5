"""FSDP2 on real processes gives the single process's numbers: loss, gradient norm, parameters."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import run_ranks, tiny_llama
from torch import Tensor, nn

from trainer.config.schema import Engine, Optimizer, Tuning
from trainer.data.batch import Batch
from trainer.engine.single import SingleEngine
from trainer.model.blocks import blocks
from trainer.model.methods import apply_method
from trainer.model.root import Trainee
from trainer.world import World, connected, environment_world

STEPS, MICROS = 6, 4


def padded_batch(seed: int, examples: int = 2, longest: int = 11) -> Batch:
    """A right-padded batch of random tokens in which every second token is a target."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest, (examples,), generator=draw, dtype=torch.int32)
    width = int(lengths.max())
    ids = torch.randint(3, 259, (examples, width), generator=draw)
    rows = [(r, t) for r in range(examples) for t in range(0, int(lengths[r]) - 1, 2)]
    index = torch.tensor([r * width + t for r, t in rows])
    return Batch(
        ids=ids,
        positions=torch.arange(width).expand(examples, width).contiguous(),
        lengths=lengths,
        packed=False,
        target_index=index,
        targets=ids.reshape(-1)[index + 1],
        weights=torch.ones(len(rows)),
        target_task=torch.zeros(len(rows), dtype=torch.int64),
        target_example=torch.tensor([r for r, _ in rows]),
        tasks=("t",),
        example_ids=tuple(str(r) for r in range(examples)),
    )


def build(method: str, checkpointing: bool = False) -> Trainee:
    network: Any = tiny_llama()
    tuning = Tuning(method=method, layers=1 if method == "last-layers" else None, rank=4)  # type: ignore[arg-type]
    network = apply_method(network, tuning, blocks(network), seed=3)
    if checkpointing:
        getattr(network, "get_base_model", lambda: network)().gradient_checkpointing_enable({"use_reentrant": False})
    return Trainee(network).train()


def plain_loss(batch: Batch) -> Any:
    def readout(selected: Tensor, head: nn.Module) -> Tensor:
        return F.cross_entropy(head(selected), batch.targets, reduction="sum")

    return readout


def walk(engine: Any, world: World) -> dict[str, Any]:
    """Losses and norms of some steps over four micro-batches dealt to the ranks."""
    losses, norms = [], []
    for step in range(STEPS):
        micros = [padded_batch(10 * step + m) for m in range(MICROS)]
        count = sum(len(m.targets) for m in micros)
        mine = micros[world.rank :: world.size]
        total = 0.0
        for i, batch in enumerate(mine):
            loss = engine.model(batch, plain_loss(batch)) / count
            engine.backward(loss, last=i == len(mine) - 1)
            total += float(loss.detach())
        norms.append(engine.step(0.9**step, pull=lambda slots: None))
        losses.append(world.sum({"loss": total})["loss"])
    return {"losses": losses, "norms": norms}


def whole_parameters(engine: Any, world: World) -> dict[str, list[float]]:
    """Every trainable parameter put together from the slots of all ranks."""
    mine = [
        (piece.name, piece.start, slot.value(piece).tolist(), math.prod(piece.shape))
        for slot in engine.slots()
        for piece in slot.pieces
    ]
    whole: dict[str, list[float]] = {}
    for rank in world.gather(mine):
        for name, start, values, numel in rank:
            whole.setdefault(name, [math.nan] * numel)[start : start + len(values)] = values
    return whole


CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "full": (2, "full", {}),
    "lora-checkpointed": (2, "lora", {"activation_checkpointing": True}),
    "last-layers-kept": (2, "last-layers", {"reshard_after_forward": False}),
    "full-offloaded": (2, "full", {"cpu_offload": True}),
    "full-replicated": (2, "full", {"shard_size": 1}),
    "full-checkpointed-ahead": (2, "full", {"activation_checkpointing": True, "prefetch": 2}),
    "full-4": (4, "full", {}),
    "lora-4": (4, "lora", {}),
    "full-hybrid-4": (4, "full", {"shard_size": 2}),
    "lora-hybrid-4": (4, "lora", {"shard_size": 2, "prefetch": 2, "activation_checkpointing": True}),
    "full-hybrid-offloaded-4": (4, "full", {"shard_size": 2, "cpu_offload": True, "reshard_after_forward": False}),
}


def distributed(rank: int, size: int, out: str) -> None:
    """All cases of a world size in one set of processes: starting them costs more than the steps."""
    from trainer.engine.fsdp2 import FSDP2Engine

    with connected(environment_world()) as world:
        for name, (ranks, method, options) in CASES.items():
            if ranks != size:
                continue
            settings = Engine(kind="fsdp2", **{k: v for k, v in options.items() if k != "activation_checkpointing"})
            model = build(method, options.get("activation_checkpointing", False))
            engine = FSDP2Engine(
                model, Optimizer(lr=1e-2, clip=0.5, weight_decay=0.1), 1e-2, settings, torch.float32, world
            )
            result = walk(engine, world) | {"parameters": whole_parameters(engine, world)}
            result["replicas"] = world.gather([[replica.name, replica.ranks] for replica in engine.replicas()])
            result["written"] = world.gather([engine.writes(slot) for slot in engine.slots()])
            if world.is_main:
                Path(out, f"{name}.json").write_text(json.dumps(result))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What a case gave; all cases of as many processes run when the first is asked for."""
    folder = tmp_path_factory.mktemp("engines")

    def result(name: str) -> dict[str, Any]:
        if not (folder / f"{name}.json").exists():
            run_ranks(CASES[name][0], distributed, CASES[name][0], str(folder))
        return json.loads((folder / f"{name}.json").read_text())

    return result


def reference(method: str) -> dict[str, Any]:
    engine = SingleEngine(build(method), Optimizer(lr=1e-2, clip=0.5, weight_decay=0.1), 1e-2, World())
    result = walk(engine, World())
    return result | {"parameters": whole_parameters(engine, World())}


def marked(*names: str) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if CASES[name][0] > 2 else []) for name in names]


@pytest.mark.parametrize("name", marked(*CASES))
def test_fsdp2_gives_the_single_process_numbers(name: str, results: Callable[[str], dict[str, Any]]) -> None:
    result, expected = results(name), reference(CASES[name][1])
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert result["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert max(expected["norms"]) > 0.5  # clipping was at work
    assert result["parameters"].keys() == expected["parameters"].keys()
    for key, values in expected["parameters"].items():
        assert result["parameters"][key] == pytest.approx(values, abs=1e-5), key


@pytest.mark.parametrize("name", marked("full", "full-replicated", "full-hybrid-4"))
def test_of_replicas_the_first_writes_and_each_knows_who_holds_a_copy(
    name: str, results: Callable[[str], dict[str, Any]]
) -> None:
    result = results(name)
    holders = {"full": [[], []], "full-replicated": [[0, 1]] * 2, "full-hybrid-4": [[0, 2], [1, 3]] * 2}[name]
    for rank, ranks in enumerate(holders):
        assert set(result["written"][rank]) == {not ranks or ranks[0] == rank}
        assert result["replicas"][rank] == [[key, ranks] for key in result["parameters"] if ranks]


def test_a_nonfinite_gradient_changes_nothing() -> None:
    engine = SingleEngine(build("full"), Optimizer(lr=1e-2), 1e-2, World())
    batch = padded_batch(1)
    engine.backward(engine.model(batch, plain_loss(batch)), last=True)
    engine.step(1.0, pull=lambda slots: None)
    before = whole_parameters(engine, World())
    moments = [float(slot.moment("exp_avg", slot.pieces[0]).sum()) for slot in engine.slots()]
    engine.backward(engine.model(batch, plain_loss(batch)) * math.nan, last=True)
    assert not math.isfinite(engine.step(1.0, pull=lambda slots: None))
    assert whole_parameters(engine, World()) == before
    assert [float(slot.moment("exp_avg", slot.pieces[0]).sum()) for slot in engine.slots()] == moments
    assert all(p.grad is None for p in engine.model.parameters())


def test_pull_sees_clipped_gradients_and_changes_them() -> None:
    engine = SingleEngine(build("full"), Optimizer(name="sgd", lr=1.0, clip=0.1), 1.0, World())
    batch = padded_batch(2)
    engine.backward(engine.model(batch, plain_loss(batch)), last=True)
    seen: list[float] = []

    def pull(slots: Any) -> None:
        for slot in slots:
            gradient = slot.gradient(slot.pieces[0])
            seen.append(float(gradient.square().sum()))
            gradient.zero_()

    before = whole_parameters(engine, World())
    norm = engine.step(1.0, pull=pull)
    assert norm > 0.1
    assert math.sqrt(sum(seen)) == pytest.approx(0.1, rel=1e-4)
    assert whole_parameters(engine, World()) == before  # a zeroed gradient moves nothing


def test_low_precision_copies_follow_fp32_masters() -> None:
    """The model holds bf16; masters, moments and gradients are fp32, so tiny updates are not rounded away."""
    engine = SingleEngine(build("full"), Optimizer(lr=1e-4, clip=None), 1e-4, World(), torch.bfloat16)
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
    before = whole_parameters(engine, World())
    for seed in range(3):
        batch = padded_batch(seed)
        for last in (False, True):
            engine.backward(engine.model(batch, plain_loss(batch)) / len(batch.targets), last=last)
        masters = [slot.owner for slot in engine.slots()]
        assert all(m.grad is not None and m.grad.dtype == torch.float32 for m in masters)
        engine.step(1.0, pull=lambda slots: None)
    after = whole_parameters(engine, World())
    moved = [abs(a - b) for name in after for a, b in zip(after[name], before[name], strict=True) if a != b]
    assert max(moved) == pytest.approx(3e-4, rel=0.3)  # 3 steps of lr: far below bf16's spacing of 4e-3 near 1
    for parameter, master in engine._copies:
        assert torch.equal(parameter, master.to(torch.bfloat16))
