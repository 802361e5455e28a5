"""What a model is made of, read from its files' headers: no weights, no torch, no network."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from trainer.config.check_sources import is_local
from trainer.config.errors import UserError
from trainer.config.model_files import read_json
from trainer.config.safetensors_header import MOST_DIMENSIONS, read_header
from trainer.config.schema import Model

MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors format
BUFFERS = re.compile(r"(inv_freq|masked_bias|attn\.bias|position_ids|num_batches_tracked)$")  # stored, not trained
BLOCK = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|blk)\.(\d+)\.")
HEADS = ("lm_head", "output", "score", "classifier", "embed_out")
GGUF_NAMES = {
    "attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj",
    "ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj",
}  # fmt: skip


class UnknownModel(Exception):
    """Why nothing can be said of a model here."""


@dataclass(frozen=True)
class ModelFacts:
    """Names and shapes of a model's parameters, and the sizes that decide its activations (0 where not known)."""

    shapes: dict[str, tuple[int, ...]]
    tied: bool  # the output head is the embedding
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    intermediate: int
    vocabulary: int
    gated: bool  # three matrices in the feed-forward part, as in SwiGLU, not two
    causal: bool  # made for language modelling

    @property
    def parameters(self) -> int:
        """All parameters, a tied head counted once."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def block_of(self, name: str) -> int | None:
        """The index of the transformer block that holds a parameter."""
        found = BLOCK.search(name)
        return int(found.group(1)) if found else None

    def is_embedding(self, name: str) -> bool:
        """Whether a parameter is a table of input embeddings."""
        return "embed" in name.removesuffix("embed_out.weight") or bool(re.search(r"\b(wte|wpe|shared)\b", name))

    def is_head(self, name: str) -> bool:
        """Whether a parameter belongs to the output head."""
        return name.rpartition(".")[0].rpartition(".")[2] in HEADS and self.block_of(name) is None

    def linears(self) -> dict[str, tuple[int, ...]]:
        """Module name -> shape of the linear layers but the head: two-dimensional weights that are no table."""
        return {
            name.removesuffix(".weight"): shape
            for name, shape in self.shapes.items()
            if len(shape) == 2 and name.endswith(".weight") and not self.is_embedding(name) and not self.is_head(name)
        }


def model_facts(model: Model) -> ModelFacts:
    """The facts of a recipe's model. Raises UnknownModel with the reason where its files are not here."""
    path = Path(model.path).expanduser()
    try:
        if path.suffix == ".gguf":
            return _from_gguf(path)
        return _from_folder(path) if path.is_dir() else _from_cache(model)
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise UnknownModel(f"its files cannot be read ({type(error).__name__}: {str(error)[:120]})") from error


