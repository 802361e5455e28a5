"""From a row to a Record: the six formats, each field checked, nothing guessed."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainer.config.errors import UserError
from trainer.config.problems import clean
from trainer.config.schema import Source
from trainer.data.chat import Message, check_chat, from_sharegpt, insert_system, parsed, read_messages, read_tools
from trainer.data.readers import Row

FIELDS = {
    "messages": ("messages", "tools"),
    "sharegpt": ("conversations", "system", "tools"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "prompt-completion": ("prompt", "completion", "tools"),
    "text": ("text",),
    "text-label": ("text", "text_pair", "label"),
}


@dataclass(frozen=True)
class Record:
    """One example before tokens. Exactly one of `messages`, `prompt` + `completion` and `text` is given."""

    place: str  # file:line
    messages: tuple[Message, ...] | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    text_pair: str | None = None
    label: int | None = None


def check_source(name: str, source: Source, objective: str, labels: list[str] | None) -> None:
    """Refuse source keys that the format would ignore, and a format that the objective cannot use."""
    known = FIELDS[source.format]
    for field in source.fields:
        if field not in known:
            near = difflib.get_close_matches(field, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the format reads {', '.join(known)}"
            raise UserError(f"sources.{name}.fields.{field}: format {source.format} has no such field; {hint}")
    if source.system is not None and source.format in ("text", "text-label"):
        raise UserError(f"sources.{name}.system: format {source.format} has no conversation; remove it")
    if source.format == "text-label" and objective != "classification":
        raise UserError(
            f"sources.{name}.format: text-label: for `model.kind: classification`; a causal model reads "
            "`format: prompt-completion` with `fields: {prompt: text, completion: label}`, or `format: text`"
        )
    if source.format != "text-label" and objective == "classification":
        raise UserError(f"sources.{name}.format: {source.format}: classification reads `format: text-label`")
    if objective == "classification" and not labels:
        raise UserError("model.labels: missing; classification needs the class names, e.g. `labels: [no, yes]`")
    if source.format == "text" and objective == "supervised":
        raise UserError(f"sources.{name}.format: text: has no answers; use `objective: {{name: language-modeling}}`")


def to_record(row: Row, source: Source, labels: list[str] | None = None, needs_answer: bool = True) -> Record:
    """The row in the source's format.

    ``needs_answer``: refuse conversations that have no assistant turn to train on. Raises UserError with
    file:line:field, the value and the remedy.
    """
    if source.format == "text-label":
        return _text_label(row, source, labels or [])
    return BUILDERS[source.format](row, source, needs_answer)


def _fault(row: Row, field: str, value: Any, remedy: str) -> UserError:
    text = repr(value)
    return UserError(f"{row.place}:{field}: {text if len(text) <= 60 else text[:57] + '...'}: {remedy}")


def _get(row: Row, source: Source, field: str, required: bool = True) -> Any:
    """The value of a format's field under its renamed name; None where it is absent, null or renamed to ``""``."""
    name = source.fields.get(field, field)
    value = row.values.get(name) if name else None
    if value is None and required:
        if name in row.values:
            raise _fault(row, name, None, "is null; give a value or remove the row")
        near = difflib.get_close_matches(name, row.values, n=1) or list(row.values)[:8]
        has = ", ".join(clean(str(key)) for key in near)
        raise UserError(
            f"{row.place}:{name}: missing; format {source.format} needs it (the row has: {has}); "
            f"rename it with `fields: {{{field}: ...}}`"
        )
    return value


