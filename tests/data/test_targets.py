"""Golden masks: which tokens are targets, worked out by hand. The tiny tokenizer makes one token of each byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from data_cases import CHATML, SMOLLM2, TAGGED, THINKING, TOOLS, chat, make_tokenizer

from trainer.config import Source, UserError
from trainer.data.encode import Encoded, Encoder, TooLong, span_weights
from trainer.data.formats import to_record
from trainer.data.guard import TokenizerFault
from trainer.data.readers import Row
from trainer.data.template import Chat, Conversation


def encoder_for(tokenizer: Any, objective: str = "supervised", max_length: int = 512, **source: Any) -> Encoder:
    return Encoder(tokenizer, Source(path="x", **{"format": "messages", **source}), objective, max_length, "sources.s")


def encoded(encoder: Encoder, row: dict[str, Any], labels: list[str] | None = None) -> Encoded:
    record = to_record(Row("f.jsonl", 1, row), encoder.source, labels, encoder.objective == "supervised")
    (result,) = encoder.encode([record])
    assert isinstance(result, Encoded), result
    return result


def marked(tokenizer: Any, example: Encoded) -> str:
    """The text of an example with its targets in brackets."""
    pieces, inside = [], False
    for token, weight in zip(example.ids, example.weights, strict=True):
        if (weight > 0) != inside:
            pieces.append("[" if not inside else "]")
            inside = not inside
        pieces.append(tokenizer.decode([int(token)]))
    return "".join(pieces) + ("]" if inside else "")


TRIMMING = CHATML.replace("message['content']", "message['content'] | trim")
ONE = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[yo<|im_end|>]\n"
TWO = ONE + "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n[c<|im_end|>]\n"
DEFAULT = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


@pytest.mark.parametrize("template", [CHATML, TAGGED], ids=["no tags", "generation tags"])
@pytest.mark.parametrize(("turns", "expected"), [(("hi", "yo"), ONE), (("hi", "yo", "b", "c"), TWO)])
def test_assistant_turns_and_their_end_are_the_targets(template: str, turns: tuple[str, ...], expected: str) -> None:
    tokenizer = make_tokenizer(template)
    assert marked(tokenizer, encoded(encoder_for(tokenizer), chat(*turns))) == expected


def test_smollm2_template_with_its_default_system_prompt(tokenizer: Any) -> None:
    assert marked(tokenizer, encoded(encoder_for(tokenizer), chat("hi", "yo", "b", "c"))) == DEFAULT + TWO
    with_system = encoded(encoder_for(tokenizer, system="Be brief."), chat("hi", "yo"))
    assert marked(tokenizer, with_system) == "<|im_start|>system\nBe brief.<|im_end|>\n" + ONE


def test_end_of_turn_is_a_target_although_it_is_the_pad_token(tokenizer: Any) -> None:
    example = encoded(encoder_for(tokenizer), chat("hi", "yo"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 257
    ends = np.flatnonzero(example.ids == 257)
    assert example.weights[ends].tolist() == [0.0, 0.0, 1.0]  # of system, user and assistant turn


@pytest.mark.parametrize("template", [CHATML, TAGGED], ids=["no tags", "generation tags"])
def test_weights_of_turns_scale_and_mask(template: str) -> None:
    row = chat("hi", "yo", "b", "c", "d", "e")
    row["messages"][1]["weight"] = 0
    row["messages"][3]["weight"] = 0.5
    example = encoded(encoder_for(make_tokenizer(template)), row)
    assert example.weights[example.weights > 0].tolist() == [0.5, 0.5, 1.0, 1.0]


def test_last_assistant_and_all(tokenizer: Any) -> None:
    tokenizer = make_tokenizer(CHATML)
    last = marked(tokenizer, encoded(encoder_for(tokenizer, train_on="last-assistant"), chat("hi", "yo", "b", "c")))
    assert last == TWO.replace("[yo<|im_end|>]", "yo<|im_end|>")
    for options in ({"train_on": "all"}, {"objective": "language-modeling"}):
        every = encoded(encoder_for(tokenizer, **options), chat("hi", "yo"))
        assert every.weights.tolist() == [0.0] + [1.0] * (len(every.ids) - 1)


def test_a_template_that_rewrites_earlier_turns_is_aligned_by_marker() -> None:
    tokenizer = make_tokenizer(THINKING)
    example = encoded(encoder_for(tokenizer), chat("q", "hm</think>yo", "b", "c"))
    assert marked(tokenizer, example) == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[yo<|im_end|>]\n"
        "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n[<think></think>c<|im_end|>]\n"
    )


@pytest.mark.parametrize("template", [SMOLLM2, CHATML, TRIMMING])
def test_the_quick_way_for_long_conversations_gives_what_the_slow_one_gives(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = chat("q", " a\n", "assistant\n", "b<|im_start|>", "q", "q", "<|im_end|>", "a", "x", "é\n\ny")
    row["messages"][3]["weight"] = 0.5
    encoder = encoder_for(make_tokenizer(template))
    record = to_record(Row("f", 1, row), encoder.source)
    assert record.messages is not None
    talk, chat_template = Conversation("f:1", record.messages), Chat(encoder.dialect)  # here: it is our own template
    seen: list[object] = []
    together = Chat._together
    monkeypatch.setattr(Chat, "_together", lambda *given: seen.append(together(*given)) or seen[-1])
    quick = chat_template.rendered(talk, "assistant")
    assert isinstance(seen[-1], dict) and len(seen[-1]) == 5
    monkeypatch.setattr("trainer.data.template.TOGETHER", 99)
    slow = chat_template.rendered(talk, "assistant")
    assert seen[-1] is None and quick.text == slow.text
    (encoding,) = encoder.tokenizer([quick.text], add_special_tokens=False).encodings
    weights = [span_weights(encoding, rendered, encoder.specials).tolist() for rendered in (quick, slow)]
    assert weights[0] == weights[1] and {0.0, 0.5, 1.0} == set(weights[0])


def test_spans_that_cannot_be_established_are_refused() -> None:
    doubling = CHATML.replace("message['content'] +", "message['content'] + message['content'] +")
    backwards = doubling.replace("for message in messages", "for message in messages | reverse")
    record = to_record(Row("f.jsonl", 7, chat("hi", "yo")), Source(path="x", format="messages"))
    (result,) = encoder_for(make_tokenizer(backwards)).encode([record])
    assert isinstance(result, UserError)
    assert "f.jsonl:7:messages[1]" in str(result) and "{% generation %}" in str(result)


def test_a_turn_that_the_next_header_ends_and_one_without_white_space() -> None:
    glued = CHATML.replace("+ '<|im_end|>' + '\n'", "+ '<|im_end|>'")
    text = marked(make_tokenizer(glued), encoded(encoder_for(make_tokenizer(glued)), chat("hi", "yo", "b", "c")))
    assert "[yo<|im_end|>]<|im_start|>user" in text and text.endswith("[c<|im_end|>]")
    endless = CHATML.replace("+ '<|im_end|>' + '\n'", "")
    text = marked(make_tokenizer(endless), encoded(encoder_for(make_tokenizer(endless)), chat("hi", "yo", "b", "c")))
    assert "[yo<|im_start|>]user\nb" in text and text.endswith("[c]")


def test_a_template_that_prints_no_plain_strings_is_refused() -> None:
    parts = CHATML.replace(
        "message['content']", "(message['content'] | selectattr('text') | map(attribute='text') | join)"
    )
    (result,) = encoder_for(make_tokenizer(parts)).encode(
        [to_record(Row("f.jsonl", 2, chat("hi", "yo")), Source(path="x", format="messages"))]
    )
    assert isinstance(result, UserError) and "f.jsonl:2:messages: the chat template prints nothing" in str(result)


def test_tools_and_calls_reach_the_template_or_are_refused() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    row = {
        "tools": [{"name": "add"}],
        "messages": [
            {"role": "user", "content": "1?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "two"},
        ],
    }
    tokenizer = make_tokenizer(TOOLS)
    text = marked(tokenizer, encoded(encoder_for(tokenizer), row))
    assert '[{"type": "function", "function": {"name": "add"}}]<|im_end|>' in text.split("user")[0]
    assert '<|im_start|>assistant\n[CALL add{"a": 1}<|im_end|>]\n<|im_start|>tool\n2<|im_end|>' in text
    assert text.endswith("[two<|im_end|>]\n")
    for left_out, named in (({}, "tools"), ({"fields": {"tools": ""}}, "tool_calls")):
        encoder = encoder_for(make_tokenizer(CHATML), **left_out)
        (refused,) = encoder.encode([to_record(Row("f.jsonl", 1, row), encoder.source)])
        assert isinstance(refused, UserError) and f"f.jsonl:1:{named}" in str(refused)


def test_sharegpt_calls_become_text_where_the_template_has_no_calls() -> None:
    turns = [
        ("human", "1?"),
        ("function_call", '{"name": "add", "arguments": {"a": 1}}'),
        ("observation", "2"),
        ("gpt", "two"),
    ]
    row = {
        "conversations": [{"from": speaker, "value": value} for speaker, value in turns],
        "tools": '[{"name": "add"}]',
    }
    plain = make_tokenizer(CHATML)
    text = marked(plain, encoded(encoder_for(plain, format="sharegpt", fields={"tools": ""}), row))
    assert '[{"name": "add", "arguments": {"a": 1}}<|im_end|>]' in text and "<|im_start|>tool\n2" in text
    knowing = make_tokenizer(TOOLS)
    assert '[CALL add{"a": 1}<|im_end|>]' in marked(knowing, encoded(encoder_for(knowing, format="sharegpt"), row))


def test_prompt_completion_strings_and_conversations(tokenizer: Any) -> None:
    encoder = encoder_for(tokenizer, format="prompt-completion")
    assert marked(tokenizer, encoded(encoder, {"prompt": "2+2=", "completion": "4"})) == "2+2=[4<|im_end|>]"
    row = {"prompt": chat("hi", "yo", "b")["messages"], "completion": [{"role": "assistant", "content": "c"}]}
    plain = make_tokenizer(CHATML)
    text = marked(plain, encoded(encoder_for(plain, format="prompt-completion"), row))
    assert text == TWO.replace("[yo<|im_end|>]", "yo<|im_end|>")


def test_alpaca_and_text(tokenizer: Any) -> None:
    plain = make_tokenizer(CHATML)
    row = {"instruction": "hi", "input": "", "output": "c", "history": [["hi", "yo"]]}
    assert marked(plain, encoded(encoder_for(plain, format="alpaca"), row)) == TWO.replace("\nb<", "\nhi<")
    text = encoded(encoder_for(tokenizer, "language-modeling", format="text"), {"text": "ab"})
    assert text.ids.tolist() == [*tokenizer("ab").input_ids, 257]
    assert text.weights.tolist() == [0.0, 1.0, 1.0]  # nothing precedes the first token


def test_text_label_by_name_index_and_with_a_second_text(tokenizer: Any) -> None:
    encoder = encoder_for(tokenizer, "classification", format="text-label")
    for given, label in (("yes", 1), (0, 0), ("1", 1)):
        assert encoded(encoder, {"text": "a", "label": given}, ["no", "yes"]).label == label
    both = encoded(encoder, {"text": "a", "text_pair": "b", "label": "no"}, ["no", "yes"])
    (a,), (b,) = tokenizer("a").input_ids, tokenizer("b").input_ids
    assert both.ids.tolist() == [a, 257, b]


def test_truncation_keeps_the_wanted_end_and_never_hides_a_loss_of_targets(tokenizer: Any) -> None:
    row = {"prompt": "0123456789", "completion": "abc"}  # 10 + 3 + end = 14 tokens
    cases = {"left": ("6789", "[abc<|im_end|>]"), "right": ("01234567", "")}
    for policy, (prompt, answer) in cases.items():
        encoder = encoder_for(tokenizer, max_length=8, format="prompt-completion", truncation=policy)
        example = encoded(encoder, row)
        assert marked(tokenizer, example) == prompt + answer and example.length == 14
    for policy in ("error", "drop"):
        encoder = encoder_for(tokenizer, max_length=8, format="prompt-completion", truncation=policy)
        assert encoder.encode([to_record(Row("f", 1, row), encoder.source)]) == [TooLong(14)]


@pytest.mark.parametrize("template", [SMOLLM2, CHATML, TAGGED, THINKING])
def test_generation_prompt_is_what_stands_before_the_answer_in_training(template: str) -> None:
    encoder = encoder_for(make_tokenizer(template))
    record = to_record(Row("f", 1, chat("hi", "yo", "b", "c")), encoder.source)
    ids, reference = encoder.generation_prompt(record)
    (example,) = encoder.encode([record])
    assert isinstance(example, Encoded) and reference == "c"
    last_answer = np.flatnonzero(np.diff(example.weights, prepend=0) > 0)[-1]
    assert example.ids[:last_answer].tolist() == ids.tolist()


def test_a_tokenizer_without_template_or_end_is_told_with_the_remedy() -> None:
    with pytest.raises(TokenizerFault, match=r"model\.chat_template"):
        encoded(encoder_for(make_tokenizer(None)), chat("hi", "yo"))
    endless = make_tokenizer()
    endless.eos_token = None
    with pytest.raises(TokenizerFault, match="no end-of-text token"):
        encoded(encoder_for(endless, "language-modeling", format="text"), {"text": "a"})


def test_a_template_that_runs_away_or_fails_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.guard.RENDER_SECONDS", 0.2)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TokenizerFault, match=r"f.jsonl:1: the chat template runs for over"):
        encoded(encoder_for(make_tokenizer(endless)), chat("hi", "yo"))
    failing = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    record = to_record(Row("f.jsonl", 3, chat("hi", "yo")), Source(path="x", format="messages"))
    (result,) = encoder_for(failing).encode([record])
    assert "f.jsonl:3: the chat template fails" in str(result) and "roles must alternate" in str(result)
