"""Averages of a run's checkpoints, made one tensor at a time.

The mean of weights along one run's path often generalises better than its last point (Izmailov et al. 2018, "Averaging
Weights Leads to Wider Optima and Better Generalization"; Wortsman et al. 2022, "Model soups").

What is averaged is the model. A tensor that was trained itself becomes the mean of its values. A low-rank change is
s B A, and the mean of products is not the product of means: mean(B) mean(A) leaves out how B and A vary together. The
mean of k changes is itself a change of rank at most k r, and this is its exact form, nothing approximated:

    (1/k) sum_i B_i A_i = [B_1/k ... B_k/k] [A_1; ...; A_k]

So an average of k adapters of rank r is an adapter of rank k r with the same scale s, which `tuning` tells (alpha grows
by k, rank-stabilised by sqrt(k)).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.durable import clean, publish_folder, remove_folder, staging_folder, sync, write_file
from trainer.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    SEAL,
    FileRecord,
    Manifest,
    Range,
    TensorRecord,
    encode,
    shard_key,
    shard_name,
)
from trainer.checkpoint.merge import learned
from trainer.checkpoint.ranges import PARAMETER
from trainer.checkpoint.tensor_files import Planned, write_tensors
from trainer.checkpoint.weights import Source, check_shapes
from trainer.config.errors import UserError
from trainer.config.schema import Tuning


def mean(tensors: Iterable[Tensor]) -> Tensor:
    """The elementwise mean, summed in fp64 and rounded to the tensors' own dtype once.

    One tensor is returned bitwise as it is; fp64 keeps the sum of fp32 values of like size exact, and the result never
    leaves the range of the values.
    """
    total: Tensor | None = None
    count = 0
    for tensor in tensors:
        dtype = tensor.dtype
        total = tensor.to(torch.float64, copy=True) if total is None else total.add_(tensor)
        count += 1
    if total is None:
        raise ValueError("the mean of nothing")
    return total.div_(count).to(dtype)


def stacked_down(factors: Sequence[Tensor]) -> Tensor:
    """The A of the mean of low-rank changes: (k r, in) of k times (r, in)."""
    return torch.cat(list(factors))


def stacked_up(factors: Sequence[Tensor]) -> Tensor:
    """The B of the mean of low-rank changes: (out, k r) of k times (out, r), each divided by k."""
    return torch.cat([factor / len(factors) for factor in factors], dim=1)


def averaged_tuning(tuning: Tuning, count: int) -> Tuning:
    """The settings under which an average of `count` low-rank changes is a low-rank change of the same scale."""
    if tuning.method != "lora":
        return tuning
    grown = count**0.5 if tuning.rslora else count
    return tuning.model_copy(update={"rank": tuning.rank * count, "alpha": tuning.alpha * grown})


def check_ranks(shapes: Mapping[str, tuple[int, ...]], tuning: Tuning) -> None:
    """Raise UserError where a low-rank change is not one product of rank r (adapted experts have one for each expert,
    in an order of their own)."""
    for pair in learned(shapes).low_rank.values():
        if shapes[pair.down][0] != tuning.rank:
            raise UserError(
                f"average: {pair.down}: rank {shapes[pair.down][0]}, tuning.rank {tuning.rank}: adapters of experts "
                "cannot be averaged; name `tuning.targets` without them in the next run"
            )


class Average:
    """The average of several sources as a source: a tensor is made when it is read.

    With `width`, low-rank factors are as wide as those of an average of that many, with zeros in the rest: a model
    built once can then hold averages of fewer.
    """

    def __init__(self, members: Sequence[Source], width: int | None = None) -> None:
        """Raises UserError where the members are not of one model, ValueError where there is none."""
        if not members:
            raise ValueError("the average of nothing")
        self.members = members
        self.width = len(members) if width is None else width
        for member in members[1:]:
            check_shapes(members[0].shapes, member.shapes)
        pairs = learned(members[0].shapes).low_rank.values()
        self._down, self._up = {pair.down for pair in pairs}, {pair.up for pair in pairs}
        self.shapes: Mapping[str, tuple[int, ...]] = {n: self._shape(n, s) for n, s in members[0].shapes.items()}

    def read(self, name: str) -> Tensor:
        """The averaged tensor."""
        if name not in self._down and name not in self._up:
            return mean(member.read(name) for member in self.members)
        factors = [member.read(name) for member in self.members]
        made = stacked_down(factors) if name in self._down else stacked_up(factors)
        if tuple(made.shape) == self.shapes[name]:
            return made
        wide = made.new_zeros(self.shapes[name])
        wide[: made.shape[0], : made.shape[1]] = made
        return wide

    def _shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if name in self._down:
            return (shape[0] * self.width, *shape[1:])
        return (shape[0], shape[1] * self.width) if name in self._up else shape


@dataclass(frozen=True)
class Step:
    """One candidate of a greedy soup: its metric alone, the soup's metric with it, and whether it stayed."""

    step: int
    alone: float
    soup: float
    kept: bool


def greedy_soup(alone: Mapping[int, float], together: Callable[[list[int]], float], higher: bool) -> list[Step]:
    """Which of several checkpoints to average: best first, one at a time, kept where the average gets no worse.

    (Wortsman et al. 2022, sec. 3, recipe 1.) `alone` is each step's held-out metric, `together(steps)` measures the
    average of several. Of equals the earlier step comes first. A value that is not finite is worse than any.
    """
    sign = 1.0 if higher else -1.0
    rank = {step: sign * value if math.isfinite(value) else -math.inf for step, value in alone.items()}
    order = sorted(alone, key=lambda step: (-rank[step], step))
    rows = [Step(order[0], alone[order[0]], alone[order[0]], True)]
    best, kept = rank[order[0]], [order[0]]
    for step in order[1:]:
        value = together([*kept, step])
        stays = math.isfinite(value) and sign * value >= best
        if stays:
            kept, best = [*kept, step], sign * value
        rows.append(Step(step, alone[step], value, stays))
    return rows


def write_average(target: Path, average: Average, step: int, state: dict[str, Any]) -> Path:
    """Write an average in the store's own format, in fp32, one tensor at a time; published whole or not at all.

    It holds values alone, no optimizer's state: nothing can be resumed from it. `step` is the newest member's. An older
    average of the same name is replaced.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    clean(target.parent, f"{target.name}@")
    staging = staging_folder(target)
    file = shard_name(0, 1)
    names = {shard_key(PARAMETER, name, 0, whole=False): name for name in average.shapes}
    planned = [Planned(key, torch.float32, (_numel(average.shapes[name]),)) for key, name in names.items()]
    digest = hashlib.sha256()
    try:
        write_tensors(staging / file, planned, lambda key: average.read(names[key]).float().view(-1), digest)
        record = FileRecord(size=(staging / file).stat().st_size, sha256=digest.hexdigest())
        tensors = [_record(name, shape, file) for name, shape in average.shapes.items()]
        manifest = Manifest(
            format=FORMAT, step=step, world_size=1, files={file: record}, tensors=tensors, counters={}, state=state
        )
        data, seal = encode(manifest)
        write_file(staging / MANIFEST, data)
        write_file(staging / SEAL, seal)
        sync(staging)
        publish_folder(staging, target)
    except Exception:
        remove_folder(staging)
        raise
    return target


def _record(name: str, shape: tuple[int, ...], file: str) -> TensorRecord:
    ranges = [Range(file=file, start=0, numel=_numel(shape))]
    return TensorRecord(kind=PARAMETER, name=name, shape=list(shape), dtype="F32", whole=False, ranges=ranges)


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
