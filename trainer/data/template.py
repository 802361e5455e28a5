"""Chat templates to text, and which characters of it are targets: exactly, or not at all.

A template without `{% generation %}` tags does not say where an answer lies. Two proofs are tried, in this order:
the text up to the turn (with the generation prompt) and through the turn are both prefixes of the whole; or, where a
template rewrites earlier turns, the turn is replaced by a marker and nothing but the marker changes.

A template is code of whoever published the model. `Chat` runs it where it stands: only the bounded process of
`render_process` calls it, everyone else asks `renderer`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainer.config.errors import UserError
from trainer.data.chat import Message
from trainer.data.guard import TokenizerFault

TOGETHER = 3  # from so many answers on, one marked rendering for all is cheaper than two for each
MARK = "\ue000\uf8ff\ue000"  # private-use characters: no sane conversation holds them
TAGS = re.compile(r"\{%-?\s*generation\s*-?%\}")
NOTES = ("weight", "raw_call")  # our own keys of a message, which templates must not see


@dataclass(frozen=True)
class Conversation:
    """What a template is given of a row; `place` is file:line."""

    place: str
    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a rendered conversation and their target weight.

    ``close``: where the turn's end token may lie, which is a target too: `within` the span (behind it white space at
    most) or else right after it, `after` alone, or `none` where the template has said it all.
    """

    start: int
    end: int
    weight: float
    close: Literal["none", "within", "after"] = "none"


@dataclass(frozen=True)
class Rendered:
    """A conversation as text with its target spans, in order and without overlap."""

    text: str
    spans: tuple[Span, ...]


def _shared(first: str, second: str) -> int:
    """How many characters two texts begin with in common."""
    low, high = 0, min(len(first), len(second))
    while low < high:  # by halves, each compared in C: texts of 10 million characters have two seconds
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle - 1)
    return low


@dataclass(frozen=True)
class Dialect:
    """What a tokenizer brings to its chat template: the template (or several by name), the texts of its named special
    tokens, and those of all special tokens."""

    templates: str | Mapping[str, str]
    named: Mapping[str, str]
    special_texts: Sequence[str]


