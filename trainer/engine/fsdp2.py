"""FSDP2: parameters, gradients and optimizer state sharded by rows over the ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from trainer.config.schema import Engine as EngineSettings
from trainer.config.schema import Optimizer
from trainer.engine.base import Pull, Replica, Slot
from trainer.engine.update import Local, Updater
from trainer.model.blocks import blocks
from trainer.model.root import Trainee
from trainer.optim import build_optimizers
from trainer.world import World


def shard(model: Trainee, settings: EngineSettings, dtype: torch.dtype, world: World) -> None:
    """Put FSDP2 on a model in place: blocks first, then the root with embeddings, final norm and head.

    Gradients are summed, not averaged: the step has divided by counts over all ranks already. On gloo the divide
    factor of
    1 alone is refused (PREMUL_SUM), hence the forced sum.
    """
    mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    lower = dtype if dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=torch.float32)
    offload: OffloadPolicy = OffloadPolicy()
    if settings.cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    for module in [*blocks(model.network), model]:
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=settings.reshard_after_forward if module is not model else False,
        )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for method in ("generate", "within_forward"):
        register_fsdp_forward_method(model, method)


class FSDP2Engine:
    """The optimizer steps plain tensors that share the shards' storage, so every elementwise optimizer works as in
    one process."""

    def __init__(
        self, model: Trainee, settings: Optimizer, lr: float, engine: EngineSettings, dtype: torch.dtype, world: World
    ) -> None:
        model.device_type = world.device.type
        shard(model, engine, dtype, world)
        self.model = model
        self._sharded = cast(FSDPModule, model)  # what fully_shard made of it
        self.world = world
        # taken once, right after sharding: after a no-grad forward the root shows unsharded parameters instead
        self._parameters: list[tuple[str, DTensor]] = [
            (n, p) for n, p in model.named_parameters() if p.requires_grad and isinstance(p, DTensor)
        ]
        self.configure(settings, lr)

    def configure(self, settings: Optimizer, lr: float) -> None:
        """New optimizers with fresh state, as a stage with its own settings needs them."""
        shapes = {n: tuple(p.shape) for n, p in self._parameters}
        self._locals = [_local(n, p, self.world) for n, p in self._parameters]
        held = [(part.name, part.tensor) for part in self._locals if part.tensor.numel()]
        optimizers = build_optimizers(settings, lr, held, shapes) if held else []
        self.updater = Updater(self._locals, optimizers, settings.clip, self.world)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of one micro-batch; only the last is reduced over ranks."""
        self._sharded.set_requires_gradient_sync(last)
        self._sharded.set_is_last_backward(last)
        loss.backward()

    def step(self, lr_factor: float, *, pull: Pull, apply: bool = True) -> float:
        """Clip, pull, update, zero; the gradient norm before clipping."""
        for part, (_, parameter) in zip(self._locals, self._parameters, strict=True):
            part.tensor.grad = None if parameter.grad is None else _local_tensor(parameter.grad)
        norm = self.updater.step(lr_factor, pull, apply)
        for part, (_, parameter) in zip(self._locals, self._parameters, strict=True):
            part.tensor.grad = parameter.grad = None
        return norm

    def slots(self) -> Iterator[Slot]:
        """One slot for each row shard of this rank."""
        return self.updater.slots()

    def writes(self, slot: Slot) -> bool:
        """Nothing is replicated over the one-dimensional mesh."""
        return True

    def replicas(self) -> Iterator[Replica]:
        """Nothing is replicated over the one-dimensional mesh."""
        return iter(())

    def prepare_state(self) -> None:
        """Zero optimizer state for every slot."""
        self.updater.prepare_state()

    def after_load(self) -> None:
        """Slots share the shards' storage; drop any gathered copy of the root from an earlier forward."""
        self._sharded.reshard()


def _local(name: str, parameter: DTensor, world: World) -> Local:
    """This rank's rows as a plain tensor: rank r holds rows [r*k, (r+1)*k) with k = ceil(rows / ranks)."""
    rows = math.ceil(parameter.shape[0] / world.size)
    width = parameter.numel() // parameter.shape[0]
    start = min(world.rank * rows, parameter.shape[0]) * width
    tensor = nn.Parameter(_local_tensor(parameter), requires_grad=True)
    assert (
        tensor.is_contiguous()
        and tensor.untyped_storage().data_ptr() == _local_tensor(parameter).untyped_storage().data_ptr()
    )
    return Local(name, tuple(parameter.shape), start, tensor)


def _local_tensor(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local().detach()
