"""policy_attention: causal attention in which a number per key, the policy, says how much the key counts.

A program owns a block of rows of a segment and one query head, as in FlashAttention-2 (arXiv 2307.08691). A row has two
largest logits: ``top`` over all keys that it may see, which ``epsilon`` refers to, and ``kept``, with the log of the
policy added, which its sums are relative to. So what is added up stays near 1 however far a dropped key is above the
others, and float16 holds it.
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
    add_weighted,
    aligned,
    head_tiles,
    load_heads,
    products,
    scale_heads,
    store_heads,
    tile_config,
    zero_heads,
)
from pruneops.triton.segments import clamped_pair
from pruneops.triton.tuning import Config, Tunable

# Boundaries that a program looks at in one step.
_CHUNK = tl.constexpr(128)
# Of segment_sums: 32 KiB of 16-bit rows in flight, 64 bytes of each.
_SUMS = Config({"ROWS": 512, "COLUMNS": 32}, num_warps=8)
_LOGS = Config({"ROWS": 512}, num_warps=4)


@triton.jit
def block_of_slot(
    bounds,  # [B+1] ascending, within [0, total]
    num_segments,
    total,
    slot,
    BLOCK: tl.constexpr,
):
    """The part of the packed rows that a slot's block is of: number, first row and length; and the block's first row.

    Part 0 are the rows before the first segment, parts 1 to B the segments, part B + 1 the rows after the last. A part
    that starts at row ``s`` has the slots from ``s // BLOCK`` plus its number on, which are enough for its blocks and
    which the next part leaves alone; so ``total // BLOCK + B + 2`` slots hold every block, whatever the lengths. In a
    slot to spare the block starts past its part.
    """
    part = -1
    for first in range(0, num_segments + 2, _CHUNK):
        i = first + tl.arange(0, _CHUNK)
        there = i < num_segments + 2
        starts = tl.load(bounds + i - 1, mask=there & (i > 0), other=0)
        part += tl.sum((there & (starts // BLOCK + i <= slot)).to(tl.int32))
    start = tl.load(bounds + part - 1, mask=part > 0, other=0)
    stop = tl.load(bounds + part, mask=part <= num_segments, other=total)
    return part, start, stop - start, (slot - start // BLOCK - part) * BLOCK


def num_slots(total: int, num_segments: int, block: int) -> int:
    """How many slots :func:`block_of_slot` needs."""
    return total // block + num_segments + 2


@triton.jit(do_not_specialize=["total", "num_segments"])
def segment_sums_kernel(
    rows,  # [total, heads, D]
    factors,  # [heads, total], or None
    bounds,  # [B+1]
    sums,  # [B, heads, D] float32
    stride,
    stride_head,
    total,
    num_segments,
    heads,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    parts = tl.cdiv(D, COLUMNS)
    columns = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    head = (tl.program_id(0) // parts % heads).to(tl.int64)
    segment = tl.program_id(0) // parts // heads
    start = tl.load(bounds + segment).to(tl.int64)
    length = tl.load(bounds + segment + 1) - start
    rows += start * stride + head * stride_head
    sums_of_lanes = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, length, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < length)[:, None] & (columns < D)[None, :]
        x = tl.load(rows + row.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if factors is not None:
            x *= tl.load(factors + head * total + start + row, mask=row < length, other=0.0)[:, None]
        sums_of_lanes += x
    out = sums + (segment.to(tl.int64) * heads + head) * D
    tl.store(out + columns, tl.sum(sums_of_lanes, 0), mask=columns < D)


def segment_sums(rows: Tensor, bounds: Tensor, factors: Tensor | None = None) -> Tensor:
    """float32 ``[B, heads, D]``: the sum of each segment's rows, times ``factors`` (``[heads, total]``) if given."""
    total, heads, head_dim = rows.shape
    num_segments = bounds.shape[0] - 1
    sums = rows.new_empty((num_segments, heads, head_dim), dtype=torch.float32)
    if num_segments:
        segment_sums_kernel[(num_segments * heads * triton.cdiv(head_dim, _SUMS.blocks["COLUMNS"]),)](
            rows,
            factors,
            bounds,
            sums,
            *rows.stride()[:2],
            total,
            num_segments,
            heads,
            D=head_dim,
            **_SUMS.options,
        )
    return sums


