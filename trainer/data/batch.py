"""What the step sees: one micro-batch as tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one device.

    packed: the examples lie one behind the other in a single row (1, total) and nothing is padding.
    padded: one example a row (examples, longest), padding on the right.
    Targets are already selected: `target_index` are flat positions in `ids` (row * length + column) of the hidden
    states
    that predict, so position t where token t+1 is a target; for classification the last token of the example, with
    `targets` the class. Logits are made for these positions only.
    An empty batch (a rank with nothing left in a step) has one dummy token, no targets and no examples.
    """

    ids: Tensor  # (rows, length) int64
    positions: Tensor  # (rows, length) int64, restarting at 0 for each example
    lengths: Tensor  # (examples,) int32: tokens of each example
    packed: bool
    target_index: Tensor  # (targets,) int64
    targets: Tensor  # (targets,) int64: token ids, or classes
    weights: Tensor  # (targets,) float32
    target_task: Tensor  # (targets,) int64: index into `tasks`
    target_example: Tensor  # (targets,) int64: index into `example_ids`
    tasks: tuple[str, ...]  # all tasks of the stage, the same on every rank
    example_ids: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on a device."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    @property
    def mask(self) -> Tensor:
        """(rows, length) bool: true on real tokens. For a packed batch all true."""
        if self.packed or not len(self.example_ids):
            return torch.ones_like(self.ids, dtype=torch.bool)
        columns = torch.arange(self.ids.shape[1], device=self.ids.device)
        return columns < self.lengths[:, None]

    @property
    def tokens(self) -> int:
        """Real tokens, padding not counted."""
        return int(self.lengths.sum())


def target_counts(batches: list[Batch]) -> dict[str, float]:
    """{task: sum of target weights} of this rank's micro-batches: the denominators, before they are summed over
    ranks."""
    tasks = batches[0].tasks
    counts = dict.fromkeys(tasks, 0.0)
    for batch in batches:
        sums = torch.zeros(len(tasks), dtype=torch.float64).index_add_(0, batch.target_task, batch.weights.double())
        for task, value in zip(tasks, sums.tolist(), strict=True):
            counts[task] += value
    return counts
