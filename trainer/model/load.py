"""From a recipe to a network: hub id, folder or GGUF file; dtype; 4 or 8 bit; attention; dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.config import UserError
from trainer.config.hub_model import model_folder
from trainer.config.schema import Model, Tuning

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_network(settings: Model, tuning: Tuning, seed: int) -> nn.Module:
    """The pretrained network on the CPU (quantised ones on their device), in eval mode, before any method is put on.

    Raises UserError where the model cannot be had or a setting would be ignored. A new classification head is drawn
    from the
    seed, so every rank draws the same.
    """
    torch.manual_seed(seed)
    arguments: dict[str, Any] = {
        "dtype": storage_dtype(settings, tuning),
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
    network: Any = _from_pretrained(settings, arguments)
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


def _from_pretrained(settings: Model, arguments: dict[str, Any]) -> nn.Module:
    import transformers  # seconds to import: after the recipe was checked

    transformers.logging.set_verbosity_error()  # its bars and advice would stand between our own lines
    transformers.logging.disable_progress_bar()
    auto = {
        "causal-lm": transformers.AutoModelForCausalLM,
        "classification": transformers.AutoModelForSequenceClassification,
    }[settings.kind]
    path = Path(settings.path).expanduser()
    try:
        if path.suffix == ".gguf":
            return _plain(auto.from_pretrained(str(path.parent), gguf_file=path.name, **arguments))
        return auto.from_pretrained(str(model_folder(settings, weights=True)), **arguments)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        if "custom code" in reason:
            reason += "; read that code, and set `model.trust_remote_code: true` where it may run"
        raise UserError(f"model.path: {settings.path!r}: cannot be loaded: {reason}") from error


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
