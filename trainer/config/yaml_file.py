"""YAML 1.2 in, YAML 1.2 out, and nothing of YAML that a recipe has no use for."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml import tokens as marks
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import YAMLError

from trainer.config.errors import UserError
from trainer.config.problems import ABSENT, Key, Problem, clean

MAX_RECIPE_BYTES = 1 << 18  # a recipe is a page; this much takes the parser about two seconds
MOST_BITS = 64  # of a whole number; Python itself prints no more than 4,300 digits
MAX_DEPTH = 20  # the deepest key of the schema lies five levels down
OPENING = (
    marks.BlockMappingStartToken, marks.BlockSequenceStartToken, marks.FlowMappingStartToken,
    marks.FlowSequenceStartToken,
)  # fmt: skip
CLOSING = (marks.BlockEndToken, marks.FlowMappingEndToken, marks.FlowSequenceEndToken)
REFUSED = {
    marks.AnchorToken: "anchors and aliases are not accepted; write the value out",
    marks.AliasToken: "anchors and aliases are not accepted; write the value out",
    marks.TagToken: "tags (`!...`) are not accepted; write the plain value",
    marks.DirectiveToken: "directives (`%...`) are not accepted; recipes are YAML 1.2, remove the line",
}


class _Constructor(SafeConstructor):
    """The core schema: a date is text (timestamps are of YAML 1.1), and so is a lone `=`."""


for _tag in ("timestamp", "value"):
    _Constructor.add_constructor(f"tag:yaml.org,2002:{_tag}", SafeConstructor.construct_yaml_str)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML 1.2 file (`3e-4` is a number, `no` is a string, duplicate keys are errors).

    Raises UserError with the line for what YAML or the house refuses.
    """
    if what := _no_file(path):
        raise UserError(f"recipe: {clean(str(path), 300)}: {what}; give the path of a YAML recipe")
    data = parse_yaml(_read_text(path), f"recipe: {clean(str(path), 300)}")
    if data is None:
        raise UserError(f"recipe: {path}: is empty; start with `name: ...`")
    if not isinstance(data, dict):
        raise UserError(f"recipe: {path}: holds {_kind(data)}, not keys; start with `name: ...`")
    return data


def _no_file(path: Path) -> str:
    """Why a path is no regular file; empty where it is one."""
    try:
        if path.is_file():
            return ""
        return "is a folder" if path.is_dir() else "is a pipe or device" if path.exists() else "no such file"
    except OSError as error:  # a name too long for the system
        return error.strerror or str(error)


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_RECIPE_BYTES:
            limit = MAX_RECIPE_BYTES >> 10
            raise UserError(f"recipe: {path}: {size >> 10} KiB, at most {limit} are read; a recipe points to data")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"recipe: {path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"recipe: {path}: cannot be read ({error.strerror}); check its permissions") from error


def parse_yaml(text: str, origin: str) -> Any:
    """The value of one YAML 1.2 document. Raises UserError as `origin:line: what: remedy`."""
    try:
        _refuse(text, origin)
        yaml = YAML(typ="safe", pure=True)
        yaml.Constructor = _Constructor
        return yaml.load(io.StringIO(text))
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{origin}{line}: {clean(problem, 200)}; mend the YAML") from error
    except (ValueError, OverflowError) as error:  # a number that Python cannot read, such as 5000 digits
        raise UserError(f"{origin}: {clean(str(error), 200)}; mend the YAML") from error


def _refuse(text: str, origin: str) -> None:
    """Aliases can expand without bound and depth exhausts the parser's stack, so both are stopped while scanning."""
    depth, key = 0, False
    for token in YAML(typ="safe", pure=True).scan(io.StringIO(text)):
        place = f"{origin}:{token.start_mark.line + 1}"
        if type(token) in REFUSED:
            raise UserError(f"{place}: YAML {REFUSED[type(token)]}")
        if key and isinstance(token, marks.ScalarToken) and token.value == "<<" and token.plain:
            raise UserError(f"{place}: `<<` merges keys in YAML 1.1 alone; write the keys out")
        key = isinstance(token, marks.KeyToken)
        depth += isinstance(token, OPENING) - isinstance(token, CLOSING)
        if depth > MAX_DEPTH:
            raise UserError(f"{place}: nested more than {MAX_DEPTH} deep; no key of a recipe is, mend the brackets")


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"one {type(value).__name__}"


def odd_values(data: Any, path: Key = ()) -> Iterator[Problem]:
    """Problems with what no key may hold: keys that are not text, numbers that are not finite or
    immense, broken characters."""
    if isinstance(data, dict):
        for key, value in data.items():
            if not isinstance(key, str):
                yield Problem((*path, str(key)), ABSENT, "a key must be text; put it in quotes")
            yield from odd_values(value, (*path, str(key)))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from odd_values(value, (*path, index))
    elif isinstance(data, int) and data.bit_length() > MOST_BITS:
        yield Problem(path, ABSENT, f"a number of {data.bit_length()} bits; no key holds more than {MOST_BITS}")
    elif isinstance(data, float) and not math.isfinite(data):
        yield Problem(path, data, "must be a finite number")
    elif isinstance(data, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in data):
        yield Problem(path, data, "holds a NUL or half a character; write plain text")


def dump_yaml(data: Any) -> str:
    """Plain data as YAML 1.2 in block style, in the order given."""
    buffer = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.width = 1 << 16  # a long text stays on its line
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(data, buffer)
    return buffer.getvalue()
