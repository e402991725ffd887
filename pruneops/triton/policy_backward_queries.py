"""The gradient of one tile of query rows under a policy, while keys and values go by."""

from __future__ import annotations

import triton
import triton.language as tl

from pruneops.triton.attention_forward import tile_of_program
from pruneops.triton.head_tiles import (
    add_weighted,
    load_heads,
    products,
    scale_heads,
    store_heads,
    tile_config,
    zero_heads,
)
from pruneops.triton.policy_forward import block_of_slot
from pruneops.triton.tuning import Config


@triton.jit
def _add_query_gradient(
    dq0,  # [M, D0]
    dq1,  # [M, D1]
    q0,
    q1,
    dout0,
    dout1,
    tops,  # [M]
    inverses,  # [M]
    deltas,  # [M]
    k,  # the key head's first row of the segment
    v,
    policy,  # of the segment's first row
    stride_k,
    stride_v,
    start,
    rows,  # [M]
    length,
    scale,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of keys. Without a mask all rows see all of them and none is a row's own."""
    keys = start + tl.arange(0, BLOCK_N)
    inside = keys < length if MASKED else None
    count = tl.load(policy + keys, mask=inside)[None, :]
    k0, k1 = load_heads(k, keys, stride_k, inside, D, D0, D1, ALIGNED)
    x = tl.exp2(products(q0, q1, k0, k1, D1) * scale - tops[:, None]) * inverses[:, None]
    v0, v1 = load_heads(v, keys, stride_v, inside, D, D0, D1, ALIGNED)
    change = x * (products(dout0, dout1, v0, v1, D1) - deltas[:, None])
    if MASKED:
        change *= tl.where(keys[None, :] == rows[:, None], 1.0, count)
        change = tl.where(keys[None, :] <= rows[:, None], change, 0.0)
    else:
        change *= count
    return add_weighted(dq0, dq1, change, k0, k1, D1)


@triton.jit(do_not_specialize=["total", "num_segments", "slots", "section"])
def query_gradient_kernel(
    dout,  # [total, Hq, D]
    q,  # [total, Hq, D]
    k,  # [total, Hk, D]
    v,  # [total, Hk, D]
    policy,  # [total] float32
    softmax_max,  # [Hq, total] float32, in units of log 2
    inverse,  # [Hq, total] float32, of den
    delta,  # [Hq, total] float32
    bounds,  # [B+1]
    dq,  # [total, Hq, D], contiguous
    stride_dout,
    stride_dout_head,
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    total,
    num_segments,
    slots,
    section,
    heads_q,
    group,  # query heads of a key head
    softmax_scale,
    scale,  # times log2(e)
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head, rank = tile_of_program(heads_q, slots, section)
    # The last block of a segment has the most keys, so it comes first.
    part, start, length, first = block_of_slot(bounds, num_segments, total, slots - 1 - rank, BLOCK_M)
    if first >= length:
        return
    head = head.to(tl.int64)
    dq += head * D
    rows = first + tl.arange(0, BLOCK_M)
    inside = rows < length
    dq0, dq1 = zero_heads(BLOCK_M, D0, D1)
    if (part == 0) | (part > num_segments):
        store_heads(dq, start + rows, heads_q * D, inside, dq0, dq1, D, D0, D1, ALIGNED)
        return

    head_k = head // group
    offset = start.to(tl.int64)
    q += offset * stride_q + head * stride_q_head
    dout += offset * stride_dout + head * stride_dout_head
    k += offset * stride_k + head_k * stride_k_head
    v += offset * stride_v + head_k * stride_v_head
    policy += start
    q0, q1 = load_heads(q, rows, stride_q, inside, D, D0, D1, ALIGNED)
    dout0, dout1 = load_heads(dout, rows, stride_dout, inside, D, D0, D1, ALIGNED)
    at = head * total + start + rows
    tops = tl.load(softmax_max + at, mask=inside, other=0.0)
    inverses = tl.load(inverse + at, mask=inside, other=0.0)
    deltas = tl.load(delta + at, mask=inside, other=0.0)
    full = first // BLOCK_N * BLOCK_N
    # Masks take registers.
    MASKED_N: tl.constexpr = max(16, BLOCK_N // 2)
    for key in range(0, full, BLOCK_N):
        dq0, dq1 = _add_query_gradient(
            dq0, dq1, q0, q1, dout0, dout1, tops, inverses, deltas, k, v, policy, stride_k, stride_v, key, rows, length,
            scale, D, D0, D1, ALIGNED, BLOCK_N, MASKED=False,
        )  # fmt: skip
    for key in range(full, tl.minimum(first + BLOCK_M, length), MASKED_N):
        dq0, dq1 = _add_query_gradient(
            dq0, dq1, q0, q1, dout0, dout1, tops, inverses, deltas, k, v, policy, stride_k, stride_v, key, rows, length,
            scale, D, D0, D1, ALIGNED, MASKED_N, MASKED=True,
        )  # fmt: skip
    dq0, dq1 = scale_heads(dq0, dq1, softmax_scale, D1)
    # Counted from the block: the rows from above would take registers all the way down here.
    rows = tl.arange(0, BLOCK_M)
    dq += (offset + first) * heads_q * D
    store_heads(dq, rows, heads_q * D, rows < length - first, dq0, dq1, D, D0, D1, ALIGNED)


def candidates_of_queries(shape_class: str) -> tuple[Config, ...]:
    if shape_class == "32-bit":
        return tile_config(32, 16, 8, 2), tile_config(16, 16, 8, 2)
    if shape_class == "other 16-bit":
        return tile_config(64, 32, 8, 2), tile_config(32, 32, 8, 2)
    return tile_config(128, 64, 8, 2, 90), tile_config(64, 64, 8, 2), tile_config(64, 32, 4, 2)
