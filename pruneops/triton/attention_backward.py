"""Gradients of varlen_attention (FlashAttention-2, arXiv 2307.08691, algorithm 2), without atomics.

Probabilities are made again from the logits and the LSE. One kernel keeps a tile of keys and visits the query rows of
all heads that share it, for dk and dv; another keeps a tile of query rows and visits keys, for dq. So logits are
computed twice, but no two programs add to the same place, and results are the same in every run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pruneops.triton import tuning
from pruneops.triton.attention_backward_keys import candidates_of_keys, keys_kernel
from pruneops.triton.attention_backward_queries import candidates_of_queries, queries_kernel
from pruneops.triton.attention_forward import (
    SHAPE_CLASSES,
    section_of_pairs,
    shape_class,
    typical_inputs,
    unit_rows,
    varlen_attention,
)
from pruneops.triton.head_tiles import LOG2_E, aligned, head_tiles, load_heads
from pruneops.triton.tuning import Config, Tunable

# Rows of a program that sums dout * out.
ROWS = 32


@triton.jit(do_not_specialize=["total_q"])
def row_terms_kernel(
    dout,  # [total_q, Hq, D]
    out,  # [total_q, Hq, D]
    lse,  # [Hq, total_q]
    dlse,  # [Hq, total_q], or None
    shift,  # [Hq, total_q] float32
    delta,  # [Hq, total_q] float32
    stride_dout,
    stride_dout_head,
    stride_out,
    stride_out_head,
    stride_lse_head,
    stride_lse,
    stride_dlse_head,
    stride_dlse,
    total_q,
    heads_q,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Per row what its probabilities ``exp2(logit - shift)`` and gradients ``p * (dp - delta)`` need."""
    program = tl.program_id(0)
    head = (program % heads_q).to(tl.int64)
    rows = program // heads_q * ROWS + tl.arange(0, ROWS)
    inside = rows < total_q
    dout0, dout1 = load_heads(dout + head * stride_dout_head, rows, stride_dout, inside, D, D0, D1, ALIGNED)
    out0, out1 = load_heads(out + head * stride_out_head, rows, stride_out, inside, D, D0, D1, ALIGNED)
    sums = tl.sum(dout0.to(tl.float32) * out0.to(tl.float32), 1)
    if D1 > 0:
        sums += tl.sum(dout1.to(tl.float32) * out1.to(tl.float32), 1)
    wide = rows.to(tl.int64)
    logs = tl.load(lse + head * stride_lse_head + wide * stride_lse, mask=inside, other=0.0)
    if dlse is not None:
        sums -= tl.load(dlse + head * stride_dlse_head + wide * stride_dlse, mask=inside, other=0.0)
    # A row without keys gets probabilities of 0 and no gradient.
    empty = logs == float("-inf")
    place = head * total_q + rows
    tl.store(shift + place, tl.where(empty, float("inf"), logs * LOG2_E), mask=inside)
    tl.store(delta + place, tl.where(empty, 0.0, sums), mask=inside)


def varlen_attention_backward(
    dout: Tensor,
    dsoftmax_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    softmax_scale: float,
    kv_limit: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq``, ``dk`` and ``dv`` from the gradients of the output and, where there is one, of the LSE.

    Source: FlashAttention-2 (arXiv 2307.08691), algorithm 2.
    """
    total_q, heads_q, head_dim = q.shape
    total_k, heads_k, _ = k.shape
    num_segments = cu_seqlens_q.shape[0] - 1
    if num_segments <= 0 or total_q == 0 or total_k == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    dout, q, k, v, out = unit_rows(dout), unit_rows(q), unit_rows(k), unit_rows(v), unit_rows(out)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    shift, delta = q.new_empty((2, heads_q, total_q), dtype=torch.float32)
    d0, d1 = head_tiles(head_dim)
    group = heads_q // heads_k
    widths = {"D": head_dim, "D0": d0, "D1": d1, "ALIGNED": aligned(dout, q, k, v, out, dq, dk, dv)}
    row_terms_kernel[(triton.cdiv(total_q, ROWS) * heads_q,)](
        dout,
        out,
        softmax_lse,
        dsoftmax_lse,
        shift,
        delta,
        *dout.stride()[:2],
        *out.stride()[:2],
        *softmax_lse.stride(),
        *((0, 0) if dsoftmax_lse is None else dsoftmax_lse.stride()),
        total_q,
        heads_q,
        **widths,
        **Config({"ROWS": ROWS}, num_warps=4, num_stages=1).options,
    )
    boundaries = (
        cu_seqlens_q.contiguous(),
        cu_seqlens_k.contiguous(),
        None if kv_limit is None else kv_limit.contiguous(),
    )
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dout.stride()[:2])
    scales = (softmax_scale * LOG2_E.value, softmax_scale)
    inputs = (q, k, v, dout, shift, delta)
    masks = {"CAUSAL": causal and kv_limit is None}
    row_bytes = 2 * head_dim * q.element_size()
    longest_q, longest_k = min(max_seqlen_q, total_q), min(max_seqlen_k, total_k)

    config = tuning.configuration(BACKWARD_KEYS, shape_class(head_dim, q.dtype), q.device)
    tiles = max(1, triton.cdiv(longest_k, config.blocks["BLOCK_N"]))
    keys_kernel[(num_segments * heads_k * tiles,)](
        *inputs,
        dk,
        dv,
        *boundaries,
        *strides,
        *dk.stride()[:2],
        total_q,
        total_k,
        num_segments,
        heads_k,
        tiles,
        section_of_pairs(row_bytes * group, longest_q, 1),
        *scales,
        **widths,
        **masks,
        GROUP=group,
        **config.options,
    )

    config = tuning.configuration(BACKWARD_QUERIES, shape_class(head_dim, q.dtype), q.device)
    tiles = max(1, triton.cdiv(longest_q, config.blocks["BLOCK_M"]))
    queries_kernel[(num_segments * heads_q * tiles,)](
        *inputs,
        dq,
        *boundaries,
        *strides,
        *dq.stride()[:2],
        total_q,
        total_k,
        num_segments,
        heads_q,
        group,
        tiles,
        section_of_pairs(row_bytes, longest_k, group),
        *scales,
        **widths,
        **masks,
        **config.options,
    )
    return dq, dk, dv


def problem(shape_class: str, device: torch.device) -> Callable[[], Any]:
    """The backward pass of four LLaVA prompts."""
    q, k, v, cu_seqlens, longest = typical_inputs(shape_class, device)
    numbers = (cu_seqlens, cu_seqlens, longest, longest, True, q.shape[2] ** -0.5)
    out, lse = torch.empty_like(q), torch.zeros(q.shape[1], q.shape[0], device=device)
    if device.type == "cuda":
        out, lse = varlen_attention(q, k, v, *numbers)
    dout = torch.randn_like(q)
    return lambda: varlen_attention_backward(dout, None, q, k, v, out, lse, *numbers)


_INTERPRETED = Config({"BLOCK_M": 32, "BLOCK_N": 32})
BACKWARD_KEYS = Tunable("varlen_backward_keys", SHAPE_CLASSES, candidates_of_keys, _INTERPRETED, problem)
BACKWARD_QUERIES = Tunable("varlen_backward_queries", SHAPE_CLASSES, candidates_of_queries, _INTERPRETED, problem)
TUNABLES: tuple[Tunable, ...] = (BACKWARD_KEYS, BACKWARD_QUERIES)
KERNELS = {"varlen_attention_backward": varlen_attention_backward}
