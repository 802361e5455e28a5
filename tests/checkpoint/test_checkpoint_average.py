"""Averages of checkpoints: by hand, by their laws, and written so that the store takes them for its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from checkpoint_cases import checkpoints
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.checkpoint import CheckpointError, Reader, newest, open_checkpoint, verify
from trainer.checkpoint.average import (
    Average,
    averaged_tuning,
    check_ranks,
    greedy_soup,
    mean,
    stacked_down,
    stacked_up,
    write_average,
)
from trainer.checkpoint.manifest import step_name
from trainer.checkpoint.merge import change, lora_scale
from trainer.checkpoint.weights import EMA, Weights
from trainer.config.errors import UserError
from trainer.config.schema import Tuning

DOWN, UP = (f"network.base_model.model.m.q_proj.lora_{side}.default.weight" for side in "AB")


class Held:
    def __init__(self, **values: Tensor) -> None:
        self.values = values
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tuple(value.shape) for name, value in values.items()}

    def read(self, name: str) -> Tensor:
        return self.values[name].clone()


def test_a_mean_by_hand() -> None:
    found = mean([torch.tensor([1.0, -2.0, 0.1]), torch.tensor([2.0, 2.0, 0.1]), torch.tensor([6.0, 3.0, 0.1])])
    assert torch.equal(found, torch.tensor([3.0, 1.0, 0.1]))
    # 1e8 + 1 - 1e8 + 1: fp32 would lose both ones
    values = [torch.tensor([x]) for x in (1e8, 1.0, -1e8, 1.0)]
    assert mean(values).item() == 0.5
    with pytest.raises(ValueError, match="nothing"):
        mean([])


FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)
LIKE_SIZED = st.integers(-(2**24), 2**24).map(lambda n: n * 2.0**-12)  # fp32 values whose fp64 sums are exact
ROWS = st.integers(1, 6).flatmap(lambda n: st.lists(st.lists(FLOATS, min_size=n, max_size=n), min_size=1, max_size=6))


@given(st.lists(FLOATS, min_size=1, max_size=9))
def test_the_mean_of_one_and_of_equals_is_itself_bitwise(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    for count in (1, 2, 3, 7):
        assert torch.equal(mean([tensor] * count).view(torch.int32), tensor.view(torch.int32))


@given(st.permutations(range(5)), st.lists(st.lists(LIKE_SIZED, min_size=3, max_size=3), min_size=5, max_size=5))
def test_the_order_does_not_matter(order: list[int], rows: list[list[float]]) -> None:
    tensors = [torch.tensor(row, dtype=torch.float32) for row in rows]
    assert torch.equal(mean(tensors), mean(tensors[index] for index in order))


@given(ROWS)
def test_the_mean_stays_among_the_values(rows: list[list[float]]) -> None:
    tensors = torch.tensor(rows, dtype=torch.float32)
    found = mean(tensors)
    assert bool((found >= tensors.amin(0)).all() and (found <= tensors.amax(0)).all())


def test_low_rank_changes_by_hand() -> None:
    """Two changes of rank 1: B1 A1 = [[1, 2], [0, 0]], B2 A2 = [[0, 0], [3, 4]]; their factors' means would give
    [[1, 1.5], [1, 1.5]]."""
    down = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])]
    up = [torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])]
    assert torch.equal(stacked_down(down), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert torch.equal(stacked_up(up), torch.tensor([[0.5, 0.0], [0.0, 0.5]]))
    assert torch.equal(stacked_up(up) @ stacked_down(down), torch.tensor([[0.5, 1.0], [1.5, 2.0]]))
    assert torch.equal(mean(up) @ mean(down), torch.tensor([[1.0, 1.5], [1.0, 1.5]]))


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(1, 4), st.booleans(), st.integers(0, 2**31))
def test_an_average_of_adapters_is_the_mean_of_their_changes(k: int, rank: int, rslora: bool, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    tuning = Tuning(method="lora", rank=rank, alpha=8.0, rslora=rslora)
    members = [
        Held(**{DOWN: torch.randn(rank, 7, generator=draw), UP: torch.randn(5, rank, generator=draw)}) for _ in range(k)
    ]
    wider = averaged_tuning(tuning, k)
    assert lora_scale(wider) == pytest.approx(lora_scale(tuning), rel=1e-12) and wider.rank == k * rank
    changes = [change(m.read(DOWN).double(), m.read(UP).double(), lora_scale(tuning), False) for m in members]
    for width, settings_ in ((None, wider), (k + 2, averaged_tuning(tuning, k + 2))):
        average = Average(members, width)
        down, up = average.read(DOWN), average.read(UP)
        assert down.shape == average.shapes[DOWN] == ((width or k) * rank, 7) and up.shape == average.shapes[UP]
        found = change(down.double(), up.double(), lora_scale(settings_), False)
        expected = torch.stack(changes).mean(0)
        assert torch.allclose(found, expected, rtol=0, atol=float(expected.abs().max()) * 1e-6)
    if k == 1:
        assert torch.equal(Average(members).read(UP), members[0].values[UP])
        assert torch.equal(Average(members).read(DOWN), members[0].values[DOWN])


def test_members_of_different_models_are_refused() -> None:
    with pytest.raises(UserError, match="w: saved"):
        Average([Held(w=torch.zeros(2)), Held(w=torch.zeros(3))])
    check_ranks({DOWN: (4, 7), UP: (5, 4), "network.w": (3,)}, Tuning(rank=4))
    with pytest.raises(UserError, match="adapters of experts"):
        check_ranks({DOWN: (8, 7), UP: (5, 8)}, Tuning(rank=4))


def test_a_greedy_soup_leaves_out_the_bad_one() -> None:
    """By hand: points on a line, the metric is the distance of their mean from 0. 3 spoils every average."""
    points = {10: 1.0, 20: -0.5, 30: 3.0, 40: -0.6}
    asked: list[list[int]] = []

    def together(steps: list[int]) -> float:
        asked.append(steps)
        return abs(sum(points[step] for step in steps) / len(steps))

    alone = {step: abs(value) for step, value in points.items()}
    rows = greedy_soup(alone, together, higher=False)
    # 20 first (0.5); with 40: 0.55, worse; with 10: 0.25, better; with 30: 3.5/3, worse
    assert [(row.step, row.kept) for row in rows] == [(20, True), (40, False), (10, True), (30, False)]
    assert [row.soup for row in rows] == pytest.approx([0.5, 0.55, 0.25, 3.5 / 3])
    assert [row.alone for row in rows] == [0.5, 0.6, 1.0, 3.0]
    assert asked == [[20, 40], [20, 10], [20, 10, 30]]
    higher = greedy_soup({s: -v for s, v in alone.items()}, lambda steps: -together(steps), higher=True)
    assert [(row.step, row.kept) for row in higher] == [(row.step, row.kept) for row in rows]


def test_a_greedy_soup_with_equals_and_values_that_are_not_finite() -> None:
    rows = greedy_soup({10: 1.0, 20: 1.0, 30: math.nan}, lambda steps: 1.0 if 30 not in steps else math.nan, False)
    assert [(row.step, row.kept) for row in rows] == [(10, True), (20, True), (30, False)]  # no worse is good enough
    assert [row.kept for row in greedy_soup({1: math.nan, 2: math.inf}, lambda steps: math.nan, True)] == [True, False]


def test_an_average_lies_in_the_stores_format_and_is_verified(tmp_path: Path) -> None:
    checkpoints(tmp_path / "checkpoints", 2, 4, 6)
    members = [Weights(open_checkpoint(tmp_path / "checkpoints" / step_name(step))) for step in (2, 4, 6)]
    path = write_average(tmp_path / "averages" / "last-3", Average(members), 6, {"average": {"name": "last-3"}})
    manifest = verify(path)
    assert manifest.step == 6 and manifest.state["average"]["name"] == "last-3" and manifest.counters == {}
    found = Weights(Reader(path, manifest))
    assert found.shapes == members[0].shapes and {"scale", "head"} <= found.shapes.keys()
    for name in found.shapes:
        expected = torch.stack([member.read(name).double() for member in members]).mean(0).float()
        assert torch.equal(found.read(name), expected), name
    one = write_average(tmp_path / "averages" / "one", Average(members[:1]), 2, {})
    again = Weights(Reader(one, verify(one)))
    assert all(torch.equal(again.read(name), members[0].read(name)) for name in again.shapes)
    # never taken for a checkpoint of the run
    assert newest(tmp_path / "averages") == []
    with pytest.raises(UserError, match=r"--ema: .*holds no averaged weights"):
        Weights(Reader(path, manifest), EMA)
    # written again it is replaced; a flipped bit is found
    write_average(path, Average(members[:2]), 4, {})
    assert verify(path).step == 4
    shard = next(path.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match="SHA-256"):
        verify(path)


def test_a_checkpoint_removed_meanwhile_is_told(tmp_path: Path) -> None:
    import shutil

    checkpoints(tmp_path, 2)
    weights = Weights(open_checkpoint(tmp_path))
    shutil.rmtree(weights.path)
    with pytest.raises(CheckpointError, match="removed while it was read"):
        weights.read("head")
