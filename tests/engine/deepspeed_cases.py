"""Scripts that one process and ZeRO on several run alike, and what they leave: losses, norms, parameters."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from test_engines_agree import padded_batch, plain_loss, whole_parameters
from torch import Tensor

from trainer.config.schema import Engine, Model, Optimizer, Tuning
from trainer.data.batch import Batch
from trainer.engine.base import Slot
from trainer.engine.single import SingleEngine
from trainer.model.blocks import blocks
from trainer.model.load import DTYPES, load_network
from trainer.model.lora_fused import fuse_lora
from trainer.model.methods import apply_method
from trainer.model.root import Trainee
from trainer.world import World

LR = 3e-3  # an element whose gradient is near zero moves by rounding alone: by a share of lr
SETTINGS = Optimizer(lr=LR, clip=0.5, weight_decay=0.1)
# Every parameter of the tiny model is small enough to stay gathered by default, and all fit one sub group.
PARTITIONED = {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 5000}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


@dataclass(frozen=True)
class Case:
    zero: dict[str, Any]  # zero_optimization of the settings file
    method: str = "full"
    dtype: str = "float32"
    script: str = "walk"
    ranks: int = 2
    checkpointing: bool = False

    @property
    def alone(self) -> tuple[str, str, str]:
        """What one process needs to know to do the same."""
        return self.method, self.dtype, self.script


def build(folder: Path, method: str, dtype: str, checkpointing: bool = False) -> Trainee:
    """The tiny model from its folder with a method on it, as a recipe's would be."""
    lora = method in ("lora", "qlora")
    tuning = Tuning(method="lora" if lora else method, layers=1 if method == "last-layers" else None, rank=4)  # type: ignore[arg-type]
    quantization = "nf4" if method == "qlora" else "none"
    settings = Model(path=str(folder), dtype=dtype, quantization=quantization)  # type: ignore[arg-type]
    network: Any = apply_method(network := load_network(settings, tuning, 5), tuning, blocks(network), seed=3)
    if lora:
        fuse_lora(network)
        for name, parameter in network.named_parameters():  # as after training: both adapter matrices get gradients
            if "lora_B" in name:
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)))
    if checkpointing:
        getattr(network, "get_base_model", lambda: network)().gradient_checkpointing_enable({"use_reentrant": False})
    return Trainee(network).train()


def reference(folder: Path, method: str, dtype: str, script: str) -> dict[str, Any]:
    """The script in this process."""
    engine = SingleEngine(build(folder, method, dtype), SETTINGS, LR, World(), DTYPES[dtype])
    return SCRIPTS[script](engine, World()) | {"parameters": whole_parameters(engine, World())}


def settings_of(case: Case, folder: Path) -> Engine:
    """The engine's settings; every rank writes its own file of DeepSpeed's."""
    file = folder / f"zero-{os.getpid()}.json"
    file.write_text(json.dumps({"zero_optimization": case.zero}))
    return Engine(kind="deepspeed", config=str(file))


# ---------------------------------------------------------------- steps


def gradients(engine: Any, world: World, step: int, factor: float = 1.0, micros: int = 4) -> float:
    """Backward of one step's micro-batches dealt to the ranks, two passes over each; the step's loss over all ranks.

    The second micro-batch of the step has no target, as where a rank gets an empty one.
    """
    batches = [without_targets(padded_batch(10 * step + m), m == 1) for m in range(micros)]
    count = sum(len(batch.targets) for batch in batches)
    mine, total = batches[world.rank :: world.size], 0.0
    for index, batch in enumerate(mine):
        for share in (0.75, 0.25):
            loss = factor * share * engine.model(batch, plain_loss(batch)) / count
            engine.backward(loss, last=index == len(mine) - 1 and share == 0.25)
            total += float(loss.detach())
    return world.sum({"loss": total})["loss"]


