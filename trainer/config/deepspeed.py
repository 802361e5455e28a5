"""DeepSpeed settings files: what `engine.config` names. They hold what DeepSpeed alone knows; no torch here.

A value that the recipe decides, that this project's step would never read, or that no test of it has proved, is
refused rather than passed on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError
from trainer.config.problems import Key, Problem
from trainer.config.resources import find, names

DEFAULT = "zero2"
KEY: Key = ("engine", "config")
OF_THE_RECIPE = {  # DeepSpeed's key -> the recipe's
    "train_batch_size": "batch.examples",
    "train_micro_batch_size_per_gpu": "batch.micro_tokens",
    "gradient_accumulation_steps": "batch.micro_tokens",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16": "model.dtype",
    "bfloat16": "model.dtype",
    "fp16": "model.dtype",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
    "data_types": "model.dtype",
    "communication_data_type": "model.dtype",
    "activation_checkpointing": "engine.activation_checkpointing",
    "wandb": "tracking.wandb",
}
STAGES = {  # key of zero_optimization -> (stages that read it, what it must be)
    "stage": ((1, 2, 3), "stage"),
    "contiguous_gradients": ((1, 2, 3), "switch"),
    "overlap_comm": ((1, 2, 3), "switch"),
    "reduce_scatter": ((1, 2, 3), "switch"),
    "reduce_bucket_size": ((1, 2, 3), "count"),
    "offload_optimizer": ((1, 2, 3), "offload"),
    "allgather_bucket_size": ((1, 2), "count"),
    "use_multi_rank_bucket_allreduce": ((1, 2), "switch"),
    "parameter_alignment": ((1, 2), "switch"),
    "round_robin_gradients": ((1, 2), "switch"),
    "offload_param": ((3,), "offload"),
    "sub_group_size": ((3,), "count"),
    "stage3_max_live_parameters": ((3,), "count"),
    "stage3_max_reuse_distance": ((3,), "count"),
    "stage3_param_persistence_threshold": ((3,), "count"),
    "stage3_prefetch_bucket_size": ((3,), "count"),
}


def read_config(config: str | None) -> dict[str, Any]:
    """The settings of a file, or of a name in ds_configs (null: `zero2`), as plain data.

    Raises UserError where the file is not there, is no JSON object, or sets what it must not.
    """
    settings = _load(config)
    for problem in _of(settings):
        raise UserError(f"engine.config: {config or DEFAULT}: {problem}")
    return settings


def zero_stage(config: str | None) -> int:
    """1: optimizer state is partitioned; 2: gradients too; 3: parameters too. Raises as `read_config`."""
    return int(read_config(config)["zero_optimization"]["stage"])


def config_problems(config: str | None) -> Iterator[Problem]:
    """Everything wrong with what `engine.config` names, under that key."""
    try:
        settings = _load(config)
    except UserError as error:
        yield Problem(KEY, config or DEFAULT, str(error).partition(": ")[2].partition(": ")[2])
        return
    for problem in _of(settings):
        yield Problem(KEY, config or DEFAULT, problem)


def _load(config: str | None) -> dict[str, Any]:
    name = config or DEFAULT
    path = Path(name).expanduser()
    if f"{name}.json" in names("ds_configs"):
        path = find("ds_configs", f"{name}.json")
    elif not path.is_file():
        known = ", ".join(known.removesuffix(".json") for known in names("ds_configs"))
        raise UserError(f"engine.config: {name}: no such file; give its path, or one of {known}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"engine.config: {name}: no JSON: {str(error)[:160]}; mend {path}") from error
    if not isinstance(settings, dict):
        raise UserError(f"engine.config: {name}: holds no JSON object; write {{...}}")
    return settings


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are there once: of two, JSON's reader would drop the first in silence."""
    seen = dict(pairs)
    if len(seen) < len(pairs):
        twice = sorted(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"{twice[0]} is there twice")
    return seen


def _of(settings: dict[str, Any]) -> Iterator[str]:
    for key, value in settings.items():
        if key in OF_THE_RECIPE:
            yield f"{key}: {_shown(value)}: the recipe decides it by `{OF_THE_RECIPE[key]}`; remove it from the file"
        elif key != "zero_optimization":
            yield f"{key}: {_shown(value)}: nothing here would read it; remove it from the file"
    zero = settings.get("zero_optimization")
    if not isinstance(zero, dict) or "stage" not in zero:
        yield "zero_optimization.stage: missing; write 1, 2 or 3"
        return
    stage = zero["stage"]
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        yield f"zero_optimization.stage: {_shown(stage)}: must be 1, 2 or 3 (without partitions use fsdp2 or single)"
        return
    for key, value in zero.items():
        for text in _wrong(key, value, stage):
            yield f"zero_optimization.{key}: {_shown(value)}: {text}"


def _wrong(key: str, value: Any, stage: int) -> Iterator[str]:
    if key not in STAGES:
        yield f"not proved here, so not passed on; remove it (known: {', '.join(STAGES)})"
        return
    stages, kind = STAGES[key]
    if stage not in stages:
        yield f"stage {stage} does not read it; remove it"
    elif kind == "switch" and not isinstance(value, bool):
        yield "must be true or false"
    elif kind == "count" and (isinstance(value, bool) or not isinstance(value, int | float) or not _whole(value)):
        yield "must be a whole number, 0 or more (`auto` is another program's word)"
    elif kind == "offload":
        yield from _wrong_offload(value)


def _wrong_offload(value: Any) -> Iterator[str]:
    if not isinstance(value, dict) or value.get("device") not in ("cpu", "none"):
        yield 'must be {"device": "cpu"} or {"device": "none"}; nvme is not proved here'
        return
    for key, inner in value.items():
        if key not in ("device", "pin_memory"):
            yield f"{key} is not proved here; remove it"
        elif key == "pin_memory" and not isinstance(inner, bool):
            yield "pin_memory must be true or false"


def _whole(value: float) -> bool:
    return value >= 0 and float(value).is_integer()


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
