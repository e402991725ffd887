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
from pruneops.triton.attention_forward import (
    SHAPE_CLASSES,
    section_of_pairs,
    shape_class,
    tile_of_program,
    typical_inputs,
    unit_rows,
    varlen_attention,
    zero_outside,
)
from pruneops.triton.head_tiles import (
    LOG2_E,
    add_weighted,
    aligned,
    head_tiles,
    key_limits,
    key_range,
    load_heads,
    packed_segment,
    products,
    scale_heads,
    store_heads,
    zero_heads,
)
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


@triton.jit
def _add_to_keys(
    dk0,  # [N, D0]
    dk1,
    dv0,
    dv1,
    k0,  # [N, D0]
    k1,
    v0,
    v1,
    q,  # the first head's first row of the segment
    dout,
    shift,
    delta,
    kv_limit,
    stride_q,
    stride_q_head,
    stride_dout,
    stride_dout_head,
    stride_terms,  # of shift and delta, from head to head
    visit,
    begin,  # the first tile of each head
    count,  # tiles of each head
    columns,  # [N]
    length_q,
    length_k,
    scale,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ALIGNED: tl.constexpr,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
):
    """What one tile of query rows adds to dk and dv; visits go through the tiles of one head after the other."""
    if GROUP > 1:
        head = (visit // count).to(tl.int64)
        visit = visit % count
        q += head * stride_q_head
        dout += head * stride_dout_head
        shift += head * stride_terms
        delta += head * stride_terms
    rows = begin + visit * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows past the segment get weights of 1, times zeros. Loads that fill with zeros are copied without registers.
    inside = rows < length_q
    q0, q1 = load_heads(q, rows, stride_q, inside, D, D0, D1, ALIGNED)
    shifts = tl.load(shift + rows, mask=inside, other=0.0)
    weights = tl.exp2(products(k0, k1, q0, q1, D1) * scale - shifts[None, :])  # [N, M]
    if MASKED:
        limits = rows + (length_k - length_q + 1) if CAUSAL else tl.load(kv_limit + rows, mask=inside, other=0)
        weights = tl.where(columns[:, None] < limits[None, :], weights, 0.0)
    dout0, dout1 = load_heads(dout, rows, stride_dout, inside, D, D0, D1, ALIGNED)
    dv0, dv1 = add_weighted(dv0, dv1, weights, dout0, dout1, D1)
    deltas = tl.load(delta + rows, mask=inside, other=0.0)
    dlogits = weights * (products(v0, v1, dout0, dout1, D1) - deltas[None, :])
    dk0, dk1 = add_weighted(dk0, dk1, dlogits, q0, q1, D1)
    return dk0, dk1, dv0, dv1


@triton.jit
def _query_range(
    kv_limit,  # [Lq] of the segment's query rows, or None
    first,  # of the keys
    last,  # one past the keys
    length_q,
    length_k,
    CAUSAL: tl.constexpr,
    SCAN: tl.constexpr,
):
    """The query rows that see any of these keys lie in ``[begin, end)``; from ``full`` on a row sees all of them."""
    if kv_limit is not None:
        begin = length_q
        full = 0
        end = 0
        for start in range(0, length_q, SCAN):
            rows = start + tl.arange(0, SCAN)
            inside = rows < length_q
            limits = tl.load(kv_limit + rows, mask=inside, other=0)
            seeing = inside & (limits > first)
            begin = tl.minimum(begin, tl.min(tl.where(seeing, rows, length_q), 0))
            end = tl.maximum(end, tl.max(tl.where(seeing, rows + 1, 0), 0))
            full = tl.maximum(full, tl.max(tl.where(inside & (limits < last), rows + 1, 0), 0))
    elif CAUSAL:
        begin = tl.maximum(first - (length_k - length_q), 0)
        full = tl.maximum(last - 1 - (length_k - length_q), 0)
        end = length_q
    else:
        begin = 0
        full = 0
        end = length_q
    return begin, full, end


@triton.jit(do_not_specialize=["total_q", "total_k", "num_segments", "tiles", "section"])
def keys_kernel(
    q,  # [total_q, Hq, D]
    k,  # [total_k, Hk, D]
    v,  # [total_k, Hk, D]
    dout,  # [total_q, Hq, D]
    shift,  # [Hq, total_q]
    delta,  # [Hq, total_q]
    dk,  # [total_k, Hk, D]
    dv,  # [total_k, Hk, D]
    cu_seqlens_q,  # [B+1]
    cu_seqlens_k,  # [B+1]
    kv_limit,  # [total_q], or None
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    stride_dout,
    stride_dout_head,
    stride_dk,
    stride_dk_head,
    total_q,
    total_k,
    num_segments,
    heads_k,
    tiles,  # of a segment with max_seqlen_k rows
    section,
    scale,  # times log2(e)
    softmax_scale,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ALIGNED: tl.constexpr,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a key head
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv of one tile of keys."""
    pair, rank = tile_of_program(num_segments * heads_k, tiles, section)
    segment = pair // heads_k
    head_k = (pair % heads_k).to(tl.int64)
    start_k, length_k = packed_segment(cu_seqlens_k, segment, total_k)
    if segment == num_segments - 1:
        begin = tl.minimum(tl.load(cu_seqlens_k), total_k)
        end = start_k + length_k
        offset = head_k * stride_dk_head
        zero_outside(dk + offset, None, stride_dk, begin, end, total_k, rank, tiles, D=D, D0=D0, D1=D1, BLOCK=BLOCK_N)
        zero_outside(dv + offset, None, stride_dk, begin, end, total_k, rank, tiles, D=D, D0=D0, D1=D1, BLOCK=BLOCK_N)
    # The first tile is seen by the most rows where the mask is causal.
    first = rank * BLOCK_N
    if first >= length_k:
        return

    start_q, length_q = packed_segment(cu_seqlens_q, segment, total_q)
    if kv_limit is not None:
        kv_limit += start_q
    columns = first + tl.arange(0, BLOCK_N)
    inside = columns < length_k
    last = tl.minimum(first + BLOCK_N, length_k)
    begin, full, end = _query_range(kv_limit, first, last, length_q, length_k, CAUSAL, SCAN=1024)
    begin = begin // BLOCK_M * BLOCK_M
    full = tl.minimum(tl.maximum(tl.cdiv(full, BLOCK_M) * BLOCK_M, begin), tl.maximum(end, begin))

    offset_k = start_k.to(tl.int64)
    k0, k1 = load_heads(k + offset_k * stride_k + head_k * stride_k_head, columns, stride_k, inside, D, D0, D1, ALIGNED)
    v0, v1 = load_heads(v + offset_k * stride_v + head_k * stride_v_head, columns, stride_v, inside, D, D0, D1, ALIGNED)
    dk0, dk1 = zero_heads(BLOCK_N, D0, D1)
    dv0, dv1 = zero_heads(BLOCK_N, D0, D1)
    q += start_q.to(tl.int64) * stride_q + head_k * GROUP * stride_q_head
    dout += start_q.to(tl.int64) * stride_dout + head_k * GROUP * stride_dout_head
    shift += head_k * GROUP * total_q + start_q
    delta += head_k * GROUP * total_q + start_q
    if CAUSAL or kv_limit is not None:
        count = tl.cdiv(full - begin, BLOCK_M)
        for visit in range(GROUP * count):
            dk0, dk1, dv0, dv1 = _add_to_keys(
                dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, dout, shift, delta, kv_limit, stride_q, stride_q_head,
                stride_dout, stride_dout_head, total_q, visit, begin, count, columns, length_q, length_k, scale,
                D, D0, D1, ALIGNED, CAUSAL, GROUP, BLOCK_M, MASKED=True,
            )  # fmt: skip
    count = tl.cdiv(end - full, BLOCK_M)
    for visit in range(GROUP * count):
        dk0, dk1, dv0, dv1 = _add_to_keys(
            dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, dout, shift, delta, kv_limit, stride_q, stride_q_head,
            stride_dout, stride_dout_head, total_q, visit, full, count, columns, length_q, length_k, scale,
            D, D0, D1, ALIGNED, CAUSAL, GROUP, BLOCK_M, MASKED=False,
        )  # fmt: skip
    dk0, dk1 = scale_heads(dk0, dk1, softmax_scale, D1)
    # Counted from the tile: the rows from above would take registers all the way down here.
    rows = tl.arange(0, BLOCK_N)
    inside = rows < length_k - first
    offset = (offset_k + first) * stride_dk + head_k * stride_dk_head
    store_heads(dk + offset, rows, stride_dk, inside, dk0, dk1, D, D0, D1, ALIGNED)
    store_heads(dv + offset, rows, stride_dk, inside, dv0, dv1, D, D0, D1, ALIGNED)


@triton.jit
def _add_to_queries(
    dq0,  # [M, D0]
    dq1,
    q0,
    q1,
    dout0,
    dout1,
    shifts,  # [M]
    deltas,  # [M]
    k,  # the key head's first row of the segment
    v,
    stride_k,
    stride_v,
    start,
    limits,  # [M]
    length_k,
    scale,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """What one tile of keys adds to dq."""
    columns = start + tl.arange(0, BLOCK_N)
    inside = columns < length_k if MASKED else None
    k0, k1 = load_heads(k, columns, stride_k, inside, D, D0, D1, ALIGNED)
    weights = tl.exp2(products(q0, q1, k0, k1, D1) * scale - shifts[:, None])  # [M, N]
    if MASKED:
        weights = tl.where(columns[None, :] < limits[:, None], weights, 0.0)
    v0, v1 = load_heads(v, columns, stride_v, inside, D, D0, D1, ALIGNED)
    dlogits = weights * (products(dout0, dout1, v0, v1, D1) - deltas[:, None])
    return add_weighted(dq0, dq1, dlogits, k0, k1, D1)


@triton.jit(do_not_specialize=["total_q", "total_k", "num_segments", "tiles", "section"])
def queries_kernel(
    q,  # [total_q, Hq, D]
    k,  # [total_k, Hk, D]
    v,  # [total_k, Hk, D]
    dout,  # [total_q, Hq, D]
    shift,  # [Hq, total_q]
    delta,  # [Hq, total_q]
    dq,  # [total_q, Hq, D]
    cu_seqlens_q,  # [B+1]
    cu_seqlens_k,  # [B+1]
    kv_limit,  # [total_q], or None
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    stride_dout,
    stride_dout_head,
    stride_dq,
    stride_dq_head,
    total_q,
    total_k,
    num_segments,
    heads_q,
    group,  # query heads of a key head
    tiles,  # of a segment with max_seqlen_q rows
    section,
    scale,  # times log2(e)
    softmax_scale,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ALIGNED: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq of one tile of query rows."""
    pair, rank = tile_of_program(num_segments * heads_q, tiles, section)
    segment = pair // heads_q
    head = (pair % heads_q).to(tl.int64)
    dq += head * stride_dq_head
    start_q, length_q = packed_segment(cu_seqlens_q, segment, total_q)
    if segment == num_segments - 1:
        begin = tl.minimum(tl.load(cu_seqlens_q), total_q)
        end = start_q + length_q
        zero_outside(dq, None, stride_dq, begin, end, total_q, rank, tiles, D=D, D0=D0, D1=D1, BLOCK=BLOCK_M)
    first = (tl.cdiv(length_q, BLOCK_M) - 1 - rank) * BLOCK_M
    if first < 0:
        return

    start_k, length_k = packed_segment(cu_seqlens_k, segment, total_k)
    head_k = head // group
    k += start_k.to(tl.int64) * stride_k + head_k * stride_k_head
    v += start_k.to(tl.int64) * stride_v + head_k * stride_v_head
    if kv_limit is not None:
        kv_limit += start_q
    rows = first + tl.arange(0, BLOCK_M)
    inside = rows < length_q
    limits = key_limits(kv_limit, rows, length_q, length_k, CAUSAL)
    fewest, most = key_range(kv_limit, limits, rows, first, length_q, length_k, CAUSAL)

    q += start_q.to(tl.int64) * stride_q + head * stride_q_head
    q0, q1 = load_heads(q, rows, stride_q, inside, D, D0, D1, ALIGNED)
    dout += start_q.to(tl.int64) * stride_dout + head * stride_dout_head
    dout0, dout1 = load_heads(dout, rows, stride_dout, inside, D, D0, D1, ALIGNED)
    place = head * total_q + start_q + rows
    shifts = tl.load(shift + place, mask=inside, other=float("inf"))
    deltas = tl.load(delta + place, mask=inside, other=0.0)
    dq0, dq1 = zero_heads(BLOCK_M, D0, D1)
    full = fewest // BLOCK_N * BLOCK_N
    for start in range(0, full, BLOCK_N):
        dq0, dq1 = _add_to_queries(
            dq0, dq1, q0, q1, dout0, dout1, shifts, deltas, k, v, stride_k, stride_v, start, limits, length_k, scale,
            D, D0, D1, ALIGNED, BLOCK_N, MASKED=False,
        )  # fmt: skip
    for start in range(full, most, BLOCK_N):
        dq0, dq1 = _add_to_queries(
            dq0, dq1, q0, q1, dout0, dout1, shifts, deltas, k, v, stride_k, stride_v, start, limits, length_k, scale,
            D, D0, D1, ALIGNED, BLOCK_N, MASKED=True,
        )  # fmt: skip
    dq0, dq1 = scale_heads(dq0, dq1, softmax_scale, D1)
    rows = tl.arange(0, BLOCK_M)
    dq += (start_q + first).to(tl.int64) * stride_dq
    store_heads(dq, rows, stride_dq, rows < length_q - first, dq0, dq1, D, D0, D1, ALIGNED)


def _tiles(m: int, n: int, warps: int, stages: int, capability: int = 80) -> Config:
    return Config({"BLOCK_M": m, "BLOCK_N": n}, warps, stages, capability)


def _candidates_of_keys(shape_class: str) -> tuple[Config, ...]:
    if shape_class == "32-bit":
        return (_tiles(32, 32, 4, 1),)
    if shape_class == "other 16-bit":
        return (_tiles(32, 64, 4, 2),)
    return (_tiles(64, 128, 8, 2),)


def _candidates_of_queries(shape_class: str) -> tuple[Config, ...]:
    if shape_class == "32-bit":
        return (_tiles(32, 32, 4, 1),)
    if shape_class == "other 16-bit":
        return (_tiles(64, 32, 4, 2),)
    return (_tiles(128, 64, 8, 2),)


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
BACKWARD_KEYS = Tunable("varlen_backward_keys", SHAPE_CLASSES, _candidates_of_keys, _INTERPRETED, problem)
BACKWARD_QUERIES = Tunable("varlen_backward_queries", SHAPE_CLASSES, _candidates_of_queries, _INTERPRETED, problem)
TUNABLES: tuple[Tunable, ...] = (BACKWARD_KEYS, BACKWARD_QUERIES)
KERNELS = {"varlen_attention_backward": varlen_attention_backward}
