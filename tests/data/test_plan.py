"""The plan: examples of a step from seed and position alone, each once an epoch, mixtures in exact proportion."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from source_cases import source, stage

from trainer.data.loader import Loader
from trainer.data.order import MixtureOrder, permutation
from trainer.data.plan import Plan, count_token_steps

lengths_lists = st.lists(st.integers(2, 40), min_size=1, max_size=30)
batches = st.one_of(
    st.builds(lambda n: {"examples": n}, st.integers(1, 9)), st.builds(lambda n: {"tokens": n}, st.integers(20, 150))
)


def walk(plan: Plan, state: dict[str, Any] | None = None) -> list[list[tuple[str, int]]]:
    state = state or plan.start()
    steps = []
    while not plan.is_done(state):
        chosen, state = plan.next_step(state)
        steps.append(chosen)
    assert plan.next_step(state) == ([], state)
    return steps


def test_the_stream_is_this_one_forever() -> None:
    """Resumed runs rely on it: a change of these numbers breaks every checkpoint."""
    assert permutation(17, 0, "tickets", 0, 10).tolist() == FIRST
    assert permutation(17, 0, "tickets", 1, 10).tolist() != FIRST


FIRST = [9, 3, 7, 8, 2, 1, 6, 0, 4, 5]


@given(lengths=lengths_lists, batch=batches, epochs=st.integers(1, 3), seed=st.integers(0, 99))
def test_single_source_gives_each_example_once_an_epoch(
    lengths: list[int], batch: dict[str, int], epochs: int, seed: int
) -> None:
    plan = Plan(stage({"a": 1.0}, batch, epochs=epochs), {"a": source("a", lengths)}, seed, 0)
    steps = walk(plan)
    assert len(steps) == plan.total_steps == plan.totals()["steps"]
    stream = [index for step in steps for _, index in step]
    for epoch in range(epochs):
        assert sorted(stream[epoch * len(lengths) : (epoch + 1) * len(lengths)]) == list(range(len(lengths)))
    assert len(stream) == epochs * len(lengths) == plan.totals()["examples"]
    assert plan.totals()["tokens"] == sum(lengths) * epochs
    if "examples" in batch:
        assert all(len(step) == batch["examples"] for step in steps[:-1])
    else:
        sizes = [[lengths[index] for _, index in step] for step in steps]
        assert all(sum(size) <= batch["tokens"] or len(size) == 1 for size in sizes)
        for size, after in pairwise(sizes):
            assert sum(size) + after[0] > batch["tokens"]  # as many as fit


@given(
    weights=st.lists(st.integers(1, 50), min_size=2, max_size=4),
    draws=st.integers(1, 200),
    start=st.integers(0, 100),
)
def test_every_prefix_of_a_mixture_is_in_proportion(weights: list[int], draws: int, start: int) -> None:
    names = "abcd"[: len(weights)]
    order = MixtureOrder(dict.fromkeys(names, 7), {name: w / 100 for name, w in zip(names, weights, strict=True)}, 1, 0)
    sources, _ = order.block({}, start + draws)
    for position in range(1, start + draws + 1):
        counts = np.bincount(sources[:position], minlength=len(names))
        shares = np.array(weights) * position / sum(weights)
        assert np.abs(counts - shares).max() < len(names) - 0.999
    drawn = Counter(names[index] for index in sources[:start])
    assert np.array_equal(order.block(drawn, draws)[0], sources[start:])  # entered anywhere, the same stream


def test_an_epoch_is_a_pass_over_the_source_with_the_largest_weight() -> None:
    sources = {"big": source("big", [5] * 80), "small": source("small", [5] * 3)}
    plan = Plan(stage({"big": 0.8, "small": 0.2}, {"examples": 10}, epochs=1), sources, 3, 0)
    stream = [draw for step in walk(plan) for draw in step]
    assert len(stream) == 100 and plan.total_steps == 10  # 80 / 0.8
    assert sorted(index for name, index in stream if name == "big") == list(range(80))
    assert sorted(Counter(index for name, index in stream if name == "small").values()) == [6, 7, 7]
    assert plan.totals()["epochs"] == {"big": 1.0, "small": pytest.approx(20 / 3)}
    for step in walk(plan):
        assert Counter(name for name, _ in step) == {"big": 8, "small": 2}


def test_steps_cap_and_run_on_without_epochs() -> None:
    sources = {"a": source("a", [5] * 10)}
    assert len(walk(Plan(stage({"a": 1.0}, {"examples": 4}, steps=7), sources, 0, 0))) == 7  # 28 draws of 10 examples
    assert len(walk(Plan(stage({"a": 1.0}, {"examples": 4}, steps=7, epochs=1), sources, 0, 0))) == 3
    assert Plan(stage({"a": 1.0}, {"tokens": 10}, steps=2, epochs=1), sources, 0, 0).total_steps == 2
    assert Plan(stage({"a": 1.0}, {"tokens": 10}, steps=2, epochs=1), sources, 0, 0).totals()["examples"] == 4


def test_token_steps_by_hand() -> None:
    blocks = [np.array([4, 4, 4]), np.array([4, 20, 1])]
    assert count_token_steps(iter(blocks), 8) == 4  # 4+4, 4+4, 20 alone, 1
    assert count_token_steps(iter(blocks), 8, most=2) == 2


@given(batch=batches, cut=st.integers(0, 6), size=st.sampled_from([1, 2, 4]), seed=st.integers(0, 9))
def test_a_loader_from_its_state_goes_on_as_if_never_stopped(
    batch: dict[str, int], cut: int, size: int, seed: int
) -> None:
    sources = {"a": source("a", list(range(2, 33))), "b": source("b", [7, 9])}

    def loader(size: int) -> Loader:
        plan = Plan(stage({"a": 0.7, "b": 0.3}, batch, epochs=1.5), sources, seed, 1)
        return Loader(plan, rank=0, size=size, packed=True, pad_id=0)

    whole, first, second = loader(1), loader(size), loader(2)
    expected = []
    while not whole.done:
        whole.next_step()
        expected.append(whole.step_ids())
    got = []
    while not first.done and len(got) < cut:
        first.next_step()
        got.append(first.step_ids())
    second.load(json.loads(json.dumps(first.state())))
    while not second.done:
        second.next_step()
        got.append(second.step_ids())
    assert got == expected and len(got) == whole.total_steps


@given(batch=batches, packed=st.booleans(), seed=st.integers(0, 9))
def test_the_examples_of_a_step_do_not_depend_on_the_number_of_ranks(
    batch: dict[str, int], packed: bool, seed: int
) -> None:
    sources = {"a": source("a", list(range(2, 33)))}
    per_world = []
    for size in (1, 2, 4):
        plan = Plan(stage({"a": 1.0}, batch, epochs=1), sources, seed, 0)
        loaders = [Loader(plan, rank=rank, size=size, packed=packed, pad_id=0) for rank in range(size)]
        steps = []
        while not loaders[0].done:
            dealt = [loader.next_step() for loader in loaders]
            assert len({len(batches) for batches in dealt}) == 1
            names = sorted(name for batches in dealt for one in batches for name in one.example_ids)
            assert names == sorted(loaders[0].step_ids()) and loaders[-1].step_ids() == loaders[0].step_ids()
            targets = [one.targets.numpy() for batches in dealt for one in batches]
            steps.append((names, sorted(np.concatenate(targets).tolist())))
        per_world.append(steps)
    assert per_world[0] == per_world[1] == per_world[2]


def test_a_state_of_another_stage_is_refused() -> None:
    plan = Plan(stage({"a": 1.0}, {"examples": 4}), {"a": source("a", [5] * 10)}, 0, 0)
    with pytest.raises(ValueError, match="lacks: b"):
        Loader(plan, rank=0, size=1, packed=True, pad_id=0).load({"step": 1, "drawn": {"b": 3}})
