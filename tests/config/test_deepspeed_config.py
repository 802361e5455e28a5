"""DeepSpeed settings files: those that come along are good, and what they must not set is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import UserError
from trainer.config.deepspeed import OF_THE_RECIPE, STAGES, config_problems, read_config
from trainer.config.resources import names

GOOD = {"zero_optimization": {"stage": 2}}


def told(folder: Path, settings: Any) -> str:
    """What is said of a file with these settings; the empty string where nothing is."""
    file = folder / "mine.json"
    file.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    problems = list(config_problems(str(file)))
    if problems:
        with pytest.raises(UserError) as refusal:
            read_config(str(file))
        assert problems[0].remedy in str(refusal.value)
        assert "\n" not in str(refusal.value)
    assert all(problem.key == ("engine", "config") and problem.value == str(file) for problem in problems)
    return "; ".join(problem.remedy for problem in problems)


@pytest.mark.parametrize("name", names("ds_configs"))
def test_the_files_that_come_along_are_good(name: str) -> None:
    short = name.removesuffix(".json")
    assert list(config_problems(short)) == []
    stage = read_config(short)["zero_optimization"]["stage"]
    assert short.startswith(f"zero{stage}")


def test_null_means_zero2() -> None:
    assert read_config(None) == read_config("zero2")


CASES: list[tuple[Any, str]] = [
    ({}, "zero_optimization.stage: missing"),
    ({"zero_optimization": True}, "zero_optimization.stage: missing"),
    ({"zero_optimization": {"stage": 0}}, "stage: 0: must be 1, 2 or 3"),
    ({"zero_optimization": {"stage": True}}, "stage: true: must be 1, 2 or 3"),
    ({"zero_optimization": {"stage": "auto"}}, 'stage: "auto": must be'),
    ("[1]", "holds no JSON object"),
    ("{", "no JSON"),
    ('{"zero_optimization": {"stage": 1, "stage": 2}}', "stage is there twice"),
    (GOOD | {"train_batch_size": 32}, "train_batch_size: 32: the recipe decides it by `batch.examples`; remove it"),
    (GOOD | {"gradient_accumulation_steps": 4}, "by `batch.micro_tokens`"),
    (GOOD | {"optimizer": {"type": "Adam"}}, "by `optimizer`"),
    (GOOD | {"scheduler": {"type": "WarmupLR"}}, "by `schedule`"),
    (GOOD | {"bf16": {"enabled": True}}, 'bf16: {"enabled": true}: the recipe decides it by `model.dtype`'),
    (GOOD | {"gradient_clipping": 1.0}, "by `optimizer.clip`"),
    (GOOD | {"activation_checkpointing": {}}, "by `engine.activation_checkpointing`"),
    (GOOD | {"comms_logger": {"enabled": True}}, "nothing here would read it"),
    ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "zero_hpz_partition_size: 8: not proved"),
    ({"zero_optimization": {"stage": 3, "mics_shard_size": 8}}, "mics_shard_size: 8: not proved"),
    ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "not proved"),
    ({"zero_optimization": {"stage": 2, "sub_group_size": 10}}, "stage 2 does not read it"),
    ({"zero_optimization": {"stage": 3, "allgather_bucket_size": 10}}, "stage 3 does not read it"),
    ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "stage 2 does not read it"),
    ({"zero_optimization": {"stage": 2, "overlap_comm": "auto"}}, "must be true or false"),
    ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, "must be a whole number"),
    ({"zero_optimization": {"stage": 2, "reduce_bucket_size": True}}, "must be a whole number"),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}}, "nvme is not"),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "ratio is not proved"),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": 1}}}, "true or false"),
]


@pytest.mark.parametrize(("settings", "text"), CASES, ids=[text[:40] for _, text in CASES])
def test_what_a_file_must_not_hold(settings: Any, text: str, tmp_path: Path) -> None:
    assert text in told(tmp_path, settings)


def test_every_problem_is_told(tmp_path: Path) -> None:
    text = told(tmp_path, {"zero_optimization": {"stage": 2, "nope": 1}, "train_batch_size": 1, "fp16": {}})
    assert all(word in text for word in ("nope", "train_batch_size", "fp16"))


@given(st.sampled_from(sorted(OF_THE_RECIPE)), st.one_of(st.none(), st.integers(), st.text(max_size=5)))
def test_no_key_of_the_recipe_passes(key: str, value: Any) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        assert f"`{OF_THE_RECIPE[key]}`" in told(Path(folder), GOOD | {key: value})


def test_every_known_key_has_a_value_that_passes(tmp_path: Path) -> None:
    good = {"switch": True, "count": 5e6, "offload": {"device": "cpu", "pin_memory": False}}
    for stage in (1, 2, 3):
        zero = {key: good[kind] for key, (stages, kind) in STAGES.items() if kind != "stage" and stage in stages}
        assert told(tmp_path, {"zero_optimization": {"stage": stage, **zero}}) == ""
