"""The gradients of one tile of keys and values, while the query rows of all heads that share it go by."""

from __future__ import annotations

import triton
import triton.language as tl

from pruneops.triton.attention_forward import tile_of_program, zero_outside
from pruneops.triton.head_tiles import (
    add_weighted,
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


def candidates_of_keys(shape_class: str) -> tuple[Config, ...]:
    if shape_class == "32-bit":
        return tile_config(32, 16, 8, 2), tile_config(16, 16, 8, 2)
    if shape_class == "other 16-bit":
        return (tile_config(32, 32, 8, 2),)
    return tile_config(64, 128, 8, 2), tile_config(64, 64, 8, 2), tile_config(32, 64, 4, 2)
