"""The definition of each op, through plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LinearCrossEntropy(NamedTuple):
    """Sums over positions: `loss` (), in nats; `nll` (), unsmoothed, detached; `correct` (), a count, long."""

    loss: Tensor
    nll: Tensor
    correct: Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax and sums: fp64 for fp64 (gradient checks), else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    """See `trainer.kernels.linear_cross_entropy`; makes all logits (T, V) at once and ignores `chunk`."""
    dtype = accumulation_dtype(hidden.dtype)
    logits = F.linear(hidden, weight, bias).to(dtype)  # (T, V)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    weights = weights.to(dtype)
    smoothed = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)  # (T,)
    with torch.no_grad():
        nll = F.cross_entropy(logits, targets, reduction="none")
        correct = ((logits.argmax(-1) == targets) & (weights != 0)).sum()
    return LinearCrossEntropy((weights * smoothed).sum(), (weights * nll).sum(), correct)
