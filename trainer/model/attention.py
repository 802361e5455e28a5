"""Padding-free attention: the documents of a micro-batch lie in one row and never see each other.

Registered in transformers' attention interface under `NAME`. Where a forward carries the lengths (`cu_seq_lens_q` and
its kin, named as transformers names them for flash attention) attention runs per document and no mask exists; every
other forward (generation with a cache, padded batches) is the stock sdpa function with the stock sdpa mask.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trainer.kernels.attention import documents_attention, supported

log = logging.getLogger(__name__)

NAME = "tunesmith_varlen"

# What a layer may hand to its attention that changes the result and that packed attention does not compute.
REFUSED = {
    "softcap": "soft-capped attention scores (attn_logit_softcapping)",
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
    "head_mask": "a head mask",
}
PLAIN_LAYERS = {"full_attention", "sliding_attention"}

_packed: ContextVar[bool] = ContextVar("packed", default=False)


def enable(model: nn.Module) -> None:
    """Give a Hugging Face model packed attention; without lengths in its forward it computes what sdpa computes.

    Raises ValueError where `packing_support` gives a reason.
    """
    if reason := packing_support(model):
        raise ValueError(reason)
    AttentionInterface.register(NAME, varlen_attention)
    AttentionMaskInterface.register(NAME, varlen_mask)
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    backbone: Any = getattr(model, "base_model", model)
    if not getattr(backbone, "_tunesmith_varlen", False):
        backbone.register_forward_pre_hook(_enter, with_kwargs=True)
        backbone.register_forward_hook(_leave, with_kwargs=True, always_call=True)
        backbone._tunesmith_varlen = True


def packing_support(model: nn.Module) -> str | None:
    """Why documents of this Hugging Face model cannot be packed, or None where they can."""
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if config is None or not hasattr(model, "set_attn_implementation"):
        return f"{kind} is no transformers model"
    if getattr(config, "is_encoder_decoder", False):
        return f"{kind} is an encoder-decoder, whose cross attention is not packed"
    text = config.get_text_config()
    if getattr(text, "attn_logit_softcapping", None):
        return f"{kind} uses {REFUSED['softcap']}, which packed attention does not compute"
    if not getattr(model, "_supports_attention_backend", False) or not getattr(model, "_supports_sdpa", False):
        return f"{kind} does not call attention through transformers' attention interface"
    if odd := sorted(set(getattr(text, "layer_types", None) or ()) - PLAIN_LAYERS):
        return f"{kind} has layers of type {', '.join(odd)}, which carry state across documents"
    return None


def _enter(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    packed = keywords.get("cu_seq_lens_q") is not None
    if packed:
        if keywords.get("attention_mask") is not None:
            raise ValueError("a packed batch takes no attention_mask: the lengths say what may be seen")
        if keywords.get("position_ids") is None:
            raise ValueError("a packed batch needs position_ids that begin again with each document")
        rows = next((keywords[k] for k in ("input_ids", "inputs_embeds") if keywords.get(k) is not None), None)
        rows = arguments[0] if rows is None and arguments else rows
        if rows is not None and rows.shape[0] != 1:
            raise ValueError(f"a packed batch is one row, not {rows.shape[0]}")
    _packed.set(packed)


def _leave(*unused: Any) -> None:
    _packed.set(False)


def varlen_mask(*arguments: Any, **keywords: Any) -> Tensor | None:
    """What sdpa needs, or None inside a packed forward."""
    return None if _packed.get() else sdpa_mask(*arguments, **keywords)


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of `query` (1, H, T, D) over `key`, `value` (1, G, T, D) inside each document: (1, T, H, D), None.

    Documents are [cu_seq_lens_q[i], cu_seq_lens_q[i + 1]); both borders are the same tensor (n + 1,) int32 from 0 to T.
    Without them: transformers' sdpa. Raises RuntimeError where a packed forward lost its lengths on the way and
    ValueError for what cannot be computed packed.
    """
    if cu_seq_lens_q is None:
        if _packed.get():
            raise RuntimeError(
                f"{type(module).__name__} was not handed the lengths of its packed batch: it cannot pack"
            )
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
        )
    for name, meaning in REFUSED.items():
        if others.get(name) is not None:
            raise ValueError(f"{type(module).__name__} uses {meaning}, which packed attention does not compute")
    if attention_mask is not None:
        raise ValueError("packed attention takes no mask")
    if query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise ValueError(
            f"packed queries {tuple(query.shape)} over keys {tuple(key.shape)}: want one row without cache"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    longest = query.shape[2] if max_length_q is None else int(max_length_q)
    window = sliding_window if sliding_window is not None and sliding_window < longest else None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    flash = _flash_varlen(query, value, dropout)
    if flash is not None:
        output = flash(query, key, value, cu_seq_lens_q, longest, scale, causal, window)
        return output, None
    borders = cu_seq_lens_q.tolist()
    if dropout == 0.0 and window is None and supported(query, key, value):
        return documents_attention(query, key, value, borders, scale, causal).transpose(1, 2), None
    parts = [
        _document(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], dropout, scale, causal, window)
        for a, b in pairwise(borders)
    ]
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


def _document(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, scale: float, causal: bool, window: int | None
) -> Tensor:
    """sdpa of one document (1, H, L, D); a band mask (L, L) only where the document outgrows the layer's window."""
    mask = None
    length = query.shape[2]
    if window is not None and length > window:
        distance = torch.arange(length, device=query.device)
        distance = distance[:, None] - distance[None, :]
        # transformers' convention: fewer than `window` positions away, behind or, for encoders, on either side
        mask = ((distance >= 0) & (distance < window)) if causal else (distance.abs() < window)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _flash_varlen(query: Tensor, value: Tensor, dropout: float) -> Callable[..., Tensor] | None:
    """torch's varlen flash attention where it can run these tensors (CUDA, half precision, no dropout), else None."""
    if not query.is_cuda or dropout or query.dtype not in (torch.bfloat16, torch.float16):
        return None
    if query.shape[-1] != value.shape[-1] or query.shape[-1] > 256:
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = frozenset(inspect.signature(varlen_attn).parameters)
    return _call_varlen(varlen_attn, known) if "scale" in known else None


def _call_varlen(varlen_attn: Callable[..., Any], known: frozenset[str]) -> Callable[..., Tensor]:
    """One call for varlen_attn's signatures: causality by `is_causal` or `window_size`, GQA by flag or repeat."""

    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        borders: Tensor,
        longest: int,
        scale: float,
        causal: bool,
        window: Any,
    ) -> Tensor:
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
        options: dict[str, Any] = {"scale": scale}
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and "enable_gqa" in known:
            options["enable_gqa"] = True
        elif groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        if "window_size" in known:
            reach = -1 if window is None else window - 1
            options["window_size"] = (reach, 0 if causal else reach)
        elif window is not None:
            raise ValueError(
                "this torch's varlen_attn has no sliding window; use a newer torch or batch.packing: padded"
            )
        else:
            options["is_causal"] = causal
        return varlen_attn(query, key, value, borders, borders, longest, longest, **options)[None]

    return call
