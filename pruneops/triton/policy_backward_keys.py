"""Gradients of one tile of keys, values and their policy, while the query rows of all heads that share it go by."""

from __future__ import annotations

import triton
import triton.language as tl

from pruneops.triton.attention_forward import tile_of_program
from pruneops.triton.head_tiles import (
    add_products,
    add_weighted,
    load_heads,
    products,
    scale_heads,
    store_heads,
    tile_config,
    zero_heads,
)
from pruneops.triton.policy_forward import block_of_slot, load_sum
from pruneops.triton.tuning import Config


@triton.jit
def _add_key_gradients(
    dk0,  # [N, D0]
    dk1,  # [N, D1]
    dv0,
    dv1,
    dcount,  # [N]
    k0,
    k1,
    v0,
    v1,
    count,  # [N]
    keys,  # [N]
    q,  # the first head's first row of the segment
    dout,
    softmax_max,
    inverse,
    delta,
    stride_q,
    stride_q_head,
    stride_dout,
    stride_dout_head,
    stride_head,  # of the vectors
    visit,
    begin,  # the first row to visit in each head
    tiles,  # to visit in each head
    length,
    scale,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of rows, turned: ``[key, row]``. Without a mask all rows see all keys and none is a row's own.

    Visits go through the tiles of one head after the other.
    """
    if GROUP > 1:
        head = (visit // tiles).to(tl.int64)
        visit = visit % tiles
        q += head * stride_q_head
        dout += head * stride_dout_head
        softmax_max += head * stride_head
        inverse += head * stride_head
        delta += head * stride_head
    rows = begin + visit * BLOCK_M + tl.arange(0, BLOCK_M)
    # A row that is not there has an inverse of 0. Loads that fill with zeros are copied without registers.
    inside = rows < length
    q0, q1 = load_heads(q, rows, stride_q, inside, D, D0, D1, ALIGNED)
    tops = tl.load(softmax_max + rows, mask=inside, other=0.0)
    inverses = tl.load(inverse + rows, mask=inside, other=0.0)
    x = tl.exp2(products(k0, k1, q0, q1, D1) * scale - tops[None, :]) * inverses[None, :]
    counts = count[:, None]
    if MASKED:
        x = tl.where(keys[:, None] <= rows[None, :], x, 0.0)
        counts = tl.where(keys[:, None] == rows[None, :], 1.0, counts)
    dout0, dout1 = load_heads(dout, rows, stride_dout, inside, D, D0, D1, ALIGNED)
    dv0, dv1 = add_weighted(dv0, dv1, x * counts, dout0, dout1, D1)
    deltas = tl.load(delta + rows, mask=inside, other=0.0)
    less = tl.broadcast_to(-deltas[None, :], [keys.shape[0], BLOCK_M])
    change = x * add_products(less, v0, v1, dout0, dout1, D1)
    if MASKED:
        dcount += tl.sum(tl.where(keys[:, None] == rows[None, :], 0.0, change), 1)
    else:
        dcount += tl.sum(change, 1)
    dk0, dk1 = add_weighted(dk0, dk1, change * counts, q0, q1, D1)
    return dk0, dk1, dv0, dv1, dcount


@triton.jit(do_not_specialize=["total", "num_segments", "slots", "section"])
def key_gradient_kernel(
    dout,  # [total, Hq, D]
    q,  # [total, Hq, D]
    k,  # [total, Hk, D]
    v,  # [total, Hk, D]
    policy,  # [total] float32
    softmax_max,  # [Hq, total] float32, in units of log 2
    inverse,  # [Hq, total] float32, of den
    delta,  # [Hq, total] float32
    dout_sums,  # [B, Hq, D] float32, of dout / den
    bounds,  # [B+1]
    dk,  # [total, Hk, D], contiguous
    dv,  # [total, Hk, D], contiguous
    dpolicy,  # [Hk, total] float32
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
    heads_k,
    softmax_scale,
    scale,  # times log2(e)
    epsilon,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # The first keys of a segment are seen by the most rows, and come first.
    head_k, rank = tile_of_program(heads_k, slots, section)
    part, start, length, first = block_of_slot(bounds, num_segments, total, rank, BLOCK_N)
    if first >= length:
        return
    head_k = head_k.to(tl.int64)
    dk += head_k * D
    dv += head_k * D
    dpolicy += head_k * total + start
    keys = first + tl.arange(0, BLOCK_N)
    inside = keys < length
    dk0, dk1 = zero_heads(BLOCK_N, D0, D1)
    dv0, dv1 = zero_heads(BLOCK_N, D0, D1)
    dcount = tl.zeros([BLOCK_N], tl.float32)
    if (part == 0) | (part > num_segments):
        at = start + keys
        store_heads(dk, at, heads_k * D, inside, dk0, dk1, D, D0, D1, ALIGNED)
        store_heads(dv, at, heads_k * D, inside, dv0, dv1, D, D0, D1, ALIGNED)
        tl.store(dpolicy + keys, dcount, mask=inside)
        return

    offset = start.to(tl.int64)
    k += offset * stride_k + head_k * stride_k_head
    v += offset * stride_v + head_k * stride_v_head
    k0, k1 = load_heads(k, keys, stride_k, inside, D, D0, D1, ALIGNED)
    v0, v1 = load_heads(v, keys, stride_v, inside, D, D0, D1, ALIGNED)
    count = tl.load(policy + start + keys, mask=inside, other=0.0)
    # Masks take registers.
    MASKED_M: tl.constexpr = max(16, BLOCK_M // 2)
    before = first // MASKED_M * MASKED_M
    # The first tile whose rows see all keys and are none of them.
    full = tl.cdiv(tl.minimum(first + BLOCK_N, length), BLOCK_M) * BLOCK_M
    head = head_k * GROUP
    q += offset * stride_q + head * stride_q_head
    dout += offset * stride_dout + head * stride_dout_head
    softmax_max += head * total + start
    inverse += head * total + start
    delta += head * total + start
    tiles = (full - before) // MASKED_M
    for visit in range(GROUP * tiles):
        dk0, dk1, dv0, dv1, dcount = _add_key_gradients(
            dk0, dk1, dv0, dv1, dcount, k0, k1, v0, v1, count, keys, q, dout, softmax_max, inverse, delta, stride_q,
            stride_q_head, stride_dout, stride_dout_head, total, visit, before, tiles, length, scale,
            D, D0, D1, ALIGNED, GROUP, MASKED_M, MASKED=True,
        )  # fmt: skip
    tiles = tl.cdiv(tl.maximum(length - full, 0), BLOCK_M)
    for visit in range(GROUP * tiles):
        dk0, dk1, dv0, dv1, dcount = _add_key_gradients(
            dk0, dk1, dv0, dv1, dcount, k0, k1, v0, v1, count, keys, q, dout, softmax_max, inverse, delta, stride_q,
            stride_q_head, stride_dout, stride_dout_head, total, visit, full, tiles, length, scale,
            D, D0, D1, ALIGNED, GROUP, BLOCK_M, MASKED=False,
        )  # fmt: skip
    dk0, dk1 = scale_heads(dk0, dk1, softmax_scale, D1)
    # Every row of the segment, in every head, gives every value the same.
    share = epsilon / length.to(tl.float32)
    dout_sums += ((part - 1) * (heads_k * GROUP) + head) * D
    for i in range(GROUP):
        sum0, sum1 = load_sum(dout_sums + i * D, D, D0, D1)
        dv0 += sum0 * share
        if D1 > 0:
            dv1 += sum1 * share
    # Counted from the block: the keys from above would take registers all the way down here.
    keys = tl.arange(0, BLOCK_N)
    inside = keys < length - first
    at = (offset + first) * heads_k * D
    store_heads(dk + at, keys, heads_k * D, inside, dk0, dk1, D, D0, D1, ALIGNED)
    store_heads(dv + at, keys, heads_k * D, inside, dv0, dv1, D, D0, D1, ALIGNED)
    tl.store(dpolicy + first + keys, dcount, mask=inside)


def candidates_of_keys(shape_class: str) -> tuple[Config, ...]:
    if shape_class == "32-bit":
        return tile_config(32, 16, 8, 2), tile_config(16, 16, 8, 2)
    if shape_class == "other 16-bit":
        return (tile_config(32, 32, 8, 2),)
    return tile_config(64, 128, 8, 2, 90), tile_config(64, 64, 8, 2), tile_config(32, 64, 4, 2)
