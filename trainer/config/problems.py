"""What is wrong with a recipe: the key as its author wrote it, the value, the remedy; told in one line."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from trainer.config.errors import UserError

PLANNED = ("curriculum", "adversary", "anchors")  # of a stage, by the design; refused until something reads them
ELSEWHERE = {  # what other tools call it; keys of this schema are found in their own section
    "learning_rate": "optimizer.lr",
    "batch_size": "batch.examples",
    "per_device_train_batch_size": "batch.micro_tokens",
    "num_train_epochs": "until.epochs",
    "max_steps": "until.steps",
    "max_seq_length": "model.max_length",
    "warmup_ratio": "schedule.warmup",
    "warmup_steps": "schedule.warmup",
    "lora_alpha": "tuning.alpha",
    "max_grad_norm": "optimizer.clip",
}
SHOWN = 60  # characters of a value or key in a message
EXPLAINED = 20  # unknown keys whose nearest key is looked for; one is told, and 20,000 would take ten seconds
Key = tuple[str | int, ...]


class Problem(NamedTuple):
    """One thing to mend. `value` is shown as YAML would write it; ABSENT shows none."""

    key: Key
    value: Any
    remedy: str


class Absent:
    """The value of a key that is not there."""


ABSENT = Absent()


def report(problems: Sequence[Problem], origin: str = "") -> UserError:
    """One line: the first problem whole, then how many others there are and where."""
    first, *others = dict.fromkeys(line(problem) for problem in problems)
    keys = list(dict.fromkeys(dotted(problem.key) for problem in problems[1:]))
    more = f" (and {len(others)} more: {', '.join(keys[:4])}{' ...' if len(keys) > 4 else ''})" if others else ""
    return UserError((f"{clean(origin, 300)}: " if origin else "") + first + more)


def line(problem: Problem) -> str:
    """`key: value: remedy`."""
    value = "" if problem.value is ABSENT else f"{shown(problem.value)}: "
    return f"{dotted(problem.key)}: {value}{problem.remedy}"


def dotted(key: Key) -> str:
    """A key as an override writes it: `stages.0.until.steps`."""
    return ".".join(clean(str(part)) for part in key) or "recipe"


def shown(value: Any) -> str:
    """A value in the words of YAML, on one line, shortened."""
    words = {"None": "null", "True": "true", "False": "false"}
    text = repr(value)
    return clean(words.get(text, text))


def clean(text: str, most: int = SHOWN) -> str:
    """Printable text on one line, shortened."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return escaped if len(escaped) <= most else escaped[: most - 3] + "..."


def schema_problems(error: ValidationError, model: type[BaseModel], data: Any) -> list[Problem]:
    """A pydantic error as problems, one for each key; unknown keys first, since they often cause the others."""
    found: dict[Key, Problem] = {}
    for detail in error.errors(include_url=False, include_context=True):
        key = _written_path(detail, data)
        if key not in found:  # the branches of a union each complain of the same key
            explained = len(found) < EXPLAINED or detail["type"] != "extra_forbidden"
            found[key] = _problem(detail, key, model) if explained else Problem(key, detail["input"], "unknown key")
    return sorted(found.values(), key=lambda problem: "unknown key" not in problem.remedy)


def _written_path(detail: ErrorDetails, data: Any) -> Key:
    """The location without the parts that pydantic adds: tags of union branches, `[key]`."""
    path: list[str | int] = []
    node: Any = data
    for index, part in enumerate(detail["loc"]):
        inside = part in (node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ())
        if inside:
            node = node[part]
            path.append(part)
        elif index == len(detail["loc"]) - 1 and detail["type"] == "missing":
            path.append(part)
    return tuple(path)


def _problem(detail: ErrorDetails, key: Key, model: type[BaseModel]) -> Problem:
    kind, context = detail["type"], detail.get("ctx", {})
    section = section_at(model, key[:-1])
    if kind == "extra_forbidden":
        return Problem(key, detail["input"], unknown_key(str(key[-1]), key[:-1], section, model))
    if kind == "missing":
        meaning = _meaning(section, str(key[-1])) if section else "one more value of the list"
        return Problem(key, ABSENT, f"missing; add it ({meaning})")
    if detail["loc"][-1] == "[key]":
        return Problem(key, key[-1], f"as a name: {_remedy(kind, context)}")
    field = section.model_fields.get(str(key[-1])) if section else None
    choices = _choices(field.annotation) if field else []
    if kind == "literal_error" or (choices and kind.endswith("_type")):
        return Problem(key, detail["input"], _choose(detail["input"], choices, field.annotation if field else None))
    return Problem(key, detail["input"], _remedy(kind, context, detail["msg"]))


