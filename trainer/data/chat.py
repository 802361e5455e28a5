"""Conversations: turns checked and brought to the one form that chat templates read."""

from __future__ import annotations

import json
import math
from typing import Any

from trainer.config.errors import UserError

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def fault(where: str, value: Any, remedy: str) -> UserError:
    """A UserError at file:line:field with the value cut to one readable line."""
    text = repr(value)
    return UserError(f"{where}: {text if len(text) <= 60 else text[:57] + '...'}: {remedy}")


def parsed(value: Any, where: str) -> Any:
    """The value, read as JSON where it is a string that holds a list or object (as CSV columns do)."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise fault(where, value, f"neither a list nor JSON ({error.msg}); write a JSON list") from error


def read_messages(value: Any, where: str) -> list[Message]:
    """The turns of a `messages` list with text content, `weight` as a number, and tool calls as objects.

    Raises UserError naming the turn for anything that is not a turn.
    """
    turns = parsed(value, where)
    if not isinstance(turns, list):
        raise fault(where, value, "must be a list of messages, each {role, content}")
    if not turns:
        raise fault(where, turns, "no messages; give a conversation or remove the row")
    return [_message(turn, f"{where}[{index}]") for index, turn in enumerate(turns)]


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise fault(where, turn, "a message must be an object {role, content}")
    # Parquet gives every row the union of all keys, with null for what the row does not have.
    message = {key: value for key, value in turn.items() if value is not None}
    role = message.get("role")
    if role not in ROLES:
        raise fault(f"{where}.role", role, f"unknown role; use one of {', '.join(ROLES)}")
    if message.get("tool_calls"):
        message["tool_calls"] = _tool_calls(message["tool_calls"], f"{where}.tool_calls")
    else:
        message.pop("tool_calls", None)
    message["content"] = _content(message.get("content"), f"{where}.content", "tool_calls" in message)
    if role == "assistant" and not message["content"].strip() and "tool_calls" not in message:
        raise fault(f"{where}.content", message["content"], "an empty answer; give text or remove the row")
    if "weight" in message:
        message["weight"] = _weight(message["weight"], f"{where}.weight")
    return message


def _content(value: Any, where: str, may_be_missing: bool) -> str:
    if value is None and may_be_missing:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(_part(part, f"{where}[{index}]") for index, part in enumerate(value))
    raise fault(where, value, "content must be a string, or a list of {type: text, text: ...} parts")


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise fault(where, part, "only text parts can be trained on; remove images and the like")


def _weight(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise fault(where, value, "a weight is a number from 0 (not a target) on; use 0 or 1")
    return float(value)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as an object, since templates print them with `tojson`."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise fault(where, calls, "must be a list of {type: function, function: {name, arguments}}")
    read = []
    for index, call in enumerate(calls):
        place = f"{where}[{index}]"
        inner = call.get("function", call)
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise fault(place, call, "a call needs {type: function, function: {name, arguments}}")
        arguments = inner.get("arguments", {})
        if isinstance(arguments, str):
            arguments = parsed(arguments, f"{place}.arguments")
        if not isinstance(arguments, dict | list | type(None)):
            raise fault(f"{place}.arguments", arguments, "must be an object or a JSON string of one")
        function = {**inner, "arguments": arguments if arguments is not None else {}}
        outer = {
            key: value for key, value in call.items() if key != "function" and "function" in call and value is not None
        }
        read.append({"type": "function", **outer, "function": function})
    return read


def read_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """The tool schemas of a row, from a list or the JSON string of one; None where there are none."""
    tools = parsed(value, where)
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise fault(where, value, "must be a list of tool schemas (objects), or the JSON of one")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def from_sharegpt(value: Any, where: str) -> list[Message]:
    """ShareGPT turns `{from, value}` as messages; `function_call` becomes a tool call that keeps its own text.

    The text (`raw_call`) is what a template without tool calls prints as the turn's content.
    """
    turns = parsed(value, where)
    if not isinstance(turns, list) or not turns:
        raise fault(where, value, "must be a list of turns, each {from, value}")
    messages = []
    for index, turn in enumerate(turns):
        place = f"{where}[{index}]"
        if not isinstance(turn, dict):
            raise fault(place, turn, "a turn must be an object {from, value}")
        speaker, said = turn.get("from"), turn.get("value")
        if speaker not in SHAREGPT_ROLES:
            raise fault(f"{place}.from", speaker, f"unknown speaker; use one of {', '.join(SHAREGPT_ROLES)}")
        if not isinstance(said, str):
            raise fault(f"{place}.value", said, "must be a string")
        message: Message = {"role": SHAREGPT_ROLES[speaker], "content": said}
        if speaker == "function_call":
            message.update(content="", tool_calls=_called(said, f"{place}.value"), raw_call=said)
        if turn.get("weight") is not None:
            message["weight"] = turn["weight"]
        messages.append(_message(message, place))
    return messages


def _called(text: str, where: str) -> list[dict[str, Any]]:
    calls = parsed(text, where)
    return calls if isinstance(calls, list) else [calls]


def insert_system(messages: list[Message], system: str | None) -> list[Message]:
    """The conversation with a system prompt at its start, where it has none of its own."""
    if system is None or messages[0]["role"] in ("system", "developer"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def check_chat(messages: list[Message], where: str, needs_answer: bool) -> None:
    """Refuse conversations that would train on nonsense: a late system prompt, a tool without a call, no answer."""
    calls = False
    for index, message in enumerate(messages):
        role = message["role"]
        if role in ("system", "developer") and index > 0:
            raise fault(f"{where}[{index}].role", role, "only the first message may be the system prompt; move it")
        if role == "tool" and not calls:
            raise fault(
                f"{where}[{index}].role", role, "a tool answers before any assistant turn called it; mend the order"
            )
        calls = calls or role == "assistant"
    roles = {message["role"] for message in messages}
    if needs_answer and "assistant" not in roles:
        raise fault(where, sorted(roles), "no assistant turn to learn from; add one or remove the row")
    if needs_answer and messages[0]["role"] == "assistant" and len(messages) == 1:
        raise fault(where, "assistant", "an answer without a question; add the user's turn")
