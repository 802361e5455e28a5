"""What the number of processes makes impossible, or leaves unread, is told before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.config import UserError
from trainer.config.schema import Engine, Model, Optimizer, Recipe, Stage
from trainer.engine import check_engine, engine_kind


def recipe(optimizer: str = "adamw", quantization: str = "none", **engine: Any) -> Recipe:
    return Recipe(
        name="x",
        model=Model(path="m", quantization=quantization),  # type: ignore[arg-type]
        engine=Engine(**engine),
        sources={},
        stages=[Stage(name="s", mixture={}, optimizer=Optimizer(name=optimizer))],  # type: ignore[arg-type]
    )


def test_auto_stands_for_single_alone_and_for_fsdp2_among_several() -> None:
    assert [engine_kind(Engine(), size) for size in (1, 2)] == ["single", "fsdp2"]
    for size in (1, 2, 3):
        check_engine(recipe(), size)
    check_engine(recipe(kind="deepspeed", config="zero2"), 1)
    check_engine(recipe("muon"), 1)
    for shard_size in (1, 2, 3, 6):
        check_engine(recipe(shard_size=shard_size), 6)


@pytest.mark.parametrize(
    ("made", "size", "told"),
    [
        (recipe(kind="single"), 2, r"engine\.kind: single: started on 2 processes; use `auto`"),
        (recipe(kind="fsdp2"), 1, r"engine\.kind: fsdp2: needs several processes; start with torchrun"),
        (recipe(shard_size=4), 6, r"engine\.shard_size: 4: does not divide 6 processes; use one of 1, 2, 3, 6"),
        (recipe(shard_size=8), 4, r"engine\.shard_size: 8: does not divide 4 processes; use one of 1, 2, 4"),
        (recipe(shard_size=2), 1, r"engine\.shard_size: 2: not read by `single`.*start several processes"),
        (recipe(prefetch=2), 1, r"engine\.prefetch: 2: not read by `single`"),
        (recipe(loading="sharded"), 1, r"engine\.loading: sharded: not read by `single`"),
        (recipe(cpu_offload=True), 1, r"engine\.cpu_offload: True: not read by `single`"),
        (recipe(reshard_after_forward=False), 1, r"engine\.reshard_after_forward: False: not read"),
        (recipe(quantization="int8"), 2, r"model\.quantization: int8: cannot be sharded; use `nf4`"),
        (recipe("muon"), 2, r"optimizer\.name: muon: .*; use adamw or lion"),
        (recipe("adamw8bit", kind="deepspeed", config="zero1"), 2, r"optimizer\.name: adamw8bit"),
    ],
)
def test_what_cannot_work_names_key_and_remedy(made: Recipe, size: int, told: str) -> None:
    with pytest.raises(UserError, match=told):
        check_engine(made, size)
