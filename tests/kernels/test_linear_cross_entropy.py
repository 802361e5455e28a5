"""Every implementation of linear_cross_entropy against its reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from trainer.kernels import force, linear_cross_entropy


def case(positions, width, vocabulary, *, dtype=torch.float32, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(positions, width, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator) / math.sqrt(width)).to(dtype).requires_grad_()
    offset = torch.randn(vocabulary, generator=generator).to(dtype).requires_grad_() if bias else None
    targets = torch.randint(vocabulary, (positions,), generator=generator)
    weights = torch.rand(positions, generator=generator) * (torch.rand(positions, generator=generator) > 0.3)
    return hidden, weight, offset, targets, weights


def run(name, inputs, smoothing=0.0, softcap=None, chunk=None, factor=0.5):
    leaves = [None if x is None else x.detach().clone().requires_grad_(x.requires_grad) for x in inputs[:3]]
    with force(name):
        result = linear_cross_entropy(
            leaves[0], leaves[1], *inputs[3:], label_smoothing=smoothing, bias=leaves[2], softcap=softcap, chunk=chunk
        )
    (factor * result.loss).backward()
    return result, [None if x is None else x.grad for x in leaves]


@settings(max_examples=40, deadline=None)
@given(
    positions=st.integers(0, 23),
    width=st.integers(1, 17),
    vocabulary=st.integers(2, 41),
    chunk=st.one_of(st.none(), st.integers(1, 9)),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    softcap=st.sampled_from([None, 3.0]),
    bias=st.booleans(),
    seed=st.integers(0, 3),
)
def test_chunked_equals_reference(positions, width, vocabulary, chunk, smoothing, softcap, bias, seed):
    inputs = case(positions, width, vocabulary, bias=bias, seed=seed)
    expected, expected_grads = run("reference", inputs, smoothing, softcap)
    got, grads = run("chunked", inputs, smoothing, softcap, chunk)
    torch.testing.assert_close(got.loss, expected.loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got.nll, expected.nll, atol=1e-6, rtol=1e-6)
    assert got.correct == expected.correct
    for mine, reference in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-6, rtol=1e-6)


def test_by_hand():
    """Logits (ln 3, 0): p = (3/4, 1/4). Target 0, weight 2, smoothing 1/2: 2 [ln(4/3)/2 + (ln(4/3) + ln 4)/4]."""
    hidden, weight = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[math.log(3)], [0.0]])
    result = linear_cross_entropy(hidden, weight, torch.tensor([0]), torch.tensor([2.0]), label_smoothing=0.5)
    right, wrong = math.log(4 / 3), math.log(4)
    assert result.loss.item() == pytest.approx(2 * (right / 2 + (right + wrong) / 4), abs=1e-6)
    assert result.nll.item() == pytest.approx(2 * right, abs=1e-6)
    assert result.correct.item() == 1
    result.loss.backward()
    # w (p - q) W with q = (3/4, 1/4): smoothing 1/2 makes the target distribution the predicted one.
    assert hidden.grad.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(smoothing, softcap):
    hidden, weight, bias, targets, weights = case(5, 3, 7, dtype=torch.float64)

    def loss(h, w, b):
        return linear_cross_entropy(h, w, targets, weights.double(), smoothing, b, softcap, chunk=2).loss

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bf16_is_near_fp32(smoothing):
    low = case(64, 32, 97, dtype=torch.bfloat16)
    high = tuple(x.detach().float().requires_grad_() for x in low[:3]) + low[3:]
    got, grads = run("chunked", low, smoothing, chunk=16)
    expected, expected_grads = run("reference", high, smoothing)
    assert got.loss.dtype == torch.float32 and grads[0].dtype == torch.bfloat16
    # bf16 keeps 8 bits: logits of size 4 are off by up to 4 / 256.
    torch.testing.assert_close(got.loss, expected.loss, rtol=5e-3, atol=0)
    for mine, reference in zip(grads, expected_grads, strict=True):
        assert (mine.float() - reference).norm() / reference.norm() < 2e-2


def test_frozen_head_gets_no_gradient():
    hidden, weight, _, targets, weights = case(6, 4, 9, bias=False)
    weight = weight.detach()
    result = linear_cross_entropy(hidden, weight, targets, weights)
    saved = result.loss.grad_fn.saved_tensors
    assert [None if x is None else tuple(x.shape) for x in saved] == [(6, 4), None, None]
    result.loss.backward()
    assert weight.grad is None and hidden.grad is not None


def test_no_grad_makes_no_gradient():
    hidden, weight, bias, targets, weights = case(6, 4, 9)
    with torch.no_grad():
        result = linear_cross_entropy(hidden, weight, targets, weights, bias=bias)
    assert not result.loss.requires_grad
    with force("reference"):
        assert torch.allclose(result.loss, linear_cross_entropy(hidden, weight, targets, weights, bias=bias).loss)


def test_no_positions():
    hidden, weight, bias, targets, weights = case(0, 4, 9)
    result = linear_cross_entropy(hidden, weight, targets, weights, bias=bias)
    assert (result.loss.item(), result.nll.item(), result.correct.item()) == (0.0, 0.0, 0)
    result.loss.backward()
    assert hidden.grad.shape == (0, 4) and not weight.grad.any()


def test_tied_weight_collects_both_gradients():
    """The embedding that is also the head: its gradient is the sum of the two uses."""
    _, table, _, targets, weights = case(5, 4, 9)
    grads = {}
    for name in ("chunked", "reference"):
        tied = table.detach().clone().requires_grad_()
        with force(name):
            linear_cross_entropy(torch.tanh(tied[targets]), tied, targets.roll(1), weights, chunk=2).loss.backward()
        grads[name] = tied.grad
    torch.testing.assert_close(grads["chunked"], grads["reference"], atol=1e-6, rtol=1e-6)


def test_autocast():
    hidden, weight, bias, targets, weights = case(16, 8, 33)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, grads = run("chunked", (hidden, weight, bias, targets, weights), chunk=5)
        expected, expected_grads = run("reference", (hidden, weight, bias, targets, weights))
    assert got.loss.dtype == torch.float32 and grads[0].dtype == torch.float32
    torch.testing.assert_close(got.loss, expected.loss)
    for mine, reference in zip(grads, expected_grads, strict=True):
        assert (mine - reference).norm() / reference.norm() < 1e-2


def test_under_activation_checkpointing():
    hidden, weight, _, targets, weights = case(7, 4, 11, bias=False)

    def loss(h):
        return linear_cross_entropy(torch.tanh(h), weight, targets, weights, 0.1, chunk=3).loss

    plain = torch.autograd.grad(loss(hidden), (hidden, weight))
    replayed = torch.autograd.grad(checkpoint(loss, hidden, use_reentrant=False), (hidden, weight))
    for mine, other in zip(replayed, plain, strict=True):
        assert torch.equal(mine, other)


def test_refuses_what_does_not_fit():
    hidden, weight, _, targets, weights = case(4, 3, 5, bias=False)
    with pytest.raises(ValueError, match="label_smoothing"):
        linear_cross_entropy(hidden, weight, targets, weights, label_smoothing=1.5)
    with pytest.raises(ValueError, match="targets"):
        linear_cross_entropy(hidden, weight, targets[:2], weights)
    with pytest.raises(KeyError, match="triton"), force("triton"):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_reference():
    inputs = tuple(x.detach().cuda().requires_grad_(x.is_floating_point()) for x in case(300, 64, 1001))
    inputs = (*inputs[:4], inputs[4].detach())
    got, grads = run("chunked", inputs, 0.1, chunk=128)
    expected, expected_grads = run("reference", inputs, 0.1)
    torch.testing.assert_close(got.loss, expected.loss, atol=1e-4, rtol=1e-5)
    for mine, reference in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-4, rtol=1e-4)
