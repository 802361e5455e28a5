"""FSDP2: parameters, gradients and optimizer state sharded by rows over the ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard

from trainer.config.schema import Engine as EngineSettings
from trainer.config.schema import Optimizer
from trainer.engine.base import Pull, Replica, Slot, flat
from trainer.engine.update import Local, Updater
from trainer.model.blocks import blocks
from trainer.model.root import Trainee
from trainer.optim import build_optimizers
from trainer.world import World


def mesh_of(settings: EngineSettings, world: World) -> DeviceMesh:
    """All ranks share one copy of the model; with `shard_size` neighbouring ranks do, (replicas, shard_size)."""
    size = settings.shard_size or world.size
    if size == world.size:
        return init_device_mesh(world.device.type, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(world.device.type, (world.size // size, size), mesh_dim_names=("replicate", "shard"))


def shard(model: Trainee, settings: EngineSettings, dtype: torch.dtype, world: World) -> None:
    """Put FSDP2 on a model in place: blocks first, then the root with embeddings, final norm and head.

    Gradients are summed, not averaged: the step has divided by counts over all ranks already. On gloo the divide
    factor of 1 alone is refused (PREMUL_SUM), hence the forced sum, which holds for the sum over replicas too.
    Parameters that were left in their files are read here, this rank's rows alone.
    """
    mesh = mesh_of(settings, world)
    lower = dtype if dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=torch.float32)
    offload: OffloadPolicy = OffloadPolicy()
    if settings.cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    units = blocks(model.network)
    to_meta(model)
    for module in [*units, model]:
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
    if settings.prefetch > 1:
        prefetch(model, cast(list[FSDPModule], units), settings.prefetch)
    for method in ("generate", "within_forward"):
        register_fsdp_forward_method(model, method)
    if model.unread:
        read_shards(model, torch.device("cpu") if settings.cpu_offload else world.device)


def prefetch(model: Trainee, units: list[FSDPModule], count: int) -> None:
    """Let each block ask for the next `count` before it computes; by itself FSDP2 has one on its way."""
    cast(FSDPModule, model).set_modules_to_forward_prefetch(units[:count])
    for index, unit in enumerate(units):
        unit.set_modules_to_forward_prefetch(units[index + 1 : index + 1 + count])
        unit.set_modules_to_backward_prefetch(units[max(0, index - count) : index][::-1])


def to_meta(model: Trainee) -> None:
    """Parameters whose values are still in files become meta tensors, which fully_shard cuts without memory."""
    owners = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.waiting()}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in owners:
                setattr(module, name, owners[id(parameter)])  # tied ones stay one


def read_shards(model: Trainee, device: torch.device) -> None:
    """Memory for the shards that have none, and their values from the files."""
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    for name, parameter in model.named_parameters():
        if name in model.unread:
            assert isinstance(parameter, DTensor)
            model.unread[name].read(flat(parameter), first_element(parameter))
    model.unread.clear()


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
        mesh = self._parameters[0][1].device_mesh
        self._writes = mesh.ndim == 1 or mesh.get_local_rank("replicate") == 0
        self.configure(settings, lr)

    def configure(self, settings: Optimizer, lr: float) -> None:
        """New optimizers with fresh state, as a stage with its own settings needs them."""
        shapes = {n: tuple(p.shape) for n, p in self._parameters}
        self._locals = [_local(n, p, self._writes) for n, p in self._parameters]
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
        """Of replicas the first saves."""
        return self._writes

    def replicas(self) -> Iterator[Replica]:
        """With a replicated mesh this rank's shards, of which the same coordinate of each group holds a copy."""
        for name, parameter in self._parameters:
            mesh = parameter.device_mesh
            if mesh.ndim == 2:
                ranks = tuple(mesh.mesh[:, mesh.get_local_rank("shard")].tolist())
                yield Replica(name, flat(parameter), ranks)

    def prepare_state(self) -> None:
        """Zero optimizer state for every slot."""
        self.updater.prepare_state()

    def after_load(self) -> None:
        """Slots share the shards' storage; drop any gathered copy of the root from an earlier forward."""
        self._sharded.reshard()


def first_element(parameter: DTensor) -> int:
    """Where this rank's rows begin in the flattened parameter.

    Coordinate c of n holds rows [c*k, (c+1)*k), k = ceil(rows / n), as far as there are any. Only such blocks of whole
    rows are contiguous ranges; any other placement is a fault of this program.
    """
    assert parameter.placements[-1] == Shard(0) and all(p.is_replicate() for p in parameter.placements[:-1])
    mesh = parameter.device_mesh
    rows = math.ceil(parameter.shape[0] / mesh.size(mesh.ndim - 1))
    width = parameter.numel() // parameter.shape[0]
    return min(mesh.get_local_rank(mesh.ndim - 1) * rows, parameter.shape[0]) * width


def _local(name: str, parameter: DTensor, written: bool) -> Local:
    """This rank's rows as a plain tensor; of replicas the one that is `written` counts in the gradient's norm."""
    tensor = nn.Parameter(_local_tensor(parameter), requires_grad=True)
    assert (
        tensor.is_contiguous()
        and tensor.untyped_storage().data_ptr() == _local_tensor(parameter).untyped_storage().data_ptr()
    )
    return Local(name, tuple(parameter.shape), first_element(parameter), tensor, written)


def _local_tensor(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local().detach()
