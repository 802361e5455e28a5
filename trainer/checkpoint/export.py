"""An ordinary Hugging Face folder of what was learned, published only after its logits were compared with the run's.

One model at a time is in memory: the trained one answers the prompts and goes; tensors are read, merged and written one
by one; the folder is opened and answers the same prompts.
"""

from __future__ import annotations

import copy
import gc
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.checkpoint.assemble import Assembly
from trainer.checkpoint.base import Base, LiveBase, beneath, file_base, layout_of
from trainer.checkpoint.card import model_card
from trainer.checkpoint.durable import clean, publish_folder, remove_folder, staging_folder, sync_tree, write_file
from trainer.checkpoint.merge import ADAPTER, ROOT, adapter_key, lora_scale
from trainer.checkpoint.parity import (
    LONGEST,
    PROMPTS,
    check_tokenizer,
    compare,
    logits,
    open_adapter,
    open_model,
    tolerance_of,
)
from trainer.checkpoint.tensor_files import SHARD_BYTES, Planned, digest_of, write_model, write_tensors
from trainer.checkpoint.weights import Source
from trainer.config.errors import UserError
from trainer.config.schema import Recipe
from trainer.model.load import DTYPES
from trainer.tracking.redact import known_secrets, redact

RECORD = "export.json"

Build = Callable[[], nn.Module]
"""Makes the trained network (a Hugging Face model, or a PeftModel over one) and keeps no reference to it."""


