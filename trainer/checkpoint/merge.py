"""From trained parameters to the tensors of an ordinary model: names, and the adapter's share of a weight.

Pure: names and tensors in, names and tensors out. A trained parameter is `network.<tensor>` where the model itself was
trained; under peft `network.base_model.model.<module>.lora_A.default.weight` and its like.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from trainer.config.errors import UserError
from trainer.config.schema import Tuning

ADAPTER = "default"  # peft's name of the only adapter

ROOT = "network."  # the trainee's name for its network

_PEFT = f"{ROOT}base_model.model."
_LINEAR = re.compile(rf"(?P<module>.+)\.lora_(?P<side>[AB])\.{ADAPTER}\.weight")
_EMBEDDING = re.compile(rf"(?P<module>.+)\.lora_embedding_(?P<side>[AB])\.{ADAPTER}")
_WHOLE = re.compile(rf"(?P<module>.+)\.modules_to_save\.{ADAPTER}\.(?P<rest>.+)")


@dataclass(frozen=True)
class LowRank:
    """The two factors of one weight's change, by the names of their parameters."""

    down: str  # A: (rank, in), of an embedding (rank, vocabulary)
    up: str  # B: (out, rank), of an embedding (width, rank)
    embedding: bool


@dataclass(frozen=True)
class Learned:
    """What the trained parameters do to the tensors of the model beneath."""

    whole: dict[str, str] = field(default_factory=dict)  # tensor of the model -> the parameter that takes its place
    low_rank: dict[str, LowRank] = field(default_factory=dict)  # tensor of the model -> the change added to it
    adapted: bool = False  # whether an adapter was trained, and not the model itself


def learned(names: Iterable[str]) -> Learned:
    """What parameters of these names mean. Raises UserError for one that no weight of a plain model can take up."""
    whole: dict[str, str] = {}
    sides: dict[str, dict[str, str]] = {}
    embeddings = set()
    adapted = False
    for name in names:
        adapted |= name.startswith(_PEFT)
        inner = name.removeprefix(_PEFT)
        if inner == name:
            whole[name.removeprefix(ROOT)] = name
        elif found := _LINEAR.fullmatch(inner) or _EMBEDDING.fullmatch(inner):
            target = f"{found['module']}.weight"
            sides.setdefault(target, {})[found["side"]] = name
            if found.re is _EMBEDDING:
                embeddings.add(target)
        elif found := _WHOLE.fullmatch(inner):
            whole[f"{found['module']}.{found['rest']}"] = name
        else:
            raise UserError(f"export: {inner}: adds no weights that could be merged: export with --adapter")
    low_rank = {}
    for target, pair in sides.items():
        if pair.keys() != {"A", "B"}:
            raise UserError(f"export: {target}: has one low-rank factor only; the checkpoint is not whole")
        low_rank[target] = LowRank(pair["A"], pair["B"], target in embeddings)
    return Learned(whole, low_rank, adapted)


def lora_scale(tuning: Tuning) -> float:
    """The factor s of W + s B A: alpha / r (Hu et al. 2022, sec. 4.1); alpha / sqrt(r) rank-stabilised."""
    return tuning.alpha / (tuning.rank**0.5 if tuning.rslora else tuning.rank)


def change(down: Tensor, up: Tensor, scale: float, transposed: bool) -> Tensor:
    """s B A in the factors' dtype: (out, in), or (in, out) `transposed`, as Conv1D and embeddings keep their weight."""
    product = up @ down
    return (product.T if transposed else product).mul_(scale)


def adapter_key(name: str) -> str:
    """The name of a trained parameter in peft's adapter_model.safetensors: without root module and adapter name.

    Raises UserError where the parameter is no adapter's.
    """
    if not name.startswith(_PEFT):
        raise UserError("--adapter: this run trained the model's own weights and has no adapter; export without it")
    head, _, rest = name.removeprefix(ROOT).rpartition(f".{ADAPTER}")
    return head.removesuffix(".modules_to_save") + rest