def _text(row: Row, source: Source, field: str, required: bool = True, filled: bool = True) -> str:
    value = _get(row, source, field, required)
    name = source.fields.get(field, field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _fault(row, name, value, f"must be a string, not {type(value).__name__}; quote it")
    if filled and not value.strip():
        raise _fault(row, name, value, "is empty; give text or remove the row")
    return value


def _messages(row: Row, source: Source, needs_answer: bool) -> Record:
    name = source.fields.get("messages", "messages")
    where = f"{row.place}:{name}"
    messages = read_messages(_get(row, source, "messages"), where)
    return _chat(row, source, messages, needs_answer, where)


def _chat(row: Row, source: Source, messages: list[Message], needs_answer: bool, where: str) -> Record:
    tools = read_tools(_get(row, source, "tools", required=False), f"{row.place}:{source.fields.get('tools', 'tools')}")
    check_chat(messages, where, needs_answer)
    messages = insert_system(messages, source.system)
    return Record(row.place, messages=tuple(messages), tools=tuple(tools) if tools else None)


def _sharegpt(row: Row, source: Source, needs_answer: bool) -> Record:
    name = source.fields.get("conversations", "conversations")
    where = f"{row.place}:{name}"
    messages = from_sharegpt(_get(row, source, "conversations"), where)
    own = _text(row, source, "system", required=False, filled=False)
    if own:
        messages = insert_system(messages, own)
    return _chat(row, source, messages, needs_answer, where)


def _alpaca(row: Row, source: Source, needs_answer: bool) -> Record:
    messages: list[Message] = []
    system = _text(row, source, "system", required=False, filled=False) or source.system
    if system:
        messages.append({"role": "system", "content": system})
    name = source.fields.get("history", "history")
    history = parsed(_get(row, source, "history", required=False), f"{row.place}:{name}") or []
    for turn in history if isinstance(history, list) else [history]:
        if not (isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(part, str) for part in turn)):
            raise _fault(row, name, turn, "must be a list of [question, answer] pairs of strings")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    question = _text(row, source, "instruction")
    extra = _text(row, source, "input", required=False, filled=False)
    messages.append({"role": "user", "content": f"{question}\n{extra}" if extra.strip() else question})
    answer = _text(row, source, "output", required=needs_answer, filled=needs_answer)
    if answer:
        messages.append({"role": "assistant", "content": answer})
    check_chat(messages, row.place, needs_answer)
    return Record(row.place, messages=tuple(messages))


def _prompt_completion(row: Row, source: Source, needs_answer: bool) -> Record:
    """Strings, or conversations: the completion's assistant turns are the targets, the prompt's are not."""
    names = [source.fields.get(field, field) for field in ("prompt", "completion")]
    prompt, completion = (_get(row, source, field) for field in ("prompt", "completion"))
    if isinstance(prompt, str) and isinstance(completion, str):
        if source.system is not None:
            raise _fault(row, names[0], prompt, "a plain string takes no `system`; remove it or give lists of messages")
        for field in ("prompt", "completion"):
            _text(row, source, field, filled=field == "completion")
        return Record(row.place, prompt=prompt, completion=completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        head = [{**message, "weight": 0.0} for message in read_messages(prompt, f"{row.place}:{names[0]}")]
        tail = read_messages(completion, f"{row.place}:{names[1]}")
        if tail[0]["role"] == "system":
            raise _fault(row, names[1], tail[0], "a system message belongs at the start of the prompt")
        return _chat(row, source, head + tail, needs_answer, f"{row.place}:{names[1]}")
    wrong = names[0] if not isinstance(prompt, str | list) else names[1]
    value = prompt if wrong == names[0] else completion
    raise _fault(row, wrong, value, "prompt and completion must both be strings, or both lists of messages")


def _plain_text(row: Row, source: Source, needs_answer: bool) -> Record:
    return Record(row.place, text=_text(row, source, "text"))


def _text_label(row: Row, source: Source, labels: list[str]) -> Record:
    name = source.fields.get("label", "label")
    given = _get(row, source, "label")
    pair = _text(row, source, "text_pair", required=False, filled=False) or None
    return Record(
        row.place,
        text=_text(row, source, "text"),
        text_pair=pair,
        label=_label(row, name, given, labels),
    )


def _label(row: Row, name: str, given: Any, labels: list[str]) -> int:
    if isinstance(given, str) and given in labels:
        return labels.index(given)
    index = given if isinstance(given, int) and not isinstance(given, bool) else None
    if isinstance(given, str) and given.isascii() and given.isdigit():
        index = int(given)  # a CSV has no numbers
    if index is not None and 0 <= index < len(labels):
        return index
    near = difflib.get_close_matches(str(given), labels, n=1) or labels[:8]
    raise _fault(
        row, name, given, f"not in model.labels ({len(labels)}: {', '.join(near)} ...); mend it or add the label"
    )


BUILDERS: dict[str, Callable[[Row, Source, bool], Record]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "text": _plain_text,
}


def canonical(record: Record) -> str:
    """The record as JSON with sorted keys, without its place: what an example is, for comparing rows."""
    values = {key: value for key, value in vars(record).items() if key != "place" and value is not None}
    return json.dumps(values, ensure_ascii=False, sort_keys=True)
