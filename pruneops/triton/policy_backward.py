"""Gradients of policy_attention; scores are computed again, once for dq and once for dk, dv and dpolicy.

With ``x = exp(logit - max) / den``, ``den = sum of the weights + epsilon``, counts ``c`` (the policy, 1 for a row's own
key) and ``delta = rowsum(dout * out)``::

    change = x * (dout v^T - delta)    dq = scale * (change * c) k    dk = scale * (change * c)^T q
    dv = (x * c)^T dout + epsilon / length * sum of dout / den       dpolicy = column sums of change, without own keys

No program adds to what another wrote, so the order of additions is fixed.
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
)
from pruneops.triton.head_tiles import (
    LOG2_E,
    add_products,
    add_weighted,
    aligned,
    head_tiles,
    load_heads,
    products,
    scale_heads,
    store_heads,
    zero_heads,
)
from pruneops.triton.policy_forward import (
    block_of_slot,
    load_sum,
    num_slots,
    segment_sums,
    typical_policy,
)
from pruneops.triton.segments import clamped_pair
from pruneops.triton.tuning import Config, Tunable

_ROW_TERMS = Config({"ROWS": 64}, num_warps=4)
_HEAD_SUM = Config({"ROWS": 256}, num_warps=4)


@triton.jit(do_not_specialize=["total"])
def row_terms_kernel(
    dout,  # [total, Hq, D]
    out,  # [total, Hq, D]
    softmax_sum,  # [Hq, total] float32
    inverse,  # [Hq, total] float32
    delta,  # [Hq, total] float32
    stride_dout,
    stride_dout_head,
    stride_out,
    stride_out_head,
    total,
    heads_q,
    epsilon,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """1 / den and delta of every row; those of no segment get what nobody reads."""
    head = (tl.program_id(0) % heads_q).to(tl.int64)
    rows = tl.program_id(0) // heads_q * ROWS + tl.arange(0, ROWS)
    inside = rows < total
    dout0, dout1 = load_heads(dout + head * stride_dout_head, rows, stride_dout, inside, D, D0, D1, ALIGNED)
    out0, out1 = load_heads(out + head * stride_out_head, rows, stride_out, inside, D, D0, D1, ALIGNED)
    sums = tl.sum(dout0.to(tl.float32) * out0.to(tl.float32), 1)
    if D1 > 0:
        sums += tl.sum(dout1.to(tl.float32) * out1.to(tl.float32), 1)
    at = head * total + rows
    tl.store(inverse + at, 1.0 / (tl.load(softmax_sum + at, mask=inside, other=1.0) + epsilon), mask=inside)
    tl.store(delta + at, sums, mask=inside)


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


@triton.jit(do_not_specialize=["total"])
def head_sum_kernel(
    of_heads,  # [heads, total] float32
    result,  # [total] float32
    total,
    heads,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros([ROWS], tl.float32)
    for head in range(heads):
        sums += tl.load(of_heads + head * total.to(tl.int64) + rows, mask=rows < total, other=0.0)
    tl.store(result + rows, sums, mask=rows < total)


def _tiles(m: int, n: int, warps: int, stages: int, capability: int = 80) -> Config:
    return Config({"BLOCK_M": m, "BLOCK_N": n}, warps, stages, capability)


def _query_candidates(shape_class: str) -> tuple[Config, ...]:
    if shape_class == "32-bit":
        return (_tiles(32, 32, 4, 1),)
    if shape_class == "other 16-bit":
        return (_tiles(64, 32, 4, 2),)
    return (
        _tiles(128, 64, 8, 2),
        _tiles(64, 64, 4, 2),
    )


def _key_candidates(shape_class: str) -> tuple[Config, ...]:
    if shape_class == "32-bit":
        return (_tiles(32, 32, 4, 1),)
    if shape_class == "other 16-bit":
        return (_tiles(32, 64, 4, 2),)
    return (
        _tiles(64, 128, 8, 2),
        _tiles(64, 64, 8, 2),
        _tiles(32, 64, 4, 2),
    )


def policy_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    out: Tensor,
    softmax_max: Tensor,
    softmax_sum: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to q, k, v and the policy, with the largest logit of a row as a constant; deterministic."""
    total, heads_q, head_dim = q.shape
    heads_k = k.shape[1]
    dq, dk, dv, dpolicy = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), policy.new_empty(total)
    if total == 0:
        return dq, dk, dv, dpolicy
    dout, q, k, v, out = (unit_rows(x) for x in (dout, q, k, v, out))
    policy, softmax_max, softmax_sum = (x.contiguous() for x in (policy, softmax_max, softmax_sum))
    bounds = clamped_pair(cu_seqlens, total, cu_seqlens, total)[0]
    num_segments = bounds.shape[0] - 1
    d0, d1 = head_tiles(head_dim)
    vectors = aligned(dout, q, k, v, out, dq, dk, dv)
    inverse, delta = softmax_max.new_empty((2, heads_q, total))
    row_terms_kernel[(triton.cdiv(total, _ROW_TERMS.blocks["ROWS"]) * heads_q,)](
        dout,
        out,
        softmax_sum,
        inverse,
        delta,
        *dout.stride()[:2],
        *out.stride()[:2],
        total,
        heads_q,
        epsilon,
        D=head_dim,
        D0=d0,
        D1=d1,
        ALIGNED=vectors,
        **_ROW_TERMS.options,
    )
    dout_sums = segment_sums(dout, bounds, inverse)

    inputs = (dout, q, k, v, policy, softmax_max, inverse, delta)
    strides = [stride for x in (dout, q, k, v) for stride in x.stride()[:2]]
    group = heads_q // heads_k
    scales = softmax_scale, softmax_scale * LOG2_E.value
    row_bytes, longest = 2 * head_dim * q.element_size(), min(max_seqlen, total)
    class_ = shape_class(head_dim, q.dtype)

    config = tuning.configuration(QUERY_GRADIENT, class_, q.device)
    slots = num_slots(total, num_segments, config.blocks["BLOCK_M"])
    query_gradient_kernel[(slots * heads_q,)](
        *inputs,
        bounds,
        dq,
        *strides,
        total,
        num_segments,
        slots,
        section_of_pairs(row_bytes, longest, group),
        heads_q,
        group,
        *scales,
        D=head_dim,
        D0=d0,
        D1=d1,
        ALIGNED=vectors,
        **config.options,
    )

    config = tuning.configuration(KEY_GRADIENT, class_, q.device)
    slots = num_slots(total, num_segments, config.blocks["BLOCK_N"])
    of_heads = softmax_max.new_empty((heads_k, total))
    key_gradient_kernel[(slots * heads_k,)](
        *inputs,
        dout_sums,
        bounds,
        dk,
        dv,
        of_heads,
        *strides,
        total,
        num_segments,
        slots,
        section_of_pairs(row_bytes * group, longest, 1),
        heads_k,
        *scales,
        epsilon,
        D=head_dim,
        D0=d0,
        D1=d1,
        ALIGNED=vectors,
        GROUP=group,
        **config.options,
    )
    head_sum_kernel[(triton.cdiv(total, _HEAD_SUM.blocks["ROWS"]),)](
        of_heads, dpolicy, total, heads_k, **_HEAD_SUM.options
    )
    return dq, dk, dv, dpolicy


def problem(shape_class: str, device: torch.device) -> Callable[[], Any]:
    """The gradients of a training step's four LLaVA prompts."""
    q, k, v, cu_seqlens, longest = typical_inputs(shape_class, device)
    policy, scale = typical_policy(q.shape[0], device), q.shape[2] ** -0.5
    # In place of a forward pass: of the size that a row has whose largest logit is 5.5.
    softmax_max = q.new_full((q.shape[1], q.shape[0]), 8.0, dtype=torch.float32)
    softmax_sum = torch.full_like(softmax_max, 10.0)
    return lambda: policy_attention_backward(
        v, q, k, v, policy, q, softmax_max, softmax_sum, cu_seqlens, longest, scale, 1e-6
    )


QUERY_GRADIENT = Tunable(
    "policy_attention_backward dq",
    SHAPE_CLASSES,
    _query_candidates,
    Config({"BLOCK_M": 64, "BLOCK_N": 32}),
    problem,
)
KEY_GRADIENT = Tunable(
    "policy_attention_backward dk dv",
    SHAPE_CLASSES,
    _key_candidates,
    Config({"BLOCK_M": 32, "BLOCK_N": 64}),
    problem,
)
