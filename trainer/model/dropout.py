"""Dropout that the recipe asks for, and the proof that it is in force."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import UserError
from trainer.config.schema import Model

ATTENTION_KEYS = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")
HIDDEN_KEYS = ("hidden_dropout", "hidden_dropout_prob", "resid_pdrop")


def set_dropout(network: Any, settings: Model, blocks: list[nn.Module]) -> None:
    """Put the recipe's dropout into a network in place; `verify_dropout` proves later that it is in force.

    attention: the probability that attention modules hand to the attention kernel. hidden: where a model has its own
    residual dropout, that; else dropout on the output of each block's attention and feed-forward before the residual
    sum (the place of Vaswani et al. 2017, sec. 5.4). The network's own setting stays where the recipe gives null.
    """
    if settings.attention_dropout is not None:
        _set_attention(network, settings.attention_dropout)
    if settings.hidden_dropout is not None:
        _set_hidden(network, settings.hidden_dropout, blocks)


def verify_dropout(network: Any, settings: Model, device: torch.device) -> None:
    """Raise UserError for a network that ignores the recipe's dropout; each kind is tried with all others off.

    Adapters' own dropout is among the others. Modules and random state stay as they were.
    """
    if settings.attention_dropout:
        with _silenced(network, "hidden"):
            _verify(network, settings, "attention_dropout", device)
    if settings.hidden_dropout:
        with _silenced(network, "attention"):
            _verify(network, settings, "hidden_dropout", device)


@contextmanager
def _silenced(network: Any, kind: str) -> Iterator[None]:
    """One kind of dropout off for a while, `attention` or `hidden`, and that of adapters, in every form it takes:
    layers, probabilities that modules and the configuration keep, hooks."""
    places: list[tuple[Any, str]] = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Dropout) and (_is_attention(name) == (kind == "attention") or _is_adapter(name)):
            places.append((module, "p"))
        if kind == "attention" and _hands_over(module):
            places.append((module, "attention_dropout"))
        if kind == "hidden":
            places += [(hook, "probability") for hook in module._forward_hooks.values() if isinstance(hook, _Residual)]
    keys = ATTENTION_KEYS if kind == "attention" else HIDDEN_KEYS
    places += [(network.config, key) for key in keys if hasattr(network.config, key)]
    kept = [getattr(owner, name) for owner, name in places]
    for owner, name in places:
        setattr(owner, name, 0.0)
    try:
        yield
    finally:
        for (owner, name), value in zip(places, kept, strict=True):
            setattr(owner, name, value)


def _hands_over(module: nn.Module) -> bool:
    """Whether an attention module keeps the probability that it hands to its kernel."""
    return isinstance(getattr(module, "attention_dropout", None), float | int)


def _set_attention(network: Any, probability: float) -> None:
    keys = [key for key in ATTENTION_KEYS if hasattr(network.config, key)]
    for key in keys:
        setattr(network.config, key, probability)
    for module in network.modules():
        if _hands_over(module):
            module.attention_dropout = probability
        inner = getattr(module, "dropout", None)
        if hasattr(module, "query") and isinstance(inner, nn.Dropout):  # BERT-like self-attention
            inner.p = probability


def _set_hidden(network: Any, probability: float, blocks: list[nn.Module]) -> None:
    own = [key for key in HIDDEN_KEYS if hasattr(network.config, key)]
    if own:
        for key in own:
            setattr(network.config, key, probability)
        for name, module in network.named_modules():
            if isinstance(module, nn.Dropout) and not _is_attention(name):
                module.p = probability
        return
    for block in blocks:
        for name, child in block.named_children():
            if name in ("self_attn", "attn", "attention", "mlp", "feed_forward"):
                child.register_forward_hook(_Residual(probability))


def _is_attention(name: str) -> bool:
    """Whether a module by this name belongs to attention weights: its dropout, or the module that hands it over."""
    return name.endswith(("self.dropout", "attn_dropout", "self_attn", ".attn", ".attention"))


def _is_adapter(name: str) -> bool:
    return ".lora_dropout." in name


class _Residual:
    """A forward hook that drops elements of a branch's output while its module trains."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return F.dropout(output, self.probability, module.training)
        return (F.dropout(output[0], self.probability, module.training), *output[1:])


@torch.no_grad()
def _verify(network: Any, settings: Model, key: str, device: torch.device) -> None:
    """Two training forwards that differ in nothing but the generator must differ; else the setting is ignored."""
    probability = getattr(settings, key)
    was_training = network.training
    network.train()
    vocabulary = network.config.get_text_config().vocab_size
    ids = torch.arange(3, 35, device=device)[None] % vocabulary
    outputs = []
    try:
        for seed in (1, 2):
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(seed)
                backbone = getattr(network, network.base_model_prefix)
                outputs.append(backbone(input_ids=ids).last_hidden_state)
    finally:
        network.train(was_training)
    if torch.equal(outputs[0], outputs[1]):
        raise UserError(
            f"model.{key}: {probability}: {type(network).__name__} with {network.config._attn_implementation} "
            "attention ignores it; set it to 0, or choose another `model.attention`"
        )
