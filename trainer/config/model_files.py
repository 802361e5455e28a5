"""The folder of a base model, looked at as something that a stranger made, before any library reads it. No torch.

What must hold: weights are safetensors, never a pickle; every name stays within the folder; no file is larger than its
kind has any use for; and the sizes that the configuration declares are those of the weights that are there, since a
library builds what is declared. Links are followed: the hub's cache consists of them.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError
from trainer.config.safetensors_header import read_header

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
PICKLES = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle|distcp)")
LARGEST = {  # bytes by name; what is not named may be LARGEST_OTHER
    CONFIG: 8 << 20,
    "generation_config.json": 1 << 20,
    "tokenizer_config.json": 16 << 20,  # some list every added token
    "special_tokens_map.json": 8 << 20,
    "chat_template.jinja": 1 << 20,
    INDEX: 64 << 20,
}
LARGEST_OTHER = 128 << 20  # tokenizer.json: the largest published ones are 35 MB
READ_BY_LIBRARIES = re.compile(r".*\.(json|jinja|model|txt|safetensors|vocab|tiktoken)")
DEEPEST = 32  # levels of a configuration; published ones have five
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
# Sizes whose product with the hidden size counts parameters that are stored, at least 4 bits each.
STORED_TIMES_HIDDEN = (
    "vocab_size", "intermediate_size", "n_inner", "ffn_dim", "num_hidden_layers", "n_layer", "num_layers",
    "n_positions", "num_local_experts", "num_experts", "n_routed_experts",
)  # fmt: skip
HIDDEN = ("hidden_size", "n_embd", "d_model")
MOST_POSITIONS = 1 << 24  # rotary positions are computed, not stored; the longest published context is 10 million


def check_model_folder(folder: Path, named: str, *, trusted: bool = False, weights: bool = True) -> None:
    """Raise UserError, naming the file and a remedy, where a base model's folder is not one to be loaded.

    ``named`` is the recipe's `model.path`; ``trusted``: its own code may run; ``weights``: they are here as well.
    """
    try:
        sizes = _files(folder)
        config = _object(folder / CONFIG) if CONFIG in sizes else {}
        for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
            if name in sizes:
                _check_code(name, _object(folder / name), trusted)
        _check_config(config, trusted)
        if "adapter_config.json" in sizes and CONFIG in sizes:
            raise ValueError("adapter_config.json: an adapter lies in the model's folder; merge it, or take it out")
        if weights:
            _check_sizes(config, _check_weights(folder, sizes))
    except (ValueError, OSError) as error:
        raise UserError(f"model.path: {named}: {error}") from error


def read_json(path: Path, largest: int | None = None) -> Any:
    """The value in a JSON file. Raises ValueError, beginning with its name, for one that is too large or too deep."""
    limit = largest or LARGEST.get(path.name, LARGEST_OTHER)
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path.name}: over {limit >> 20} MiB; no model needs that")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else f"not JSON ({str(error)[:100]})"
        raise ValueError(f"{path.name}: {reason}; download it again, or choose another model") from error
    level = [value]
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return value
    raise ValueError(f"{path.name}: nested more than {DEEPEST} deep; choose another model")


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield from value.values() if isinstance(value, dict) else value


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path.name}: holds no object; choose another model")
    return value


def _files(folder: Path) -> dict[str, int]:
    """Name and size of the files that libraries would read."""
    sizes = {}
    for entry in os.scandir(folder):
        if not READ_BY_LIBRARIES.fullmatch(entry.name):
            continue
        status = entry.stat()  # of what a link points to
        if stat.S_ISDIR(status.st_mode):
            continue
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{entry.name}: a pipe, socket or device; remove it")
        limit = LARGEST.get(entry.name, LARGEST_OTHER)
        if status.st_size > limit and not entry.name.endswith(".safetensors"):
            raise ValueError(f"{entry.name}: {status.st_size >> 20} MiB, at most {limit >> 20}; no model needs that")
        sizes[entry.name] = status.st_size
    return sizes


# ---------------------------------------------------------------- configuration


def _check_config(config: dict[str, Any], trusted: bool) -> None:
    _check_code(CONFIG, config, trusted)
    if config.get("transformers_weights") is not None:
        raise ValueError(f"{CONFIG}: transformers_weights: names another file of weights; name that {WEIGHTS}")
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
            chosen = section.get(key)
            if chosen is not None and chosen not in ATTENTIONS:
                raise ValueError(
                    f"{CONFIG}: {key}: {str(chosen)[:60]!r}: would fetch code from the hub; remove the key "
                    f"(allowed: {', '.join(ATTENTIONS)})"
                )


def _check_code(name: str, values: Mapping[str, Any], trusted: bool) -> None:
    """Where a model's own code may run, it must be the code that was pinned with it."""
    given = values.get("auto_map")
    if given is None:
        return
    entries = given.values() if isinstance(given, dict) else [given]
    parts = [part for entry in entries for part in (entry if isinstance(entry, list) else [entry]) if part is not None]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{name}: auto_map: not names of classes; choose another model")
    elsewhere = next((part for part in parts if "--" in part), None)
    if trusted and elsewhere is not None:
        raise ValueError(
            f"{name}: auto_map: {elsewhere[:80]!r}: code of another repository, which `model.revision` does not pin; "
            "copy that code into a local folder with the model"
        )