def _from_folder(folder: Path) -> ModelFacts:
    config = read_json(folder / "config.json")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index)["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UnknownModel(f"{folder.name} has no {missing[0]}")
    shapes = {name: shape for file in names for name, shape in _safetensors_shapes(folder / file)}
    return _facts(config, shapes)


def _from_cache(model: Model) -> ModelFacts:
    if is_local(model.path):
        raise UnknownModel("there is no such folder")
    from huggingface_hub import try_to_load_from_cache  # 0.2 s, only for hub ids

    def cached(name: str) -> Path | None:
        found = try_to_load_from_cache(model.path, name, revision=model.revision)
        return Path(found) if isinstance(found, str) else None

    place = cached("model.safetensors") or cached("model.safetensors.index.json")
    if place is None or cached("config.json") is None:
        raise UnknownModel("not downloaded yet; the first run fetches it")
    return _from_folder(place.parent)


def _safetensors_shapes(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes from the header."""
    for name, entry in read_header(path).items():
        if not BUFFERS.search(name):
            yield name, entry.shape


def _facts(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> ModelFacts:
    text = config.get("text_config", config)

    def size(*names: str) -> int:
        return next((int(text[name]) for name in names if text.get(name)), 0)

    heads = size("num_attention_heads", "n_head")
    hidden = size("hidden_size", "n_embd", "d_model")
    head = [name for name in shapes if name.endswith(("lm_head.weight", "embed_out.weight"))]
    tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", not head)))
    if tied:
        shapes = {name: shape for name, shape in shapes.items() if name not in head}
    return ModelFacts(
        shapes=shapes,
        tied=tied or not head,
        hidden=hidden,
        layers=size("num_hidden_layers", "n_layer"),
        heads=heads,
        kv_heads=size("num_key_value_heads") or heads,
        head_width=size("head_dim") or hidden // max(heads, 1),
        intermediate=size("intermediate_size", "n_inner", "ffn_dim") or 4 * hidden,
        vocabulary=size("vocab_size"),
        gated=any("gate_proj" in name or "gate_up" in name for name in shapes),
        causal=any("CausalLM" in name or "LMHead" in name for name in config.get("architectures") or []),
    )


# ---------------------------------------------------------------- GGUF (specification: ggml/docs/gguf.md)

SCALARS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
MAX_COUNT = 1 << 21  # entries; the largest vocabularies have 300,000; more is a damaged file


def check_gguf(path: Path) -> None:
    """Raise UserError where a .gguf file is damaged, or made to keep its reader busy."""
    try:
        _gguf_header(path)
    except (OSError, ValueError, struct.error, KeyError) as error:
        raise UserError(
            f"model.path: {path}: not a GGUF file that can be read ({str(error)[:120]}); download it again"
        ) from error


def _gguf_header(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """(values by key, shapes by tensor). The gguf package's reader takes seconds over the vocabulary, skipped here."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF" or _scalar(file, "<I") not in (2, 3):
            raise ValueError("not a GGUF file of version 2 or 3")
        tensors, pairs = _count(file), _count(file)
        values: dict[str, Any] = {}
        for _ in range(pairs):
            key = _string(file)
            values[key] = _value(file, int(_scalar(file, "<I")))
        shapes = {}
        for _ in range(tensors):
            name = _string(file)
            rank = int(_scalar(file, "<I"))
            if rank > MOST_DIMENSIONS:
                raise ValueError(f"{name[:60]}: {rank} dimensions")
            dimensions = [int(_scalar(file, "<Q")) for _ in range(rank)]
            file.read(12)  # type and offset
            shapes[_hub_name(name)] = tuple(reversed(dimensions))
    return values, shapes


def _from_gguf(path: Path) -> ModelFacts:
    values, shapes = _gguf_header(path)
    kind = f"{values['general.architecture']}."
    config = {
        "architectures": ["GGUFForCausalLM"],
        "hidden_size": values.get(f"{kind}embedding_length"),
        "num_hidden_layers": values.get(f"{kind}block_count"),
        "num_attention_heads": values.get(f"{kind}attention.head_count"),
        "num_key_value_heads": values.get(f"{kind}attention.head_count_kv"),
        "head_dim": values.get(f"{kind}attention.key_length"),
        "intermediate_size": values.get(f"{kind}feed_forward_length"),
        "vocab_size": shapes["embed_tokens.weight"][0],
        "tie_word_embeddings": "lm_head.weight" not in shapes,
    }
    return _facts(config, {name: shape for name, shape in shapes.items() if not name.startswith("rope_")})


def _hub_name(name: str) -> str:
    parts = name.replace("token_embd", "embed_tokens").split(".")
    if parts[0] == "output":
        parts[0] = "lm_head"
    return ".".join(GGUF_NAMES.get(part, part) for part in parts)


def _scalar(file: BinaryIO, form: str) -> Any:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _count(file: BinaryIO) -> int:
    count = int(_scalar(file, "<Q"))
    if count > MAX_COUNT:
        raise ValueError(f"{count} entries, at most {MAX_COUNT} are read")
    return count


def _string(file: BinaryIO) -> str:
    return file.read(_count(file)).decode("utf-8", "replace")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _string(file)
    if kind != ARRAY:
        return _scalar(file, SCALARS[kind])
    inner, count = int(_scalar(file, "<I")), _count(file)
    if inner == STRING:
        for _ in range(count):
            file.seek(_count(file), 1)
    elif inner == ARRAY:
        raise ValueError("arrays of arrays")
    else:
        file.seek(count * struct.calcsize(SCALARS[inner]), 1)
    return None
