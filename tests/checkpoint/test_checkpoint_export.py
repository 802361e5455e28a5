"""Exported folders: read back by plain transformers and peft, with the trained model's logits, or not published."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import byte_tokenizer

from trainer.checkpoint import export as exporting
from trainer.checkpoint.export import TOLERANCES, check_weights, compare, export
from trainer.config.errors import RunError, UserError
from trainer.config.schema import Model, Objective, Recipe, Source, Stage, Tuning
from trainer.model.blocks import blocks
from trainer.model.load import load_network
from trainer.model.methods import apply_method

TUNINGS = {
    "full": Tuning(method="full"),
    "last-layers": Tuning(method="last-layers", layers=1),
    "lora": Tuning(method="lora", rank=4, alpha=8),
    "rslora": Tuning(method="lora", rank=4, alpha=8, rslora=True, targets=["q_proj", "down_proj", "embed_tokens"]),
}


def trained(folder: Path, method: str = "lora", dtype: str = "float32", **model: Any) -> tuple[Any, Recipe]:
    """A network with the method on it and its trainable parameters moved, and its recipe."""
    tuning = TUNINGS[method]
    settings = Model(path=str(folder), dtype=dtype, **model)  # type: ignore[arg-type]
    recipe = Recipe(
        name="tiny-run",
        model=settings,
        tuning=tuning,
        sources={"a": Source(path="a.jsonl", format="messages")},
        stages=[Stage(name="only", objective=Objective(), mixture={"a": 1.0})],
    )
    network: Any = load_network(settings, tuning, 0)
    network.config.pad_token_id = 2
    network = apply_method(network, tuning, blocks(network), 0)
    torch.manual_seed(1)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return network.train(), recipe


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("method", "merge"),
    [("full", True), ("last-layers", False), ("lora", True), ("lora", False), ("rslora", True), ("rslora", False)],
)
def test_the_folder_gives_the_trained_logits(
    tiny_folder: Path, tmp_path: Path, method: str, merge: bool, dtype: str
) -> None:
    network, recipe = trained(tiny_folder, method, dtype)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    report = export(network, byte_tokenizer(), tmp_path / "out", merge=merge, recipe=recipe, step=7)
    assert report["max_difference"] <= report["tolerance"] == TOLERANCES[report["kind"]][getattr(torch, dtype)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert network.training and not network.config.use_cache
    names = {path.name for path in (tmp_path / "out").iterdir()}
    adapter = method.endswith("lora") and not merge
    weights = "adapter_model.safetensors" if adapter else "model.safetensors"
    assert {weights, "README.md", "export.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    if not adapter:
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["use_cache"] and config["dtype"] == dtype and "quantization_config" not in config
        assert (tmp_path / "out" / "generation_config.json").exists()
        tensors = load_file(tmp_path / "out" / weights)
        assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{dtype}"}
        assert not [name for name in tensors if "lora" in name]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("merge", [True, False])
def test_a_quantised_base_is_dequantised_and_merged(tiny_folder: Path, tmp_path: Path, merge: bool, dtype: str) -> None:
    network, recipe = trained(tiny_folder, "lora", dtype, quantization="nf4")
    report = export(network, byte_tokenizer(), tmp_path / "out", merge=merge, recipe=recipe, step=7)
    assert report["max_difference"] <= TOLERANCES[report["kind"]][getattr(torch, dtype)]
    if merge:
        assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
        base = load_file(tiny_folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
        merged = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
        assert merged.shape == base.shape and not torch.allclose(merged.float(), base, atol=1e-3)


def test_a_classifier_keeps_its_head(tiny_folder: Path, tmp_path: Path) -> None:
    network, recipe = trained(tiny_folder, "lora", kind="classification", labels=["no", "yes", "why"])
    for merge in (True, False):
        report = export(network, byte_tokenizer(), tmp_path / f"out-{merge}", merge=merge, recipe=recipe, step=7)
        assert report["max_difference"] <= 1e-5
    config = json.loads((tmp_path / "out-True" / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "yes", "2": "why"}


def test_a_folder_with_other_logits_is_not_published(tiny_folder: Path, tmp_path: Path, monkeypatch) -> None:
    network, recipe = trained(tiny_folder)
    export(network, byte_tokenizer(), tmp_path / "out", merge=True, recipe=recipe, step=7)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(exporting, "merged", lambda network, adapter: copy.deepcopy(network).unload())
    with pytest.raises(RunError, match="differ from the trained model's"):
        export(network, byte_tokenizer(), tmp_path / "out", merge=True, recipe=recipe, step=8)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    export(network, byte_tokenizer(), tmp_path / "out", merge=False, recipe=recipe, step=8)  # an export may be replaced
    assert json.loads((tmp_path / "out" / "export.json").read_text())["step"] == 8
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_other_files_are_never_replaced(tiny_folder: Path, tmp_path: Path) -> None:
    network, recipe = trained(tiny_folder, "full")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds files of something else"):
        export(network, byte_tokenizer(), tmp_path, merge=False, recipe=recipe, step=1)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="not a folder"):
        export(network, byte_tokenizer(), tmp_path / "link", merge=False, recipe=recipe, step=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "thesis.tex"]


def test_the_card_names_recipe_base_and_metrics_but_no_path_or_secret(
    tiny_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-4711-canary")
    network, recipe = trained(tiny_folder)
    metrics = {"held-out": {"loss": 1.23456, "note": "canary-4711-canary"}}
    export(network, byte_tokenizer(), tmp_path / "out", merge=False, recipe=recipe, step=7, metrics=metrics)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# tiny-run" in card and tiny_folder.name in card and "| held-out/loss | 1.235 |" in card
    assert str(tiny_folder) not in card and "canary" not in card and "/" + "tmp" not in card
    assert "lora, rank 4, alpha 8" in card and "| optimizer steps | 7 |" in card


def test_compare_by_hand() -> None:
    expected = [torch.tensor([[1.0, -4.0]]), torch.tensor([[2.0, 0.0]])]
    actual = [torch.tensor([[1.0, -4.0]]), torch.tensor([[1.9, 2.0]])]
    report = compare(expected, actual, 0.5)  # |0 - 2| / |-4|; the top token of one position of two changed
    assert report == {"max_difference": 0.5, "tolerance": 0.5, "same_top_token": 0.5}
    with pytest.raises(RunError, match=r"5\.0e-01"):
        compare(expected, actual, 0.4)
    with pytest.raises(RunError, match="nan"):
        compare(expected, [torch.full((1, 2), torch.nan)] * 2, 0.4)


def test_one_other_weight_is_found(tiny_folder: Path) -> None:
    one, _ = trained(tiny_folder, "full", "bfloat16")
    two = copy.deepcopy(one)
    check_weights(one, two)
    two.model.norm.weight.data[3] += 1e-3  # far below what bf16 logits show
    with pytest.raises(RunError, match=r"model\.norm\.weight"):
        check_weights(one, two)
