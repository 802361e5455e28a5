"""Examples to tensors: one micro-batch, packed or padded, with its targets already selected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.data.batch import Batch
from trainer.data.store import TokenisedSource


@dataclass(frozen=True)
class Example:
    """One example as the collator takes it; `label` is -1 where the target is not a class."""

    ids: np.ndarray  # (length,) int32
    weights: np.ndarray  # (length,) float32
    label: int
    task: str
    name: str


def example_of(source: TokenisedSource, index: int) -> Example:
    """Example ``index`` of a source."""
    ids, weights, label = source.example(index)
    return Example(ids, weights, label, source.task, source.example_id(index))


def collate(
    examples: Sequence[Example], tasks: tuple[str, ...], packed: bool, pad_id: int, classification: bool
) -> Batch:
    """One micro-batch. ``tasks``: all tasks of the stage. No examples: the empty batch of :class:`Batch`.

    Padding is where an example has ended; ``pad_id`` is only what stands there, and may be any token.
    """
    lengths = np.array([len(example.ids) for example in examples], dtype=np.int64)
    if not len(examples):
        ids, positions = np.full((1, 1), pad_id, np.int64), np.zeros((1, 1), np.int64)
    elif packed:
        ids = np.concatenate([example.ids for example in examples]).astype(np.int64)[None]  # (1, total)
        positions = np.concatenate([np.arange(length) for length in lengths])[None]  # (1, total)
    else:
        width = int(lengths.max())
        ids = np.full((len(examples), width), pad_id, np.int64)  # (examples, longest)
        for row, example in enumerate(examples):
            ids[row, : len(example.ids)] = example.ids
        positions = np.broadcast_to(np.arange(width), ids.shape).copy()  # (examples, longest)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if packed else np.arange(len(examples)) * ids.shape[1]
    selected = [_targets(example, int(start), classification) for example, start in zip(examples, starts, strict=False)]
    owners = np.repeat(np.arange(len(examples)), [len(index) for index, _, _ in selected])
    task_of = np.array([tasks.index(example.task) for example in examples], dtype=np.int64)
    return Batch(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        lengths=torch.from_numpy(lengths.astype(np.int32)),
        packed=packed,
        target_index=_joined([index for index, _, _ in selected], torch.int64),
        targets=_joined([targets for _, targets, _ in selected], torch.int64),
        weights=_joined([weights for _, _, weights in selected], torch.float32),
        target_task=_joined([task_of[owners]] if len(examples) else [], torch.int64),
        target_example=_joined([owners] if len(examples) else [], torch.int64),
        tasks=tasks,
        example_ids=tuple(example.name for example in examples),
    )


def _targets(example: Example, start: int, classification: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(flat positions that predict, what they predict, weights) of an example whose first token lies at ``start``."""
    if classification:
        return np.array([start + len(example.ids) - 1]), np.array([example.label]), np.ones(1, np.float32)
    predicting = np.flatnonzero(example.weights[1:] > 0)  # t predicts t + 1, within the example alone
    return start + predicting, example.ids[predicting + 1], example.weights[predicting + 1]


def _joined(parts: Sequence[np.ndarray], dtype: torch.dtype) -> Tensor:
    if not parts:
        return torch.empty(0, dtype=dtype)
    return torch.from_numpy(np.concatenate(parts)).to(dtype)
