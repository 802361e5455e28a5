"""What may differ between a run's recipe and the one that resumes it."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.config import Recipe, UserError, build_recipe
from trainer.config.changes import Verdict, changes, check_changes, flatten, verdict_of

BASE: dict[str, Any] = {
    "name": "run",
    "model": {"path": "some/model", "max_length": 64},
    "tuning": {"method": "lora"},
    "sources": {"rows": {"path": "rows.jsonl", "format": "messages"}},
    "optimizer": {"lr": 0.001},
    "until": {"steps": 10},
}
CASES: list[tuple[dict[str, Any], str, Verdict]] = [
    ({"optimizer": {"lr": 0.1}}, "stages.0.optimizer.lr", "length"),
    ({"schedule": {"name": "linear"}}, "stages.0.schedule.name", "length"),
    ({"until": {"steps": 20}}, "stages.0.until.steps", "length"),
    ({"checkpoint": {"every": 5}}, "checkpoint.every", "free"),
    ({"tracking": {"ledger": True}}, "tracking.ledger", "free"),
    ({"engine": {"kind": "fsdp2"}}, "engine.kind", "free"),
    ({"guard": {"skip_steps": [3]}}, "guard.skip_steps.0", "free"),
    ({"batch": {"examples": 32, "micro_tokens": 128}}, "stages.0.batch.micro_tokens", "length"),
    ({"seed": 18}, "seed", "data"),
    ({"sources": {"rows": {"path": "other.jsonl", "format": "messages"}}}, "sources.rows.path", "free"),
    ({"sources": {"rows": {"path": "rows.jsonl", "format": "messages", "limit": 9}}}, "sources.rows.limit", "data"),
    ({"batch": {"examples": 8}}, "stages.0.batch.examples", "data"),
    ({"objective": {"label_smoothing": 0.1}}, "stages.0.objective.label_smoothing", "data"),
    ({"model": {"path": "some/model", "max_length": 32}}, "model.max_length", "data"),
    ({"model": {"path": "some/model", "max_length": 64, "quantization": "nf4"}}, "model.quantization", "identity"),
    ({"model": {"path": "some/model", "max_length": 64, "dtype": "float32"}}, "model.dtype", "identity"),
    ({"tuning": {"method": "lora", "rank": 4}}, "tuning.rank", "identity"),
    ({"tuning": {"method": "full"}}, "tuning.method", "identity"),
    ({"optimizer": {"lr": 0.001, "name": "lion"}}, "stages.0.optimizer.name", "identity"),
]


@pytest.mark.parametrize(("change", "key", "verdict"), CASES, ids=[key for _, key, _ in CASES])
def test_each_change_has_its_verdict(change: dict[str, Any], key: str, verdict: Verdict) -> None:
    old, new = build_recipe(BASE), build_recipe(BASE | change)
    found = changes(old, new)
    assert (key, verdict) in {(change.key, change.verdict) for change in found}
    if verdict == "identity":
        with pytest.raises(UserError, match=rf"{key}: .* would not fit"):
            check_changes(found, "runs/run", allow_data_change=True)
    elif verdict == "data":
        with pytest.raises(UserError, match=rf"{key}: .* --allow-data-change"):
            check_changes(found, "runs/run", allow_data_change=False)
        check_changes(found, "runs/run", allow_data_change=True)
    else:
        check_changes(found, "runs/run", allow_data_change=False)


def test_the_same_recipe_has_no_change() -> None:
    assert changes(build_recipe(BASE), build_recipe(dict(BASE))) == []


def test_every_key_of_a_recipe_has_a_deliberate_verdict() -> None:
    """What only the last rule catches is what decides the data; a new section must be thought about."""
    keys = {key for key, _ in flatten(build_recipe(BASE).model_dump(mode="json"))}
    data = {
        key.split(".")[0] if not key.startswith("stages") else key.split(".")[2]
        for key in keys
        if verdict_of(key) == "data"
    }
    assert data == {"name", "seed", "sources", "objective", "mixture", "batch", "model"}
    assert set(Recipe.model_fields) >= {key.split(".")[0] for key in keys}
