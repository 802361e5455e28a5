"""One process, one device: the reference that every other engine must agree with."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from trainer.config.schema import Optimizer
from trainer.engine.base import Pull, Slot
from trainer.engine.update import Local, Updater
from trainer.model.root import Trainee
from trainer.optim import build_optimizers
from trainer.world import World


class SingleEngine:
    """Plain autograd and a torch optimizer over the trainable parameters."""

    def __init__(self, model: Trainee, settings: Optimizer, lr: float, world: World) -> None:
        self.model = model.to(world.device)
        self.model.device_type = world.device.type
        self.world = world
        self._parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.configure(settings, lr)

    def configure(self, settings: Optimizer, lr: float) -> None:
        """New optimizers with fresh state, as a stage with its own settings needs them."""
        shapes = {n: tuple(p.shape) for n, p in self._parameters}
        parts = [Local(n, shapes[n], 0, p) for n, p in self._parameters]
        optimizers = build_optimizers(settings, lr, list(self._parameters), shapes)
        self.updater = Updater(parts, optimizers, settings.clip, self.world)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of one micro-batch."""
        loss.backward()

    def step(self, lr_factor: float, *, pull: Pull) -> float:
        """Clip, pull, update, zero; the gradient norm before clipping."""
        norm = self.updater.step(lr_factor, pull)
        for _, parameter in self._parameters:
            parameter.grad = None
        return norm

    def slots(self) -> Iterator[Slot]:
        """One slot for each trainable parameter."""
        return self.updater.slots()

    def writes(self, slot: Slot) -> bool:
        """The only process saves all."""
        return True

    def prepare_state(self) -> None:
        """Zero optimizer state for every slot."""
        self.updater.prepare_state()

    def after_load(self) -> None:
        """Slots are the parameters themselves: nothing to bring in line."""
