from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import CHATML, byte_tokenizer, tiny_llama
from transformers import GenerationConfig

from trainer.config import UserError
from trainer.data.prompts import Prompt
from trainer.evaluation.generation import (
    first_stop,
    generate_answers,
    generation_batches,
    greedy_generation,
    left_padded,
    stop_ids,
)
from trainer.evaluation.mode import evaluating
from trainer.model.attention import enable
from trainer.model.root import Trainee
from trainer.world import World

TOKENIZER = byte_tokenizer()


def tiny_trainee(**changes: Any) -> Trainee:
    """As a run has it: training mode, no cache; fp32."""
    network = tiny_llama(**changes)
    network.config.use_cache = False
    return Trainee(network).train()


def prompts(count: int = 13) -> list[Prompt]:
    texts = [f"Q{index}: " + "word " * (index * 7 % 11) + "?" for index in range(count)]
    return [Prompt(f"p{index}", np.array(TOKENIZER(text)["input_ids"]), "x") for index, text in enumerate(texts)]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 9))
def test_batches_hold_every_prompt_once_longest_first(lengths: list[int], size: int) -> None:
    batches = generation_batches(lengths, size)
    flat = [index for batch in batches for index in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert all(len(batch) == size for batch in batches[:-1]) and 1 <= len(batches[-1]) <= size
    assert [lengths[index] for index in flat] == sorted(lengths, reverse=True)


def test_left_padding_by_hand() -> None:
    ids, mask = left_padded([[5, 6, 7], [8]], pad=0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_an_answer_ends_before_its_first_stop() -> None:
    assert first_stop([4, 5, 9, 9], [9]) == [4, 5]
    assert first_stop([4, 5], [9]) == [4, 5]
    assert first_stop([9, 4], [9]) == []


def test_stops_are_eos_and_the_end_of_turn() -> None:
    def stops(eos: str, template: str | None = CHATML) -> list[str]:
        tokenizer = byte_tokenizer(template)
        tokenizer.eos_token = eos
        return tokenizer.convert_ids_to_tokens(stop_ids(tokenizer))

    assert stops("<|im_end|>") == ["<|im_end|>"]
    # a base model's eos ends a document: without the template's own token an answer would run on
    assert stops("<|endoftext|>") == ["<|endoftext|>", "<|im_end|>"]
    assert stops("<|endoftext|>", None) == ["<|endoftext|>"]
    plain = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    assert stops("<|endoftext|>", plain) == ["<|endoftext|>"]
    assert stops("<|endoftext|>", "{{ raise_exception('no') }}") == ["<|endoftext|>"]


@pytest.mark.parametrize("attention", ["sdpa", "eager", "varlen"])
def test_answers_do_not_depend_on_the_batch(attention: str) -> None:
    trainee = tiny_trainee()
    if attention == "varlen":
        enable(trainee.base)
    else:
        trainee.base.set_attn_implementation(attention)
    with evaluating(trainee):
        alone = generate_answers(trainee, prompts(), TOKENIZER, 1, 24, World())
        together = generate_answers(trainee, prompts(), TOKENIZER, 8, 24, World())
    assert alone == together
    assert len(set(alone)) > 8  # the model does not say the same to everything


def greedy_by_hand(trainee: torch.nn.Module, prompt: Prompt, stop: list[int], longest: int) -> list[int]:
    ids = prompt.ids.tolist()
    for _ in range(longest):
        with torch.no_grad():
            best = int(trainee.network(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if best in stop:
            break
        ids.append(best)
    return ids[len(prompt.ids) :]


def test_answers_are_the_argmax_of_each_step_and_stop_at_the_stop() -> None:
    trainee = tiny_trainee(tie_word_embeddings=False)
    stop = stop_ids(TOKENIZER)
    with torch.no_grad():  # the stop token must be said now and then for the test to see it
        trainee.base.lm_head.weight[stop[0]] *= 4
    with evaluating(trainee):
        answers = generate_answers(trainee, prompts(), TOKENIZER, 8, 16, World())
        expected = [greedy_by_hand(trainee, prompt, stop, 16) for prompt in prompts()]
    assert answers == [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in expected]
    lengths = [len(ids) for ids in expected]
    assert min(lengths) < 16 and max(lengths) > 0


def test_generation_settings_shipped_with_the_model_do_not_act() -> None:
    trainee = tiny_trainee()
    with evaluating(trainee):
        plain = generate_answers(trainee, prompts(4), TOKENIZER, 4, 24, World())
        shipped = GenerationConfig(
            do_sample=True, temperature=5.0, repetition_penalty=3.0, no_repeat_ngram_size=1, suppress_tokens=[10, 11]
        )
        trainee.base.generation_config = shipped
        assert generate_answers(trainee, prompts(4), TOKENIZER, 4, 24, World()) == plain
    assert trainee.base.generation_config is shipped


def test_the_same_through_an_adapter() -> None:
    from peft import LoraConfig, get_peft_model

    network = tiny_trainee().network
    with evaluating(Trainee(network)):
        plain = generate_answers(Trainee(network), prompts(4), TOKENIZER, 4, 24, World())
    network.generation_config.repetition_penalty = 3.0
    adapted = Trainee(get_peft_model(network, LoraConfig(r=2, target_modules="all-linear")))  # B = 0: says the same
    with evaluating(adapted):
        assert generate_answers(adapted, prompts(4), TOKENIZER, 4, 24, World()) == plain
    assert adapted.base.generation_config.repetition_penalty == 3.0


def test_cache_is_on_meanwhile_and_back_after_an_error() -> None:
    trainee = tiny_trainee()
    with pytest.raises(RuntimeError, match="stop"), greedy_generation(trainee):
        assert trainee.config.use_cache is True
        raise RuntimeError("stop")
    assert trainee.config.use_cache is False


def test_prompts_that_cannot_be_answered_are_named() -> None:
    trainee = tiny_trainee()
    with pytest.raises(UserError, match="p1: empty prompt"):
        generate_answers(
            trainee, [prompts()[0], Prompt("p1", np.array([], dtype=np.int32), "x")], TOKENIZER, 2, 4, World()
        )
    with pytest.raises(UserError, match="p1: prompt of 510 tokens with max_new_tokens 4: the model reaches 512"):
        generate_answers(trainee, [Prompt("p1", np.full(510, 5), "x")], TOKENIZER, 2, 4, World())
