"""Engines by name. An engine puts parallelism on a model from outside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.config.schema import Engine as EngineSettings

if TYPE_CHECKING:
    from trainer.engine.base import Engine


def engine_kind(settings: EngineSettings, world_size: int) -> str:
    """The engine that `auto` stands for."""
    if settings.kind != "auto":
        return settings.kind
    return "fsdp2" if world_size > 1 else "single"


__all__ = ["Engine", "engine_kind"]