def _choose(value: Any, choices: list[str], annotation: Any) -> str:
    near = difflib.get_close_matches(str(value), choices, n=1)
    also = " or a list" if any(get_origin(branch) is list for branch in get_args(annotation)) else ""
    hint = f"did you mean `{near[0]}`? " if near else ""
    return f"{hint}use {'one of ' if len(choices) > 1 else ''}{', '.join(choices)}{also}"


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is typing.Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for branch in get_args(annotation) for choice in _choices(branch)]


REMEDIES = {
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be {ge:g} or more",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be {le:g} or less",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number (unquoted, e.g. 2.0e-4)",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text; put it in quotes",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "use letters, digits, `.`, `_`, `-`, a letter or digit first, at most 100 of them",
    "list_type": "must be a list; write `[...]`",
    "dict_type": "must hold keys; write `{{key: value}}`, or remove it",
    "model_type": "must hold keys; write `{{key: value}}`, or remove it",
    "model_attributes_type": "must hold keys; write `{{key: value}}`, or remove it",
    "tuple_type": "must be a list; write `[...]`",
    "too_short": "needs {min_length} or more; fill it, or remove the key",
    "too_long": "has {actual_length}, at most {max_length} fit",
}


def _remedy(kind: str, context: dict[str, Any], message: str = "not valid") -> str:
    template = REMEDIES.get(kind)
    return template.format(**context) if template else f"{message[0].lower()}{message[1:]}; change it"


def _meaning(section: type[BaseModel], name: str) -> str:
    return (section.model_fields[name].description or name).rstrip(".")


def unknown_key(name: str, parent: Key, section: type[BaseModel] | None, model: type[BaseModel]) -> str:
    """The remedy for a key that the schema lacks: the nearest key, or the section where it belongs."""
    names = list(section.model_fields) if section else []
    if name in PLANNED:
        return "not available in this version; remove it (nothing is ignored in silence)"
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    if near:
        return f"unknown key; did you mean `{near[0]}`?"
    places = [path for path in all_keys(model) if path.rpartition(".")[2] == name]
    place = ELSEWHERE.get(name) or (places[0] if places else "")
    if place:
        return f"unknown key; it is written `{place}`"
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`? " if near else ""
    return f"unknown key; {hint}known keys: {', '.join(names)}"


def no_source(name: str, sources: Iterable[str], key: Key) -> Problem:
    """A name that no source has, with the nearest that one has."""
    near = difflib.get_close_matches(name, list(sources), n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"sources: {', '.join(sources)}"
    return Problem(key, name, f"no such source; {hint}")


def section_at(model: type[BaseModel], path: Iterable[str | int]) -> type[BaseModel] | None:
    """The section of the schema at a path, None where the path leads to no section."""
    current: Any = model
    for part in path:
        if isinstance(current, type) and issubclass(current, BaseModel):
            field = current.model_fields.get(str(part))
            current = field.annotation if field else None
        else:
            current = _item(current)
        current = _unwrapped(current)
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def _unwrapped(annotation: Any) -> Any:
    """`Section | None` and Annotated sections as the section itself."""
    if get_origin(annotation) is typing.Annotated:
        return _unwrapped(get_args(annotation)[0])
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return next((b for b in get_args(annotation) if isinstance(b, type) and issubclass(b, BaseModel)), annotation)
    return annotation


def _item(annotation: Any) -> Any:
    arguments = get_args(annotation)
    return arguments[-1] if get_origin(annotation) in (list, dict) and arguments else None


def all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema, breadth first; names and list places are written `<name>` and `0`."""
    inner = []
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        annotation = _unwrapped(field.annotation)
        if get_origin(annotation) in (list, dict):
            mark = "0" if get_origin(annotation) is list else "<name>"
            inner.append((_unwrapped(_item(annotation)), f"{prefix}{name}.{mark}."))
        else:
            inner.append((annotation, f"{prefix}{name}."))
    for section, path in inner:
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield from all_keys(section, path)
