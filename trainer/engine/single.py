"""One process, one device: the reference that every other engine must agree with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from trainer.config.schema import Optimizer
from trainer.engine.base import Pull, Replica, Slot
from trainer.engine.update import Local, Updater
from trainer.model.root import Trainee
from trainer.optim import build_optimizers
from trainer.world import World


class SingleEngine:
    """Plain autograd and a torch optimizer over fp32 masters of the trainable parameters.

    With a lower compute dtype the model holds low-precision copies, and gradients are accumulated into the masters in
    fp32: the arithmetic of FSDP2's mixed precision and of ZeRO's bf16 engine. Autocast would instead cast every
    adapter weight in every forward (a third of a decoding step's time on a CPU).
    """

    def __init__(
        self, model: Trainee, settings: Optimizer, lr: float, world: World, dtype: torch.dtype = torch.float32
    ) -> None:
        self.model = model.to(world.device)
        self.model.device_type = world.device.type
        self.world = world
        self._parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self._masters: list[tuple[str, Tensor]] = list(self._parameters)
        self._copies: list[tuple[nn.Parameter, Tensor]] = []
        if dtype != torch.float32:
            self._masters = [(n, nn.Parameter(p.detach().clone())) for n, p in self._parameters]
            self._copies = [(p, m) for (_, p), (_, m) in zip(self._parameters, self._masters, strict=True)]
            for parameter, master in self._copies:
                parameter.data = parameter.data.to(dtype)
                parameter.register_post_accumulate_grad_hook(_Accumulate(master))
        self.configure(settings, lr)

    def configure(self, settings: Optimizer, lr: float) -> None:
        """New optimizers with fresh state, as a stage with its own settings needs them."""
        shapes = {n: tuple(p.shape) for n, p in self._parameters}
        parts = [Local(n, shapes[n], 0, m) for n, m in self._masters]
        optimizers = build_optimizers(settings, lr, list(self._masters), shapes)
        self.updater = Updater(parts, optimizers, settings.clip, self.world)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of one micro-batch."""
        loss.backward()

    def step(self, lr_factor: float, *, pull: Pull, apply: bool = True) -> float:
        """Clip, pull, update, zero; the gradient norm before clipping."""
        norm = self.updater.step(lr_factor, pull, apply)
        for _, master in self._masters:
            master.grad = None
        self.after_load()
        return norm

    def slots(self) -> Iterator[Slot]:
        """One slot for each trainable parameter: its fp32 master."""
        return self.updater.slots()

    def writes(self, slot: Slot) -> bool:
        """The only process saves all."""
        return True

    def replicas(self) -> Iterator[Replica]:
        """Nothing: there is one process."""
        return iter(())

    def prepare_state(self) -> None:
        """Zero optimizer state for every slot."""
        self.updater.prepare_state()

    @torch.no_grad()
    def after_load(self) -> None:
        """Bring the model's low-precision copies in line with the masters."""
        if self._copies:
            torch._foreach_copy_([p.data for p, _ in self._copies], [m.data for _, m in self._copies])


class _Accumulate:
    """Moves a parameter's fresh gradient into its master's, in fp32."""

    def __init__(self, master: Tensor) -> None:
        self.master = master

    def __call__(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if self.master.grad is None:
            self.master.grad = parameter.grad.float()
        else:
            self.master.grad += parameter.grad
        parameter.grad = None
