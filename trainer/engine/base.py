"""What the step and the checkpoint need of an engine, and no more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer.config.schema import Optimizer
from trainer.model.root import Trainee


@dataclass(frozen=True)
class Piece:
    """A contiguous flat range of a named parameter, and where it lies in its slot's local 1-D view."""

    name: str
    start: int  # first element of the range in the flattened parameter
    numel: int
    offset: int  # first element of the range in the slot's local view
    shape: tuple[int, ...]  # of the whole parameter


@dataclass(frozen=True)
class Slot:
    """A tensor that the base optimizer steps (the key of its state, the owner of the gradient), with its named ranges.

    One parameter (single), one row shard of it (FSDP2) or a flat partition of many (ZeRO): all are contiguous ranges.
    """

    owner: Tensor
    pieces: tuple[Piece, ...]
    state: dict[str, Tensor | float]  # the optimizer's state of the owner, as it lives (empty before the first step)

    def value(self, piece: Piece) -> Tensor:
        """1-D writable view of the piece's values."""
        return flat(self.owner)[piece.offset : piece.offset + piece.numel]

    def gradient(self, piece: Piece) -> Tensor | None:
        """1-D writable view of the piece's gradient; None where the parameter got none."""
        if self.owner.grad is None:
            return None
        return flat(self.owner.grad)[piece.offset : piece.offset + piece.numel]

    def moment(self, kind: str, piece: Piece) -> Tensor:
        """1-D writable view of an optimizer state tensor of the parameter's shape, e.g. `exp_avg`."""
        tensor = self.state[kind]
        assert isinstance(tensor, Tensor)
        return flat(tensor)[piece.offset : piece.offset + piece.numel]


def flat(tensor: Tensor) -> Tensor:
    """The local part of a tensor as a 1-D view; never copies."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().view(-1)


@dataclass(frozen=True)
class Replica:
    """A tensor of this rank of which other ranks hold a copy that must be the same bit for bit."""

    name: str  # of the parameter
    tensor: Tensor
    ranks: tuple[int, ...]  # all that hold a copy, this one included, ascending


Pull = Callable[[Iterator[Slot]], None]
"""Adds to the gradients of this rank's slots (EWC, SI); acts after clipping and before the update."""


class Engine(Protocol):
    """Five verbs. The step speaks of sums only: an engine that averages over ranks undoes it inside itself."""

    model: Trainee

    def configure(self, settings: Optimizer, lr: float) -> None:
        """New optimizers with fresh state, as a stage with its own settings needs them."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of one micro-batch; `last` marks the step's last, where gradients are reduced."""

    def step(self, lr_factor: float, *, pull: Pull, apply: bool = True) -> float:
        """Clip, pull, update, zero. Returns the global gradient norm before clipping.

        `pull` is called once, with every slot of this rank and its gradient. A norm that is not finite (the same on
        all ranks) updates nothing: parameters and moments stay as they were; nor does any step without `apply`, which
        measures the norm and drops the gradients.
        """

    def slots(self) -> Iterator[Slot]:
        """This rank's slots, in the same order at every call; an owner may hold a replica of another rank's."""

    def writes(self, slot: Slot) -> bool:
        """Whether this rank is the one that saves the slot (replicas are saved once)."""

    def prepare_state(self) -> None:
        """Make zero optimizer state for every slot, so that a load has where to write."""

    def after_load(self) -> None:
        """Bring copies of the parameters (low precision, gathered) in line after values were written to slots."""

    def replicas(self) -> Iterator[Replica]:
        """What this rank holds as a copy of other ranks' tensors: trainable parameters, in the same order on all of
        them. Nothing where every element lives once."""
