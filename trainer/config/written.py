"""The recipe as a user writes it: stages may leave keys out, and take them from the top level."""

from __future__ import annotations

import copy
import json
from typing import Any

from pydantic import BaseModel, Field, ValidationError, create_model
from pydantic.fields import FieldInfo

from trainer.config.problems import Key, Problem, schema_problems
from trainer.config.schema import Recipe, Section, Stage
from trainer.config.yaml_file import odd_values

INHERITED = ("objective", "mixture", "until", "optimizer", "schedule", "batch")


def _field(name: str, description: str, default: Any = None) -> tuple[Any, FieldInfo]:
    """A stage's field that may be absent; `default` is only told, never filled in."""
    field = copy.copy(Stage.model_fields[name])
    field.default, field.description = default, description
    return field.rebuild_annotation(), field


STAGE_KEYS: dict[str, Any] = {
    "name": _field("name", "Name of the stage; default `main`, or `stage-<index>`."),
    **{key: _field(key, f"This stage's own; merged key by key over the shared `{key}`.") for key in INHERITED},
}
STAGE_KEYS["mixture"] = _field("mixture", "This stage's own; replaces the shared `mixture`.")
SHARED_KEYS: dict[str, Any] = {
    "objective": _field("objective", "What is minimised; shared by all stages."),
    "mixture": _field(
        "mixture", "Source -> weight, shared by all stages; default: the one source that no suite holds out."
    ),
    "until": _field("until", "When a stage ends; shared by all stages. Default: one epoch."),
    "optimizer": _field("optimizer", "Update rule, learning rate, clipping; shared by all stages."),
    "schedule": _field("schedule", "Learning rate over a stage; shared by all stages."),
    "batch": _field("batch", "Size of one optimizer step; shared by all stages. Default: 32 examples."),
}
StageFile: type[BaseModel] = create_model("StageFile", __base__=Section, __doc__="One stage.", **STAGE_KEYS)


def _recipe_file() -> type[BaseModel]:
    """The recipe's own fields in their order, the shared ones where the stages follow."""
    fields: dict[str, Any] = {}
    for name, field in Recipe.model_fields.items():
        if name == "stages":
            fields |= SHARED_KEYS
            told = "What happens, in order; a stage overrides the shared keys. Default: one stage, `main`."
            fields["stages"] = (list[StageFile], Field(None, min_length=1, description=told))
        else:
            fields[name] = (field.rebuild_annotation(), field)
    return create_model("Recipe", __base__=Section, __doc__="A whole fine-tuning practice.", **fields)


RecipeFile = _recipe_file()


def file_problems(data: Any) -> list[Problem]:
    """Everything that the schema of single keys finds wrong in a recipe as written, by the keys as written.

    Types are strict (`"3"` is no number, `yes` no truth value); validated as JSON, where a list is also a pair.
    """
    odd = list(odd_values(data))
    if odd:
        return odd
    try:
        RecipeFile.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        return schema_problems(error, RecipeFile, data)
    return []


def written(key: Key, data: dict[str, Any]) -> Key:
    """Where the author wrote (or would write) the value behind a resolved key: in the stage, or at the top level."""
    if len(key) < 3 or key[0] != "stages" or key[2] not in INHERITED:
        return key
    stages = data.get("stages") or [{}]
    node: Any = stages[int(key[1])]
    for part in key[2:]:
        if isinstance(node, dict) and part not in node:
            return key[2:]
        if not isinstance(node, dict) or part == "mixture":
            break
        node = node[part]
    return key
