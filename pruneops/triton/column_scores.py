"""column_scores: what each key receives from all query rows of its segment. A program owns a tile of keys.

Needs the LSE of every row (:mod:`pruneops.triton.softmax_lse`, or the caller's), after which a probability is one
``exp2``. Heads are reduced before query rows. Where both are sums, or both are largest values, the order does not
matter: then a tile of keys stays where it is while all rows of a head stream past. Otherwise, and where rows are few
and the keys are all there is to read, all heads of a tile of rows are put together before the next rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pruneops.triton import tuning
from pruneops.triton.attention_forward import typical_inputs, unit_rows
from pruneops.triton.head_tiles import LOG2_E, head_tiles, load_heads, products, tile_config
from pruneops.triton.pieces import pieces
from pruneops.triton.score_tiles import (
    FEW,
    SHAPE_CLASSES,
    combined,
    few_inputs,
    reduced,
    score_class,
    shared_heads,
)
from pruneops.triton.softmax_lse import softmax_lse
from pruneops.triton.tuning import Config, Tunable
from pruneops.triton.visible_ranges import visible_ranges

FINISHED = 256  # keys that a program of the last step has
# Programs a multiprocessor gets: the first keys are seen by many more rows than the last ones.
PROGRAMS = 8


@triton.jit
def _where_seen(
    x,  # [M, N]
    keys,  # [N], counted from the tile's first
    first_key,  # [M], likewise
    last_key,  # [M], the one after, likewise
):
    return tl.where((keys[None, :] >= first_key[:, None]) & (keys[None, :] < last_key[:, None]), x, 0.0)


@triton.jit
def _store_column(
    scores,  # [total_k], or [splits, total_k]
    column,  # [N]
    rows_of_keys,  # [3, total_k]
    keys,
    total_k,
    factor,  # of the mean over heads, or 1
    split,
    MEAN: tl.constexpr,  # over query rows
    ONE_SPLIT: tl.constexpr,
):
    inside = keys < total_k
    if ONE_SPLIT:
        column *= factor
        if MEAN:
            length = tl.load(rows_of_keys + 2 * total_k + keys, mask=inside, other=1)
            column /= tl.maximum(length, 1).to(tl.float32)
    else:
        scores += tl.cast(split, tl.int64) * total_k
    tl.store(scores + keys, column, mask=inside)


@triton.jit(do_not_specialize=["total_q", "total_k", "num_splits", "heads_of_split"])
def keys_stay_kernel(
    q,  # [total_q, Hq, D]
    k,  # [total_k, Hk, D]
    lse,  # [Hq, total_q]
    keys_of_rows,  # [2, total_q]
    rows_of_keys,  # [3, total_k]
    scores,  # out [total_k], or [splits, total_k] where heads are split over programs
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    total_q,
    total_k,
    num_splits,
    heads_of_split,
    scale,  # times log2(e)
    factor,
    HEADS_Q: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    MAX: tl.constexpr,
    MEAN: tl.constexpr,
    LIMITED: tl.constexpr,  # rows see what kv_limit says
    ONE_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    split = tl.program_id(0) % num_splits
    first_tile_key = tl.program_id(0) // num_splits * BLOCK_N
    final_key = tl.minimum(first_tile_key + BLOCK_N, total_k) - 1
    begin = tl.load(rows_of_keys + first_tile_key)
    end = tl.load(rows_of_keys + total_k + final_key)
    # Rows in [full, full_end) see all keys of the tile: from where its last key is seen to where the segment of its
    # first key ends. There are none if the tile has keys of several segments.
    full = end
    full_end = end
    if not LIMITED:
        some = begin + tl.maximum(tl.load(rows_of_keys + final_key) - begin + BLOCK_M - 1, 0) // BLOCK_M * BLOCK_M
        whole = tl.maximum(tl.load(rows_of_keys + total_k + first_tile_key) - some, 0) // BLOCK_M * BLOCK_M
        full = tl.where(whole > 0, some, end)
        full_end = tl.where(whole > 0, some + whole, end)
    others = tl.cdiv(full - begin, BLOCK_M) + tl.cdiv(end - full_end, BLOCK_M)

    keys = tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    k += tl.cast(first_tile_key, tl.int64) * stride_k
    acc = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    for head in range(split * heads_of_split, tl.minimum((split + 1) * heads_of_split, HEADS_Q)):
        wide_head = tl.cast(head, tl.int64)
        inside = first_tile_key + keys < total_k
        k0, k1 = load_heads(k + wide_head // GROUP * stride_k_head, keys, stride_k, inside, D, D0, D1)
        q_head = q + wide_head * stride_q_head
        lse_head = lse + wide_head * total_q
        for start in range(full, full_end, BLOCK_M):
            q0, q1 = load_heads(q_head + tl.cast(start, tl.int64) * stride_q, rows, stride_q, None, D, D0, D1)
            log2_lse = tl.load(lse_head + start + rows) * LOG2_E
            x = tl.exp2(products(q0, q1, k0, k1, D1) * scale - log2_lse[:, None])
            acc = combined(acc, x, MAX)
        for tile in range(0, others):
            start = begin + tile * BLOCK_M
            start = tl.where(start < full, start, start - full + full_end)
            there = rows < end - start
            q0, q1 = load_heads(q_head + tl.cast(start, tl.int64) * stride_q, rows, stride_q, there, D, D0, D1)
            first_key = tl.load(keys_of_rows + start + rows, mask=there, other=0) - first_tile_key
            last_key = tl.load(keys_of_rows + total_q + start + rows, mask=there, other=0) - first_tile_key
            log2_lse = tl.load(lse_head + start + rows, mask=there, other=0.0) * LOG2_E
            x = tl.exp2(products(q0, q1, k0, k1, D1) * scale - log2_lse[:, None])
            acc = combined(acc, _where_seen(x, keys, first_key, last_key), MAX)
    column = reduced(acc, 0, MAX)
    _store_column(scores, column, rows_of_keys, first_tile_key + keys, total_k, factor, split, MEAN, ONE_SPLIT)


@triton.jit(do_not_specialize=["total_q", "total_k", "num_splits"])
def heads_first_kernel(
    q,  # [total_q, Hq, D]
    k,  # [total_k, Hk, D]
    lse,  # [Hq, total_q]
    keys_of_rows,  # [2, total_q]
    rows_of_keys,  # [3, total_k]
    scores,  # out [total_k], or [splits, total_k] where tiles of rows are split over programs
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    total_q,
    total_k,
    num_splits,
    scale,  # times log2(e)
    factor,
    HEADS_K: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,  # query heads of a key head in a tile, a power of two
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    HEAD_MAX: tl.constexpr,
    QUERY_MAX: tl.constexpr,
    MEAN: tl.constexpr,
    ONE_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    CHUNKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    ROWS: tl.constexpr = BLOCK_M // HEADS
    split = tl.program_id(0) % num_splits
    first_tile_key = tl.program_id(0) // num_splits * BLOCK_N
    keys = tl.arange(0, BLOCK_N)
    begin = tl.load(rows_of_keys + first_tile_key)
    end = tl.load(rows_of_keys + total_k + tl.minimum(first_tile_key + BLOCK_N, total_k) - 1)
    k += tl.cast(first_tile_key, tl.int64) * stride_k
    place = tl.arange(0, BLOCK_M) // HEADS
    column = tl.full([BLOCK_N], 0.0, tl.float32)
    for start in range(begin + split * ROWS, end, num_splits * ROWS):
        rows = start + place
        within = rows < end
        first_key = tl.load(keys_of_rows + rows, mask=within, other=0) - first_tile_key
        last_key = tl.load(keys_of_rows + total_q + rows, mask=within, other=0) - first_tile_key
        q_start = q + tl.cast(start, tl.int64) * stride_q
        of_rows = tl.full([ROWS, BLOCK_N], 0.0, tl.float32)
        for chunk in range(0, HEADS_K * CHUNKS):
            head_k = tl.cast(chunk // CHUNKS, tl.int64)
            of_group = chunk % CHUNKS * HEADS + tl.arange(0, BLOCK_M) % HEADS
            heads = head_k * GROUP + of_group
            there = within & (of_group < GROUP)
            inside = first_tile_key + keys < total_k
            k0, k1 = load_heads(k + head_k * stride_k_head, keys, stride_k, inside, D, D0, D1)
            q0, q1 = load_heads(q_start, place * stride_q + heads * stride_q_head, 1, there, D, D0, D1)
            log2_lse = tl.load(lse + heads * total_q + rows, mask=there, other=0.0) * LOG2_E
            x = tl.exp2(products(q0, q1, k0, k1, D1) * scale - log2_lse[:, None])
            # A head past the group sees no key.
            x = _where_seen(x, keys, first_key, tl.where(there, last_key, first_key))
            if HEADS > 1:
                x = reduced(tl.reshape(x, [ROWS, HEADS, BLOCK_N]), 1, HEAD_MAX)
            of_rows = combined(of_rows, x, HEAD_MAX)
        column = combined(column, reduced(of_rows, 0, QUERY_MAX), QUERY_MAX)
    _store_column(scores, column, rows_of_keys, first_tile_key + keys, total_k, factor, split, MEAN, ONE_SPLIT)


@triton.jit(do_not_specialize=["total_k", "num_splits"])
def finish_kernel(
    partial,  # [splits, total_k]
    rows_of_keys,  # [3, total_k]
    scores,  # out [total_k]
    total_k,
    num_splits,
    factor,
    MAX: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    keys = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.full([BLOCK], 0.0, tl.float32)
    for _ in range(0, num_splits):
        column = combined(column, tl.load(partial + keys, mask=keys < total_k, other=0.0), MAX)
        partial += total_k
    _store_column(scores, column, rows_of_keys, keys, total_k, factor, 0, MEAN, ONE_SPLIT=True)


def reduced_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    keys_of_rows: Tensor,
    rows_of_keys: Tensor,
    softmax_scale: float,
    head_reduce: str,
    query_reduce: str,
    *,
    segment_rows: int,
    few: bool,
    limited: bool,
) -> Tensor:
    """float32 ``[total_k]``: the softmax reduced over heads, then query rows; one launch, or two where work is split.

    ``segment_rows`` is the average number of query rows of a segment.
    """
    total_q, heads_q, head_dim = q.shape
    total_k, heads_k = k.shape[:2]
    group = heads_q // heads_k
    head_max, query_max, mean = head_reduce == "max", query_reduce == "max", query_reduce == "mean"
    factor = 1.0 / heads_q if head_reduce == "mean" else 1.0
    keys_stay = head_max == query_max and not few
    config = tuning.configuration(COLUMN, score_class(head_dim, q.dtype, few), q.device)
    heads = shared_heads(group, config.blocks["BLOCK_M"], few)
    tiles = triton.cdiv(total_k, config.blocks["BLOCK_N"])
    # What is split: the heads, or the tiles of rows.
    parts = heads_q if keys_stay else triton.cdiv(segment_rows, config.blocks["BLOCK_M"] // heads)
    num_splits = pieces(tiles, parts, q.device, PROGRAMS)
    parts_of_split = triton.cdiv(parts, num_splits)
    num_splits = triton.cdiv(parts, parts_of_split)
    scores = q.new_empty((total_k,), dtype=torch.float32)
    partial = scores if num_splits == 1 else q.new_empty((num_splits, total_k), dtype=torch.float32)
    d0, d1 = head_tiles(head_dim)
    tensors = (q, k, lse, keys_of_rows, rows_of_keys, partial, *q.stride()[:2], *k.stride()[:2])
    constants = {"D": head_dim, "D0": d0, "D1": d1, "MEAN": mean, "ONE_SPLIT": num_splits == 1, **config.options}
    scale = softmax_scale * LOG2_E.value
    if keys_stay:
        keys_stay_kernel[(tiles * num_splits,)](
            *tensors,
            total_q,
            total_k,
            num_splits,
            parts_of_split,
            scale,
            factor,
            HEADS_Q=heads_q,
            GROUP=group,
            MAX=head_max,
            LIMITED=limited,
            **constants,
        )
    else:
        heads_first_kernel[(tiles * num_splits,)](
            *tensors,
            total_q,
            total_k,
            num_splits,
            scale,
            factor,
            HEADS_K=heads_k,
            GROUP=group,
            HEADS=heads,
            HEAD_MAX=head_max,
            QUERY_MAX=query_max,
            **constants,
        )
    if num_splits > 1:
        finish_kernel[(triton.cdiv(total_k, FINISHED),)](
            partial,
            rows_of_keys,
            scores,
            total_k,
            num_splits,
            factor,
            MAX=query_max,
            MEAN=mean,
            BLOCK=FINISHED,
            **_FINISH_OPTIONS,
        )
    return scores


def column_scores(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    softmax_scale: float,
    query_reduce: str,
    head_reduce: str,
    softmax_lse: Tensor | None = None,
) -> Tensor:
    """float32 ``[total_k]``: the softmax of all query rows, reduced over heads and then over rows."""
    return scores_of(
        q, k, cu_seqlens_q, cu_seqlens_k, softmax_scale, head_reduce, query_reduce, causal=causal, lse=softmax_lse
    )


def scores_of(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    head_reduce: str,
    query_reduce: str,
    *,
    causal: bool = False,
    kv_limit: Tensor | None = None,
    lse: Tensor | None = None,
    few: bool = False,
) -> Tensor:
    """Scores of any visibility: ranges, the LSE unless it is given, and the probabilities; three to five launches."""
    total_q, total_k = q.shape[0], k.shape[0]
    if total_q == 0 or total_k == 0 or cu_seqlens_q.shape[0] < 2:
        return k.new_zeros((total_k,), dtype=torch.float32)
    q, k = unit_rows(q), unit_rows(k)
    keys_of_rows, rows_of_keys = visible_ranges(cu_seqlens_q, cu_seqlens_k, total_q, total_k, causal, kv_limit)
    lse = softmax_lse(q, k, keys_of_rows, softmax_scale, few) if lse is None else lse.contiguous()
    return reduced_scores(
        q,
        k,
        lse,
        keys_of_rows,
        rows_of_keys,
        softmax_scale,
        head_reduce,
        query_reduce,
        segment_rows=triton.cdiv(total_q, cu_seqlens_q.shape[0] - 1),
        few=few,
        limited=kv_limit is not None,
    )


_FINISH_OPTIONS = Config({}, num_warps=4, num_stages=1).options


def _candidates(shape_class: str) -> tuple[Config, ...]:
    if shape_class.startswith(FEW):
        # Small tiles: programs enough to read the keys at the speed of the memory.
        if shape_class.endswith("32-bit"):
            return tile_config(16, 16, 4, 2), tile_config(16, 32, 4, 2)
        return tile_config(16, 16, 2, 4), tile_config(16, 32, 4, 4), tile_config(16, 64, 4, 3)
    if shape_class == "32-bit":
        return (tile_config(32, 32, 4, 1),)
    if shape_class == "other 16-bit":
        return (tile_config(32, 64, 8, 2),)
    return (
        tile_config(64, 128, 8, 3),
        tile_config(128, 64, 8, 3, 90),
        tile_config(64, 128, 8, 2),
        tile_config(64, 64, 4, 2),
    )


def problem(shape_class: str, device: torch.device) -> Callable[[], Any]:
    """The prefill of four LLaVA prompts, with its LSE; with few rows, the last row of each against all keys."""
    few = shape_class.startswith(FEW)
    if few:
        q, k, *cu_seqlens = few_inputs(shape_class, device)
    else:
        q, k, _, ends, _ = typical_inputs(shape_class, device)
        cu_seqlens = [ends, ends]
    lse = torch.full((q.shape[1], q.shape[0]), 10.0, device=device)
    scale = q.shape[2] ** -0.5
    return lambda: scores_of(q, k, *cu_seqlens, scale, "mean", "sum", causal=not few, lse=lse, few=few)


COLUMN = Tunable("column_scores", SHAPE_CLASSES, _candidates, Config({"BLOCK_M": 32, "BLOCK_N": 64}), problem)