def without_targets(batch: Batch, empty: bool) -> Batch:
    names = ("target_index", "targets", "weights", "target_task", "target_example")
    return dataclasses.replace(batch, **{name: getattr(batch, name)[:0] for name in names}) if empty else batch


def nothing(slots: Any) -> None:
    """No pull."""


def walk(engine: Any, world: World) -> dict[str, Any]:
    """Twenty steps of AdamW with clipping and accumulation; forwards without a backward in between."""
    losses, norms = [], []
    for step in range(20):
        losses.append(gradients(engine, world, step))
        with torch.no_grad():
            engine.model(padded_batch(step), plain_loss(padded_batch(step)))
        norms.append(engine.step(0.9**step, pull=nothing))
    return {"losses": losses, "norms": norms}


def stages(engine: Any, world: World) -> dict[str, Any]:
    """Three stages, each with another optimizer; the second does not clip."""
    losses, norms = [], []
    later = (Optimizer(name="lion", clip=None, weight_decay=0.2), Optimizer(name="sgd", momentum=0.9, clip=1.0))
    for index, settings in enumerate((SETTINGS, *later)):
        engine.configure(settings, LR if index != 1 else 1e-4)
        for step in range(4):
            losses.append(gradients(engine, world, 10 * index + step))
            norms.append(engine.step(1.0, pull=nothing))
    return {"losses": losses, "norms": norms}


def skips(engine: Any, world: World) -> dict[str, Any]:
    """A gradient that is not finite on one rank, and a step that only measures, change nothing."""
    losses, norms, same = [], [], []
    for step in range(7):
        bad = math.nan if step in (0, 3) and world.rank == world.size - 1 else 1.0
        before = state_of(engine)
        losses.append(gradients(engine, world, step, factor=bad))
        norms.append(engine.step(1.0, pull=nothing, apply=step != 5))
        if step in (0, 3, 5):
            same.append(before == state_of(engine))
    return {"losses": [x for x in losses if math.isfinite(x)], "norms": [str(x) for x in norms], "same": same}


def state_of(engine: Any) -> list[Any]:
    """This rank's values and moments, bit for bit, and the counters."""
    states = []
    for slot in engine.slots():
        tensors = {"": slot.owner, **{key: value for key, value in slot.state.items() if isinstance(value, Tensor)}}
        states.append({key: tensor.detach().clone().view(-1).tolist() for key, tensor in tensors.items()})
    return states + [parameter.detach().float().tolist() for parameter in engine.model.parameters()]


def pulled(engine: Any, world: World) -> dict[str, Any]:
    """A pull that sees each slot once with its clipped gradient, and adds a penalty on the distance from the start."""
    anchors = {(piece.name, piece.start): slot.value(piece).clone() for slot in engine.slots() for piece in slot.pieces}
    losses, norms, seen, clipped = [], [], [], []

    def pull(slots: Any) -> None:
        square, elements = 0.0, 0
        for slot in slots:
            assert isinstance(slot, Slot)
            for piece in slot.pieces:
                gradient = slot.gradient(piece)
                assert gradient is not None and gradient.dtype == torch.float32
                square += float(gradient.double().square().sum())
                elements += piece.numel
                gradient.add_(slot.value(piece) - anchors[piece.name, piece.start], alpha=3.0)
        seen.append(elements)
        clipped.append(square)

    for step in range(5):
        losses.append(gradients(engine, world, step))
        norms.append(engine.step(1.0, pull=pull))
    total = [world.sum({"elements": float(n), "square": s}) for n, s in zip(seen, clipped, strict=True)]
    return {
        "losses": losses,
        "norms": norms,
        "elements": [row["elements"] for row in total],
        "clipped": [math.sqrt(row["square"]) for row in total],
    }


SCRIPTS: dict[str, Callable[[Any, World], dict[str, Any]]] = {
    "walk": walk,
    "stages": stages,
    "skips": skips,
    "pulled": pulled,
}