def export(
    build: Build,
    source: Source,
    tokenizer: Any,
    out: Path,
    *,
    adapter: bool,
    recipe: Recipe,
    step: int,
    origin: str = "",
    metrics: Mapping[str, Any] | None = None,
    prompts: Sequence[str] = PROMPTS,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write what a source holds, with its tokenizer, as an ordinary folder: a model, or with `adapter` an adapter.

    A low-rank change is merged into the model's weights; all are in the recipe's dtype, in files of at most
    `shard_bytes`. The folder is read back from the disk by transformers (and peft): its weights must be bitwise those
    written, and its logits on the prompts near those of the network that `build` makes. `origin` says for the record
    where the weights are from. Returns {kind, base, max_difference, tolerance, same_top_token, prompts}. Raises
    RunError, and publishes nothing, where they differ; UserError where `out` holds other files, or there is no adapter.
    """
    _check_target(out)
    sequences = [tokenizer(prompt)["input_ids"][:LONGEST] for prompt in prompts]
    clean(out.parent, f"{out.name}@")
    staging = staging_folder(out)
    try:
        part = _write_adapter if adapter else _write_model
        expected, written, base, device = part(build, source, recipe, sequences, staging, shard_bytes)
        gc.collect()  # the network is cyclic garbage by now
        tokenizer.save_pretrained(staging)
        check_tokenizer(tokenizer, staging, prompts)
        if adapter:
            again = open_adapter(recipe, staging, written, tokenizer.pad_token_id)
        else:
            again = open_model(recipe, staging, written)
        actual = logits(again.to(device), sequences)
        difference = compare(expected, actual, tolerance_of(recipe, adapter))
        report = {"kind": "adapter" if adapter else "model", "base": base, **difference, "prompts": len(prompts)}
        _describe(staging, recipe, step, origin, report, metrics or {})
        sync_tree(staging)
        publish_folder(staging, out)
    except Exception:
        remove_folder(staging)
        raise
    return report


Written = tuple[list[Tensor], dict[str, str], str, torch.device]
"""Expected logits; {tensor in memory: SHA-256}; where frozen values came from: `files`, `memory`, `none` (all were
trained, or an adapter stands alone); the device of the network."""


def _write_model(
    build: Build, source: Source, recipe: Recipe, sequences: list[list[int]], staging: Path, shard_bytes: int
) -> Written:
    network: Any = build()
    expected, device = logits(network, sequences), next(network.parameters()).device
    layout, dtype = layout_of(network), DTYPES[recipe.model.dtype]
    if layout.converted:
        return expected, _write_converted(network, source, dtype, staging, shard_bytes), "memory", device
    assembly = Assembly(layout, source, lora_scale(recipe.tuning), dtype)
    _save_config(beneath(network), dtype, assembly.unties, staging)
    found = file_base(recipe.model, layout, assembly.needed)
    base: Base = found or LiveBase(network)
    del network
    gc.collect()  # where files give the values, the network is cyclic garbage by now
    digests = write_model(staging, assembly.planned, lambda name: assembly.make(name, base), shard_bytes)
    where = ("files" if found else "memory") if assembly.needed else "none"
    return expected, digests, where, device


def _write_converted(
    network: Any, source: Source, dtype: torch.dtype, staging: Path, shard_bytes: int
) -> dict[str, str]:
    """Write a model whose tensors transformers regroups between memory and files (the experts of some mixtures).

    That takes them all at once, and peft adapts such experts in ways of its own: so peft merges, in place and in fp32.
    """
    from transformers.core_model_loading import revert_weight_conversion

    for name, parameter in network.named_parameters():
        if parameter.requires_grad:  # so far in the dtype of training's arithmetic
            parameter.data = source.read(f"{ROOT}{name}").to(parameter.device)
    model, adapted = beneath(network), network is not beneath(network)
    if getattr(model, "is_quantized", False):
        model.dequantize(dtype=torch.float32)
    unties = adapted and model.config.tie_word_embeddings and _adapts_embeddings(model)
    if unties:  # the adapter changed one of two matrices that were one: from here on they are two
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
    if adapted:
        model = network.float().merge_and_unload(safe_merge=True)
    model.to(dtype)
    _save_config(model, dtype, unties, staging)
    base = LiveBase(model)
    tensors = {name: base.read(name) for name in layout_of(model).tensors}
    digests = {name: digest_of(tensor) for name, tensor in tensors.items()}
    filed = revert_weight_conversion(model, tensors)
    planned = [Planned(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in filed.items()]
    write_model(staging, planned, filed.pop, shard_bytes)
    return digests


def _adapts_embeddings(model: Any) -> bool:
    return any(hasattr(end, "base_layer") for end in (model.get_input_embeddings(), model.get_output_embeddings()))


def _write_adapter(
    build: Build, source: Source, recipe: Recipe, sequences: list[list[int]], staging: Path, shard_bytes: int
) -> Written:
    names = {adapter_key(name): name for name in source.shapes}  # before anything loads: there may be no adapter
    network: Any = build()
    expected, device = logits(network, sequences), next(network.parameters()).device
    config = copy.copy(network.peft_config[ADAPTER])
    config.inference_mode = True
    config.base_model_name_or_path = config.base_model_name_or_path or beneath(network).name_or_path
    config.save_pretrained(staging)
    planned = [Planned(key, torch.float32, source.shapes[name]) for key, name in names.items()]
    path = staging / "adapter_model.safetensors"
    return expected, write_tensors(path, planned, lambda key: source.read(names[key]).float()), "none", device


def _save_config(network: Any, dtype: torch.dtype, unties: bool, staging: Path) -> None:
    """config.json, generation_config.json and a custom model's code, as transformers would save them beside weights."""
    config = copy.deepcopy(network.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [type(network).__name__]
    config.use_cache = True  # training switches it off
    if unties:
        config.tie_word_embeddings = False
    if network.is_remote_code():
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(network, staging, config=config)
    config.save_pretrained(staging)
    if network.can_generate():
        network.generation_config.save_pretrained(staging)


def _check_target(out: Path) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"out: {out}: not a folder; give a new one")
    if out.is_dir() and any(out.iterdir()) and not (out / RECORD).is_file():
        raise UserError(f"out: {out}: holds files of something else; give a new folder")


def _describe(
    folder: Path, recipe: Recipe, step: int, origin: str, report: dict[str, Any], metrics: Mapping[str, Any]
) -> None:
    """The model card and the record of the parity check, in place of what the libraries wrote."""
    secrets = known_secrets(os.environ)
    (folder / "README.md").unlink(missing_ok=True)
    card = model_card(recipe, step, origin, report, metrics)
    write_file(folder / "README.md", redact(card, secrets).encode())
    record = {"recipe": recipe.name, "step": step, "weights": origin, **report}
    write_file(folder / RECORD, (json.dumps(redact(record, secrets), indent=2, allow_nan=False) + "\n").encode())
