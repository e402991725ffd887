"""The log-sum-exp of every query row and head, without values: the first of the two passes behind attention scores.

A row of a tile is a query row with one of the query heads that share a key head. A tile streams the keys that any of
its rows sees; where rows are few, the keys are split over programs and the parts put together afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pruneops.triton import tuning
from pruneops.triton.attention_forward import typical_inputs
from pruneops.triton.head_tiles import LN_2, LOG2_E, head_tiles, load_heads, products, tile_config
from pruneops.triton.pieces import pieces
from pruneops.triton.score_tiles import FEW, SHAPE_CLASSES, few_inputs, score_class, shared_heads
from pruneops.triton.tuning import Config, Tunable

MERGED = 128  # rows that a program puts together


@triton.jit
def _add_keys(
    top,  # [M] largest logit so far
    total,  # [M] sum of exp2(logit - top)
    q0,
    q1,
    k,  # the key head's row 0
    stride_k,
    begin,
    end,
    first_key,  # [M]
    last_key,  # [M] the one after
    scale,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Streams keys ``[begin, end)``; without a mask they are whole tiles and all rows see them."""
    lanes = tl.arange(0, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        inside = start + lanes < end if MASKED else None
        k0, k1 = load_heads(k + tl.cast(start, tl.int64) * stride_k, lanes, stride_k, inside, D, D0, D1)
        x = products(q0, q1, k0, k1, D1)
        if MASKED:
            keys = (start + lanes)[None, :]
            visible = (keys >= first_key[:, None]) & (keys < last_key[:, None]) & (keys < end)
            x = tl.where(visible, x * scale, float("-inf"))
            new_top = tl.maximum(top, tl.max(x, 1))
            # A row that has not seen a key yet: -inf - -inf would be NaN.
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp2(x - shift[:, None])
        else:
            new_top = tl.maximum(top, tl.max(x, 1) * scale)
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp2(x * scale - shift[:, None])
        total = total * tl.exp2(top - shift) + tl.sum(weights, 1)
        top = new_top
    return top, total


@triton.jit(do_not_specialize=["total_q", "num_splits", "tiles"])
def lse_kernel(
    q,  # [total_q, Hq, D]
    k,  # [total_k, Hk, D]
    keys_of_rows,  # [2, total_q]
    lse,  # out [Hq, total_q], written if there is one split
    partial_top,  # out [splits, Hq, total_q], written if there are several: largest logits
    partial_sum,  # out [splits, Hq, total_q], likewise: sums of exp2(logit - top); 0 where a split has no keys
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    total_q,
    tiles,  # of query rows
    num_splits,
    scale,  # times log2(e)
    HEADS_K: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a key head
    HEADS: tl.constexpr,  # of them in a tile, a power of two
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ONE_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    CHUNKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    HEADS_Q: tl.constexpr = HEADS_K * GROUP
    program = tl.program_id(0)
    split = program % num_splits
    program = program // num_splits
    # The last rows see the most keys where the mask is causal, so they come first.
    tile = tiles - 1 - program % tiles
    chunk = program // tiles
    head_k = chunk // CHUNKS

    lanes = tl.arange(0, BLOCK_M)
    first_row = tile * (BLOCK_M // HEADS)
    place = lanes // HEADS
    of_group = chunk % CHUNKS * HEADS + lanes % HEADS
    heads = (head_k * GROUP + of_group).to(tl.int64)
    there = (first_row + place < total_q) & (of_group < GROUP)
    outs = heads * total_q + first_row + place
    first_key = tl.load(keys_of_rows + first_row + place, mask=there, other=0)
    last_key = tl.load(keys_of_rows + total_q + first_row + place, mask=there, other=0)
    seeing = first_key < last_key
    start = tl.min(tl.where(seeing, first_key, 2147483647), 0)
    stop = tl.max(tl.where(seeing, last_key, 0), 0)
    # Whole tiles a split, so that the order of additions depends on num_splits only.
    length = (tl.maximum(stop - start, 0) + BLOCK_N * num_splits - 1) // (BLOCK_N * num_splits) * BLOCK_N
    begin = start + split * length
    end = tl.minimum(begin + length, stop)
    # Up to here every key is seen by all rows. Without a mask the largest logit is the scale times the largest product,
    # which takes a positive scale.
    most = tl.max(tl.where(there, first_key, 0), 0)
    fewest = tl.min(tl.where(there, tl.where(seeing, last_key, 0), 2147483647), 0)
    full = tl.maximum(tl.minimum(fewest, end) - begin, 0) // BLOCK_N * BLOCK_N
    full = begin + tl.where((most == start) & (scale > 0), full, 0)

    q += tl.cast(first_row, tl.int64) * stride_q
    q0, q1 = load_heads(q, place.to(tl.int64) * stride_q + heads * stride_q_head, 1, there, D, D0, D1)
    k += tl.cast(head_k, tl.int64) * stride_k_head
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.full([BLOCK_M], 0.0, tl.float32)
    top, total = _add_keys(
        top, total, q0, q1, k, stride_k, begin, full, first_key, last_key, scale, D, D0, D1, BLOCK_N, MASKED=False
    )
    top, total = _add_keys(
        top, total, q0, q1, k, stride_k, full, end, first_key, last_key, scale, D, D0, D1, BLOCK_N, MASKED=True
    )
    if ONE_SPLIT:
        # A row without keys has a sum of 0 and, as its largest logit is -inf, an LSE of -inf.
        tl.store(lse + outs, (top + tl.log2(tl.where(total == 0.0, 1.0, total))) * LN_2, mask=there)
    else:
        outs += tl.cast(split, tl.int64) * HEADS_Q * total_q
        tl.store(partial_top + outs, top, mask=there)
        tl.store(partial_sum + outs, total, mask=there)


@triton.jit(do_not_specialize=["count", "num_splits"])
def merge_kernel(
    partial_top,  # [splits, Hq * total_q]
    partial_sum,  # [splits, Hq * total_q]
    lse,  # out [Hq * total_q]
    count,  # Hq * total_q
    num_splits,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < count
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.full([BLOCK], 0.0, tl.float32)
    for _ in range(0, num_splits):
        part_top = tl.load(partial_top + rows, mask=inside, other=float("-inf"))
        part_sum = tl.load(partial_sum + rows, mask=inside, other=0.0)
        new_top = tl.maximum(top, part_top)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - shift) + part_sum * tl.exp2(part_top - shift)
        top = new_top
        partial_top += count
        partial_sum += count
    tl.store(lse + rows, (top + tl.log2(tl.where(total == 0.0, 1.0, total))) * LN_2, mask=inside)


def softmax_lse(q: Tensor, k: Tensor, keys_of_rows: Tensor, softmax_scale: float, few: bool) -> Tensor:
    """float32 ``[Hq, total_q]``, natural logarithms; one launch, or two where the keys are split."""
    total_q, heads_q, head_dim = q.shape
    total_k, heads_k = k.shape[:2]
    group = heads_q // heads_k
    config = tuning.configuration(LSE, score_class(head_dim, q.dtype, few), q.device)
    heads = shared_heads(group, config.blocks["BLOCK_M"], few)
    tiles = triton.cdiv(total_q, config.blocks["BLOCK_M"] // heads)
    programs = tiles * heads_k * triton.cdiv(group, heads)
    num_splits = pieces(programs, triton.cdiv(total_k, 2 * config.blocks["BLOCK_N"]), q.device)
    lse = q.new_empty((heads_q, total_q), dtype=torch.float32)
    parts = num_splits if num_splits > 1 else 0
    partial_top, partial_sum = (q.new_empty((parts, heads_q, total_q), dtype=torch.float32) for _ in range(2))
    d0, d1 = head_tiles(head_dim)
    lse_kernel[(programs * num_splits,)](
        q,
        k,
        keys_of_rows,
        lse,
        partial_top,
        partial_sum,
        *q.stride()[:2],
        *k.stride()[:2],
        total_q,
        tiles,
        num_splits,
        softmax_scale * LOG2_E.value,
        HEADS_K=heads_k,
        GROUP=group,
        HEADS=heads,
        D=head_dim,
        D0=d0,
        D1=d1,
        ONE_SPLIT=num_splits == 1,
        **config.options,
    )
    if num_splits > 1:
        merge_kernel[(triton.cdiv(lse.numel(), MERGED),)](
            partial_top, partial_sum, lse, lse.numel(), num_splits, BLOCK=MERGED, **_MERGE_OPTIONS
        )
    return lse


_MERGE_OPTIONS = Config({}, num_warps=4, num_stages=1).options


def _candidates(shape_class: str) -> tuple[Config, ...]:
    if shape_class.startswith(FEW):
        # Memory decides, as in decoding.
        if shape_class.endswith("32-bit"):
            return (tile_config(16, 16, 4, 2),)
        return tile_config(16, 64, 4, 3), tile_config(16, 128, 4, 2), tile_config(16, 32, 4, 3)
    if shape_class == "32-bit":
        return (tile_config(32, 16, 8, 2),)
    if shape_class == "other 16-bit":
        return (tile_config(64, 32, 4, 2),)
    return (
        tile_config(128, 128, 8, 3, 90),
        tile_config(128, 128, 8, 2, 90),
        tile_config(128, 64, 4, 3),
        tile_config(64, 64, 4, 3),
        tile_config(64, 64, 4, 2),
    )


def problem(shape_class: str, device: torch.device) -> Callable[[], Any]:
    """The prefill of four LLaVA prompts; with few rows, the last row of each against all keys."""
    few = shape_class.startswith(FEW)
    if few:
        q, k, _, cu_seqlens = few_inputs(shape_class, device)
        ranges = torch.stack([cu_seqlens[:-1], cu_seqlens[1:]])
    else:
        q, k, _, cu_seqlens, _ = typical_inputs(shape_class, device)
        rows = torch.arange(q.shape[0], dtype=torch.int32, device=device)
        ranges = torch.stack([cu_seqlens[torch.bucketize(rows, cu_seqlens[1:], right=True)], rows + 1])
    return lambda: softmax_lse(q, k, ranges, q.shape[2] ** -0.5, few)


LSE = Tunable("softmax_lse", SHAPE_CLASSES, _candidates, Config({"BLOCK_M": 32, "BLOCK_N": 64}), problem)
