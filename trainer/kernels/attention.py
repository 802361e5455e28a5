"""Attention inside the documents of a pack on the CPU: torch's flash kernels, the backward of short documents in fp32.

In bf16 the backward of torch's CPU flash kernel is slow for short documents. Forward and backward of one layer (9 query
heads on 3 key heads of 64, one core of an AMD EPYC with AVX512-BF16, torch 2.13, medians of 15), sdpa per document in
bf16 against this: 12 documents of 64 tokens 21.2 and 10.2 ms; 6 of 128, 24.6 and 14.6; 300 + 120 + 200 + 190, 30.3 and
24.1; 40 of 20, 34.0 and 11.2. At 512 tokens bf16 wins by a tenth, hence the border.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# Documents from this length on go backward in their own dtype.
LONG = 400


def documents_attention(
    query: Tensor, key: Tensor, value: Tensor, borders: list[int], scale: float, causal: bool
) -> Tensor:
    """Attention inside each document [borders[i], borders[i + 1]) of one packed row, on the CPU and without dropout.

    `query` (1, H, T, D), `key` and `value` (1, G, T, D) with G dividing H. Returns (1, H, T, D), differentiable once.
    Saves its inputs and output as they are and the log-sum-exp (H, T); no mask and no probabilities.
    """
    return _DocumentsAttention.apply(query, key, value, borders, scale, causal)


def supported(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `documents_attention` takes these tensors."""
    floats = (torch.bfloat16, torch.float32, torch.float64)
    same = query.dtype == key.dtype == value.dtype and query.shape[-1] == value.shape[-1]
    return query.device.type == "cpu" and query.dtype in floats and same and query.shape[1] % key.shape[1] == 0


class _DocumentsAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, borders: list[int], scale: float, causal: bool
    ) -> Tensor:
        heads, length = query.shape[1:3]
        groups = heads // key.shape[1]
        # Laid out (1, T, H, D) in memory: the caller joins the heads without a copy.
        output = torch.empty(1, length, heads, query.shape[3], dtype=query.dtype).transpose(1, 2)
        sums = torch.empty(1, heads, length, dtype=torch.promote_types(query.dtype, torch.float32))
        for start, end in pairwise(borders):
            part = slice(start, end)
            keys, values = (x[:, :, part].repeat_interleave(groups, 1) for x in (key, value))
            output[:, :, part], sums[:, :, part] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, part], keys, values, 0.0, causal, scale=scale
            )
        ctx.save_for_backward(query, key, value, output, sums)
        ctx.borders, ctx.scale, ctx.causal = borders, scale, causal
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, sums = ctx.saved_tensors
        shared, length, width = key.shape[1:]
        groups = query.shape[1] // shared
        # (1, T, heads, D) in memory, as the projections whose gradients these become
        grads = [torch.empty(1, length, x.shape[1], width, dtype=x.dtype).transpose(1, 2) for x in (query, key, value)]
        for start, end in pairwise(ctx.borders):
            part = slice(start, end)
            wide = sums.dtype if end - start < LONG else query.dtype
            keys, values = (x[:, :, part].to(wide).repeat_interleave(groups, 1) for x in (key, value))
            made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad[:, :, part].to(wide),
                query[:, :, part].to(wide),
                keys,
                values,
                output[:, :, part].to(wide),
                sums[:, :, part],
                0.0,
                ctx.causal,
                scale=ctx.scale,
            )
            grads[0][:, :, part] = made[0]
            for target, result in zip(grads[1:], made[1:], strict=True):
                target[:, :, part] = result.view(1, shared, groups, end - start, width).sum(2) if groups > 1 else result
        return (*grads, None, None, None)
