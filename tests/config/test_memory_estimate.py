"""Parameter counts against real networks, bytes against arithmetic by hand, activations against what autograd keeps."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from trainer.config import Recipe, build_recipe
from trainer.config.memory import (
    NF4_BYTES,
    activation_bytes,
    count,
    estimate,
    gathered_bytes,
    optimizer_bytes,
    parameters,
)
from trainer.config.model_facts import UnknownModel, model_facts
from trainer.config.schema import Optimizer
from trainer.model.blocks import blocks
from trainer.model.methods import apply_method

SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
EMBEDDING, BLOCK, NORM = 512 * 64, 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 176 + 2 * 64, 64
METHODS: list[dict[str, Any]] = [
    {"method": "full"},
    {"method": "lora", "rank": 4},
    {"method": "lora", "rank": 4, "targets": ["q_proj", "v_proj"]},
    {"method": "last-layers", "layers": 2},
    {"method": "last-layers", "layers": 1, "train_head": False},
]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=request.param)).save_pretrained(place)
    return place


def recipe_for(path: Path, tuning: dict[str, Any], dtype: str = "float32", **more: Any) -> Recipe:
    return build_recipe(
        {
            "name": "x",
            "model": {"path": str(path), "dtype": dtype, "max_length": 64} | more.pop("model", {}),
            "tuning": tuning,
            "batch": {"micro_tokens": 128, "examples": 2},
            "sources": {"a": {"path": "a.jsonl", "format": more.pop("format", "messages")}},
        }
        | more
    )


def network_for(path: Path, recipe: Recipe) -> Any:
    network = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    if recipe.model.dtype == "bfloat16" and recipe.tuning.method != "full":
        network = network.to(torch.bfloat16)
    return apply_method(network, recipe.tuning, blocks(network), 0)


@pytest.mark.parametrize("tuning", METHODS, ids=str)
def test_counts_are_those_of_the_network(folder: Path, tuning: dict[str, Any]) -> None:
    recipe = recipe_for(folder, tuning)
    found = parameters(recipe, model_facts(recipe.model))
    network = network_for(folder, recipe)
    assert found.total == sum(p.numel() for p in network.parameters())
    assert count(found.trainable) == sum(p.numel() for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize("tuning", METHODS[:3], ids=str)
def test_counts_of_a_classifier(folder: Path, tuning: dict[str, Any]) -> None:
    more = {"objective": {"name": "classification"}, "format": "text-label"}
    recipe = recipe_for(folder, tuning, model={"kind": "classification", "labels": ["a", "b", "c"]}, **more)
    found = parameters(recipe, model_facts(recipe.model))
    network = LlamaForSequenceClassification.from_pretrained(folder, num_labels=3, dtype=torch.float32)
    network = apply_method(network, recipe.tuning, blocks(network), 0)
    assert found.total == sum(p.numel() for p in network.parameters())
    assert count(found.trainable) == sum(p.numel() for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tuning", METHODS, ids=str)
def test_activations_are_near_what_autograd_keeps(folder: Path, tuning: dict[str, Any], dtype: str) -> None:
    recipe = recipe_for(folder, tuning, dtype)
    network = network_for(folder, recipe).train()
    base = getattr(network, "get_base_model", lambda: network)()
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    casts = {p.numel() for p in network.parameters()}  # autocast's copies of weights are another part
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.numel() not in casts:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"),
    ):
        output = base.model(input_ids=torch.zeros(2, 64, dtype=torch.long), use_cache=False).last_hidden_state
    assert output.requires_grad
    ratio = activation_bytes(recipe, model_facts(recipe.model), 128) / sum(kept.values())
    assert 0.9 < ratio < 1.35


def test_facts_of_a_folder(folder: Path) -> None:
    facts = model_facts(recipe_for(folder, METHODS[0]).model)
    assert facts.parameters == EMBEDDING * (1 if facts.tied else 2) + 4 * BLOCK + NORM
    assert (facts.hidden, facts.layers, facts.heads, facts.kv_heads, facts.head_width) == (64, 4, 8, 4, 8)
    assert (facts.intermediate, facts.vocabulary, facts.gated, facts.causal) == (176, 512, True, True)
    assert len(facts.linears()) == 4 * 7


def test_facts_of_several_files_are_those_of_one(tmp_path: Path) -> None:
    network = LlamaForCausalLM(LlamaConfig(**SIZES))
    network.save_pretrained(tmp_path / "one")
    network.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (model_facts(recipe_for(tmp_path / name, METHODS[0]).model) for name in ("one", "many"))
    assert one.shapes == many.shapes


def write_gguf(path: Path, tensors: dict[str, list[int]]) -> None:
    """A GGUF header as the gguf package writes it, without data."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(176)
    writer.add_head_count(8)
    writer.add_head_count_kv(4)
    writer.add_token_list(["one", "two", "ü"])
    writer.add_token_scores([0.0, 1.0, 2.0])
    writer.add_token_types([1, 1, 1])
    for name, shape in tensors.items():
        writer.add_tensor(name, torch.zeros(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_facts_of_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shapes = {"token_embd.weight": [512, 64], "blk.0.attn_q.weight": [64, 64], "blk.0.attn_k.weight": [32, 64]}
    shapes |= {"blk.0.ffn_gate.weight": [176, 64], "output_norm.weight": [64]}
    write_gguf(path, shapes)
    facts = model_facts(recipe_for(path, METHODS[0]).model)
    assert facts.parameters == 512 * 64 + 64 * 64 + 32 * 64 + 176 * 64 + 64
    assert (facts.tied, facts.layers, facts.kv_heads, facts.vocabulary, facts.gated) == (True, 1, 4, 512, True)
    assert set(facts.linears()) == {"blk.0.q_proj", "blk.0.k_proj", "blk.0.gate_proj"}


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", struct.pack("<Q", 1 << 40), struct.pack("<Q", 10) + b"not json..", b"\xff" * 64]
)
def test_damaged_headers_are_unknown(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "model.gguf").write_bytes(content)
    for path in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(UnknownModel):
            model_facts(recipe_for(path, METHODS[0]).model)


def test_a_model_that_is_not_here_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UnknownModel, match="not downloaded yet"):
        model_facts(recipe_for(Path("no-such-owner/no-such-model"), METHODS[0]).model)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnknownModel, match=r"no model\.safetensors"):
        model_facts(recipe_for(tmp_path, METHODS[0]).model)


