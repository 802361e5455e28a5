"""The update that every engine over plain local tensors shares: norm over ranks, clip, pull, step, zero."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.engine.base import Piece, Pull, Slot
from trainer.world import World


@dataclass
class Local:
    """This rank's part of a trainable parameter: a plain tensor that shares the parameter's storage."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    start: int  # first element of the part in the flattened parameter
    tensor: Tensor  # what the optimizer steps; its .grad is set before the update
    written: bool = True  # whether this rank saves it (False for a replica)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The part as one range; none where the rank holds no element."""
        numel = self.tensor.numel()
        return (Piece(self.name, self.start, numel, 0, self.shape),) if numel else ()


@dataclass
class FlatLocal:
    """This rank's part of several trainable parameters at once: a flat partition, padding included."""

    tensor: Tensor  # 1-D; what the optimizer steps; its .grad is set before the update, zero in the padding
    pieces: tuple[Piece, ...]
    written: bool = True


class Updater:
    """Owns the optimizers over local tensors."""

    def __init__(
        self,
        locals_: Sequence[Local | FlatLocal],
        optimizers: list[torch.optim.Optimizer],
        clip: float | None,
        world: World,
    ) -> None:
        self.locals = locals_
        self.optimizers = optimizers
        self.clip = clip
        self.world = world
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["peak_lr"] = group["lr"]

    def norm(self) -> float:
        """L2 norm of the whole gradient, over ranks; the same number on every rank."""
        grads = [local.tensor.grad for local in self.locals if local.tensor.grad is not None and local.written]
        norms = torch._foreach_norm(grads) if grads else []
        squared = float(torch.stack([n.float() for n in norms]).double().square().sum()) if norms else 0.0
        return math.sqrt(self.world.sum({"squared": squared})["squared"])

    def step(self, lr_factor: float, pull: Pull, apply: bool = True) -> float:
        """Clip, pull, update; a norm that is not finite changes nothing, nor does a step without `apply`. Gradients
        are left to the engine to zero."""
        norm = self.norm()
        if not (apply and math.isfinite(norm)):
            return norm
        if self.clip is not None and norm > self.clip:
            torch._foreach_mul_(
                [local.tensor.grad for local in self.locals if local.tensor.grad is not None], self.clip / (norm + 1e-6)
            )
        pull(self.slots())
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_factor
            optimizer.step()
        return norm

    def slots(self) -> Iterator[Slot]:
        """One slot for each local tensor."""
        for local in self.locals:
            yield Slot(local.tensor, local.pieces, self._state(local.tensor))

    def _state(self, tensor: Tensor) -> dict[str, Tensor | float]:
        for optimizer in self.optimizers:
            if tensor in optimizer.state:
                return optimizer.state[tensor]
        return {}

    def prepare_state(self) -> None:
        """Run the optimizers' own state initialisation by a step of zero size that leaves the values as they are."""
        before = [(local.tensor.detach().clone(), local.tensor.grad) for local in self.locals]
        for local in self.locals:
            local.tensor.grad = torch.zeros_like(local.tensor)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            optimizer.step()
        for local, (value, gradient) in zip(self.locals, before, strict=True):
            local.tensor.detach().copy_(value)
            local.tensor.grad = gradient
