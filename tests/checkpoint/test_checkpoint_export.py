"""Exported folders: read back by plain transformers and peft, with the trained model's logits, or not published."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import byte_tokenizer, tiny_llama
from torch import Tensor

from trainer.checkpoint import assemble
from trainer.checkpoint.export import export
from trainer.checkpoint.parity import TOLERANCES, check_weights, compare
from trainer.checkpoint.tensor_files import digest_of
from trainer.config.errors import RunError, UserError
from trainer.config.schema import Model, Objective, Recipe, Source, Stage, Tuning
from trainer.model.blocks import blocks
from trainer.model.load import DTYPES, load_network
from trainer.model.methods import apply_method

TUNINGS = {
    "full": Tuning(method="full"),
    "last-layers": Tuning(method="last-layers", layers=1),
    "lora": Tuning(method="lora", rank=4, alpha=8),
    "conv1d": Tuning(method="lora", rank=4, alpha=8, targets=["c_attn", "c_proj", "c_fc"]),
    "rslora": Tuning(method="lora", rank=4, alpha=8, rslora=True, targets=["q_proj", "down_proj", "embed_tokens"]),
}


class Held:
    """Trained values in memory as a source, under the names that a trainee gives its parameters."""

    def __init__(self, network: Any) -> None:
        self.values = {f"network.{n}": p.detach().clone() for n, p in network.named_parameters() if p.requires_grad}
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tuple(value.shape) for name, value in self.values.items()}

    def read(self, name: str) -> Tensor:
        return self.values[name].clone()


Trained = tuple[Callable[[], Any], Held, Recipe]


def trained(folder: Path, method: str = "lora", dtype: str = "float32", **model: Any) -> Trained:
    """A network with the method on it and its trainable parameters moved: how to build it, its values, its recipe."""
    tuning = TUNINGS[method]
    settings = Model(path=str(folder), dtype=dtype, **model)  # type: ignore[arg-type]
    recipe = Recipe(
        name="tiny-run",
        model=settings,
        tuning=tuning,
        sources={"a": Source(path="a.jsonl", format="messages")},
        stages=[Stage(name="only", objective=Objective(), mixture={"a": 1.0})],
    )

    def untrained() -> Any:
        network: Any = load_network(settings, tuning, 0)
        network.config.pad_token_id = 2
        return apply_method(network, tuning, blocks(network), 0)

    moved = untrained()
    torch.manual_seed(1)
    for parameter in moved.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    held = Held(moved)

    def build() -> Any:
        network = untrained()
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:  # the low-precision copy of a master, as training has it
                parameter.data = held.read(f"network.{name}").to(DTYPES[dtype])
        return network.train()

    return build, held, recipe


@pytest.mark.parametrize(
    ("method", "adapter", "dtype"),
    [
        ("full", False, "bfloat16"),
        ("last-layers", False, "float32"),
        ("last-layers", False, "bfloat16"),
        ("lora", False, "float32"),
        ("lora", False, "bfloat16"),
        ("lora", True, "bfloat16"),
        ("rslora", False, "float32"),
        ("rslora", True, "float32"),
    ],
)
def test_the_folder_gives_the_trained_logits(
    tiny_folder: Path, tmp_path: Path, method: str, adapter: bool, dtype: str
) -> None:
    build, held, recipe = trained(tiny_folder, method, dtype)
    report = export(build, held, byte_tokenizer(), tmp_path / "out", adapter=adapter, recipe=recipe, step=7)
    assert report["max_difference"] <= report["tolerance"] == TOLERANCES[report["kind"]][getattr(torch, dtype)]
    assert report["base"] == ("none" if adapter or method == "full" else "files")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    weights = "adapter_model.safetensors" if adapter else "model.safetensors"
    assert {weights, "README.md", "export.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    if not adapter:
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["use_cache"] and config["dtype"] == dtype and "quantization_config" not in config
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert (tmp_path / "out" / "generation_config.json").exists()
        tensors = load_file(tmp_path / "out" / weights)
        assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{dtype}"}
        assert not [name for name in tensors if "lora" in name]
        assert ("lm_head.weight" in tensors) == (method == "rslora")  # that one adapts the embedding, and so unties it


@pytest.mark.parametrize(("method", "dtype"), [("lora", "bfloat16"), ("rslora", "float32")])
def test_every_weight_is_bitwise_what_peft_would_merge(
    tiny_folder: Path, tmp_path: Path, method: str, dtype: str
) -> None:
    """peft's own merge in fp32, rounded once, is the yardstick for the one that never holds the model."""
    build, held, recipe = trained(tiny_folder, method, dtype)
    export(build, held, byte_tokenizer(), tmp_path / "out", adapter=False, recipe=recipe, step=7)
    network = build().float()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            parameter.data = held.read(f"network.{name}")
    if method == "rslora":
        head = network.get_base_model().get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())  # peft merges into both otherwise
    expected = network.merge_and_unload(safe_merge=True).to(getattr(torch, dtype)).state_dict()
    actual = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name
    assert expected.keys() - actual.keys() <= {"lm_head.weight"}


