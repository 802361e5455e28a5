"""Greedy answers to held-out prompts: in batches, left-padded, and the same whatever shares the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from trainer.config import UserError
from trainer.data.guard import TokenizerFault
from trainer.data.prompts import Prompt
from trainer.data.renderer import whole
from trainer.data.template import dialect
from trainer.heartbeat import beat
from trainer.model.root import Trainee
from trainer.world import World


def generation_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices of prompts in batches of like length, longest first: little padding, and memory is asked early."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + size] for start in range(0, len(order), size)]


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (rows, longest) int64: padding on the left, so that every prompt ends in the last column."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def stop_ids(tokenizer: Any) -> list[int]:
    """Token ids that end an answer: the tokenizer's eos, and the token that the chat template puts behind a reply."""
    found = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if getattr(tokenizer, "chat_template", None):
        end = _end_of_turn(tokenizer)
        if end is not None and end not in found:
            found.append(end)
    return found


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token right behind a reply; None where the template closes a turn by ordinary text or not at all."""
    probe = "answer-0x7e57"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": probe}]
    try:
        text = whole(dialect(tokenizer, "model.path"), turns)
    except TokenizerFault:
        raise
    except UserError:  # wants more than a plain exchange, so it closes none
        return None
    ids = tokenizer(text.rpartition(probe)[2], add_special_tokens=False)["input_ids"]
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return int(ids[0]) if ids and ids[0] in special else None


def first_stop(ids: Sequence[int], stop: Sequence[int]) -> list[int]:
    """The ids before the first stop token; what follows it is padding, which may be the stop token itself."""
    for position, token in enumerate(ids):
        if token in stop:
            return list(ids[:position])
    return list(ids)


@contextmanager
def greedy_generation(trainee: Trainee) -> Iterator[None]:
    """The key-value cache on, and the model's own generation settings out of the way; both are put back.

    transformers fills every option that is left None from the model's generation_config, so a repetition penalty or a
    forced token shipped with the model would act although generation was asked for with another config.
    """
    config: Any = trainee.config
    use_cache = config.use_cache
    configured: list[Any] = [module for module in trainee.modules() if "generation_config" in vars(module)]
    before = [module.generation_config for module in configured]
    try:
        for module in configured:
            module.generation_config = GenerationConfig()
        config.use_cache = True
        yield
    finally:
        config.use_cache = use_cache
        for module, settings in zip(configured, before, strict=True):
            module.generation_config = settings


@torch.no_grad()
def generate_answers(
    trainee: Trainee, prompts: Sequence[Prompt], tokenizer: Any, batch: int, max_new_tokens: int, world: World
) -> list[str]:
    """The greedy answer to every prompt, in their order, the same on every rank.

    Rank r answers batches r, r + ranks, ...; a rank without a batch left answers a dummy prompt, and every rank keeps
    forwarding until the slowest is done, since sharded weights are gathered in each forward. Raises UserError for an
    empty prompt or one that leaves the model no room to answer.
    """
    _check_room(trainee, prompts, max_new_tokens)
    batches = generation_batches([len(prompt.ids) for prompt in prompts], batch)
    stop = stop_ids(tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stop or [0])[0]
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=stop or None,
        pad_token_id=pad,
    )
    mine: dict[str, list[int]] = {}  # JSON has no integer keys
    with greedy_generation(trainee):
        for first in range(0, len(batches), world.size):
            beat()
            indices = batches[first + world.rank] if first + world.rank < len(batches) else []
            ids, mask = left_padded([prompts[index].ids.tolist() for index in indices] or [[pad]], pad)
            output = trainee.generate(
                ids.to(world.device), mask.to(world.device), generation_config=settings, synced_gpus=world.size > 1
            )  # (rows, longest + new)
            for index, row in zip(indices, output[:, ids.shape[1] :].tolist(), strict=False):
                mine[str(index)] = first_stop(row, stop)
    found = {int(index): ids for part in world.gather(mine) for index, ids in part.items()}
    return [tokenizer.decode(found[index], skip_special_tokens=True) for index in range(len(prompts))]


def _check_room(trainee: Trainee, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
    config: Any = trainee.config
    room = getattr(config.get_text_config(), "max_position_embeddings", None)
    for prompt in prompts:
        if not len(prompt.ids):
            raise UserError(f"{prompt.name}: empty prompt: nothing to answer; remove the row or give it a prompt")
        if room is not None and len(prompt.ids) + max_new_tokens > room:
            raise UserError(
                f"{prompt.name}: prompt of {len(prompt.ids)} tokens with max_new_tokens {max_new_tokens}: the model "
                f"reaches {room} positions; lower the suite's max_new_tokens or remove the row"
            )
