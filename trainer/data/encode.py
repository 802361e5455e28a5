"""Records to token ids with a weight for each token: what is a target, and what truncation leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.config.errors import UserError
from trainer.config.schema import Source
from trainer.data import renderer
from trainer.data.formats import Record
from trainer.data.guard import TokenizerFault
from trainer.data.template import Conversation, Dialect, Rendered, Span, dialect

SURE_TEXT = 1_000_000  # characters from which a text is measured by its size before it is tokenised


@dataclass(frozen=True)
class Encoded:
    """One example: ids and, for each, its weight as a target (0: none; the first token never is one).

    `length` is the token count before truncation; `label` the class, -1 where there is none.
    """

    ids: np.ndarray  # (length,) int32
    weights: np.ndarray  # (length,) float32
    length: int
    label: int = -1


@dataclass(frozen=True)
class TooLong:
    """An example over max_length, not kept."""

    length: int
    sure: bool = True  # False: only a lower bound


Example = Encoded | TooLong | UserError
Chat = Rendered | TooLong | UserError


class Encoder:
    """Encodes the records of one source for one objective.

    ``objective``: supervised, language-modeling or classification. Raises UserError where the tokenizer lacks what
    the format needs.
    """

    def __init__(self, tokenizer: Any, source: Source, objective: str, max_length: int, key: str) -> None:
        self.tokenizer, self.source, self.objective = tokenizer, source, objective
        self.max_length, self.key = max_length, key
        if not tokenizer.is_fast:
            raise TokenizerFault(f"{key}: the tokenizer gives no character offsets; use a model with a tokenizer.json")
        added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.specials = frozenset(added | set(tokenizer.all_special_ids))
        self._dialect: Dialect | None = None
        self.known: dict[str, np.ndarray] = {}  # text -> ids, of the records at hand
        self.train_on = "all" if objective == "language-modeling" else source.train_on
        # A token never stands for more characters than its own text is long.
        self.longest_token = max(map(len, tokenizer.get_vocab()), default=1)

    def encode(self, records: Sequence[Record], chats: Sequence[Chat] | None = None) -> list[Example]:
        """An example for each record, in order; a record's own fault is given in its place.

        ``chats``: what `chats` gave of these records. Raises TokenizerFault for what is no record's fault.
        """
        self._tokenise_together(records)
        results: list[Example | None] = []
        rendered: list[tuple[int, Rendered]] = []
        texts = iter(self.chats(records) if chats is None else chats)
        for record in records:
            result = next(texts) if record.messages is not None else self._one(record)
            if isinstance(result, Rendered):
                rendered.append((len(results), result))
            results.append(None if isinstance(result, Rendered) else result)
        if rendered:
            for (place, chat), encoding in zip(
                rendered, self._encodings([chat.text for _, chat in rendered]), strict=True
            ):
                ids = np.array(encoding.ids, dtype=np.int32)
                results[place] = self._cut(ids, span_weights(encoding, chat, self.specials))
        return [result for result in results if result is not None]

    def _tokenise_together(self, records: Sequence[Record]) -> None:
        """Fill `known` with the ids of the plain texts of these records: one call costs as much as one text alone."""
        texts = [record.text for record in records if record.text] + [
            record.prompt for record in records if record.prompt
        ]
        texts += [record.prompt + (record.completion or "") for record in records if record.prompt]
        texts = [text for text in dict.fromkeys(texts) if len(text) <= SURE_TEXT]
        if texts:
            given = self.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
            self.known = {text: np.array(ids, np.int32) for text, ids in zip(texts, given, strict=True)}

    def chats(self, records: Sequence[Record]) -> list[Chat]:
        """The text of each record that is a conversation, to be tokenised with its neighbours, or its own fault.

        Waits for another process most of the time, so that a thread may ask for the next records meanwhile. Raises
        TokenizerFault.
        """
        conversations = [_conversation(record) for record in records if record.messages is not None]
        if not conversations:
            return []
        chats = renderer.render(self.dialect, conversations, self.train_on)
        return [chat if isinstance(chat, UserError) else self._surely_long(len(chat.text)) or chat for chat in chats]

    @property
    def dialect(self) -> Dialect:
        """The tokenizer's chat template. Raises TokenizerFault where it has none."""
        self._dialect = self._dialect or dialect(self.tokenizer, self.key)
        return self._dialect

    def _one(self, record: Record) -> Encoded | TooLong | UserError:
        """The finished example of a record that is no conversation."""
        try:
            size = len(record.text or "") + len(record.prompt or "") + len(record.completion or "")
            return self._surely_long(size) or self._plain(record)
        except TokenizerFault:
            raise
        except UserError as error:
            return error

    def _surely_long(self, size: int) -> TooLong | None:
        """Tells an immense text by its size: tokenising 10 million characters takes half a minute."""
        least = size // self.longest_token
        if size > SURE_TEXT and least > self.max_length and self.source.truncation in ("error", "drop"):
            return TooLong(least, sure=False)
        return None

    def _plain(self, record: Record) -> Encoded | TooLong:
        if record.label is not None:
            ids = self._classified(record)
            return self._cut(ids, np.zeros(len(ids), np.float32), record.label)
        if record.prompt is not None:
            prompt, answer = self._answered(record)
            ids = np.concatenate([prompt, answer])
            weights = np.ones(len(ids), np.float32)
            if self.objective == "supervised" and self.source.train_on != "all":
                weights[: len(prompt)] = 0.0
            return self._cut(ids, weights)
        ids = self._closed(self._ids(record.text or "", special=True))
        return self._cut(ids, np.ones(len(ids), np.float32))

    def _classified(self, record: Record) -> np.ndarray:
        """ids of a text, or of two with what the tokenizer puts between them (else its separator or end token)."""
        first = self._ids(record.text or "", special=True)
        if record.text_pair is None:
            return first
        both = self._ids(record.text or "", special=True, pair=record.text_pair)
        second = self._ids(record.text_pair, special=False)
        bare = np.concatenate([self._ids(record.text or "", special=False), second])
        if len(both) > len(bare):
            return both
        tokenizer = self.tokenizer
        border = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
        if border is None:
            raise TokenizerFault(
                f"{record.place}:text_pair: the tokenizer has no token to put between two texts; join them"
            )
        return np.concatenate([first, np.array([border], np.int32), second])

    def _answered(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """(prompt ids as at generation, completion ids with the end token)."""
        prompt = self.prompt_ids(record.prompt or "")
        whole = self._ids((record.prompt or "") + (record.completion or ""), special=True)
        whole = whole[:-1] if len(whole) and whole[-1] == self.tokenizer.eos_token_id else whole
        if len(whole) > len(prompt) and np.array_equal(whole[: len(prompt)], prompt):
            return prompt, self._closed(whole[len(prompt) :])
        # A token that would join the two cannot be generated after this prompt, so the border is kept.
        return prompt, self._closed(self._ids(record.completion or "", special=False))

    def prompt_ids(self, prompt: str) -> np.ndarray:
        """A plain prompt's ids, as the tokenizer begins a text, without an end token."""
        ids = self._ids(prompt, special=True)
        return ids[:-1] if len(ids) and ids[-1] == self.tokenizer.eos_token_id else ids

    def _closed(self, ids: np.ndarray) -> np.ndarray:
        end = self.tokenizer.eos_token_id
        if end is None:
            raise TokenizerFault(
                f"{self.key}: the tokenizer has no end-of-text token, so answers would never end; add one"
            )
        return ids if len(ids) and ids[-1] == end else np.append(ids, np.int32(end))

    def _ids(self, text: str, special: bool, pair: str | None = None) -> np.ndarray:
        if special and pair is None and text in self.known:
            return self.known[text]
        given = self.tokenizer(text, pair, add_special_tokens=special, return_attention_mask=False, verbose=False)
        return np.array(given["input_ids"], dtype=np.int32)

    def _encodings(self, texts: list[str]) -> Any:
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return self.tokenizer(texts, **options).encodings

    def _cut(self, ids: np.ndarray, weights: np.ndarray, label: int = -1) -> Encoded | TooLong:
        """The example within max_length by the source's policy."""
        length, most = len(ids), self.max_length
        if length > most:
            if self.source.truncation in ("error", "drop"):
                return TooLong(length)
            kept = slice(0, most) if self.source.truncation == "right" else slice(length - most, length)
            ids, weights = ids[kept], weights[kept]
        weights = weights.copy()
        weights[:1] = 0.0  # nothing precedes the first token that could predict it
        return Encoded(ids, weights, length, label)

    def generation_prompt(self, record: Record) -> tuple[np.ndarray, str]:
        """(prompt ids (length,) int32, reference text): everything before the last answer, and that answer.

        The ids are those that stand before the answer in training. Not truncated.
        """
        if record.messages is not None:
            text, reference = renderer.prompt(self.dialect, _conversation(record))
            return self._ids(text, special=False), reference
        if record.prompt is None:
            raise UserError(
                f"{record.place}: format {self.source.format} has no answer to compare with; use `kind: loss`"
            )
        return self.prompt_ids(record.prompt), record.completion or ""


def _conversation(record: Record) -> Conversation:
    assert record.messages is not None
    return Conversation(record.place, record.messages, record.tools)


def span_weights(encoding: Any, chat: Rendered, specials: frozenset[int]) -> np.ndarray:
    """Target weights (length,) float32 of an encoding (`ids`, `offsets`) of ``chat.text``.

    A token belongs to a span if its characters, white space around them apart, lie within it. Trailing white space
    behind the turn's last special token is no target: generation has stopped there.
    """
    ids = encoding.ids  # each access makes a new list
    weights = np.zeros(len(ids), np.float32)
    if not len(ids):
        return weights
    starts, ends = np.array(encoding.offsets, dtype=np.int64).T  # (length,) each
    for span in chat.spans:
        first = int(np.searchsorted(ends, span.start, side="right"))
        last = int(np.searchsorted(starts, span.end, side="left"))
        while first < last and _start(chat.text, starts[first], ends[first]) < span.start:
            first += 1
        while first < last and _end(chat.text, starts[last - 1], ends[last - 1]) > span.end:
            last -= 1
        if span.close != "none":
            last = _closed_at(ids, starts, chat, span, first, last, specials)
        weights[first:last] = span.weight
    return weights


def _start(text: str, start: int, end: int) -> int:
    return end - len(text[start:end].lstrip())


def _end(text: str, start: int, end: int) -> int:
    return start + len(text[start:end].rstrip()) if text[start:end].strip() else end


def _closed_at(
    ids: Sequence[int], starts: np.ndarray, chat: Rendered, span: Span, first: int, last: int, specials: frozenset[int]
) -> int:
    """Where the turn's targets end: behind its end token, within the span or, where none is, right after it."""
    if span.close == "within":
        place = last
        while place > first and ids[place - 1] not in specials and not chat.text[starts[place - 1] : span.end].strip():
            place -= 1
        if place > first and ids[place - 1] in specials:
            return place
    follows = last < len(ids) and starts[last] == span.end and ids[last] in specials
    return last + 1 if follows else last
