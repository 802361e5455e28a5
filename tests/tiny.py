"""Tiny models and data made on the spot, and real processes for what is distributed."""

from __future__ import annotations

import json
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(chat_template: str | None = CHATML) -> Any:
    """A tokenizer of single bytes with ChatML's specials; pad is eos, as in SmolLM2: the trap is part of every test."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate(specials + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=specials,
    )
    fast.chat_template = chat_template
    return fast


def tiny_llama(seed: int = 0, **changes: Any) -> Any:
    """A random Llama of some 30 thousand parameters, with tied embeddings and grouped queries."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 52,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


def write_chats(path: Path, rows: int, seed: int = 0, longest: int = 24) -> Path:
    """Chats of differing lengths about sums, as `messages` JSONL."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            a, b = draw.randrange(100), draw.randrange(100)
            question = f"{a}+{b}" + "?" * draw.randrange(longest)
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": str(a + b)}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def free_ports(count: int) -> list[str]:
    """Ports that nobody listens on."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [str(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def next_port() -> None:
    """In a rank: meet at another port from now on, as each further process group of one process needs its own."""
    first, _, rest = os.environ["TEST_PORTS"].partition(",")
    os.environ.update(MASTER_PORT=first, TEST_PORTS=rest)


def _rank(rank: int, size: int, ports: list[str], function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1")
    os.environ["TEST_PORTS"] = ",".join(ports)
    next_port()
    function(rank, *arguments)


def run_ranks(size: int, function: Callable[..., None], *arguments: Any) -> None:
    """Run `function(rank, *arguments)` in real processes with the launcher's environment; a failure of one is raised
    here."""
    import torch.multiprocessing as processes

    processes.spawn(_rank, (size, free_ports(24), function, arguments), nprocs=size)
