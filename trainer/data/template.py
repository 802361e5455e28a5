"""Chat templates to text, and which characters of it are targets: exactly, or not at all.

A template without `{% generation %}` tags does not say where an answer lies. Two proofs are tried, in this order:
the text up to the turn (with the generation prompt) and through the turn are both prefixes of the whole; or, where a
template rewrites earlier turns, the turn is replaced by a marker and nothing but the marker changes.
"""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config.errors import UserError
from trainer.data.chat import Message
from trainer.data.formats import Record

RENDER_SECONDS = 5.0  # one conversation renders in under a millisecond; the sandbox itself limits no time
MARK = "\ue000\uf8ff\ue000"  # private-use characters: no sane conversation holds them
TAGS = re.compile(r"\{%-?\s*generation\s*-?%\}")
NOTES = ("weight", "raw_call")  # our own keys of a message, which templates must not see


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a rendered conversation and their target weight.

    ``closes``: a special token that follows at once ends the turn and belongs to it.
    """

    start: int
    end: int
    weight: float
    closes: bool = False


@dataclass(frozen=True)
class Rendered:
    """A conversation as text with its target spans, in order and without overlap."""

    text: str
    spans: tuple[Span, ...]


def _shared(first: str, second: str) -> int:
    """How many characters two texts begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


class TokenizerFault(UserError):
    """A fault of the tokenizer or its template, the same for every row: no policy for bad rows may skip it."""


