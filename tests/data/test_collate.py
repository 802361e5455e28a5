"""Tensors by hand: predicting positions never cross from one example to the next."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from source_cases import source

from trainer.data.batch import target_counts
from trainer.data.collate import Example, collate
from trainer.data.loader import evaluation_batches


def example(ids: list[int], weights: list[float], label: int = -1, task: str = "t") -> Example:
    return Example(np.array(ids, np.int32), np.array(weights, np.float32), label, task, f"s:{ids[0]}")


PAIR = [example([10, 11, 12], [0, 0, 1]), example([20, 21, 22, 7], [0, 0.5, 0, 1], task="u")]


def test_packed_by_hand() -> None:
    batch = collate(PAIR, ("t", "u"), packed=True, pad_id=7, classification=False)
    assert batch.ids.tolist() == [[10, 11, 12, 20, 21, 22, 7]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert batch.lengths.tolist() == [3, 4] and batch.tokens == 7
    assert batch.target_index.tolist() == [1, 3, 5]  # never 2, whose next token is another example's first
    assert batch.targets.tolist() == [12, 21, 7] and batch.weights.tolist() == [1.0, 0.5, 1.0]
    assert batch.target_task.tolist() == [0, 1, 1] and batch.target_example.tolist() == [0, 1, 1]
    assert target_counts([batch]) == {"t": 1.0, "u": 1.5}
    assert batch.ids.dtype == torch.int64 and batch.lengths.dtype == torch.int32


def test_padded_by_hand_with_a_real_token_as_pad() -> None:
    batch = collate(PAIR, ("t", "u"), packed=False, pad_id=7, classification=False)
    assert batch.ids.tolist() == [[10, 11, 12, 7], [20, 21, 22, 7]]
    assert batch.positions.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert batch.target_index.tolist() == [1, 4, 6] and batch.targets.tolist() == [12, 21, 7]
    assert batch.mask.tolist() == [[True, True, True, False], [True] * 4]  # by length: the last 7 is a real token


def test_classes_are_predicted_from_the_last_token() -> None:
    pair = [example([10, 11, 12], [0] * 3, label=1), example([20, 21], [0] * 2, label=0)]
    packed = collate(pair, ("t",), packed=True, pad_id=0, classification=True)
    padded = collate(pair, ("t",), packed=False, pad_id=0, classification=True)
    assert packed.target_index.tolist() == [2, 4] and padded.target_index.tolist() == [2, 4]
    assert packed.targets.tolist() == padded.targets.tolist() == [1, 0]


def test_empty_batch() -> None:
    for packed in (True, False):
        batch = collate([], ("t",), packed=packed, pad_id=7, classification=False)
        assert batch.ids.tolist() == [[7]] and batch.tokens == 0 and batch.mask.tolist() == [[True]]
        assert len(batch.targets) == len(batch.target_task) == len(batch.weights) == 0 and batch.example_ids == ()
        assert target_counts([batch]) == {"t": 0.0}


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), packed=st.booleans())
def test_position_t_predicts_the_token_behind_it(lengths: list[int], packed: bool) -> None:
    rows = [example(list(range(100 * n, 100 * n + size)), [0] + [1] * (size - 1)) for n, size in enumerate(lengths)]
    batch = collate(rows, ("t",), packed=packed, pad_id=-1, classification=False)
    before = batch.ids.flatten()[batch.target_index]
    assert (before + 1 == batch.targets).all() and len(batch.targets) == sum(lengths) - len(lengths)
    assert (batch.targets // 100 == batch.target_example).all()


def test_evaluation_gives_every_rank_the_same_number_of_batches_and_each_example_once() -> None:
    held_out = source("test", [3, 9, 4, 8, 5])
    options = {"packed": False, "pad_id": 0}
    dealt = [list(evaluation_batches(held_out, 16, rank=rank, size=4, **options)) for rank in range(4)]
    assert len({len(batches) for batches in dealt}) == 1
    names = sorted(name for batches in dealt for batch in batches for name in batch.example_ids)
    assert names == [f"test:{line}" for line in range(1, 6)]