@triton.jit(do_not_specialize=["total"])
def log_policy_kernel(
    policy,  # [total] float32
    logs,  # [total] float32
    total,
    ROWS: tl.constexpr,
):
    """``log2 |policy|``; for attention to add, as a logarithm takes as long as a few keys."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(logs + rows, tl.log2(tl.abs(tl.load(policy + rows, mask=rows < total, other=1.0))), mask=rows < total)


@triton.jit
def load_sum(
    sums,  # [D] of a segment and head
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
):
    """``[1, D0]`` and ``[1, D1]`` of :func:`segment_sums`."""
    return load_heads(sums, tl.arange(0, 1), 0, None, D, D0, D1)


@triton.jit
def _attend(
    acc0,  # [M, D0]
    acc1,  # [M, D1]
    top,  # [M] largest logit so far
    kept,  # [M] largest so far of logit + log2 |policy|
    total,  # [M] sum of exp2(logit - kept) * policy
    q0,
    q1,
    k,  # the key head's first row of the segment
    v,
    policy,  # of the segment's first row
    log_policy,
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
    """One tile of keys. Without a mask all rows see all of them and none is a row's own; it takes a positive scale."""
    keys = start + tl.arange(0, BLOCK_N)
    inside = keys < length if MASKED else None
    k0, k1 = load_heads(k, keys, stride_k, inside, D, D0, D1, ALIGNED)
    logits = products(q0, q1, k0, k1, D1)
    if MASKED:
        logits = tl.where(keys[None, :] <= rows[:, None], logits * scale, float("-inf"))
        top = tl.maximum(top, tl.max(logits, 1))
        # A row's own key counts 1; so do those it does not see, which have nothing to count.
        before = keys[None, :] < rows[:, None]
        counted = logits + tl.where(before, tl.load(log_policy + keys, mask=inside)[None, :], 0.0)
    else:
        top = tl.maximum(top, tl.max(logits, 1) * scale)
        counted = logits * scale + tl.load(log_policy + keys)[None, :]
    new_kept = tl.maximum(kept, tl.max(counted, 1))
    # As long as all keys are dropped: -inf - -inf would be NaN.
    shift = tl.where(new_kept == float("-inf"), 0.0, new_kept)
    weights = tl.exp2(counted - shift[:, None])
    if MASKED:
        negative = before & (tl.load(policy + keys, mask=inside) < 0.0)[None, :]
    else:
        negative = (tl.load(policy + keys) < 0.0)[None, :]
    weights = tl.where(negative, -weights, weights)
    alpha = tl.exp2(kept - shift)
    total = total * alpha + tl.sum(weights, 1)
    acc0, acc1 = scale_heads(acc0, acc1, alpha[:, None], D1)
    v0, v1 = load_heads(v, keys, stride_v, inside, D, D0, D1, ALIGNED)
    acc0, acc1 = add_weighted(acc0, acc1, weights, v0, v1, D1)
    return acc0, acc1, top, new_kept, total