def dialect(tokenizer: Any, key: str) -> Dialect:
    """The dialect of a tokenizer. Raises TokenizerFault, naming ``key``, where it has no template."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    if not tokenizer.chat_template:
        raise TokenizerFault(
            f"{key}: conversations need a chat template and the tokenizer has none; "
            "set `model.chat_template: path/to/template.jinja` or use `format: prompt-completion` with strings"
        )
    named = {name: str(text) for name, text in tokenizer.special_tokens_map.items()}
    return Dialect(tokenizer.chat_template, named, sorted({*added, *tokenizer.all_special_tokens} - {""}))


class Chat:
    """A chat template, asked for text and spans."""

    def __init__(self, dialect: Dialect) -> None:
        self.dialect, self.special_texts = dialect, tuple(dialect.special_texts)

    def template(self, tools: Sequence[Any] | None) -> str:
        """The template for a conversation with or without tools, chosen as transformers does."""
        templates = self.dialect.templates
        if isinstance(templates, str):
            return templates
        for name in ("tool_use", "default") if tools else ("default",):
            if name in templates:
                return templates[name]
        raise TokenizerFault(
            f"model.chat_template: the tokenizer has templates {', '.join(sorted(templates))} and none is `default`; "
            "set `model.chat_template` to a file with the one to use"
        )

    def rendered(self, record: Conversation, train_on: str) -> Rendered:
        """The whole conversation and its targets; ``train_on``: assistant, last-assistant or all.

        Raises UserError naming the place where the template fails or the spans cannot be established.
        """
        messages = self._prepared(record)
        if train_on == "all":
            return self._everything(record, messages)
        if TAGS.search(self.template(record.tools)):
            return self._said(record, self._tagged(record, messages, train_on))
        text = self._render(record, messages)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if train_on == "last-assistant":
            turns = turns[-1:]
        weights = {index: float(record.messages[index].get("weight", 1.0)) for index in turns}
        turns = [index for index in turns if weights[index] > 0]
        if together := self._together(record, messages, turns, text):
            spans = [Span(*together[index], weights[index], "after") for index in turns]
        else:
            spans = [self._span(record, messages, index, text, weights[index]) for index in turns]
        return self._said(record, Rendered(text, tuple(spans)))

    def _said(self, record: Conversation, chat: Rendered) -> Rendered:
        """Refuse a template that prints nothing of an answer, as those for lists of parts do with plain strings."""
        for span in chat.spans:
            said = chat.text[span.start : span.end]
            for token in self.special_texts:
                said = said.replace(token, "")
            if not said.strip():
                raise UserError(
                    f"{record.place}:messages: the chat template prints nothing of an answer; "
                    "set `model.chat_template` to one for text content"
                )
        return chat

    def whole(self, record: Conversation) -> str:
        """The text of the conversation alone."""
        return self._render(record, self._prepared(record))

    def prompt(self, record: Conversation) -> tuple[str, str]:
        """(text before the last assistant turn with the generation prompt, that turn's content)."""
        turns = [index for index, message in enumerate(record.messages) if message["role"] == "assistant"]
        if not turns or turns[-1] == 0:
            raise UserError(f"{record.place}: no assistant turn after a question; evaluation needs a reference answer")
        last = record.messages[turns[-1]]
        messages = self._prepared(record)[: turns[-1]]
        return self._render(record, messages, add_generation_prompt=True), last["content"] or last.get("raw_call", "")

    def _prepared(self, record: Conversation) -> list[Message]:
        """The messages as the template reads them; refuses tools that it would drop in silence."""
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

    def _render(self, record: Conversation, messages: list[Message], add_generation_prompt: bool = False) -> str:
        return self._run(record, messages, add_generation_prompt=add_generation_prompt)[0]

    def _run(self, record: Conversation, messages: list[Message], **options: Any) -> tuple[str, list[tuple[int, int]]]:
        """(text, [start, end) of each part marked by generation tags, where those are asked for)."""
        from transformers.utils.chat_template_utils import render_jinja_template  # 0.7 s, not needed to read data

        tools: list[Any] | None = list(record.tools) if record.tools else None
        render: Any = render_jinja_template  # its annotation says str; it gives texts and, for each, blocks
        template = self.template(record.tools)
        try:
            texts, blocks = render([messages], tools, chat_template=template, **options, **self.dialect.named)
        except MemoryError:
            raise
        except Exception as error:  # a template is somebody's code and may raise anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{record.place}: the chat template fails on this conversation ({reason[:160]}); "
                "mend the row, or set `model.chat_template`"
            ) from error
        return texts[0], blocks[0] if blocks else []

    def _together(
        self, record: Conversation, messages: list[Message], turns: list[int], text: str
    ) -> dict[int, tuple[int, int]] | None:
        """{turn: [start, end)} of all answers from one rendering with markers, or None where it proves nothing.

        Proof: the text is the marked one with each marker replaced by its answer; each answer follows the very text
        of the generation prompt and is followed by a special token. Otherwise each turn is looked at by itself.
        """
        answers = [messages[index]["content"] for index in turns]
        if len(turns) < TOGETHER or any(not answer or MARK[0] in answer for answer in answers):
            return None
        if any("tool_calls" in messages[index] for index in turns):
            return None
        marked = list(messages)
        for index in turns:
            marked[index] = {**messages[index], "content": MARK}
        try:
            pieces = self._render(record, marked).split(MARK)
            bare = self._render(record, messages[: turns[-1]])
            before = self._render(record, messages[: turns[-1]], add_generation_prompt=True)
        except TokenizerFault:
            raise
        except UserError:
            return None
        if len(pieces) != len(turns) + 1 or not before.startswith(bare) or MARK[0] in text:
            return None
        header, found, at = before[len(bare) :], {}, 0
        for index, answer, piece, after in zip(turns, answers, pieces, pieces[1:], strict=False):
            start = at + len(piece)
            said = answer if text.startswith(answer + after, start) else answer.strip()
            found[index] = (start, start + len(said))
            proven = text.startswith(piece, at) and text.startswith(said + after, start)
            if not (proven and piece.endswith(header) and after.startswith(self.special_texts)):
                return None
            at = start + len(said)
        return found if len(before) == found[turns[-1]][0] and text[at:] == pieces[-1] else None

    def _span(self, record: Conversation, messages: list[Message], index: int, text: str, weight: float) -> Span:
        if found := self._by_prefix(record, messages, index, text):
            return Span(*found, weight, "within")
        if found := self._by_marker(record, messages, index, text):
            return Span(*found, weight, "after")
        raise UserError(
            f"{record.place}:messages[{index}]: cannot tell which text of the chat template is this answer; "
            "add `{% generation %}` tags to the template (model.chat_template), or `train_on: all`"
        )

    def _by_prefix(
        self, record: Conversation, messages: list[Message], index: int, text: str
    ) -> tuple[int, int] | None:
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

    def _by_marker(
        self, record: Conversation, messages: list[Message], index: int, text: str
    ) -> tuple[int, int] | None:
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

    def _everything(self, record: Conversation, messages: list[Message]) -> Rendered:
        """Every character a target, turns with a weight of their own scaled by it."""
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

    def _tagged(self, record: Conversation, messages: list[Message], train_on: str) -> Rendered:
        """The spans that the template itself marks with `{% generation %}`."""
        text, blocks = self._run(record, messages, return_assistant_tokens_mask=True)
        turns = [message for message in record.messages if message["role"] == "assistant"]
        weights = [float(turn.get("weight", 1.0)) for turn in turns]
        if train_on == "last-assistant":
            weights = [0.0] * (len(weights) - 1) + weights[-1:]
        if len(weights) != len(blocks):
            if len(set(weights)) > 1 or not blocks:
                raise UserError(
                    f"{record.place}: the template marks {len(blocks)} parts for {len(turns)} assistant turns, so "
                    "their weights cannot be told apart; put one `{% generation %}` block around each turn"
                )
            weights = weights[:1] * len(blocks)
        spans = [Span(block[0], block[1], weight) for block, weight in zip(blocks, weights, strict=True)]
        return Rendered(text, tuple(span for span in spans if span.weight > 0 and span.end > span.start))
