"""What DeepSpeed's ZeRO optimizers hold of the trainable parameters, as parts that the shared update can step.

DeepSpeed keeps what it is good at: partitioning, reducing gradients, gathering weights, moving them to host memory and
back. Norm, clipping, penalties and the update itself are `engine.update`, so they are the same under every engine.

The attributes read here are not public. They are those of DeepSpeed 0.19 (the range in pyproject.toml); the tests of
this engine compare every one of them with a single process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.engine.base import Piece
from trainer.engine.update import FlatLocal

Names = Mapping[int, str]
"""id of a parameter -> its name in the trainee."""


class Partitions(Protocol):
    """The fp32 masters of one kind of ZeRO optimizer: one flat part for each parameter group (stage 3: sub group)."""

    parts: list[FlatLocal]
    kinds: list[tuple[str, tuple[int, ...]]]  # (name, shape) of one parameter of each part's group

    def collect(self) -> None:
        """Put the step's reduced gradients (fp32) where the update looks for them: in each part's `.grad`."""

    def publish(self) -> None:
        """Bring the model's parameters in line with the masters: cast to their dtype, gathered over the ranks."""

    def drop(self) -> None:
        """Forget the step's gradients, applied or not: the next backward starts from zero."""


def partitions(zero: Any, names: Names) -> Partitions:
    """The partitions of whatever optimizer `deepspeed.initialize` made."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    if isinstance(zero, BF16_Optimizer):
        return WholeGradients(zero, names)
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        return SubGroups(zero, names)
    return FlatGroups(zero, names)


class FlatGroups:
    """ZeRO 1 and 2: each group's parameters lie end to end in one flat tensor, cut into equal partitions by rank.

    A parameter may reach over the border of two partitions. Padding sits at the end, and between parameters where
    the settings ask for alignment.
    """

    def __init__(self, zero: Any, names: Names) -> None:
        self._zero = zero
        self.parts, self.kinds = [], []
        for index, master in enumerate(zero.single_partition_of_fp32_groups):
            parameters = zero.round_robin_bit16_groups[index]  # in their order in the flat tensor
            placed = zip(parameters, zero.round_robin_bit16_offsets[index], strict=True)
            rank = dist.get_rank(zero.real_dp_process_group[index])
            self.parts.append(FlatLocal(master, tuple(overlaps(placed, names, rank * master.numel(), master.numel()))))
            self.kinds.append((names[id(parameters[0])], tuple(parameters[0].shape)))

    def collect(self) -> None:
        """Join each group's gradients; under offload DeepSpeed has copied them to the masters' by now."""
        self._zero._wait_for_offload_copies()
        if self._zero.cpu_offload:
            return
        for index, part in enumerate(self.parts):
            part.tensor.grad = _joined(self._zero.averaged_gradients.get(index), part.tensor)

    def publish(self) -> None:
        """Cast this rank's partition and gather the others'."""
        self._zero.update_lp_params()

    def drop(self) -> None:
        """What DeepSpeed's own step does at its end."""
        zero = self._zero
        zero.zero_grad(set_to_none=True)
        zero.micro_step_id = -1
        for index, part in enumerate(self.parts):
            zero.averaged_gradients[index] = zero.all_grad_tensors[index] = None
            if zero.cpu_offload:
                assert part.tensor.grad is not None  # pinned, made once; a parameter without a gradient leaves it be
                part.tensor.grad.zero_()
            else:
                part.tensor.grad = None
        if zero.cpu_offload:
            zero.reset_cpu_buffers()
            zero._offload_accumulated_param_ids = set()


