"""Linear cross entropy a chunk of positions at a time, its gradients made in the forward.

The scheme of Liger Kernel (Hsu et al. 2024, arXiv 2410.10989, section 3.2): a chunk's logits give its loss and at once
the gradients of hidden and weight, so the backward only scales what is stored and logits never outlive their chunk.

Why not torch.nn.functional.linear_cross_entropy with `options`: its chunked path takes no label smoothing and no weight
per position (only `reduction="none"`, whose backward makes the logits again), gives neither the unsmoothed sum nor the count
of right answers, and torch 2.11 has none. FIGURES
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.kernels.reference import LinearCrossEntropy, accumulation_dtype

# Elements of one chunk's fp32 logits: 64 MiB on a CPU, 512 MiB on a GPU, where few large products pay.
CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    label_smoothing: float = 0.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
) -> LinearCrossEntropy:
    """See `trainer.kernels.linear_cross_entropy`."""
    if chunk is None:
        chunk = max(1, CHUNK_ELEMENTS.get(hidden.device.type, 2**24) // weight.shape[0])
    needs = tuple(
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    )
    loss, nll, correct = _LinearCrossEntropy.apply(
        hidden, weight, bias, targets, weights.detach(), label_smoothing, softcap, chunk, needs
    )
    return LinearCrossEntropy(loss, nll, correct)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        smoothing: float,
        softcap: float | None,
        chunk: int,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = accumulation_dtype(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if needs[0] else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if needs[1] else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if bias is not None and needs[2] else None
        loss, nll = (torch.zeros((), dtype=dtype, device=hidden.device) for _ in range(2))
        correct = torch.zeros((), dtype=torch.long, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            part, target = hidden[rows], targets[rows, None]
            scale = weights[rows, None].to(dtype)  # (C, 1)
            logits = F.linear(part, weight, bias)  # (C, V)
            correct += ((logits.argmax(-1, keepdim=True) == target) & (scale != 0)).sum()
            slope = None
            if softcap is not None:
                bent = torch.tanh(logits.to(dtype) / softcap)
                slope = 1 - bent.square() if any(needs) else None
                logits = bent.mul_(softcap)
            log_probability = torch.log_softmax(logits, -1, dtype=dtype)  # (C, V)
            del logits
            negative = -log_probability.gather(1, target)  # (C, 1)
            nll += (scale * negative).sum()
            loss += (scale * (1 - smoothing) * negative).sum()
            if smoothing:
                loss -= (scale * smoothing * log_probability.mean(-1, keepdim=True)).sum()
            if not any(needs):
                continue
            grad = _logit_gradient(log_probability, target, scale, smoothing, slope)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            low = grad.to(hidden.dtype)
            del grad, log_probability
            if grad_hidden is not None:
                torch.mm(low, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += low.t() @ part
        ctx.save_for_backward(grad_hidden, _as(grad_weight, weight), _as(grad_bias, bias))
        ctx.mark_non_differentiable(nll, correct)
        return loss, nll, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (None if g is None else g * grad_loss.to(g.dtype) for g in ctx.saved_tensors)
        return (*gradients, None, None, None, None, None, None)


def _logit_gradient(log_probability: Tensor, target: Tensor, scale: Tensor, smoothing: float, slope: Tensor | None) -> Tensor:
    """w (p - (1 - s) onehot - s / V) (C, V), made in the place of `log_probability`, times the softcap's slope."""
    grad = log_probability.exp_()
    if smoothing:
        grad.sub_(smoothing / grad.shape[1])
    grad.scatter_add_(1, target, torch.full_like(scale, smoothing - 1))
    grad.mul_(scale)
    return grad if slope is None else grad.mul_(slope)


def _as(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if gradient is None or parameter is None else gradient.to(parameter.dtype)
