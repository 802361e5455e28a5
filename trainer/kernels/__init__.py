"""Public ops. Each has one name, one plain reference that defines it, and a switch for tests.

An implementation that is asked for by name runs or fails; nothing falls back in silence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from trainer.kernels import chunked, reference
from trainer.kernels.reference import LinearCrossEntropy

__all__ = ["LinearCrossEntropy", "force", "implementation", "linear_cross_entropy"]

log = logging.getLogger(__name__)

IMPLEMENTATIONS: dict[str, Callable[..., LinearCrossEntropy]] = {
    "chunked": chunked.linear_cross_entropy,
    "reference": reference.linear_cross_entropy,
}

_forced: list[str] = []
_logged: set[tuple[str, str]] = set()


@contextmanager
def force(name: str) -> Iterator[None]:
    """Run every op inside the block by the implementation `name`: "chunked" or "reference".

    Raises KeyError for an unknown name.
    """
    if name not in IMPLEMENTATIONS:
        raise KeyError(f"{name}: no such implementation; known: {', '.join(sorted(IMPLEMENTATIONS))}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def implementation() -> str:
    """The name of the implementation that a call would run now."""
    return _forced[-1] if _forced else "chunked"


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
    """Weighted, label-smoothed cross entropy of a linear head, summed over positions; logits exist a chunk at a time.

    `hidden` (T, d), `weight` (V, d) and `bias` (V,) or None of one dtype (under autocast, the autocast dtype is used),
    `targets` (T,) long in [0, V), `weights` (T,) float per position, which is not differentiated. `softcap` c replaces
    logits z by c * tanh(z / c) (Gemma 2). `chunk` is the number of positions whose logits exist at once; None chooses
    by vocabulary and device.

    Returns `LinearCrossEntropy`: `loss` = sum_i w_i [(1 - s) nll_i + s mean_v(-log p_iv)] (Szegedy et al. 2016,
    arXiv 1512.00567, section 7) in nats, fp32 (fp64 for fp64 input), differentiable in hidden, weight and bias, once;
    `nll` = sum_i w_i nll_i, detached; `correct` = the count of positions with w_i != 0 whose largest logit is the
    target's.
    T == 0 gives zeros that are connected to `hidden`.

    Raises ValueError for shapes that do not fit or a smoothing outside [0, 1].
    """
    positions = hidden.shape[0]
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}: want (T, d) and (V, d)")
    if targets.shape != (positions,) or weights.shape != (positions,):
        raise ValueError(f"targets {tuple(targets.shape)}, weights {tuple(weights.shape)}: want ({positions},) each")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing {label_smoothing}: want a number in [0, 1]")
    name, device = implementation(), hidden.device.type
    if (name, device) not in _logged:
        _logged.add((name, device))
        log.info("linear_cross_entropy: %s on %s", name, device)
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        return IMPLEMENTATIONS[name](hidden, weight, targets, weights, label_smoothing, bias, softcap, chunk)