def _check_sizes(config: dict[str, Any], stored: int) -> None:
    """Declared sizes against the bytes that are there: a parameter takes half a byte at the least."""
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        hidden = next((section[key] for key in HIDDEN if type(section.get(key)) is int), 1)
        for key in (*HIDDEN, *STORED_TIMES_HIDDEN):
            value = section.get(key)
            if type(value) is not int:
                continue
            if value < 0 or hidden < 0 or (value if key in HIDDEN else value * hidden) > 2 * stored:
                raise ValueError(
                    f"{CONFIG}: {key}: {str(value)[:30]}: more than {stored} bytes of weights can hold; choose another "
                    "model, or mend it"
                )
        positions = section.get("max_position_embeddings")
        if type(positions) is int and not 0 <= positions <= MOST_POSITIONS:
            raise ValueError(
                f"{CONFIG}: max_position_embeddings: {str(positions)[:30]}: at most {MOST_POSITIONS}; mend it"
            )


# ---------------------------------------------------------------- weights


def _check_weights(folder: Path, sizes: Mapping[str, int]) -> int:
    """Bytes of the weights, whose headers were read."""
    if WEIGHTS in sizes:
        names = [WEIGHTS]
    elif INDEX in sizes:
        names = _indexed(folder)
    else:
        pickles = sorted(entry.name for entry in os.scandir(folder) if PICKLES.fullmatch(entry.name))
        if pickles:
            raise ValueError(
                f"{pickles[0]}: a pickle, which can run code when it is read, so it never is; convert it where "
                "that may happen: `AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)` writes safetensors"
            )
        raise ValueError(f"holds no {WEIGHTS}; check the path")
    for name in names:
        if name not in sizes:
            raise ValueError(f"{INDEX}: names {name}, which is not there; download it again")
        read_header(folder / name)
    return sum(sizes[name] for name in names)


def _indexed(folder: Path) -> list[str]:
    """The shards that the index names, all of them plain names in the folder."""
    index = _object(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ValueError(f"{INDEX}: has no weight_map; download it again")
    names = {value for value in index.values() if isinstance(value, str)}
    odd = [value for value in index.values() if not isinstance(value, str) or not PLAIN_NAME.fullmatch(value)]
    if odd:
        raise ValueError(
            f"{INDEX}: {str(odd[0])[:60]!r}: not the name of a safetensors file here; choose another model"
        )
    return sorted(names)