# ---------------------------------------------------------------- bytes by hand


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"name": "adamw"}, 8 * 8192 + 8 * 64 + 8 * 8192),
        ({"name": "adamw8bit"}, 8192 * 2 + 8192 * 8 // 256 + 64 * 8 + 8192 * 2 + 8192 * 8 // 256),
        ({"name": "sgd"}, 0),
        ({"name": "sgd", "momentum": 0.9}, 4 * (8192 + 64 + 8192)),
        ({"name": "lion"}, 4 * (8192 + 64 + 8192)),
        ({"name": "muon"}, 4 * 8192 + 8 * 64 + 8 * 8192),
    ],
)
def test_optimizer_state(settings: dict[str, Any], expected: int) -> None:
    shapes = {"a.weight": (128, 64), "norm.weight": (64,), "embed.weight": (128, 64)}
    assert optimizer_bytes(Optimizer(**settings), shapes) == expected


def test_full_tuning_in_fp32_by_hand(folder: Path) -> None:
    recipe = recipe_for(folder, {"method": "full"})
    facts = model_facts(recipe.model)
    total = facts.parameters
    found = estimate(recipe, facts, 1, "cpu")
    assert found.parts["trainable weights (fp32)"] == found.parts["gradients (fp32)"] == 4 * total
    assert found.parts["optimizer state"] == 8 * total
    assert found.parts["frozen weights"] == 0
    assert found.parts["logits of one chunk"] == 128 * 512 * 8  # log-probabilities and gradient, fp32 each
    assert found.total == sum(found.parts.values()) - 4 * total  # one micro-batch: gradients come as activations go
    several = recipe_for(folder, {"method": "full"}, batch={"micro_tokens": 128, "examples": 4})
    again = estimate(several, facts, 1, "cpu")
    assert again.parts == found.parts and again.total == sum(again.parts.values())
    assert found.loading == 4 * total


