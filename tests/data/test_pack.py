"""Micro-batches: every example once, limits held, the same number for each rank."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.pack import pack


@given(
    lengths=st.lists(st.integers(1, 50), max_size=60),
    limit=st.integers(50, 200),
    world=st.sampled_from([1, 2, 3, 4, 8]),
    packed=st.booleans(),
)
def test_properties(lengths: list[int], limit: int, world: int, packed: bool) -> None:
    batches = pack(lengths, limit, world, packed)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert batches and len(batches) % world == 0
    for batch in batches:
        sizes = [lengths[index] for index in batch]
        cost = sum(sizes) if packed else len(sizes) * max(sizes, default=0)
        assert cost <= limit
    empty = sum(not batch for batch in batches)
    assert not empty or len(lengths) < len(batches)
    assert batches == pack(list(lengths), limit, world, packed)


@given(lengths=st.lists(st.integers(1, 20), min_size=40, max_size=60), world=st.sampled_from([2, 4]))
def test_ranks_carry_about_the_same(lengths: list[int], world: int) -> None:
    batches = pack(lengths, 100, world, packed=True)
    loads = [sum(lengths[index] for batch in batches[rank::world] for index in batch) for rank in range(world)]
    assert max(loads) - min(loads) <= 20  # one example of the longest kind


def test_by_hand() -> None:
    assert pack([5, 4, 3, 2], 7, 2, packed=True) == [[0, 3], [1, 2]]
    assert pack([5, 4, 3, 2], 14, 1, packed=True) == [[0, 1, 2, 3]]
    assert pack([5, 4, 3, 2], 10, 1, packed=False) == [[0, 1], [2, 3]]
    assert pack([5], 10, 2, packed=True) == [[0], []]
    assert pack([], 10, 2, packed=False) == [[], []]


def test_an_example_over_the_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="11 tokens"):
        pack([3, 11], 10, 1, packed=True)
