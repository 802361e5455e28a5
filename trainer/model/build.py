"""Recipe -> trainee, in one stated order."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from trainer.config import Recipe, UserError
from trainer.model.attention import enable, packing_support
from trainer.model.blocks import blocks
from trainer.model.dropout import set_dropout
from trainer.model.load import load_network
from trainer.model.lora_fused import fuse_lora
from trainer.model.methods import apply_method
from trainer.model.root import Trainee
from trainer.model.sharded import CannotShard, unread_parameters

log = logging.getLogger(__name__)

_NOTHING: AbstractContextManager[Any] = nullcontext()


def build_trainee(
    recipe: Recipe,
    pad_id: int,
    within: AbstractContextManager[Any] = _NOTHING,
    masters: bool = True,
    sharded: bool = False,
) -> Trainee:
    """load -> attention -> dropout -> method -> activation checkpointing -> root; on the CPU, unsharded.

    `within` is entered for the loading: an engine may place the weights there as they come. No forward is run:
    `probes.verify_trainee` does that once the engine has the model. Without `masters` what trains is not held in fp32.
    With `sharded` weights stay in their files, for the engine to read its part of `Trainee.unread`; raises CannotShard.
    """
    settings = recipe.model
    with within:
        network: Any = load_network(settings, recipe.tuning, recipe.seed, masters, sharded)
    network.config.pad_token_id = pad_id
    choose_attention(network, recipe)
    layers = blocks(network)
    set_dropout(network, settings, layers)
    network = apply_method(network, recipe.tuning, layers, recipe.seed, masters)
    log.info("LoRA layers fused: %d", fuse_lora(network) if recipe.tuning.method == "lora" else 0)
    if recipe.engine.activation_checkpointing:
        base = getattr(network, "get_base_model", lambda: network)()
        base.gradient_checkpointing_enable({"use_reentrant": False})
    trainee = Trainee(network).train()
    if sharded:
        trainee.unread = unread_parameters(trainee)
    return trainee


def build_unread(recipe: Recipe, pad_id: int) -> Trainee:
    """A trainee whose weights stay in their files, as `engine.loading` has it; `auto` loads whole what it must.

    Raises UserError for `sharded` where that cannot be proved to give the same weights.
    """
    if recipe.engine.loading == "whole":
        return build_trainee(recipe, pad_id)
    try:
        return build_trainee(recipe, pad_id, sharded=True)
    except CannotShard as reason:
        if recipe.engine.loading == "sharded":
            raise UserError(f"engine.loading: sharded: {reason}; use `whole`") from reason
        log.info("every rank loads the whole base model: %s", reason)
        return build_trainee(recipe, pad_id)


def choose_attention(network: Any, recipe: Recipe) -> None:
    """Set the attention implementation that the recipe names; `auto` packs where the model can."""
    wanted = recipe.model.attention
    reason = packing_support(network)
    if wanted == "auto":
        wanted = "sdpa" if reason else "varlen"
    if wanted == "varlen":
        if reason:
            raise UserError(f"model.attention: varlen: {reason}; use `attention: auto`")
        enable(network)
    else:
        try:
            network.set_attn_implementation(wanted)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"model.attention: {wanted}: {str(error).splitlines()[0][:200]}; use `attention: auto`"
            ) from error
    log.info("attention: %s%s", wanted, f" ({reason})" if reason else "")


def can_pack(trainee: Trainee) -> bool:
    """Whether the chosen attention keeps packed documents apart."""
    return not trainee.encoder and trainee.config._attn_implementation in ("tunesmith_varlen", "flash_attention_2")


def packs(trainee: Trainee, packing: str) -> bool:
    """Whether a stage's batches are packed; raises UserError where packing was asked for and cannot be had."""
    able = can_pack(trainee)
    if packing == "packed" and not able:
        raise UserError(
            f"batch.packing: packed: {trainee.config._attn_implementation} attention would mix a pack's documents; "
            "use `packing: auto` or `model.attention: varlen`"
        )
    return able and packing != "padded"


def parameter_counts(trainee: torch.nn.Module) -> tuple[int, int]:
    """(all parameters, trainable parameters)."""
    total = sum(p.numel() for p in trainee.parameters())
    return total, sum(p.numel() for p in trainee.parameters() if p.requires_grad)
