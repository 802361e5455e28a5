"""The proof that an exported folder is the trained model: its weights bit by bit, its logits within a tolerance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.checkpoint.tensor_files import digest_of
from trainer.config.errors import RunError
from trainer.config.schema import Recipe
from trainer.model.load import DTYPES, load_network

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
LONGEST = 128  # tokens of a prompt that are compared


@torch.no_grad()
def logits(network: nn.Module, sequences: list[list[int]]) -> list[Tensor]:
    """fp32 logits on the CPU of each token sequence alone: (length, vocabulary), or (1, classes)."""
    was_training = network.training
    network.eval()
    device = next(network.parameters()).device
    found = []
    for sequence in sequences:
        output = network(input_ids=torch.tensor([sequence], device=device))
        found.append(output.logits[0].float().cpu().reshape(-1, output.logits.shape[-1]))
    network.train(was_training)
    return found


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


def tolerance_of(recipe: Recipe, adapter: bool) -> float:
    """The largest difference of logits that an export of this recipe may show."""
    if recipe.model.quantization == "int8" and not adapter:
        return INT8_TOLERANCE
    return TOLERANCES["adapter" if adapter else "model"][DTYPES[recipe.model.dtype]]


def check_weights(written: Mapping[str, str], network: nn.Module | Mapping[str, Tensor]) -> None:
    """Compare tensors with the SHA-256 of what was written. Raises RunError that names the first that differs."""
    found = network.state_dict() if isinstance(network, nn.Module) else network
    for name, digest in written.items():
        if name not in found or digest_of(found[name]) != digest:
            raise RunError(f"export: {name} read back from the disk is not what was written: nothing was published")


def open_model(recipe: Recipe, folder: Path, written: Mapping[str, str]) -> nn.Module:
    """The model in a folder, as transformers reads it; its weights are those that were written."""
    import transformers  # seconds to import

    classifies = recipe.model.kind == "classification"
    auto = transformers.AutoModelForSequenceClassification if classifies else transformers.AutoModelForCausalLM
    network = auto.from_pretrained(folder, dtype="auto", trust_remote_code=recipe.model.trust_remote_code)
    check_weights(written, network)
    return network


def open_adapter(recipe: Recipe, folder: Path, written: Mapping[str, str], pad_id: int) -> nn.Module:
    """The adapter in a folder over the recipe's base, as peft reads it, in the arithmetic of training."""
    from peft import PeftModel, get_peft_model_state_dict  # 5 s to import: only where there is an adapter

    base: Any = load_network(recipe.model, recipe.tuning, recipe.seed)
    base.config.pad_token_id = pad_id
    network = PeftModel.from_pretrained(base, str(folder))
    check_weights(written, get_peft_model_state_dict(network, save_embedding_layers=False))
    for name, parameter in network.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = parameter.data.to(DTYPES[recipe.model.dtype])
    return network


def check_tokenizer(tokenizer: Any, folder: Path, prompts: Sequence[str]) -> None:
    """Raise RunError where the saved tokenizer cuts a prompt otherwise, or lost the chat template."""
    from transformers import AutoTokenizer  # seconds to import

    again = AutoTokenizer.from_pretrained(folder)
    for prompt in prompts:
        if again(prompt)["input_ids"] != tokenizer(prompt)["input_ids"]:
            raise RunError(f"export: the saved tokenizer cuts {prompt!r} in another way than the run's")
    if again.chat_template != tokenizer.chat_template:
        raise RunError("export: the saved tokenizer lost the run's chat template")