@pytest.mark.parametrize(("adapter", "dtype"), [(False, "float32"), (False, "bfloat16"), (True, "bfloat16")])
def test_a_quantised_base_is_dequantised_and_merged(
    tiny_folder: Path, tmp_path: Path, adapter: bool, dtype: str
) -> None:
    build, held, recipe = trained(tiny_folder, "lora", dtype, quantization="nf4")
    report = export(build, held, byte_tokenizer(), tmp_path / "out", adapter=adapter, recipe=recipe, step=7)
    assert report["max_difference"] <= TOLERANCES[report["kind"]][getattr(torch, dtype)]
    if not adapter:
        assert report["base"] == "memory"
        assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
        base = load_file(tiny_folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
        merged = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
        assert merged.shape == base.shape and not torch.allclose(merged.float(), base, atol=1e-3)


def write_gguf(path: Path) -> None:
    """The tiny model as an unquantised GGUF file."""
    import gguf

    network = tiny_llama()
    config = network.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_dim)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in network.named_parameters():
        writer.add_tensor(f"{names.get_name(name.removesuffix('.weight'))}.weight", tensor.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_base_is_read_from_memory(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    for method in ("lora", "last-layers", "full"):
        build, held, recipe = trained(tmp_path / "tiny.gguf", method)
        out = tmp_path / method
        report = export(build, held, byte_tokenizer(), out, adapter=False, recipe=recipe, step=7)
        assert report["base"] == ("none" if method == "full" else "memory") and report["max_difference"] <= 1e-5
        assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_an_int8_base_is_dequantised(tiny_folder: Path, tmp_path: Path) -> None:
    build, held, recipe = trained(tiny_folder, quantization="int8")
    report = export(build, held, byte_tokenizer(), tmp_path / "out", adapter=False, recipe=recipe, step=7)
    assert report["base"] == "memory" and report["max_difference"] <= report["tolerance"] == 0.2
    base = load_file(tiny_folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    merged = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert merged.dtype == torch.float32 and not torch.allclose(merged, base, atol=1e-3)


def test_a_classifier_keeps_its_head(tiny_folder: Path, tmp_path: Path) -> None:
    build, held, recipe = trained(tiny_folder, "lora", kind="classification", labels=["no", "yes", "why"])
    for adapter in (True, False):
        out = tmp_path / f"out-{adapter}"
        report = export(build, held, byte_tokenizer(), out, adapter=adapter, recipe=recipe, step=7)
        assert report["max_difference"] <= 1e-5
    config = json.loads((tmp_path / "out-False" / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "yes", "2": "why"}


def test_weights_are_dealt_to_files_with_an_index(tiny_folder: Path, tmp_path: Path) -> None:
    build, held, recipe = trained(tiny_folder)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    export(build, held, byte_tokenizer(), whole, adapter=False, recipe=recipe, step=7)
    export(build, held, byte_tokenizer(), cut, adapter=False, recipe=recipe, step=7, shard_bytes=20_000)
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in cut.glob("*.safetensors"))
    assert len(files) > 3 and files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    together: dict[str, Tensor] = {}
    for name in files:
        part = load_file(cut / name)
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= 20_000
        assert all(index["weight_map"][key] == name for key in part)
        together |= part
    expected = load_file(whole / "model.safetensors")
    assert together.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in together.items())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())


def test_a_conv1d_and_experts_in_other_files_than_in_memory(tmp_path: Path) -> None:
    """GPT-2 keeps weights as (in, out), some of them square; Mixtral's experts are one tensor in memory, many on
    the disk."""
    import transformers

    sizes = {"vocab_size": 259, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "initializer_range": 0.2}
    gpt = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **sizes)
    experts = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=2, **sizes,
    )  # fmt: skip
    for config, method in ((gpt, "conv1d"), (experts, "lora"), (experts, "full")):
        torch.manual_seed(0)
        folder = tmp_path / f"{config.model_type}-{method}"
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        build, held, recipe = trained(folder, method)
        out = tmp_path / f"{folder.name}-out"
        report = export(build, held, byte_tokenizer(), out, adapter=False, recipe=recipe, step=7)
        assert report["base"] == ("files" if config is gpt else "memory")
        assert report["max_difference"] <= 1e-5
        before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
        assert before.keys() == after.keys()
        changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
        assert changed and (method == "full") == (changed == set(after))


