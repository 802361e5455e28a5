"""Settings from the command line: `optimizer.lr=1e-4`, `stages.0.until.steps=20`.

Written here and not taken from OmegaConf, which reads `${...}` in any text of the recipe as an interpolation (it can
name environment variables, and refuses the rest) and takes 50 ms to import.
"""

from __future__ import annotations

import copy
import difflib
from typing import Any

from trainer.config.errors import UserError
from trainer.config.problems import clean
from trainer.config.yaml_file import parse_yaml

LONGEST, DEEPEST = 1 << 16, 32  # characters of a setting; keys in it, a source's name may hold dots


def apply_overrides(data: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A copy of the data with `key.sub=value` settings applied in order; values are read as YAML.

    A place in a list is its index or, for stages and suites, the `name`. A mapping is merged into one that is there,
    except a mixture. Raises UserError for a malformed setting or a place that cannot be.
    """
    result = copy.deepcopy(data)
    for item in overrides:
        key, separator, text = item.partition("=")
        parts = key.split(".")
        if len(item) > LONGEST or len(parts) > DEEPEST:
            raise _error(item, f"over {LONGEST >> 10} KiB, or over {DEEPEST} keys deep; write it into the recipe")
        if not separator or not all(parts) or any(part != part.strip() for part in parts):
            raise _error(item, "not of the form key.sub=value; write e.g. optimizer.lr=1e-4")
        value = parse_yaml(text, f"override: {clean(item)!r}") if text else ""
        if parts[0] == "stages" and len(parts) > 1 and not result.get("stages"):
            result["stages"] = [{"name": "main"}]  # what a recipe without stages means
        _set(result, parts, value, item)
    return result


def merge(base: Any, over: Any) -> Any:
    """Mappings merged key by key, anything else replaced; a `mixture` is replaced whole, since its sum is meant."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    merged = dict(base)
    for key, value in over.items():
        merged[key] = merge(base[key], value) if key in base and key != "mixture" else value
    return merged


def _set(node: Any, parts: list[str], value: Any, item: str) -> None:
    while True:
        place, rest = _step(node, parts, item)
        if not rest:
            old = node[place] if isinstance(node, list) else node.get(place)
            node[place] = value if place == "mixture" else merge(old, value)
            return
        if isinstance(node, dict) and node.get(place) is None:
            node[place] = {}
        node, parts = node[place], rest


def _step(node: Any, parts: list[str], item: str) -> tuple[Any, list[str]]:
    """The key or index that the first parts name in a node, and the parts left."""
    if isinstance(node, dict):
        for count in range(len(parts), 1, -1):  # a source's name may hold dots: the longest key that is there wins
            if ".".join(parts[:count]) in node:
                return ".".join(parts[:count]), parts[count:]
        return parts[0], parts[1:]
    if not isinstance(node, list):
        raise _error(item, f"`{clean(str(parts[0]))}` lies below a single value; check the key against the recipe")
    names: list[Any] = [entry.get("name") if isinstance(entry, dict) else None for entry in node]
    if parts[0] in names:
        return names.index(parts[0]), parts[1:]
    if parts[0].isascii() and parts[0].isdigit() and int(parts[0]) < len(node):
        return int(parts[0]), parts[1:]
    near = difflib.get_close_matches(parts[0], [name for name in names if name], n=1)
    hint = f", did you mean `{near[0]}`?" if near else ""
    indices = f"0 to {len(node) - 1}" if node else "none yet: give the whole list"
    raise _error(item, f"no entry `{clean(parts[0])}` in the list; use an index ({indices}) or a name{hint}")


def _error(item: str, remedy: str) -> UserError:
    return UserError(f"override: {clean(item)!r}: {remedy}")
