"""From a recipe to a network: hub id, folder or GGUF file; dtype; 4 or 8 bit; attention; dropout."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.config import UserError
from trainer.config.hub_model import model_folder
from trainer.config.schema import Model, Tuning
from trainer.model.blocks import blocks
from trainer.model.sharded import outline

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_network(settings: Model, tuning: Tuning, seed: int, masters: bool = True, sharded: bool = False) -> nn.Module:
    """The pretrained network on the CPU (quantised ones on their device), in eval mode, before any method is put on.

    Without `masters` nothing is loaded in fp32 for an optimizer's sake: for a model that will not be trained. With
    `sharded` weights stay in their files (`trainer.model.sharded`; raises CannotShard).
    Raises UserError where the model cannot be had or a setting would be ignored. A new classification head is drawn
    from the
    seed, so every rank draws the same.
    """
    torch.manual_seed(seed)
    arguments: dict[str, Any] = {
        "dtype": storage_dtype(settings, tuning) if masters else DTYPES[settings.dtype],
        "trust_remote_code": settings.trust_remote_code,
        "use_safetensors": True,  # the other kind of file is a pickle
    }
    if settings.kind == "classification":
        labels = settings.labels or []
        arguments |= {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
        }
    if settings.quantization != "none":
        arguments["quantization_config"] = quantization(settings)
    network: Any = _from_pretrained(settings, arguments, seed if sharded else None)
    if settings.quantization != "none":
        keep_quantised_weights(network)
    network.config.use_cache = False  # the default cache breaks the isolation of packed documents, in silence
    return network


def storage_dtype(settings: Model, tuning: Tuning) -> torch.dtype:
    """Dtype of the loaded weights: fp32 masters where everything trains, the recipe's dtype where most is frozen."""
    return torch.float32 if tuning.method == "full" else DTYPES[settings.dtype]


def quantization(settings: Model) -> Any:
    """bitsandbytes settings. The 4-bit storage dtype is the compute dtype, the one that FSDP2 can shard with mixed
    precision."""
    from transformers import BitsAndBytesConfig  # 1 s to import: only for quantised models

    dtype = DTYPES[settings.dtype]
    if settings.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def keep_quantised_weights(network: nn.Module) -> None:
    """Switch off bitsandbytes' inference repacking of 4-bit weights.

    On AVX512-BF16 CPUs one eval forward repacks a Linear4bit for inference and nothing packs it back: every later
    training
    forward then loses the gradient of its input, in silence.
    """
    import bitsandbytes  # optional: only for quantised models

    for module in network.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _from_pretrained(settings: Model, arguments: dict[str, Any], outline_seed: int | None) -> nn.Module:
    import transformers  # seconds to import: after the recipe was checked

    transformers.logging.set_verbosity_error()  # its bars and advice would stand between our own lines
    transformers.logging.disable_progress_bar()
    auto = {
        "causal-lm": transformers.AutoModelForCausalLM,
        "classification": transformers.AutoModelForSequenceClassification,
    }[settings.kind]
    path = Path(settings.path).expanduser()
    options = arguments | {"output_loading_info": True}
    try:
        if outline_seed is not None:
            network, report = outline(settings, auto, arguments, outline_seed)
        elif path.suffix == ".gguf":
            network, report = auto.from_pretrained(str(path.parent), gguf_file=path.name, **options)
            network = _plain(network)
        else:
            network, report = auto.from_pretrained(str(model_folder(settings, weights=True)), **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        if "custom code" in reason:
            reason += "; read that code, and set `model.trust_remote_code: true` where it may run"
        raise UserError(f"model.path: {settings.path!r}: cannot be loaded: {reason}") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(f"model.path: {settings.path!r}: {_mismatch(settings, error)}") from error
    check_keys(settings, network, report)
    return network


def _mismatch(settings: Model, error: RuntimeError) -> str:
    if settings.kind == "classification":
        return f"its head has other labels than the {len(settings.labels or [])} of `model.labels`; name its own labels"
    return "its weights have other shapes than its config.json says; download it again"


def check_keys(settings: Model, network: nn.Module, report: Mapping[str, Any]) -> None:
    """Raise UserError where weights are missing, which transformers fills with random numbers.

    A classifier may lack what lies after its blocks: head and pooler are then new. Weights that the network has no
    place for are named in the log.
    """
    inside = {id(p) for block in blocks(network) for p in block.parameters()}
    inside |= {id(p) for p in network.get_input_embeddings().parameters()}  # type: ignore[operator]
    known = dict(network.named_parameters(remove_duplicate=False))
    missing = sorted(
        name
        for name in report["missing_keys"]
        if settings.kind != "classification" or (name in known and id(known[name]) in inside)
    )
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"model.path: {settings.path!r}: its files lack {', '.join(missing[:3])}{more}; download it again, or "
            "choose a model of this kind"
        )
    unplaced = sorted(report["unexpected_keys"])
    if unplaced:
        log.warning("%s: %d weights have no place in the network: %s", settings.path, len(unplaced), unplaced[0])


def _plain(network: Any) -> nn.Module:
    """An ordinary network with the weights of one read from GGUF, which itself refuses to be saved."""
    config = type(network.config).from_dict(
        {key: value for key, value in network.config.to_dict().items() if key != "quantization_config"}
    )
    if getattr(config, "rms_norm_eps", None) is not None:
        config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")  # GGUF keeps fp32: 9.999999747e-06 for 1e-5
    plain = type(network)(config).to(network.dtype)
    plain.load_state_dict(network.state_dict())
    plain.generation_config = network.generation_config
    return plain.eval()