def test_quantised_weights_by_hand(folder: Path) -> None:
    linear = 4 * (BLOCK - 2 * 64)
    for kind, width in (("nf4", NF4_BYTES), ("int8", None)):
        recipe = recipe_for(folder, {"method": "lora"}, "bfloat16", model={"quantization": kind})
        facts = model_facts(recipe.model)
        rest = facts.parameters - linear
        scales = 4 * 4 * (64 + 32 + 32 + 64 + 176 + 176 + 64)  # int8: an fp32 for each output row
        expected = linear * width + 2 * rest if width else linear + scales + 2 * rest
        assert estimate(recipe, facts).parts["frozen weights"] == round(expected)
    assert NF4_BYTES == 0.5 + 1 / 64 + 1 / 4096


def test_sharding_by_hand(folder: Path) -> None:
    recipe = recipe_for(folder, {"method": "full"}, "bfloat16")
    facts = model_facts(recipe.model)
    found = estimate(recipe, facts, 2)
    assert found.parts["trainable weights (fp32)"] == 4 * facts.parameters // 2
    assert found.parts["optimizer state"] == 8 * facts.parameters // 2
    root = facts.parameters - 4 * BLOCK
    assert found.parts["gathered weights"] == 2 * (root + 2 * BLOCK)
    kept = recipe_for(folder, {"method": "full"}, "bfloat16", engine={"reshard_after_forward": False})
    assert gathered_bytes(kept, facts, parameters(kept, facts)) == 2 * facts.parameters
    assert found.loading == 4 * facts.parameters // 2  # each rank reads its own shards
    whole = recipe_for(folder, {"method": "full"}, "bfloat16", engine={"loading": "whole"})
    assert estimate(whole, facts, 2).loading == 4 * facts.parameters
    assert estimate(recipe, facts, 3).parts["trainable weights (fp32)"] > 4 * facts.parameters // 3  # rows are not cut


def test_hybrid_sharding_and_prefetch_by_hand(folder: Path) -> None:
    recipe = recipe_for(folder, {"method": "full"}, "bfloat16", engine={"shard_size": 2, "prefetch": 2})
    facts = model_facts(recipe.model)
    found = estimate(recipe, facts, 8)
    assert found.parts["trainable weights (fp32)"] == 4 * facts.parameters // 2  # not 8
    assert found.parts["optimizer state"] == 8 * facts.parameters // 2
    assert found.parts["gathered weights"] == 2 * (facts.parameters - 4 * BLOCK + 3 * BLOCK)


def test_offload_moves_the_state_to_the_host(folder: Path) -> None:
    recipe = recipe_for(folder, {"method": "full"}, engine={"cpu_offload": True})
    found = estimate(recipe, model_facts(recipe.model), 2)
    assert "optimizer state" in found.host and "optimizer state" not in found.parts
    assert found.total < sum(found.host.values()) + sum(found.parts.values())


def test_a_save_in_the_background_needs_a_copy_in_host_memory(folder: Path) -> None:
    facts = model_facts(recipe_for(folder, {"method": "full"}).model)
    name, copied = "copy that a save in the background writes", (4 + 8) * facts.parameters
    saving = recipe_for(folder, {"method": "full"}, checkpoint={"every": 10})
    assert estimate(saving, facts).host == {name: copied}
    assert estimate(saving, facts).loading == estimate(recipe_for(folder, {"method": "full"}), facts).loading > 0
    assert (
        estimate(saving, facts, device="cpu").parts[name] == copied and not estimate(saving, facts, device="cpu").host
    )
    offloaded = recipe_for(folder, {"method": "full"}, engine={"cpu_offload": True}, checkpoint={"every": 10})
    assert estimate(offloaded, facts, 2).host[name] == copied // 2
    for checkpoint in ({}, {"every": 10, "asynchronous": False}):
        assert not estimate(recipe_for(folder, {"method": "full"}, checkpoint=checkpoint), facts).host


def test_what_saves_memory_saves_it(folder: Path) -> None:
    def total(tuning: dict[str, Any], **more: Any) -> int:
        recipe = recipe_for(folder, tuning, **more)
        return estimate(recipe, model_facts(recipe.model)).total

    assert total({"method": "lora"}) < total({"method": "full"})
    assert total({"method": "full"}, engine={"activation_checkpointing": True}) < total({"method": "full"})
    assert total({"method": "lora"}, dtype="bfloat16") < total({"method": "lora"})
    eager = total({"method": "full"}, model={"attention": "eager"})
    assert eager > total({"method": "full"})
