"""The recipe's JSON schema for editors, and its reference page; both made from the schema's descriptions."""

from __future__ import annotations

from typing import Any

from trainer.config.written import RecipeFile

REGENERATE = "tunesmith schema --markdown > docs/recipe.md"
HEADER = f"""# Recipe reference

Made from the schema by `{REGENERATE}`; change descriptions in `trainer/config/schema.py`.

A recipe is one YAML 1.2 file (`3e-4` is a number, `no` is a string) without anchors, aliases and tags. An unknown key,
a value of the wrong type, and a value that nothing would read are errors. On the command line a key is set by its
dotted name: `tunesmith train RECIPE optimizer.lr=1e-4 stages.0.until.steps=20`; stages and suites may be named
(`stages.triage.until.steps=20`), and values are read as YAML.

`objective`, `mixture`, `until`, `optimizer`, `schedule` and `batch` at the top level are shared by all stages. A
stage's own keys are merged over them one by one; a `mixture` is replaced whole. A stage that names another method than
the shared one leaves out the shared keys that its method does not read. `tunesmith check RECIPE` prints what comes out.
"""


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the file that a user writes: stages' keys optional, shared keys at the top level."""
    schema = RecipeFile.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Tunesmith recipe"
    for section in [schema, *schema["$defs"].values()]:
        for entry in section["properties"].values():
            _tidy(entry)
    return schema


def _tidy(entry: dict[str, Any]) -> None:
    """No titles that repeat the key; no defaults that are a whole section, or null where null is not accepted."""
    entry.pop("title", None)
    refers = "$ref" in entry or "allOf" in entry
    if refers or (entry.get("default", 0) is None and {"type": "null"} not in entry.get("anyOf", [])):
        entry.pop("default", None)


def recipe_reference() -> str:
    """docs/recipe.md: for each section a table of key, type, default and meaning."""
    schema = json_schema()
    parts = [HEADER, _section("Top level", "", schema)]
    done: set[str] = set()
    waiting = [(key, entry) for key, entry in schema["properties"].items()]
    while waiting:
        path, entry = waiting.pop(0)
        found = _target(entry)
        if found is None:
            continue
        name, suffix = found
        if name in done:
            continue
        done.add(name)
        section = schema["$defs"][name]
        parts.append(_section(f"`{path}{suffix}`", entry.get("description", ""), section))
        waiting = [(f"{path}{suffix}.{key}", inner) for key, inner in section["properties"].items()] + waiting
    return "\n".join(parts)


def _target(entry: dict[str, Any]) -> tuple[str, str] | None:
    """The section that a key holds, and how its place is written: itself, `.<index>` or `.<name>`."""
    for branch in entry.get("anyOf", [entry]):
        for part, suffix in ((branch, ""), (branch.get("items", {}), ".0"), (_values(branch), ".<name>")):
            if isinstance(part, dict) and "$ref" in part:
                return part["$ref"].rpartition("/")[2], suffix
    return None


def _values(entry: dict[str, Any]) -> Any:
    patterns = entry.get("patternProperties")
    return next(iter(patterns.values())) if patterns else entry.get("additionalProperties")


def _section(title: str, about: str, section: dict[str, Any]) -> str:
    needed = section.get("required", [])
    lines = [f"## {title}", ""]
    if about:
        lines += [about, ""]
    lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for key, entry in section["properties"].items():
        default = "required" if key in needed else _default(entry)
        meaning = entry.get("description", "").replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{key}` | {_type(entry)} | {default} | {meaning} |")
    return "\n".join([*lines, ""])


def _default(entry: dict[str, Any]) -> str:
    if "default" not in entry:
        return ""
    value = entry["default"]
    words = {"None": "null", "True": "true", "False": "false", "": '""'}
    return f"`{words.get(str(value), str(value))}`"


def _type(entry: dict[str, Any]) -> str:
    """A key's type in words, with its bounds."""
    if "anyOf" in entry:
        return " or ".join(_type(branch) for branch in entry["anyOf"])
    if "$ref" in entry:
        return "section"
    if "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry["enum"])
    if "const" in entry:
        return f"`{entry['const']}`"
    kind = entry.get("type", "any")
    if kind == "array":
        if "prefixItems" in entry:
            return f"list of {len(entry['prefixItems'])}: {_type(entry['prefixItems'][0])}"
        return f"list of {_type(entry['items'])}"
    if kind == "object":
        return f"name -> {_type(_values(entry))}"
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
    return words.get(kind, kind) + _bounds(entry)


def _bounds(entry: dict[str, Any]) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    found = [
        f"{sign} {int(entry[key]) if entry[key] == int(entry[key]) else entry[key]}"
        for key, sign in signs.items()
        if key in entry
    ]
    return f" {', '.join(found)}" if found else ""
