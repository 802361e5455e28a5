"""Packed attention: documents of one row never see each other, and everything else is stock sdpa."""

from __future__ import annotations

import pytest
import torch
import transformers as t
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.kernels.attention import documents_attention
from trainer.model.attention import NAME, enable, packing_support, varlen_attention

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
DECODERS = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SMALL)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SMALL)),
    "qwen2-window": lambda: t.Qwen2ForCausalLM(
        t.Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    ),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**SMALL, head_dim=16)),
    "mistral-window": lambda: t.MistralForCausalLM(t.MistralConfig(**SMALL, sliding_window=5)),
    "gpt2": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, eos_token_id=1)
    ),
}
DOCUMENTS = [
    torch.tensor([5, 9, 2, 33, 7, 18, 40]),
    torch.tensor([8]),
    torch.tensor([11, 3, 60, 22]),
    torch.arange(2, 14),
]


def build(name):
    torch.manual_seed(0)
    return DECODERS[name]().float().eval()


def packed(documents):
    lengths = [len(d) for d in documents]
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    return {
        "input_ids": torch.cat(documents)[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", DECODERS)
def test_packed_equals_alone(name):
    """Logits and parameter gradients of a pack against one plain sdpa run per document."""
    plain, model = build(name), build(name)
    enable(model)
    probe = torch.randn(sum(map(len, DOCUMENTS)), 61)
    expected = torch.cat([plain(d[None], use_cache=False).logits[0] for d in DOCUMENTS])
    (expected * probe).sum().backward()
    logits = model(**packed(DOCUMENTS), use_cache=False).logits[0]
    (logits * probe).sum().backward()
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-5)
    mine, theirs = gradients(model), gradients(plain)
    assert mine.keys() == theirs.keys() and len(mine) > 10
    for key, value in theirs.items():
        assert (mine[key] - value).norm() <= 1e-6 * value.norm() + 1e-6, key


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_perturbing_one_document_changes_no_other(name):
    model = build(name)
    enable(model)
    before = model(**packed(DOCUMENTS), use_cache=False).logits[0]
    changed = [*DOCUMENTS[:2], DOCUMENTS[2].flip(0) + 1, DOCUMENTS[3]]
    changed[2] = changed[2].clamp_max(60)
    after = model(**packed(changed), use_cache=False).logits[0]
    start, end = 8, 12
    assert torch.equal(before[:start], after[:start]) and torch.equal(before[end:], after[end:])
    assert not torch.allclose(before[start:end], after[start:end])


def test_encoder():
    def bert():
        torch.manual_seed(0)
        config = t.BertConfig(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        )
        return t.BertModel(config).eval()

    plain, model = bert(), bert()
    enable(model)
    expected = torch.cat([plain(d[None]).last_hidden_state[0] for d in DOCUMENTS])
    got = model(**packed(DOCUMENTS)).last_hidden_state[0]
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_generation_and_padding_are_stock_sdpa():
    plain, model = build("llama"), build("llama")
    enable(model)
    ids = torch.tensor([[0, 0, 5, 9, 2], [7, 3, 4, 6, 8]])
    mask = (ids != 0).long()
    model(**packed(DOCUMENTS), use_cache=False)  # a packed forward leaves nothing behind
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    mine, theirs = (m.generate(ids, attention_mask=mask, **options) for m in (model, plain))
    assert torch.equal(mine.sequences, theirs.sequences)
    assert all(torch.equal(a, b) for a, b in zip(mine.logits, theirs.logits, strict=True))
    padded = {"input_ids": ids.flip(1), "attention_mask": mask.flip(1)}
    assert torch.equal(model(**padded).logits, plain(**padded).logits)


def test_an_error_inside_leaves_generation_intact():
    plain, model = build("llama"), build("llama")
    enable(model)
    with pytest.raises(IndexError):
        model(**{**packed(DOCUMENTS), "input_ids": torch.full((1, 24), 1000)}, use_cache=False)
    ids = torch.tensor([[0, 4, 5]])
    padded = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    assert torch.equal(model(**padded).logits, plain(**padded).logits)


def test_gradient_checkpointing():
    plain, model = build("qwen3").train(), build("qwen3").train()
    enable(plain)
    enable(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for network in (plain, model):
        network(**packed(DOCUMENTS), use_cache=False).logits.square().sum().backward()
    mine, theirs = gradients(model), gradients(plain)
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(t.LlamaConfig(**SMALL, attention_dropout=0.5))
    enable(model)
    model.eval()
    assert torch.equal(model(**packed(DOCUMENTS)).logits, model(**packed(DOCUMENTS)).logits)
    quiet = model(**packed(DOCUMENTS)).logits
    model.train()
    first, second = (model(**packed(DOCUMENTS), use_cache=False).logits for _ in range(2))
    # One token alone has nothing to drop but its own value: somewhere the passes differ.
    assert not torch.equal(first, second) and not torch.equal(first, quiet)


def test_lost_lengths_are_an_error_not_a_leak():
    model = build("llama")
    enable(model)
    layer = model.model.layers[0].self_attn
    stock = layer.forward
    layer.forward = lambda *a, cu_seq_lens_q=None, **k: stock(*a, **k)
    with pytest.raises(RuntimeError, match="was not handed the lengths"):
        model(**packed(DOCUMENTS), use_cache=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": torch.ones(1, 24, dtype=torch.long)}, "takes no attention_mask"),
        ({"position_ids": None}, "needs position_ids"),
        ({"input_ids": torch.ones(2, 24, dtype=torch.long)}, "one row, not 2"),
    ],
)
def test_refuses_what_contradicts_packing(change, message):
    model = build("llama")
    enable(model)
    with pytest.raises(ValueError, match=message):
        model(**{**packed(DOCUMENTS), **change}, use_cache=False)


def test_refuses_what_it_does_not_compute():
    x = torch.randn(1, 2, 4, 8)
    borders = torch.tensor([0, 4], dtype=torch.int32)
    for name in ("softcap", "s_aux", "position_bias"):
        with pytest.raises(ValueError, match="does not compute"):
            varlen_attention(torch.nn.Identity(), x, x, x, None, cu_seq_lens_q=borders, **{name: x})


def test_packing_support_names_the_reason():
    assert packing_support(build("llama")) is None
    gemma = t.Gemma2ForCausalLM(t.Gemma2Config(**SMALL, head_dim=8))
    assert "soft-capped" in packing_support(gemma)
    with pytest.raises(ValueError, match="soft-capped"):
        enable(gemma)
    t5 = t.T5ForConditionalGeneration(t.T5Config(vocab_size=61, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    assert "encoder-decoder" in packing_support(t5)
    bloom = t.BloomForCausalLM(t.BloomConfig(vocab_size=61, hidden_size=16, n_layer=1, n_head=2))
    assert "attention interface" in packing_support(bloom)
    assert "no transformers model" in packing_support(torch.nn.Linear(2, 2))
    model = build("llama")
    enable(model)
    enable(model)
    assert model.config._attn_implementation == NAME and len(model.model._forward_pre_hooks) == 1


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4), groups=st.sampled_from([1, 3]), causal=st.booleans()
)
def test_documents_attention_against_plain_softmax(lengths, groups, causal):
    """The definition, softmax(scale q k^T) v with full scores, per document, in fp64; gradients too."""
    torch.manual_seed(sum(lengths))
    total, heads, shared, width = sum(lengths), 2 * groups, 2, 8
    query, key, value = (
        torch.randn(1, total, h, width, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for h in (heads, shared, shared)
    )
    borders = [0]
    outputs = []
    for length in lengths:
        borders.append(borders[-1] + length)
        q, k, v = (x[:, :, borders[-2] : borders[-1]] for x in (query, key, value))
        scores = 0.3 * q @ k.repeat_interleave(groups, 1).transpose(-1, -2)
        if causal:
            scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
        outputs.append(scores.softmax(-1) @ v.repeat_interleave(groups, 1))
    expected = torch.cat(outputs, 2)
    probe = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * probe).sum(), (query, key, value))
    got = documents_attention(query, key, value, borders, 0.3, causal)
    grads = torch.autograd.grad((got * probe).sum(), (query, key, value))
    for mine, reference in zip((got, *grads), (expected, *wanted), strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("lengths", [[40, 7, 120], [30, 430]])
def test_documents_attention_in_bf16(lengths):
    """Below and above the length from which the backward keeps its dtype, against fp64."""
    torch.manual_seed(0)
    borders = torch.tensor([0, *lengths]).cumsum(0).tolist()
    inputs = [torch.randn(1, heads, borders[-1], 16, dtype=torch.bfloat16) for heads in (6, 2, 2)]
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        output = documents_attention(*leaves, borders, 0.25, True)
        results.append((output, *torch.autograd.grad(output.square().sum(), leaves)))
    for mine, reference in zip(*results, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - reference).norm() / reference.norm() < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", DECODERS)
def test_cuda_varlen(name):
    """varlen flash attention in bf16 against the fp32 runs of the documents alone."""
    plain, model = build(name).cuda(), build(name).to("cuda", torch.bfloat16)
    enable(model)
    batch = {k: v.cuda() if torch.is_tensor(v) else v for k, v in packed(DOCUMENTS).items()}
    expected = torch.cat([plain(d[None].cuda(), use_cache=False).logits[0] for d in DOCUMENTS])
    got = model(**batch, use_cache=False).logits[0].float()
    assert (got - expected).norm() / expected.norm() < 2e-2
    got.sum().backward()
