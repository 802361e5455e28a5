"""An ordinary Hugging Face folder of what was learned, published only after its logits were compared with the run's."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.checkpoint.card import model_card
from trainer.checkpoint.durable import clean, publish_folder, remove_folder, staging_folder, sync_tree, write_file
from trainer.config.errors import RunError, UserError
from trainer.config.schema import Recipe
from trainer.model.load import DTYPES
from trainer.tracking.redact import known_secrets, redact

RECORD = "export.json"
PROMPTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n    return a + b\n",
    "In 1969, 3 men flew 384,400 km to the Moon; two of them walked on it.",
)
# Largest difference of a logit over the largest logit. fp32: the order of sums (merged or not, attention kernel).
# A bf16 model: one rounding of the weights and other roundings of activations; 0.056 was measured on SmolLM2-135M, so
# there the bitwise comparison of weights says more. int8: its forward rounds activations to 8 bits as well, which no
# exported model can repeat. A reopened adapter lies on the same base in the same arithmetic: no difference measured.
TOLERANCES = {
    "model": {torch.float32: 1e-5, torch.bfloat16: 1e-1},
    "adapter": {torch.float32: 1e-5, torch.bfloat16: 1e-2},
}
INT8_TOLERANCE = 2e-1
_LONGEST = 128  # tokens of a prompt that are compared


def export(
    network: nn.Module,
    tokenizer: Any,
    out: Path,
    *,
    merge: bool,
    recipe: Recipe,
    step: int,
    metrics: Mapping[str, Any] | None = None,
    prompts: Sequence[str] = PROMPTS,
) -> dict[str, Any]:
    """Write `network` (a Hugging Face model, or a PeftModel over one) with its tokenizer as an ordinary folder.

    A PeftModel gives an adapter folder, or with `merge` a model folder; other networks give a model folder. Weights of
    a model folder are in the recipe's dtype. The folder is read back from the disk by transformers (and peft), and its
    logits on the prompts are compared with the network's. Returns {kind, max_difference, tolerance, same_top_token,
    prompts}. Raises RunError, and publishes nothing, where they differ by more than the tolerance; UserError where
    `out` holds other files, or the method cannot be merged.
    """
    _check_target(out)
    dtype = DTYPES[recipe.model.dtype]
    adapter = hasattr(network, "peft_config") and not merge
    sequences = [tokenizer(prompt)["input_ids"][:_LONGEST] for prompt in prompts]
    clean(out.parent, f"{out.name}@")
    staging = staging_folder(out)
    try:
        expected = logits(network, sequences, _precision(network, dtype))
        if adapter:
            network.save_pretrained(staging, save_embedding_layers=False)  # type: ignore[operator]  # "auto" asks the hub
            again, precision = _open_adapter(network, staging), _precision(network, dtype)
        else:
            plain = _save_plain(network, staging, dtype)
            again, precision = _open_model(recipe, staging).to(next(network.parameters()).device), nullcontext
            check_weights(plain, again)
            del plain
        tokenizer.save_pretrained(staging)
        _check_tokenizer(tokenizer, staging, prompts)
        kind = "adapter" if adapter else "model"
        tolerance = INT8_TOLERANCE if recipe.model.quantization == "int8" and not adapter else TOLERANCES[kind][dtype]
        difference = compare(expected, logits(again, sequences, precision), tolerance)
        report = {"kind": kind, **difference, "prompts": len(prompts)}
        _describe(staging, recipe, step, report, metrics or {})
        sync_tree(staging)
        publish_folder(staging, out)
    except Exception:
        remove_folder(staging)
        raise
    return report


def compare(expected: list[Tensor], actual: list[Tensor], tolerance: float) -> dict[str, Any]:
    """{max_difference: max |a - b| / max |a| over all logits, tolerance, same_top_token: share of positions}.

    Raises RunError where the difference is larger than the tolerance, or not a number.
    """
    largest = max(float(a.abs().max()) for a in expected)
    difference = max(float((a - b).abs().max()) for a, b in zip(expected, actual, strict=True)) / largest
    same = torch.cat([(a.argmax(-1) == b.argmax(-1)).float() for a, b in zip(expected, actual, strict=True)])
    if not difference <= tolerance:
        raise RunError(
            f"export: logits of the exported folder differ from the trained model's by {difference:.1e} (relative), "
            f"more than {tolerance:.0e}: nothing was written; please report this with the recipe"
        )
    return {"max_difference": difference, "tolerance": tolerance, "same_top_token": float(same.mean())}


@torch.no_grad()
def logits(
    network: nn.Module, sequences: list[list[int]], precision: Callable[[], AbstractContextManager[Any]]
) -> list[Tensor]:
    """fp32 logits on the CPU of each token sequence alone: (length, vocabulary), or (1, classes)."""
    was_training = network.training
    network.eval()
    device = next(network.parameters()).device
    found = []
    for sequence in sequences:
        with precision():
            output = network(input_ids=torch.tensor([sequence], device=device))
        found.append(output.logits[0].float().cpu().reshape(-1, output.logits.shape[-1]))
    network.train(was_training)
    return found


def merged(network: Any, adapter: Path) -> nn.Module:
    """A copy of a PeftModel's base in fp32 with the adapter in its weights; the network stays as it is.

    A quantised base is dequantised first. The adapter learned to correct just these rounded weights, so this merge
    gives the trained model itself (to rounding); merging into the unquantised base would give another one, and merging
    into 4-bit weights would round the adapter away. fp32 until the end, so that the sum is rounded once.
    """
    from peft import PeftModel  # 5 s to import: only where there is an adapter

    base = copy.deepcopy(network).unload()
    if getattr(base, "is_quantized", False):
        base = base.dequantize(dtype=torch.float32)
    if base.config.tie_word_embeddings and _adapts_embeddings(network):
        # the adapter changed one of two matrices that were one: from here on they are two
        base.config.tie_word_embeddings = False
        head = base.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
    whole: Any = PeftModel.from_pretrained(base.float(), str(adapter))
    if not hasattr(whole, "merge_and_unload"):
        kind = next(iter(network.peft_config.values())).peft_type.value
        raise UserError(f"export.merge: {kind} adds no weights that could be merged: export without merging")
    return whole.merge_and_unload(safe_merge=True)


def _adapts_embeddings(network: Any) -> bool:
    base = network.get_base_model()
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    return any(hasattr(module, "base_layer") for module in ends)


def check_weights(expected: nn.Module, actual: nn.Module) -> None:
    """Compare all tensors bitwise. Raises RunError that names the first that differs."""
    found = actual.state_dict()
    for name, tensor in expected.state_dict().items():
        if (
            name not in found
            or tensor.dtype != found[name].dtype
            or not torch.equal(tensor, found[name].to(tensor.device))
        ):
            raise RunError(f"export: {name} read back from the disk is not what was written: nothing was published")


def _save_plain(network: Any, staging: Path, dtype: torch.dtype) -> nn.Module:
    """Write a model folder; returns the model as written."""
    if hasattr(network, "peft_config"):
        adapter = staging / "adapter"
        network.save_pretrained(adapter, save_embedding_layers=False)
        plain: Any = merged(network, adapter)
        remove_folder(adapter)
    else:
        plain = copy.deepcopy(network)
    plain = plain.to(dtype)
    plain.config.use_cache = True  # training switches it off
    plain.save_pretrained(staging)
    return plain


def _open_model(recipe: Recipe, folder: Path) -> nn.Module:
    import transformers  # seconds to import

    classifies = recipe.model.kind == "classification"
    auto = transformers.AutoModelForSequenceClassification if classifies else transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype="auto", trust_remote_code=recipe.model.trust_remote_code)


def _open_adapter(network: Any, folder: Path) -> nn.Module:
    from peft import PeftModel  # 5 s to import: only where there is an adapter

    return PeftModel.from_pretrained(copy.deepcopy(network).unload(), str(folder))


def _precision(network: nn.Module, dtype: torch.dtype) -> Callable[[], AbstractContextManager[Any]]:
    """The arithmetic of training: autocast where some parameters are fp32 masters of a lower dtype."""
    if dtype == torch.float32 or all(p.dtype == dtype for p in network.parameters() if p.requires_grad):
        return nullcontext
    device = next(network.parameters()).device.type
    return lambda: torch.autocast(device, dtype=dtype)


def _check_target(out: Path) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"out: {out}: not a folder; give a new one")
    if out.is_dir() and any(out.iterdir()) and not (out / RECORD).is_file():
        raise UserError(f"out: {out}: holds files of something else; give a new folder")


def _check_tokenizer(tokenizer: Any, folder: Path, prompts: Sequence[str]) -> None:
    from transformers import AutoTokenizer  # seconds to import

    again = AutoTokenizer.from_pretrained(folder)
    for prompt in prompts:
        if again(prompt)["input_ids"] != tokenizer(prompt)["input_ids"]:
            raise RunError(f"export: the saved tokenizer cuts {prompt!r} in another way than the run's")
    if again.chat_template != tokenizer.chat_template:
        raise RunError("export: the saved tokenizer lost the run's chat template")


def _describe(folder: Path, recipe: Recipe, step: int, report: dict[str, Any], metrics: Mapping[str, Any]) -> None:
    """The model card and the record of the parity check, in place of what the libraries wrote."""
    secrets = known_secrets(os.environ)
    (folder / "README.md").unlink(missing_ok=True)
    write_file(folder / "README.md", redact(model_card(recipe, step, report, metrics), secrets).encode())
    record = {"recipe": recipe.name, "step": step, **report}
    write_file(folder / RECORD, (json.dumps(redact(record, secrets), indent=2, allow_nan=False) + "\n").encode())