@triton.jit(do_not_specialize=["total", "num_segments", "slots", "section"])
def forward_kernel(
    q,  # [total, Hq, D]
    k,  # [total, Hk, D]
    v,  # [total, Hk, D]
    policy,  # [total] float32
    log_policy,  # [total] float32
    bounds,  # [B+1]
    value_sums,  # [B, Hk, D] float32
    out,  # [total, Hq, D], contiguous
    softmax_max,  # [Hq, total] float32, in units of log 2
    softmax_sum,  # [Hq, total] float32
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
    scale,  # times log2(e)
    epsilon,
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
    softmax_max += head * total
    softmax_sum += head * total
    out += head * D
    rows = first + tl.arange(0, BLOCK_M)
    inside = rows < length
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    below = tl.zeros([BLOCK_M], tl.float32)
    acc0, acc1 = zero_heads(BLOCK_M, D0, D1)
    if (part == 0) | (part > num_segments):
        tl.store(softmax_max + start + rows, top, mask=inside)
        tl.store(softmax_sum + start + rows, below, mask=inside)
        store_heads(out, start + rows, heads_q * D, inside, acc0, acc1, D, D0, D1, ALIGNED)
        return

    head_k = head // group
    offset = start.to(tl.int64)
    q += offset * stride_q + head * stride_q_head
    k += offset * stride_k + head_k * stride_k_head
    v += offset * stride_v + head_k * stride_v_head
    policy += start
    log_policy += start
    q0, q1 = load_heads(q, rows, stride_q, inside, D, D0, D1, ALIGNED)
    kept = top
    # Without a mask the largest logit is the scale times the largest product, which takes a positive scale.
    full = tl.where(scale > 0, first // BLOCK_N * BLOCK_N, 0)
    # Masks take registers.
    MASKED_N: tl.constexpr = max(16, BLOCK_N // 2)
    for key in range(0, full, BLOCK_N):
        acc0, acc1, top, kept, below = _attend(
            acc0, acc1, top, kept, below, q0, q1, k, v, policy, log_policy, stride_k, stride_v, key, rows, length,
            scale, D, D0, D1, ALIGNED, BLOCK_N, MASKED=False,
        )  # fmt: skip
    for key in range(full, tl.minimum(first + BLOCK_M, length), MASKED_N):
        acc0, acc1, top, kept, below = _attend(
            acc0, acc1, top, kept, below, q0, q1, k, v, policy, log_policy, stride_k, stride_v, key, rows, length,
            scale, D, D0, D1, ALIGNED, MASKED_N, MASKED=True,
        )  # fmt: skip

    # From here on sums are relative to the largest logit of all keys, as epsilon is.
    factor = tl.exp2(kept - top)
    below *= factor
    # Counted from the block: the rows from above would take registers all the way down here.
    rows = tl.arange(0, BLOCK_M)
    inside = rows < length - first
    tl.store(softmax_max + start + first + rows, top, mask=inside)
    tl.store(softmax_sum + start + first + rows, below, mask=inside)
    sum0, sum1 = load_sum(value_sums + ((part - 1).to(tl.int64) * (heads_q // group) + head_k) * D, D, D0, D1)
    share = epsilon / length.to(tl.float32)
    inverse = 1.0 / (below + epsilon)
    acc0 = (acc0 * factor[:, None] + sum0 * share) * inverse[:, None]
    if D1 > 0:
        acc1 = (acc1 * factor[:, None] + sum1 * share) * inverse[:, None]
    store_heads(out + (offset + first) * heads_q * D, rows, heads_q * D, inside, acc0, acc1, D, D0, D1, ALIGNED)


def _candidates(shape_class: str) -> tuple[Config, ...]:
    if shape_class == "32-bit":
        return tile_config(32, 16, 8, 2), tile_config(16, 16, 8, 2)
    if shape_class == "other 16-bit":
        return tile_config(64, 32, 8, 2), tile_config(32, 32, 8, 2)
    largest = tile_config(128, 128, 8, 2, 90, 100 if shape_class == "d128 16-bit" else 1000)
    return largest, tile_config(128, 64, 8, 3, 90), tile_config(128, 64, 8, 2), tile_config(64, 64, 4, 2)


def policy_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention under a policy: ``out``, and per row the largest logit (in units of log 2) and the sum of the weights.

    Source: Dynamic-LLaVA (arXiv 2412.00876, section 3.2). Any ``max_seqlen`` gives the same result.
    """
    total, heads_q, head_dim = q.shape
    out = q.new_empty(q.shape)
    softmax_max = q.new_empty((heads_q, total), dtype=torch.float32)
    softmax_sum = torch.empty_like(softmax_max)
    if total == 0:
        return out, softmax_max, softmax_sum
    q, k, v, policy = unit_rows(q), unit_rows(k), unit_rows(v), policy.contiguous()
    bounds = clamped_pair(cu_seqlens, total, cu_seqlens, total)[0]
    value_sums = segment_sums(v, bounds)
    log_policy = torch.empty_like(policy)
    log_policy_kernel[(triton.cdiv(total, _LOGS.blocks["ROWS"]),)](policy, log_policy, total, **_LOGS.options)
    config = tuning.configuration(FORWARD, shape_class(head_dim, q.dtype), q.device)
    num_segments, group = bounds.shape[0] - 1, heads_q // k.shape[1]
    slots = num_slots(total, num_segments, config.blocks["BLOCK_M"])
    d0, d1 = head_tiles(head_dim)
    forward_kernel[(slots * heads_q,)](
        q,
        k,
        v,
        policy,
        log_policy,
        bounds,
        value_sums,
        out,
        softmax_max,
        softmax_sum,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        total,
        num_segments,
        slots,
        section_of_pairs(2 * head_dim * q.element_size(), min(max_seqlen, total), group),
        heads_q,
        group,
        softmax_scale * LOG2_E.value,
        epsilon,
        D=head_dim,
        D0=d0,
        D1=d1,
        ALIGNED=aligned(q, k, v, out),
        **config.options,
    )
    return out, softmax_max, softmax_sum


def typical_policy(total: int, device: torch.device) -> Tensor:
    """Half of the keys dropped."""
    return (torch.arange(total, device=device) % 2).float()


def problem(shape_class: str, device: torch.device) -> Callable[[], Any]:
    """A training step's four LLaVA prompts."""
    q, k, v, cu_seqlens, longest = typical_inputs(shape_class, device)
    policy, scale = typical_policy(q.shape[0], device), q.shape[2] ** -0.5
    return lambda: policy_attention(q, k, v, policy, cu_seqlens, longest, scale, 1e-6)


# Two tiles of keys to one of rows, so that a test of 70 rows has tiles without and with a mask, and parts of one.
FORWARD = Tunable("policy_attention", SHAPE_CLASSES, _candidates, Config({"BLOCK_M": 64, "BLOCK_N": 32}), problem)