class Chat:
    """A tokenizer's chat template, asked for text and spans.

    Raises TokenizerFault at once where the tokenizer has no template.
    """

    def __init__(self, tokenizer: Any, key: str) -> None:
        self.tokenizer, self.key = tokenizer, key
        if not tokenizer.chat_template:
            raise TokenizerFault(
                f"{key}: conversations need a chat template and the tokenizer has none; "
                "set `model.chat_template: path/to/template.jinja` or use `format: prompt-completion` with strings"
            )

    def template(self, tools: Sequence[Any] | None) -> str:
        return self.tokenizer.get_chat_template(None, list(tools) if tools else None)

    def rendered(self, record: Record, train_on: str) -> Rendered:
        """The whole conversation and its targets; ``train_on``: assistant, last-assistant or all.

        Raises UserError naming the place where the template fails or the spans cannot be established.
        """
        assert record.messages is not None
        with render_limit(record.place):
            messages = self._prepared(record)
            if train_on == "all":
                return self._everything(record, messages)
            if TAGS.search(self.template(record.tools)):
                return self._tagged(record, messages, train_on)
            text = self._render(record, messages)
            turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
            if train_on == "last-assistant":
                turns = turns[-1:]
            weights = {index: float(record.messages[index].get("weight", 1.0)) for index in turns}
            spans = [self._span(record, messages, index, text, weights[index]) for index in turns if weights[index] > 0]
            return Rendered(text, tuple(spans))

    def prompt(self, record: Record) -> tuple[str, str]:
        """(text before the last assistant turn with the generation prompt, that turn's content)."""
        assert record.messages is not None
        turns = [index for index, message in enumerate(record.messages) if message["role"] == "assistant"]
        if not turns or turns[-1] == 0:
            raise UserError(f"{record.place}: no assistant turn after a question; evaluation needs a reference answer")
        last = record.messages[turns[-1]]
        with render_limit(record.place):
            messages = self._prepared(record)[: turns[-1]]
            return self._render(record, messages, add_generation_prompt=True), last["content"] or last.get(
                "raw_call", ""
            )

    def _prepared(self, record: Record) -> list[Message]:
        """The messages as the template reads them; refuses tools that it would drop in silence."""
        assert record.messages is not None
        template = self.template(record.tools)
        if record.tools and "tools" not in template:
            raise UserError(
                f"{record.place}:tools: the chat template prints no tools; set `model.chat_template` to one that does, "
                'or leave them out with `fields: {tools: ""}`'
            )
        prints_calls = "tool_calls" in template
        messages = []
        for message in record.messages:
            plain = {key: value for key, value in message.items() if key not in NOTES}
            if "tool_calls" in message and not prints_calls:
                if "raw_call" not in message:
                    raise UserError(
                        f"{record.place}:tool_calls: the chat template prints no tool calls; "
                        "set `model.chat_template` to one that does"
                    )
                plain["content"] = message["raw_call"]
                del plain["tool_calls"]
            messages.append(plain)
        return messages

    def _render(self, record: Record, messages: list[Message], add_generation_prompt: bool = False) -> str:
        tools = list(record.tools) if record.tools else None
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except UserError:
            raise
        except Exception as error:  # a template is the user's code and may raise anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{record.place}: the chat template fails on this conversation ({reason[:160]}); "
                "mend the row, or set `model.chat_template`"
            ) from error

    def _span(self, record: Record, messages: list[Message], index: int, text: str, weight: float) -> Span:
        found = self._by_prefix(record, messages, index, text) or self._by_marker(record, messages, index, text)
        if found is None:
            raise UserError(
                f"{record.place}:messages[{index}]: cannot tell which text of the chat template is this answer; "
                "add `{% generation %}` tags to the template (model.chat_template), or `train_on: all`"
            )
        return Span(*found, weight, closes=True)

    def _by_prefix(self, record: Record, messages: list[Message], index: int, text: str) -> tuple[int, int] | None:
        """[start, end) if the text before and through the turn are prefixes of the whole, else None."""
        try:
            answer = messages[index]["role"] == "assistant"
            before = self._render(record, messages[:index], add_generation_prompt=answer) if index else ""
            through = text if index == len(messages) - 1 else self._render(record, messages[: index + 1])
        except UserError as error:
            if isinstance(error, TokenizerFault):
                raise
            return None  # strict templates refuse half a conversation; the marker needs none
        if index == 0 and messages[0]["role"] == "assistant":
            return None  # no text before it tells the header from the answer
        if text.startswith(through) and through.startswith(before) and len(through) > len(before):
            return len(before), len(through)
        return None

    def _by_marker(self, record: Record, messages: list[Message], index: int, text: str) -> tuple[int, int] | None:
        """[start, end) if replacing the turn by a marker changes nothing but the marker's place, else None."""
        if MARK[0] in text or MARK[1] in text:
            return None
        marked_turn = {"role": messages[index]["role"], "content": MARK}
        try:
            marked = self._render(record, [*messages[:index], marked_turn, *messages[index + 1 :]])
        except UserError as error:
            if isinstance(error, TokenizerFault):
                raise
            return None
        start = _shared(text, marked)
        tail = _shared(text[start:][::-1], marked[start:][::-1])
        if marked[start : len(marked) - tail] != MARK or start >= len(text) - tail:
            return None
        return start, len(text) - tail

    def _everything(self, record: Record, messages: list[Message]) -> Rendered:
        """Every character a target, turns with a weight of their own scaled by it."""
        assert record.messages is not None
        text = self._render(record, messages)
        spans, at = [], 0
        for index, message in enumerate(record.messages):
            weight = float(message.get("weight", 1.0))
            if weight == 1.0:
                continue
            found = self._span(record, messages, index, text, weight)
            if found.start > at:
                spans.append(Span(at, found.start, 1.0))
            spans.append(found)
            at = found.end
        if at < len(text):
            spans.append(Span(at, len(text), 1.0))
        return Rendered(text, tuple(spans))

    def _tagged(self, record: Record, messages: list[Message], train_on: str) -> Rendered:
        """The spans that the template itself marks with `{% generation %}`."""
        from transformers.utils.chat_template_utils import render_jinja_template  # 0.7 s, not needed to read data

        assert record.messages is not None
        tools: list[Any] | None = list(record.tools) if record.tools else None
        render: Any = render_jinja_template  # its annotation says str; it gives texts and, for each, blocks
        try:
            texts, blocks = render(
                conversations=[messages],
                tools=tools,
                chat_template=self.template(record.tools),
                return_assistant_tokens_mask=True,
                add_generation_prompt=False,
                **self.tokenizer.special_tokens_map,
            )
        except UserError:
            raise
        except Exception as error:  # a template is the user's code and may raise anything
            raise UserError(f"{record.place}: the chat template fails ({error}); mend it or the row") from error
        turns = [message for message in record.messages if message["role"] == "assistant"]
        weights = [float(turn.get("weight", 1.0)) for turn in turns]
        if train_on == "last-assistant":
            weights = [0.0] * (len(weights) - 1) + weights[-1:]
        if len(weights) != len(blocks[0]):
            if len(set(weights)) > 1 or not blocks[0]:
                raise UserError(
                    f"{record.place}: the template marks {len(blocks[0])} parts for {len(turns)} assistant turns, so "
                    " their weights cannot be told apart; put one `{% generation %}` block around each turn"
                )
            weights = weights[:1] * len(blocks[0])
        spans = [Span(block[0], block[1], weight) for block, weight in zip(blocks[0], weights, strict=True)]
        return Rendered(texts[0], tuple(span for span in spans if span.weight > 0 and span.end > span.start))


@contextlib.contextmanager
def render_limit(place: str, seconds: float = RENDER_SECONDS) -> Iterator[None]:
    """Stop a template that runs away, by an alarm; without effect outside a process's main thread.

    Raises TokenizerFault. An alarm that was set before goes on afterwards.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TokenizerFault(f"{place}: the chat template runs for over {seconds:g} s; mend `model.chat_template`")

    handler = signal.signal(signal.SIGALRM, stop)
    started = time.monotonic()
    earlier, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if earlier:
            signal.setitimer(signal.ITIMER_REAL, max(earlier - (time.monotonic() - started), 1e-3))
