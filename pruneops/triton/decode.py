"""decode_attention: one new token a row against cache slots, the keys split over programs (Flash-Decoding, 2023).

A program owns a piece of the keys of one cache row and key head. The query heads of that key head are the rows of its
tile, so that keys and values are read once. Pieces follow the filled slots, which only the device knows; their number
follows from shapes. Logits are kept in units of log 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pruneops.triton import tuning
from pruneops.triton.attention_forward import SHAPE_CLASSES, shape_class, unit_rows
from pruneops.triton.head_tiles import (
    LN_2,
    LOG2_E,
    SMALLEST,
    add_weighted,
    head_tiles,
    load_heads,
    products,
    scale_heads,
    store_heads,
    zero_heads,
)
from pruneops.triton.pieces import pieces
from pruneops.triton.tuning import Config, Tunable

# Query heads of one key head that share a tile; more of them take several.
MOST_ROWS = 64
SPLITS = 16  # pieces that are put together at a time
SCORE_HEADS = 16
SCORE_SLOTS = 128


@triton.jit
def _filled(seqused, row, capacity):
    return tl.minimum(tl.maximum(tl.load(seqused + row), 0), capacity)


@triton.jit(do_not_specialize=["capacity", "num_splits"])
def split_kernel(
    q,  # [B, Hq, D]
    k,  # [B, capacity, Hk, D]
    v,  # [B, capacity, Hk, D]
    seqused,  # [B]
    out,  # [B, Hq, D], written if there is one split
    lse,  # [Hq, B], likewise
    partial_out,  # [B, Hq, splits, D] float32, written if there are several: sums of exp2(logit - top) * value
    partial_top,  # [B, Hq, splits] float32, largest logits
    partial_sum,  # [B, Hq, splits] float32, sums of exp2(logit - top); 0 where a split has no keys
    logits,  # [B, Hq, capacity] float32, or None
    stride_q,
    stride_q_head,
    stride_k_slot,
    stride_k,
    stride_k_head,
    stride_v_slot,
    stride_v,
    stride_v_head,
    batch,
    capacity,
    num_splits,
    scale,  # times log2(e)
    HEADS_K: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a key head
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ROWS: tl.constexpr,
    ONE_SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    ROW_TILES: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    HEADS_Q: tl.constexpr = HEADS_K * GROUP
    program = tl.program_id(0)
    split = program % num_splits
    program = program // num_splits
    tile = program % ROW_TILES
    head_k = program // ROW_TILES % HEADS_K
    row = program // (ROW_TILES * HEADS_K)
    wide_row = row.to(tl.int64)

    used = _filled(seqused, row, capacity)
    # Whole tiles a split, so that the order of additions depends on num_splits only.
    length = tl.cdiv(tl.cdiv(used, BLOCK_N), num_splits) * BLOCK_N
    begin = split * length
    end = tl.minimum(begin + length, used)

    of_group = tile * ROWS + tl.arange(0, ROWS)
    there = of_group < GROUP
    heads = head_k * GROUP + of_group
    parts = (wide_row * HEADS_Q + heads) * num_splits + split
    if not ONE_SPLIT and begin >= end:
        tl.store(partial_sum + parts, tl.full([ROWS], 0.0, tl.float32), mask=there)
        return

    k += wide_row * stride_k_slot + head_k.to(tl.int64) * stride_k_head
    v += wide_row * stride_v_slot + head_k.to(tl.int64) * stride_v_head
    q0, q1 = load_heads(q + wide_row * stride_q, heads, stride_q_head, there, D, D0, D1)
    acc0, acc1 = zero_heads(ROWS, D0, D1)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    lanes = tl.arange(0, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        slots = start + lanes
        inside = slots < end
        wide_start = tl.cast(start, tl.int64)
        k0, k1 = load_heads(k + wide_start * stride_k, lanes, stride_k, inside, D, D0, D1)
        x = products(q0, q1, k0, k1, D1) * scale
        if logits is not None:
            places = (wide_row * HEADS_Q + heads)[:, None] * capacity + slots[None, :]
            tl.store(logits + places, x, mask=there[:, None] & inside[None, :])
        x = tl.where(inside[None, :], x, float("-inf"))
        new_top = tl.maximum(top, tl.max(x, 1))
        # Logits may all be -inf, and -inf - -inf would be NaN.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(x - shift[:, None])
        alpha = tl.exp2(top - shift)
        top = new_top
        total = total * alpha + tl.sum(weights, 1)
        acc0, acc1 = scale_heads(acc0, acc1, alpha[:, None], D1)
        v0, v1 = load_heads(v + wide_start * stride_v, lanes, stride_v, inside, D, D0, D1)
        acc0, acc1 = add_weighted(acc0, acc1, weights, v0, v1, D1)

    if ONE_SPLIT:
        # A row without keys has a sum of 0, which leaves 0 and, as its largest logit is -inf, an LSE of -inf.
        total = tl.where(total == 0.0, 1.0, total)
        tl.store(lse + heads * batch + row, (top + tl.log2(total)) * LN_2, mask=there)
        acc0, acc1 = scale_heads(acc0, acc1, (1.0 / total)[:, None], D1)
        store_heads(out + wide_row * (HEADS_Q * D), heads, D, there, acc0, acc1, D, D0, D1)
    else:
        tl.store(partial_top + parts, top, mask=there)
        tl.store(partial_sum + parts, total, mask=there)
        store_heads(partial_out, parts, D, there, acc0, acc1, D, D0, D1)


@triton.jit(do_not_specialize=["batch", "num_splits"])
def combine_kernel(
    partial_out,  # [B, Hq, splits, D]
    partial_top,  # [B, Hq, splits]
    partial_sum,  # [B, Hq, splits]
    out,  # [B, Hq, D]
    lse,  # [Hq, B]
    batch,
    num_splits,
    HEADS_Q: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,  # D, raised to a power of two
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # of B * Hq
    columns = tl.arange(0, WIDTH)
    acc = tl.full([WIDTH], 0.0, tl.float32)
    top = float("-inf")
    total = 0.0
    for first in range(0, num_splits, SPLITS):
        splits = first + tl.arange(0, SPLITS)
        parts = row * num_splits + splits
        there = splits < num_splits
        part_sum = tl.load(partial_sum + parts, mask=there, other=0.0)
        filled = part_sum != 0.0  # NaN included; a split without keys has written nothing else
        part_top = tl.load(partial_top + parts, mask=filled, other=float("-inf"))
        part = tl.load(
            partial_out + parts[:, None] * D + columns[None, :],
            mask=filled[:, None] & (columns < D)[None, :],
            other=0.0,
        )
        new_top = tl.maximum(top, tl.max(part_top, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.where(filled, tl.exp2(part_top - shift), 0.0)
        alpha = tl.exp2(top - shift)
        top = new_top
        total = total * alpha + tl.sum(weights * part_sum, 0)
        acc = acc * alpha + tl.sum(weights[:, None] * part, 0)
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(lse + row % HEADS_Q * batch + row // HEADS_Q, (top + tl.log2(total)) * LN_2)
    tl.store(out + row * D + columns, (acc / total).to(out.dtype.element_ty), mask=columns < D)


@triton.jit(do_not_specialize=["batch", "capacity", "blocks"])
def score_kernel(
    logits,  # [B, Hq, capacity], of the filled slots
    lse,  # [Hq, B]
    seqused,  # [B]
    scores,  # [B, capacity]
    batch,
    capacity,
    blocks,  # of a row's slots
    HEADS_Q: tl.constexpr,
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    program = tl.program_id(0)
    row = program // blocks
    slots = program % blocks * SLOTS + tl.arange(0, SLOTS)
    inside = slots < _filled(seqused, row, capacity)
    wide_row = row.to(tl.int64)
    result = tl.full([SLOTS], 0.0, tl.float32)
    for first in range(0, HEADS_Q, HEADS):
        heads = first + tl.arange(0, HEADS)
        there = heads < HEADS_Q
        shift = tl.load(lse + heads * batch + row, mask=there, other=0.0) * LOG2_E
        mask = there[:, None] & inside[None, :]
        places = (wide_row * HEADS_Q + heads)[:, None] * capacity + slots[None, :]
        x = tl.load(logits + places, mask=mask, other=0.0)
        result += tl.sum(tl.where(mask, tl.exp2(x - shift[:, None]), 0.0), 0)
    tl.store(scores + wide_row * capacity + slots, result / HEADS_Q, mask=slots < capacity)


def _wide_head_tiles(head_dim: int) -> tuple[int, int]:
    """:func:`head_tiles`, but tiles of 16 query heads wider than high: square ones are computed by every warp anew."""
    d0, d1 = head_tiles(head_dim)
    return (32, 0) if d0 == SMALLEST else (d0, max(32, d1) if d1 else 0)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqused_k: Tensor,
    softmax_scale: float,
    num_splits: int,
    return_scores: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of one token a row: ``out``, ``softmax_lse`` and, or else ``[0, 0]``, the scores of the slots.

    Source: Flash-Decoding (Dao, Haziza, Massa, Sizov, 2023).
    """
    batch, heads_q, head_dim = q.shape
    capacity, heads_k = k_cache.shape[1:3]
    out = q.new_empty(q.shape)
    lse = q.new_empty((heads_q, batch), dtype=torch.float32)
    scores = q.new_empty((batch, capacity) if return_scores else (0, 0), dtype=torch.float32)
    if batch == 0:
        return out, lse, scores
    q, k, v = unit_rows(q), unit_rows(k_cache), unit_rows(v_cache)
    seqused = seqused_k.contiguous()
    group = heads_q // heads_k
    rows = min(MOST_ROWS, max(SMALLEST, triton.next_power_of_2(group)))
    config = tuning.configuration(DECODE, shape_class(head_dim, q.dtype), q.device)
    programs = batch * heads_k * triton.cdiv(group, rows)
    tiles = triton.cdiv(capacity, config.blocks["BLOCK_N"])
    num_splits = min(num_splits, tiles) if num_splits > 0 else pieces(programs, triton.cdiv(tiles, 2), q.device)
    num_splits = max(1, num_splits)
    several = num_splits > 1
    parts = (batch, heads_q, num_splits) if several else (0,)
    partial_out = q.new_empty((*parts, head_dim), dtype=torch.float32)
    partial_top, partial_sum = (q.new_empty(parts, dtype=torch.float32) for _ in range(2))
    logits = q.new_empty((batch, heads_q, capacity), dtype=torch.float32) if return_scores else None
    d0, d1 = _wide_head_tiles(head_dim)
    split_kernel[(programs * num_splits,)](
        q,
        k,
        v,
        seqused,
        out,
        lse,
        partial_out,
        partial_top,
        partial_sum,
        logits,
        *q.stride()[:2],
        *k.stride()[:3],
        *v.stride()[:3],
        batch,
        capacity,
        num_splits,
        softmax_scale * LOG2_E.value,
        HEADS_K=heads_k,
        GROUP=group,
        D=head_dim,
        D0=d0,
        D1=d1,
        ROWS=rows,
        ONE_SPLIT=not several,
        **config.options,
    )
    if several:
        combine_kernel[(batch * heads_q,)](
            partial_out,
            partial_top,
            partial_sum,
            out,
            lse,
            batch,
            num_splits,
            HEADS_Q=heads_q,
            D=head_dim,
            WIDTH=triton.next_power_of_2(head_dim),
            SPLITS=SPLITS,
            **COMBINE.options,
        )
    blocks = triton.cdiv(capacity, SCORE_SLOTS)
    if logits is not None and blocks:
        score_kernel[(batch * blocks,)](
            logits,
            lse,
            seqused,
            scores,
            batch,
            capacity,
            blocks,
            HEADS_Q=heads_q,
            HEADS=min(SCORE_HEADS, triton.next_power_of_2(heads_q)),
            SLOTS=SCORE_SLOTS,
            **SCORE.options,
        )
    return out, lse, scores


