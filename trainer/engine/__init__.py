"""Engines by name. An engine puts parallelism on a model from outside."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from trainer.config import Recipe, UserError
from trainer.config.check import ENGINE_READERS, WHOLE_STATE
from trainer.config.schema import Engine as EngineSettings

if TYPE_CHECKING:
    from trainer.engine.base import Engine

NOT_INSTALLED = "engine.kind: deepspeed: not installed; run `pip install 'tunesmith[deepspeed]'`, or use fsdp2"


def engine_kind(settings: EngineSettings, world_size: int) -> str:
    """The engine that `auto` stands for."""
    if settings.kind != "auto":
        return settings.kind
    return "fsdp2" if world_size > 1 else "single"


def check_engine(recipe: Recipe, world_size: int) -> None:
    """Raise UserError for what only the number of processes makes impossible or unread; before anything is loaded."""
    settings = recipe.engine
    kind = engine_kind(settings, world_size)
    if kind == "single" and world_size > 1:
        raise UserError(f"engine.kind: single: started on {world_size} processes; use `auto` or `fsdp2`")
    for field, readers in ENGINE_READERS.items():
        value = getattr(settings, field)
        if kind not in readers.split(", ") and value != type(settings).model_fields[field].get_default():
            remedy = "start several processes, or remove it" if kind == "single" else "remove it"
            raise UserError(f"engine.{field}: {value}: not read by `{kind}`, which `auto` stands for here; {remedy}")
    if kind == "single":
        return
    if kind == "deepspeed" and find_spec("deepspeed") is None:
        raise UserError(NOT_INSTALLED)
    if kind == "fsdp2" and world_size == 1:
        raise UserError("engine.kind: fsdp2: needs several processes; start with torchrun, or use `auto`")
    if settings.shard_size and world_size % settings.shard_size:
        fitting = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        raise UserError(
            f"engine.shard_size: {settings.shard_size}: does not divide {world_size} processes; use one of {fitting}"
        )
    if recipe.model.quantization == "int8":
        raise UserError(
            "model.quantization: int8: cannot be sharded; use `nf4`, or `engine.kind: single` in one process"
        )
    for stage in recipe.stages:
        if stage.optimizer.name in WHOLE_STATE:
            raise UserError(
                f"optimizer.name: {stage.optimizer.name}: {WHOLE_STATE[stage.optimizer.name]}; use adamw or lion"
            )


__all__ = ["Engine", "check_engine", "engine_kind"]
