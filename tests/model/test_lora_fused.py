"""The fused LoRA layer against peft's own, value by value and gradient by gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainer.model.lora_fused import FusedLoraLinear, fuse_lora


class Pair(nn.Module):
    """Two linear layers in a row, the second without bias."""

    def __init__(self, width=12, inner=20):
        super().__init__()
        self.first, self.second = nn.Linear(width, inner), nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return self.second(nn.functional.leaky_relu(self.first(x)))


def models(dtype=torch.float32, seed=0, **options):
    """(peft's own, fused) with equal parameters; both adapters' factors random, so that every gradient is non-zero."""
    torch.manual_seed(seed)
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["first", "second"], **options)
    stock = get_peft_model(Pair().to(dtype), config)
    for name, parameter in stock.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    fused = copy.deepcopy(stock)
    return stock, fused, fuse_lora(fused)


def run(model, x, seed=5, autocast=False):
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = model(x)
    y.float().square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return y.detach(), x.grad, grads


@settings(max_examples=20, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=2),
    dropout=st.sampled_from([0.0, 0.4]),
    rslora=st.booleans(),
    training=st.booleans(),
    seed=st.integers(0, 2),
)
def test_equals_peft(shape, dropout, rslora, training, seed):
    stock, fused, count = models(seed=seed, lora_dropout=dropout, use_rslora=rslora)
    assert count == 2
    stock.train(training)
    fused.train(training)
    x = torch.randn(*shape, 12)
    (y, dx, grads), (y2, dx2, grads2) = run(stock, x), run(fused, x)
    assert (y2 - y).norm() <= 1e-6 * y.norm()
    assert (dx2 - dx).norm() <= 1e-6 * dx.norm()
    assert grads.keys() == grads2.keys() and len(grads) == 4
    for name, grad in grads.items():
        assert (grads2[name] - grad).norm() <= 1e-6 * grad.norm(), name


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_base_with_fp32_masters(autocast):
    """Against peft in fp32 throughout: the fused layer in bf16 is off by bf16's rounding and no more."""
    stock, fused, _ = models()
    fused.to(torch.bfloat16)
    for name, parameter in fused.named_parameters():
        if parameter.requires_grad:
            parameter.data = stock.get_parameter(name).detach().clone()
    x = torch.randn(30, 12).bfloat16().float()
    y, _, grads = run(stock, x)
    y2, _, grads2 = run(fused, x if autocast else x.bfloat16(), autocast=autocast)
    assert y2.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in grads2.values())
    assert (y2.float() - y).norm() / y.norm() < 1e-2
    for name, grad in grads.items():
        assert (grads2[name] - grad).norm() / grad.norm() < 3e-2, name


def test_saves_the_input_once_and_nothing_of_the_output_size():
    _, fused, _ = models()
    layer = fused.base_model.model.first
    x = torch.randn(50, 12, requires_grad=True)
    held = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.setdefault(t.data_ptr(), t), lambda t: t):
        layer(x)
    parameters = {p.data_ptr() for p in fused.parameters()}
    sizes = sorted(t.numel() for t in held.values() if t.data_ptr() not in parameters)
    assert sizes == [50 * 3, 50 * 12]


def test_disabled_merged_and_two_adapters_run_peft():
    stock, fused, _ = models()
    x = torch.randn(4, 12)
    for model in (stock, fused):
        model.eval()
    with stock.disable_adapter(), fused.disable_adapter():
        assert torch.equal(fused(x), stock(x))
    stock.merge_adapter()
    fused.merge_adapter()
    torch.testing.assert_close(fused(x), stock(x))
    stock.unmerge_adapter()
    fused.unmerge_adapter()
    torch.manual_seed(1)
    stock.add_adapter("other", LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False))
    fused.add_adapter("other", LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False))
    fused.load_state_dict(stock.state_dict())
    stock.base_model.set_adapter(["default", "other"])
    fused.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(fused(x), stock(x))


def test_merge_and_unload_and_saved_names():
    stock, fused, _ = models()
    x = torch.randn(4, 12)
    assert stock.state_dict().keys() == fused.state_dict().keys()
    expected = stock.eval()(x)
    plain = fused.eval().merge_and_unload()
    assert type(plain.first) is nn.Linear
    torch.testing.assert_close(plain(x), expected, atol=1e-5, rtol=1e-5)


def test_checkpointed_backward_equals_plain():
    _, fused, _ = models(lora_dropout=0.3)
    x = torch.randn(6, 12, requires_grad=True)
    results = []
    for call in (fused, lambda v: checkpoint(fused, v, use_reentrant=False)):
        torch.manual_seed(2)
        results.append(
            torch.autograd.grad(call(x).square().sum(), [x, *(p for p in fused.parameters() if p.requires_grad)])
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_is_not_eligible_stays_as_it_was():
    assert models(use_dora=True)[2] == 0
    assert models(lora_bias=True)[2] == 0
    stock, _, _ = models()
    stock.base_model.model.first.base_layer.weight.requires_grad_(True)
    assert fuse_lora(stock) == 1
    assert isinstance(stock.base_model.model.second, FusedLoraLinear)
    assert fuse_lora(stock) == 0


def test_gradient_hooks_of_the_factors_fire():
    """Sharding engines hang on gradients of the parameters that forward read."""
    _, fused, _ = models()
    seen = []
    for name, parameter in fused.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(name))
    fused(torch.randn(2, 12)).sum().backward()
    assert len(seen) == 4
