"""Checkpoints of every format ever written load for ever; shadows travel between ranks as everything else does."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import SHAPES, FlatEngine, in_threads, logical, ok, single, train
from torch import Tensor

from trainer.checkpoint import CheckpointError, load, newest, open_checkpoint, save
from trainer.checkpoint.manifest import FORMAT
from trainer.config.errors import UserError
from trainer.world import World

GOLDEN = Path(__file__).with_name("golden")
SMALL: dict[str, tuple[int, ...]] = {"body.weight": (3, 5), "body.bias": (3,), "scale": ()}


@pytest.mark.parametrize("number", range(1, FORMAT + 1))
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_checkpoint_of_each_format_loads_bit_for_bit(number: int, size: int) -> None:
    """Made by two ranks: by the last version that wrote format 1, by the first that wrote format 2. `expected.json`
    holds the digests of the logical tensors of the engine that was saved."""
    expected = json.loads((GOLDEN / "expected.json").read_text())

    def work(world: World) -> Any:
        engine = FlatEngine(world, seed=7, shapes=SMALL)
        loaded = load(GOLDEN / f"format-{number}", engine, world)
        assert (loaded, loaded.step, loaded.refused) == ({"position": 2, "note": "Größe"}, 2, ())
        return engine

    assert logical(ok(in_threads(size, work))) == expected


def test_a_golden_checkpoint_reads_without_an_engine() -> None:
    with open_checkpoint(GOLDEN / "format-2" / "step-00000002") as reader:
        assert reader.kinds == ["param", "exp_avg", "exp_avg_sq", "ema"]
        assert reader.names() == reader.names("ema") == list(SMALL)
        assert reader.manifest.shadows == ["ema"] and reader.states["scale"] == {"exp_avg", "exp_avg_sq"}
        for name, shape in SMALL.items():
            assert reader.tensor("param", name).shape == shape
            assert reader.dtype("ema", name) == torch.bfloat16
            assert torch.equal(reader.tensor("ema", name), (reader.tensor("param", name) * 0.5).bfloat16())
        converted = torch.empty(4, dtype=torch.float64)
        reader.read("ema", "body.weight", 7, converted)
        assert torch.equal(converted, reader.tensor("ema", "body.weight").view(-1)[7:11].double())
        with pytest.raises(KeyError):
            reader.tensor("ema", "nonsense")


def test_a_golden_checkpoint_is_compared_with_its_digests_too(tmp_path: Path) -> None:
    path = shutil.copytree(GOLDEN / "format-1", tmp_path / "copy") / "step-00000002" / "rank-00001-of-00002.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        open_checkpoint(tmp_path / "copy")


def averages(engine: FlatEngine, factor: float, dtype: torch.dtype = torch.float32) -> dict[str, list[Tensor]]:
    """Shadows of the engine's one slot."""
    return {"ema": [(engine.master.detach() * factor).to(dtype)], "fisher": [engine.master.detach().double().square()]}


def whole(engines: list[FlatEngine], shadows: list[dict[str, list[Tensor]]], kind: str) -> dict[str, Tensor]:
    """A shadow's logical tensors, assembled from all ranks."""
    found: dict[str, Tensor] = {}
    for engine, tensors in zip(engines, shadows, strict=True):
        for piece in engine.pieces:
            part = tensors[kind][0]
            out = found.setdefault(piece.name, torch.full((math.prod(piece.shape),), math.nan, dtype=part.dtype))
            out[piece.start : piece.start + piece.numel] = part[piece.offset : piece.offset + piece.numel]
    return found


@pytest.mark.parametrize(("writers", "readers"), [(1, 3), (2, 2), (3, 1), (3, 2)])
def test_shadows_come_back_on_any_number_of_ranks(tmp_path: Path, writers: int, readers: int) -> None:
    def write(world: World) -> tuple[FlatEngine, dict[str, list[Tensor]]]:
        engine = FlatEngine(world)
        engine.train(2)
        shadows = averages(engine, 0.25, torch.bfloat16)
        save(tmp_path, 2, engine, world, {}, shadows=shadows)
        return engine, shadows

    def read(world: World) -> tuple[FlatEngine, dict[str, list[Tensor]]]:
        engine = FlatEngine(world, seed=4)
        shadows = averages(engine, 9.0, torch.bfloat16)
        load(tmp_path, engine, world, shadows=lambda: shadows)
        return engine, shadows

    written, back = ok(in_threads(writers, write)), ok(in_threads(readers, read))
    for kind in ("ema", "fisher"):
        first, second = (whole([e for e, _ in side], [s for _, s in side], kind) for side in (written, back))
        assert first.keys() == second.keys() == SHAPES.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert logical([e for e, _ in written]) == logical([e for e, _ in back])


def test_shadows_nobody_asks_for_are_passed_over_and_absent_ones_are_told(tmp_path: Path) -> None:
    engine = single()
    train(engine, 2)
    shadows = {"ema": [slot.owner.detach().view(-1).clone() for slot in engine.slots()]}
    save(tmp_path / "with", 2, engine, World(), {}, shadows=shadows)
    save(tmp_path / "without", 2, engine, World(), {})
    target = single(3)
    load(tmp_path / "with", target, World())
    assert logical([target]) == logical([engine])
    before = logical([target])
    with pytest.raises(UserError, match=r"ema/norm: none was saved, \[1\] F32 is asked for"):
        load(tmp_path / "without", target, World(), shadows=lambda: shadows)
    with pytest.raises(UserError, match=r"exp_avg/norm: none was saved"):  # the optimizer's is no shadow
        load(tmp_path / "with", target, World(), shadows=lambda: {"exp_avg": shadows["ema"]})
    halves = {"ema": [tensor.half() for tensor in shadows["ema"]]}
    with pytest.raises(UserError, match=r"ema/norm: \[1\] F32 was saved, \[1\] F16 is asked for"):
        load(tmp_path / "with", target, World(), shadows=lambda: halves)
    assert logical([target]) == before


def test_shadows_that_do_not_fit_the_slots_are_refused(tmp_path: Path) -> None:
    engine = single()
    train(engine, 1)
    tensors = [slot.owner.detach().view(-1).clone() for slot in engine.slots()]
    for wrong in ({"ema": tensors[:-1]}, {"ema": [*tensors[1:], tensors[0]]}, {"exp_avg": tensors}, {"param": tensors}):
        with pytest.raises(CheckpointError, match="shadows"):
            save(tmp_path, 1, engine, World(), {}, shadows=wrong)
    tensors[0][0] = math.inf
    with pytest.raises(CheckpointError, match=r"ema/norm: holds values that are not finite"):
        save(tmp_path, 1, engine, World(), {}, shadows={"ema": tensors})
    assert newest(tmp_path) == [] and list(tmp_path.iterdir()) == []
