"""The gradient of one tile of query rows, while keys and values go by."""

from __future__ import annotations

import triton
import triton.language as tl

from pruneops.triton.attention_forward import tile_of_program, zero_outside
from pruneops.triton.head_tiles import (
    add_weighted,
    key_limits,
    key_range,
    load_heads,
    packed_segment,
    products,
    scale_heads,
    store_heads,
    tile_config,
    zero_heads,
)
from pruneops.triton.tuning import Config


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


def candidates_of_queries(shape_class: str) -> tuple[Config, ...]:
    if shape_class == "32-bit":
        return tile_config(32, 16, 8, 2), tile_config(16, 16, 8, 2)
    if shape_class == "other 16-bit":
        return tile_config(64, 32, 8, 2), tile_config(32, 32, 8, 2)
    return tile_config(128, 64, 8, 2), tile_config(64, 64, 8, 2), tile_config(64, 32, 4, 2)
