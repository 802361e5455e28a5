"""What is trainable: full, the last blocks, LoRA (QLoRA over a quantised base). Prefix and adapters take a row here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from trainer.config import UserError
from trainer.config.schema import Tuning
from trainer.model.sharded import widened

Method = Callable[[nn.Module, Tuning, list[nn.Module]], nn.Module]


def full(network: nn.Module, tuning: Tuning, blocks: list[nn.Module]) -> nn.Module:
    """Every parameter trains."""
    return network.requires_grad_(True)


def last_layers(network: nn.Module, tuning: Tuning, blocks: list[nn.Module]) -> nn.Module:
    """The last n blocks train; with `train_head` the final norm and the head as well (a tied embedding then trains
    too)."""
    count = tuning.layers or 0
    if count > len(blocks):
        raise UserError(f"tuning.layers: {count}: the model has {len(blocks)} blocks; lower it")
    network.requires_grad_(False)
    for block in blocks[len(blocks) - count :]:
        block.requires_grad_(True)
    if tuning.train_head:
        inside = {id(p) for block in blocks for p in block.parameters()}
        embedding = {id(p) for p in network.get_input_embeddings().parameters()}  # type: ignore[operator]
        for name, parameter in network.named_parameters():
            after = id(parameter) not in inside and id(parameter) not in embedding and "embed" not in name
            parameter.requires_grad_(parameter.requires_grad or after)
        head = network.get_output_embeddings()  # type: ignore[operator]
        if head is not None:
            head.requires_grad_(True)
    return network


def lora(network: nn.Module, tuning: Tuning, blocks: list[nn.Module]) -> nn.Module:
    """Low-rank adapters beside frozen linear layers (Hu et al. 2022), fp32 whatever the base is stored in."""
    from peft import LoraConfig, get_peft_model  # 5 s to import: only where adapters are asked for

    classifies = type(network).__name__.endswith("ForSequenceClassification")
    alpha: Any = tuning.alpha  # peft's annotation says int, its arithmetic takes any number
    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=alpha,
        lora_dropout=tuning.dropout,
        target_modules=tuning.targets,
        use_rslora=tuning.rslora,
        bias="none",
        task_type="SEQ_CLS" if classifies else "CAUSAL_LM",
    )
    try:
        adapted = get_peft_model(cast(Any, network), config)
    except ValueError as error:
        names = sorted({name.rsplit(".", 1)[-1] for name, m in network.named_modules() if isinstance(m, nn.Linear)})
        raise UserError(
            f"tuning.targets: {tuning.targets}: {str(error).splitlines()[0][:160]}; linear layers: {', '.join(names)}"
        ) from error
    return adapted


METHODS: dict[str, Method] = {"full": full, "last-layers": last_layers, "lora": lora}


def apply_method(
    network: nn.Module, tuning: Tuning, blocks: list[nn.Module], seed: int, masters: bool = True
) -> nn.Module:
    """The network with the recipe's method on it; trainable parameters are kept in fp32 as `masters`.

    New parameters are drawn from the seed, so every rank draws the same.
    """
    torch.manual_seed(seed)
    network = METHODS[tuning.method](network, tuning, blocks)
    for parameter in network.parameters():
        if masters and parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = widened(parameter.data)
    if not any(p.requires_grad for p in network.parameters()):
        raise UserError(f"tuning.method: {tuning.method}: leaves nothing trainable; check `targets` or `layers`")
    return network