def test_a_folder_with_other_logits_is_not_published(tiny_folder: Path, tmp_path: Path, monkeypatch) -> None:
    build, held, recipe = trained(tiny_folder)
    export(build, held, byte_tokenizer(), tmp_path / "out", adapter=False, recipe=recipe, step=7)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    right = assemble.change
    monkeypatch.setattr(assemble, "change", lambda *factors: right(*factors).neg_())
    with pytest.raises(RunError, match="differ from the trained model's"):
        export(build, held, byte_tokenizer(), tmp_path / "out", adapter=False, recipe=recipe, step=8)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    export(build, held, byte_tokenizer(), tmp_path / "out", adapter=True, recipe=recipe, step=8)  # may be replaced
    assert json.loads((tmp_path / "out" / "export.json").read_text())["step"] == 8
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_other_files_are_never_replaced(tiny_folder: Path, tmp_path: Path) -> None:
    build, held, recipe = trained(tiny_folder, "full")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds files of something else"):
        export(build, held, byte_tokenizer(), tmp_path, adapter=False, recipe=recipe, step=1)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="not a folder"):
        export(build, held, byte_tokenizer(), tmp_path / "link", adapter=False, recipe=recipe, step=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "thesis.tex"]


def test_no_adapter_where_none_was_trained(tiny_folder: Path, tmp_path: Path) -> None:
    build, held, recipe = trained(tiny_folder, "full")
    with pytest.raises(UserError, match="has no adapter"):
        export(build, held, byte_tokenizer(), tmp_path / "out", adapter=True, recipe=recipe, step=1)
    assert list(tmp_path.iterdir()) == []


def test_the_card_names_recipe_base_and_metrics_but_no_path_or_secret(
    tiny_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-4711-canary")
    build, held, recipe = trained(tiny_folder)
    metrics = {"held-out": {"loss": 1.23456, "note": "canary-4711-canary"}}
    export(
        build, held, byte_tokenizer(), tmp_path / "out", adapter=True, recipe=recipe, step=7, origin="step-00000007",
        metrics=metrics,
    )  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# tiny-run" in card and tiny_folder.name in card and "| held-out/loss | 1.235 |" in card
    assert str(tiny_folder) not in card and "canary" not in card and "/" + "tmp" not in card
    assert "lora, rank 4, alpha 8" in card and "| optimizer steps | 7 |" in card and "| step-00000007 |" in card


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
    one = trained(tiny_folder, "full", "bfloat16")[0]()
    written = {name: digest_of(tensor) for name, tensor in one.state_dict().items()}
    two = copy.deepcopy(one)
    check_weights(written, two)
    two.model.norm.weight.data[3] += 1e-2  # far below what bf16 logits show
    with pytest.raises(RunError, match=r"model\.norm\.weight"):
        check_weights(written, two)
    check_weights({name: digest for name, digest in written.items() if "norm" not in name}, two)
    with pytest.raises(RunError, match=r"model\.norm\.weight"):  # the same values in another dtype are other bits
        check_weights({"model.norm.weight": written["model.norm.weight"]}, one.float())