class WholeGradients:
    """ZeRO 1 in bf16 with fp32 accumulation, for which DeepSpeed has an optimizer of its own: partitions as above,
    gradients whole on every rank."""

    def __init__(self, zero: Any, names: Names) -> None:
        self._zero = zero
        self.parts, self.kinds = [], []
        for index, master in enumerate(zero.fp32_groups_flat_partition):
            parameters = zero.bf16_groups[index]
            rank = dist.get_rank(zero.real_dp_process_group[index])
            placed = zip(parameters, _offsets(parameters), strict=True)
            self.parts.append(FlatLocal(master, tuple(overlaps(placed, names, rank * master.numel(), master.numel()))))
            self.kinds.append((names[id(parameters[0])], tuple(parameters[0].shape)))

    def collect(self) -> None:
        """This rank's ranges of the whole gradients, as views."""
        for part, gradient in zip(self.parts, self._zero.fp32_groups_gradient_flat_partition, strict=True):
            part.tensor.grad = gradient

    def publish(self) -> None:
        """Cast this rank's partition and gather the others'."""
        self._zero.update_lp_params()

    def drop(self) -> None:
        """Zero the whole gradients."""
        self._zero.zero_grad(set_to_none=True)
        for part in self.parts:
            part.tensor.grad = None


class SubGroups:
    """ZeRO 3: each parameter alone is cut into equal partitions (the last may be short or empty, padded to the same
    length); a sub group holds this rank's partitions of some parameters end to end."""

    def __init__(self, zero: Any, names: Names) -> None:
        self._zero = zero
        self.parts, self.kinds = [], []
        start = 0
        for master, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            self.parts.append(FlatLocal(master, tuple(_partitioned(parameters, names))))
            self.kinds.append((names[id(parameters[0])], tuple(parameters[0].ds_shape)))
            # One buffer holds the gradients of all sub groups in this very order, reduced and accumulated in fp32, on
            # the host where the optimizer is: no copy is made of it.
            master.grad = zero.grad_partitions_flat_buffer.narrow(0, start, master.numel())
            start += master.numel()

    def collect(self) -> None:
        """Nothing: the masters' gradients are views of DeepSpeed's buffer."""

    def publish(self) -> None:
        """Copy the masters into the partitions of the model; small parameters that stay gathered are gathered anew."""
        self._zero.checkpoint_event_prologue()
        for index in range(len(self.parts)):
            self._zero._reassign_or_swap_out_partitioned_parameters(index)
        self._zero.checkpoint_event_epilogue()

    def drop(self) -> None:
        """What DeepSpeed's own step does at its beginning and its end."""
        zero = self._zero
        zero._pre_step()
        zero.zero_grad(set_to_none=True)
        zero.grad_partitions_flat_buffer.zero_()  # a parameter without a gradient in the next step leaves it be
        zero.averaged_gradients = {}
        if zero.offload_optimizer:
            zero.reset_cpu_buffers()


def overlaps(placed: Any, names: Names, low: int, numel: int) -> Iterator[Piece]:
    """The pieces of a partition [low, low + numel) of a flat tensor; `placed`: (parameter, its offset in it)."""
    for parameter, offset in placed:
        first, last = max(offset, low), min(offset + parameter.numel(), low + numel)
        if first < last:
            shape = tuple(parameter.shape)
            yield Piece(names[id(parameter)], first - offset, last - first, first - low, shape)


def _partitioned(parameters: list[Any], names: Names) -> Iterator[Piece]:
    offset = 0
    for parameter in parameters:
        length = parameter.partition_numel()  # ceil(numel / ranks)
        start = dist.get_rank(parameter.ds_process_group) * length
        numel = max(0, min(length, parameter.ds_numel - start))
        if numel:
            yield Piece(names[id(parameter)], start, numel, offset, tuple(parameter.ds_shape))
        offset += length


def _offsets(parameters: list[Tensor]) -> list[int]:
    ends = torch.tensor([parameter.numel() for parameter in parameters]).cumsum(0).tolist()
    return [0, *ends[:-1]]


def _joined(gradients: Any, master: Tensor) -> Tensor:
    """A group's gradients as one fp32 tensor as long as the master; zeros where nothing had a gradient."""
    if gradients is None:
        return torch.zeros_like(master)
    whole = getattr(gradients, "flat_partition", None)  # accumulated in fp32 apart from the parameters' dtype
    if whole is None:
        whole = torch.cat([gradient.reshape(-1) for gradient in gradients])
    if whole.numel() < master.numel():  # the padding at the end of the last partition
        whole = torch.cat([whole, whole.new_zeros(master.numel() - whole.numel())])
    return whole.to(master.dtype)
