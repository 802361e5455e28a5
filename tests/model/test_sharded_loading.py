"""A network whose weights stay in their files is the network that is loaded whole, to the bit; or it is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from torch import nn

from trainer.config import UserError
from trainer.config.schema import Engine, Model, Recipe, Stage, Tuning
from trainer.model.build import build_trainee, build_unread
from trainer.model.root import Trainee
from trainer.model.sharded import CannotShard


def recipe(folder: Path, method: str = "lora", *, loading: str = "auto", **model: Any) -> Recipe:
    tuning = Tuning(method=method, layers=1 if method == "last-layers" else None, rank=4)  # type: ignore[arg-type]
    return Recipe(
        name="x",
        model=Model(path=str(folder), **({"dtype": "bfloat16"} | model)),
        tuning=tuning,
        engine=Engine(loading=loading),  # type: ignore[arg-type]
        sources={},
        stages=[Stage(name="s", mixture={})],
    )


def values(trainee: Trainee, name: str, parameter: nn.Parameter) -> torch.Tensor:
    """A parameter's values, read from its file in three parts where they are still there."""
    if name not in trainee.unread:
        return parameter
    whole = torch.full((parameter.numel(),), torch.nan, dtype=parameter.dtype)
    for start, stop in ((0, 7), (7, whole.numel() // 2), (whole.numel() // 2, whole.numel())):
        trainee.unread[name].read(whole[start:stop], start)
    return whole.view(parameter.shape)


def same(settings: Recipe) -> Trainee:
    """Build whole and sharded, compare everything, return the sharded one."""
    whole, sharded = build_trainee(settings, 2), build_trainee(settings, 2, sharded=True)
    expected, found = dict(whole.named_parameters()), dict(sharded.named_parameters())
    assert list(found) == list(expected)
    for name, parameter in found.items():
        assert (parameter.dtype, parameter.requires_grad) == (expected[name].dtype, expected[name].requires_grad), name
        assert torch.equal(values(sharded, name, parameter), expected[name]), name
    buffers = dict(sharded.named_buffers())
    assert buffers.keys() == dict(whole.named_buffers()).keys()
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in whole.named_buffers())
    assert sharded.config.to_dict() == whole.config.to_dict()
    assert sharded.config._attn_implementation == whole.config._attn_implementation
    assert sharded.base.name_or_path == whole.base.name_or_path
    if whole.base.can_generate():
        assert sharded.base.generation_config.to_dict() == whole.base.generation_config.to_dict()
    return sharded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bf16, several files, tied embeddings, a generation configuration of its own."""
    home = tmp_path_factory.mktemp("several")
    network = tiny_llama().to(torch.bfloat16)
    network.generation_config.max_length = 77
    network.save_pretrained(home, max_shard_size="40KB")
    assert len(list(home.glob("*.safetensors"))) > 1
    return home


@pytest.mark.parametrize("method", ["full", "last-layers", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_method_and_dtype(folder: Path, method: str, dtype: str) -> None:
    trainee = same(recipe(folder, method, dtype=dtype))
    bases = [name for name in dict(trainee.named_parameters()) if "lora_" not in name]
    assert set(trainee.unread) == set(bases)  # no weight of the base was read
    assert all(p.untyped_storage().nbytes() <= 8 for n, p in trainee.named_parameters() if n in trainee.unread)


def test_a_new_head_is_drawn_alike_and_a_stored_one_is_read(folder: Path, tmp_path: Path) -> None:
    settings = recipe(folder, kind="classification", labels=["no", "yes"])
    trainee = same(settings)
    assert not any("score" in name for name in trainee.unread)
    build_trainee(settings, 2).base.save_pretrained(tmp_path)
    from transformers import LlamaForSequenceClassification

    LlamaForSequenceClassification.from_pretrained(folder, num_labels=2).save_pretrained(tmp_path)
    same(recipe(tmp_path, kind="classification", labels=["no", "yes"]))  # LoRA trains a copy of the head
    same(recipe(tmp_path, "full", kind="classification", labels=["no", "yes"]))


def test_untied_heads_and_stored_buffers(tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path / "untied")
    trainee = same(recipe(tmp_path / "untied", "full"))
    assert "network.lm_head.weight" in trainee.unread
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    trainee = same(recipe(tmp_path / "bert", "full", kind="classification", labels=["no", "yes"], dtype="float32"))
    assert any("embeddings" in name for name in trainee.unread)


def rewrite(source: Path, target: Path, change: Any) -> Path:
    """A copy of a folder of several files as one file whose tensors `change` has changed."""
    tensors: dict[str, torch.Tensor] = {}
    for file in source.glob("*.safetensors"):
        tensors |= load_file(file)
    target.mkdir(exist_ok=True)
    save_file(change(tensors), target / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "generation_config.json"):
        (target / name).write_bytes((source / name).read_bytes())
    return target


def test_renamed_tensors_are_followed(folder: Path, tmp_path: Path) -> None:
    """Files of the backbone alone have no prefix `model.`; dtypes may differ from tensor to tensor."""

    def strip(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        renamed["norm.weight"] = renamed["norm.weight"].double()
        renamed["layers.0.mlp.up_proj.weight"] = renamed["layers.0.mlp.up_proj.weight"].float() * 1.001
        return renamed

    trainee = same(recipe(rewrite(folder, tmp_path / "stripped", strip), "full"))
    assert len(trainee.unread) == len(list(trainee.parameters()))


# ---------------------------------------------------------------- what is not proved is refused, or loaded whole


def refused(settings: Recipe, reason: str) -> None:
    """`sharded` refuses with the remedy, `auto` loads whole."""
    explicit = settings.model_copy(update={"engine": Engine(loading="sharded")})
    with pytest.raises(UserError, match=rf"engine\.loading: sharded: .*{reason}.*; use `whole`"):
        build_unread(explicit, 2)
    whole = build_unread(settings, 2)
    assert not whole.unread and not any(p.isnan().any() for p in whole.parameters() if type(p) is nn.Parameter)


def test_a_tied_pair_that_is_stored_twice(folder: Path, tmp_path: Path) -> None:
    def twice(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    refused(recipe(rewrite(folder, tmp_path / "twice", twice)), "both are stored")


def test_quantised_weights(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    refused(recipe(folder, quantization="nf4"), "quantised on loading")


def test_experts_that_are_stacked_on_loading(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=99, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, pad_token_id=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    assert any("experts.1." in name for name in load_file(tmp_path / "model.safetensors"))
    refused(recipe(tmp_path, "full"), "regrouped")


@pytest.mark.parametrize("sharded", [False, True])
def test_missing_weights_are_named_and_never_drawn(folder: Path, tmp_path: Path, sharded: bool) -> None:
    gone = "model.layers.1.mlp.down_proj.weight"
    target = rewrite(folder, tmp_path / "lacking", lambda tensors: {n: t for n, t in tensors.items() if n != gone})
    with pytest.raises(UserError, match=rf"model\.path: .*lacking.*: its files lack {gone}; download it again"):
        build_trainee(recipe(target), 2, sharded=sharded)
    classifier = recipe(target, kind="classification", labels=["no", "yes"])
    with pytest.raises(UserError, match="its files lack"):
        build_trainee(classifier, 2, sharded=sharded)


@pytest.mark.parametrize("sharded", [False, True])
def test_other_shapes_than_configured_are_told(folder: Path, tmp_path: Path, sharded: bool) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors | {"model.norm.weight": tensors["model.norm.weight"][:16].clone()}

    target = rewrite(folder, tmp_path / "cut", cut)
    with pytest.raises(UserError, match=r"model\.path: .*cut.*: its weights have other shapes than its config\.json"):
        build_trainee(recipe(target), 2, sharded=sharded)


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_without_a_place_are_named_in_the_log(
    folder: Path, tmp_path: Path, sharded: bool, caplog: pytest.LogCaptureFixture
) -> None:
    target = rewrite(folder, tmp_path / "more", lambda tensors: tensors | {"vision.weight": torch.ones(3)})
    with caplog.at_level(logging.WARNING, logger="trainer.model.load"):
        build_trainee(recipe(target), 2, sharded=sharded)
    assert "1 weights have no place in the network: vision.weight" in caplog.text


def test_a_method_that_would_compute_with_absent_weights_is_caught(folder: Path) -> None:
    network: Any = build_trainee(recipe(folder), 2, sharded=True)
    weight = network.base.model.layers[0].mlp.up_proj.base_layer.weight
    assert weight.isnan().all() and weight.untyped_storage().nbytes() == weight.itemsize
    network.network.register_parameter("copy", nn.Parameter(weight.detach() * 2))
    from trainer.model.sharded import unread_parameters

    with pytest.raises(CannotShard, match="copy is made from weights that are not loaded yet"):
        unread_parameters(network)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(folder: Path, tmp_path: Path) -> None:
    target = rewrite(folder, tmp_path / "shrinks", lambda tensors: tensors)
    trainee = build_trainee(recipe(target, "full"), 2, sharded=True)
    file = target / "model.safetensors"
    last = max(trainee.unread, key=lambda name: trainee.unread[name].stored.start)  # type: ignore[attr-defined]
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(OSError, match="ended within a tensor"):
        values(trainee, last, dict(trainee.named_parameters())[last])


def test_the_index_decides_which_files_are_read(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    trainee = build_trainee(recipe(folder, "full"), 2, sharded=True)
    files = {source.stored.file.name for source in trainee.unread.values()}  # type: ignore[attr-defined]
    assert files == set(index["weight_map"].values())
