"""The JSON schema describes what the loader accepts, and the reference page is the schema."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from trainer.config import load_recipe
from trainer.config.reference import REGENERATE, json_schema, recipe_reference
from trainer.config.schema import Recipe
from trainer.config.written import INHERITED

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
TYPES = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None), "array": list,
    "object": dict,
}  # fmt: skip


def faults(value: Any, schema: dict[str, Any], root: dict[str, Any], path: str = "") -> list[str]:
    """The keywords that our schema uses, applied; what a JSON-schema validator would say."""
    if "$ref" in schema:
        return faults(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root, path)
    if "anyOf" in schema:
        found = [faults(value, branch, root, path) for branch in schema["anyOf"]]
        return [] if [] in found else found[0]
    kind = schema.get("type")
    wrong = kind and (not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"))
    if wrong or value not in schema.get("enum", [value]) or schema.get("const", value) != value:
        return [f"{path}: {value!r}"]
    found = []
    if isinstance(value, dict):
        found += [f"{path}.{key}: missing" for key in schema.get("required", []) if key not in value]
        for key, item in value.items():
            patterns = [inner for text, inner in schema.get("patternProperties", {}).items() if re.search(text, key)]
            inner = schema.get("properties", {}).get(key) or (patterns or [schema.get("additionalProperties", True)])[0]
            if inner is False:
                found.append(f"{path}.{key}: unknown")
            elif isinstance(inner, dict):
                found += faults(item, inner, root, f"{path}.{key}")
    if isinstance(value, list):
        items = schema.get("prefixItems") or [schema["items"]] * len(value)
        found += [
            f for i, (v, s) in enumerate(zip(value, items, strict=False)) for f in faults(v, s, root, f"{path}.{i}")
        ]
    return found


def validate(data: Any) -> list[str]:
    try:
        import jsonschema
    except ImportError:
        return faults(data, json_schema(), json_schema())
    return [error.message for error in jsonschema.Draft202012Validator(json_schema()).iter_errors(data)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_of_the_project_load_and_validate(path: Path) -> None:
    load_recipe(path)
    assert validate(YAML(typ="safe", pure=True).load(path)) == []


GOOD = {
    "name": "x",
    "model": {"path": "m"},
    "sources": {"a": {"path": "a.jsonl", "format": "text"}},
    "optimizer": {"lr": 1e-3, "betas": [0.9, 0.99], "clip": None},
    "stages": [{"mixture": {"a": 1}, "until": {"steps": 3}}],
}


@pytest.mark.parametrize(
    "change",
    [
        {"optimiser": {}}, {"optimizer": {"lrr": 1}}, {"optimizer": {"lr": "fast"}}, {"stages": [{"lr": 1}]},
        {"model": {}}, {"stages": {}}, {"optimizer": None}, {"seed": "x"}, {"engine": {"kind": "ddp"}},
        {"sources": {"a": {"path": "a", "format": "csv"}}}, {"stages": [{"batch": {"size": 3}}]},
    ],
)  # fmt: skip
def test_schema_tells_good_from_bad(change: dict[str, Any]) -> None:
    assert validate(GOOD) == []
    assert validate(GOOD | change)


def test_every_key_is_described() -> None:
    schema = json_schema()
    for section in [schema, *schema["$defs"].values()]:
        assert section["additionalProperties"] is False
        for key, entry in section["properties"].items():
            assert entry.get("description"), key


def test_stages_demand_nothing_and_shared_keys_stand_at_the_top() -> None:
    schema = json_schema()
    stage = schema["$defs"][schema["properties"]["stages"]["items"]["$ref"].rpartition("/")[2]]
    assert "required" not in stage
    assert set(INHERITED) < set(schema["properties"]) and set(INHERITED) < set(stage["properties"])
    assert set(Recipe.model_fields) < set(schema["properties"])
    assert schema["required"] == ["name", "model", "sources"]
    assert schema["$defs"]["Optimizer"]["properties"]["lr"]["default"] == 2e-4


def test_reference_page_is_up_to_date() -> None:
    text = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert text.rstrip() == recipe_reference().rstrip(), f"run `{REGENERATE}`"