COMBINE = Config({}, num_warps=4, num_stages=1)
SCORE = Config({}, num_warps=4, num_stages=1)


def _tiles(keys: int, warps: int, stages: int, capability: int = 80) -> Config:
    return Config({"BLOCK_N": keys}, warps, stages, capability)


def _candidates(shape_class: str) -> tuple[Config, ...]:
    # Memory decides: what counts is how many bytes of keys and values a multiprocessor has on the way.
    if shape_class == "32-bit":
        return _tiles(32, 4, 2), _tiles(16, 4, 2)
    if shape_class == "other 16-bit":
        return (_tiles(32, 8, 2),)
    return _tiles(64, 4, 3), _tiles(128, 8, 2), _tiles(32, 4, 4), _tiles(64, 4, 2)


def problem(shape_class: str, device: torch.device) -> Callable[[], Any]:
    """A step of two conversations about an image in five crops."""
    head_dim = {"other 16-bit": 256, "32-bit": 128}.get(shape_class) or int(shape_class[1:].split()[0])
    dtype = torch.float32 if shape_class == "32-bit" else torch.bfloat16
    heads = 4096 // max(64, head_dim)
    generator = torch.Generator(device).manual_seed(0)
    q = torch.randn(2, heads, head_dim, device=device, generator=generator).to(dtype)
    k, v = torch.randn(2, 2, 3072, heads, head_dim, device=device, generator=generator).to(dtype)
    used = torch.tensor([2960, 2320], dtype=torch.int32, device=device)
    return lambda: decode_attention(q, k, v, used, head_dim**-0.5, 0, False)


DECODE = Tunable("decode_attention", SHAPE_CLASSES, _candidates, Config({"BLOCK_N": 64}), problem)
TUNABLES: tuple[Tunable, ...] = (DECODE,)
KERNELS = {"decode_attention": decode_attention}
