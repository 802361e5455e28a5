"""The model card of an exported folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config.schema import Recipe


def model_card(recipe: Recipe, step: int, origin: str, report: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """README.md in the hub's form: what was trained from what and how, its metrics, and how to load it.

    `origin` says which of the run's weights these are where it is not the checkpoint of `step`.

    A local base model is named by its folder alone: no path of this machine is published.
    """
    path = recipe.model.path
    local = path.startswith(("/", ".", "~")) or path.endswith(".gguf") or path.count("/") != 1
    base = Path(path).name if local else path
    adapter = report["kind"] == "adapter"
    head = ["---", f"library_name: {'peft' if adapter else 'transformers'}"]
    head += [] if local else [f"base_model: {json.dumps(base)}"]
    head += ["tags:", "- tunesmith", "---", ""]
    method: str = recipe.tuning.method
    if method == "lora":
        method += f", rank {recipe.tuning.rank}, alpha {recipe.tuning.alpha:g}"
    rows = {
        "base model": base,
        "method": method,
        "base quantised to": recipe.model.quantization,
        "stages": ", ".join(f"{stage.name} ({stage.objective.name})" for stage in recipe.stages),
        "optimizer steps": step,
        **({"weights": origin} if origin else {}),
        "dtype": recipe.model.dtype,
        "seed": recipe.seed,
    }
    body = [f"# {recipe.name}", "", f"Fine-tuned from {base} with Tunesmith.", "", *_table("", rows)]
    if metrics:
        body += ["", "## Evaluation", "", *_table("value", _flatten(metrics))]
    loading = [
        "from peft import PeftModel\nmodel = PeftModel.from_pretrained(base_model, folder)"
        if adapter
        else "from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained(folder)"
    ]
    if recipe.model.kind == "classification":
        loading = [line.replace("AutoModelForCausalLM", "AutoModelForSequenceClassification") for line in loading]
    body += ["", "## Use", "", "```python", *loading, "```", ""]
    body += [
        f"Read back from the disk, its logits differ from the trained model's by at most {report['max_difference']:.1e}"
        f" of the largest (allowed: {report['tolerance']:.0e}).",
        "",
    ]
    return "\n".join(head + body)


def _table(heading: str, rows: Mapping[str, Any]) -> list[str]:
    return [f"| | {heading} |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]


def _flatten(metrics: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested names joined by slashes; numbers to four digits."""
    flat: dict[str, Any] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{before}{key}/")
        else:
            flat[f"{before}{key}"] = f"{value:.4g}" if isinstance(value, float) else value
    return flat
