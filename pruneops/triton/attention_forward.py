"""varlen_attention (FlashAttention-2, arXiv 2307.08691): a tile of query rows keeps a running softmax over its keys.

A program owns one tile of the query rows of a segment and head. The keys that all its rows see come first and need no
mask; only the few tiles after them do. Logits are kept in units of log 2, so that one fused multiply-add and ``exp2``
make a probability.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pruneops.triton import tuning
from pruneops.triton.head_tiles import (
    LN_2,
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
    tile_config,
    zero_heads,
)
from pruneops.triton.tuning import Config, Tunable

# Keys and values that programs running side by side should share, out of the 40 to 50 MB of a data-centre GPU's cache.
CACHED_BYTES = 32 << 20


@triton.jit
def tile_of_program(pairs, tiles, section):
    """Which ``(pair, rank)`` of ``pairs`` segment-and-heads times ``tiles`` tiles a program owns.

    Programs start in the order of their numbers. A section of pairs whose keys fit the cache together is done before
    the next; within it the first tiles of all pairs come first, and these are to be the longest ones.
    """
    program = tl.program_id(0)
    first = program // (section * tiles) * section
    width = tl.minimum(section, pairs - first)
    place = program - first * tiles
    return first + place % width, place // width


def section_of_pairs(row_bytes: int, longest: int, group: int) -> int:
    """How many pairs :func:`tile_of_program` takes at a time; ``row_bytes`` is what a row of one key head reads."""
    heads = max(1, CACHED_BYTES // max(1, row_bytes * longest))
    return group << (heads.bit_length() - 1)


@triton.jit
def zero_outside(
    out,  # [total, heads, D], at its head
    lse,  # [total] of the head, or None
    stride,
    begin,  # of the first segment
    end,  # of the last segment
    total,
    rank,
    tiles,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes zeros, and an LSE of -inf, for the rows of no segment; ``tiles`` programs share the work."""
    zero0, zero1 = zero_heads(BLOCK, D0, D1)
    for row in range(tl.where(begin > 0, 0, end) + rank * BLOCK, total, tiles * BLOCK):
        rows = row + tl.arange(0, BLOCK)
        outside = (rows < total) & ((rows < begin) | (rows >= end))
        store_heads(out, rows, stride, outside, zero0, zero1, D, D0, D1)
        if lse is not None:
            tl.store(lse + rows, tl.full([BLOCK], float("-inf"), tl.float32), mask=outside)


@triton.jit
def _attend(
    acc0,  # [M, D0]
    acc1,  # [M, D1]
    top,  # [M] largest logit so far
    total,  # [M] sum of exp2(logit - top)
    q0,
    q1,
    k,  # the key head's row 0
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
    """One tile of keys."""
    columns = start + tl.arange(0, BLOCK_N)
    inside = columns < length_k if MASKED else None
    k0, k1 = load_heads(k, columns, stride_k, inside, D, D0, D1, ALIGNED)
    logits = products(q0, q1, k0, k1, D1)
    if MASKED:
        logits = tl.where(columns[None, :] < limits[:, None], logits * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        # A row that has not seen a key yet: -inf - -inf would be NaN.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(logits - shift[:, None])
    else:
        new_top = tl.maximum(top, tl.max(logits, 1) * scale)
        shift = new_top
        weights = tl.exp2(logits * scale - shift[:, None])
    alpha = tl.exp2(top - shift)
    total = total * alpha + tl.sum(weights, 1)
    acc0, acc1 = scale_heads(acc0, acc1, alpha[:, None], D1)
    v0, v1 = load_heads(v, columns, stride_v, inside, D, D0, D1, ALIGNED)
    acc0, acc1 = add_weighted(acc0, acc1, weights, v0, v1, D1)
    return acc0, acc1, new_top, total


@triton.jit(do_not_specialize=["total_q", "total_k", "num_segments", "tiles", "section"])
def forward_kernel(
    q,  # [total_q, Hq, D]
    k,  # [total_k, Hk, D], or slots [B, capacity, Hk, D]
    v,  # as k
    out,  # [total_q, Hq, D]
    lse,  # [Hq, total_q] float32
    cu_seqlens_q,  # [B+1]
    cu_seqlens_k,  # [B+1], or None
    kv_limit,  # [total_q], or None
    seqused_k,  # [B], or None
    stride_q,
    stride_q_head,
    stride_k_slot,
    stride_k,
    stride_k_head,
    stride_v_slot,
    stride_v,
    stride_v_head,
    stride_out,
    stride_out_head,
    total_q,
    total_k,  # or capacity
    num_segments,
    heads_q,
    group,  # query heads of a key head
    tiles,  # of a segment with max_seqlen_q rows
    section,
    scale,  # times log2(e)
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ALIGNED: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pair, rank = tile_of_program(num_segments * heads_q, tiles, section)
    segment = pair // heads_q
    head = (pair % heads_q).to(tl.int64)
    start_q, length_q = packed_segment(cu_seqlens_q, segment, total_q)
    if segment == num_segments - 1:
        begin = tl.minimum(tl.load(cu_seqlens_q), total_q)
        end = start_q + length_q
        zero_outside(
            out + head * stride_out_head, lse + head * total_q, stride_out, begin, end, total_q, rank, tiles,
            D=D, D0=D0, D1=D1, BLOCK=BLOCK_M,
        )  # fmt: skip
    # The last tile has the most keys where the mask is causal, so it comes first.
    first = (tl.cdiv(length_q, BLOCK_M) - 1 - rank) * BLOCK_M
    if first < 0:
        return

    head_k = head // group
    k += head_k * stride_k_head
    v += head_k * stride_v_head
    if seqused_k is not None:
        length_k = tl.minimum(tl.maximum(tl.load(seqused_k + segment), 0), total_k)
        k += segment.to(tl.int64) * stride_k_slot
        v += segment.to(tl.int64) * stride_v_slot
    else:
        start_k, length_k = packed_segment(cu_seqlens_k, segment, total_k)
        k += start_k.to(tl.int64) * stride_k
        v += start_k.to(tl.int64) * stride_v
    if kv_limit is not None:
        kv_limit += start_q
    rows = first + tl.arange(0, BLOCK_M)
    inside = rows < length_q
    limits = key_limits(kv_limit, rows, length_q, length_k, CAUSAL)
    fewest, most = key_range(kv_limit, limits, rows, first, length_q, length_k, CAUSAL)

    q += start_q.to(tl.int64) * stride_q + head * stride_q_head
    q0, q1 = load_heads(q, rows, stride_q, inside, D, D0, D1, ALIGNED)
    acc0, acc1 = zero_heads(BLOCK_M, D0, D1)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # Without a mask the largest logit is the scale times the largest product, which takes a positive scale.
    full = tl.where(scale > 0, fewest // BLOCK_N * BLOCK_N, 0)
    for start in range(0, full, BLOCK_N):
        acc0, acc1, top, total = _attend(
            acc0, acc1, top, total, q0, q1, k, v, stride_k, stride_v, start, limits, length_k, scale,
            D, D0, D1, ALIGNED, BLOCK_N, MASKED=False,
        )  # fmt: skip
    for start in range(full, most, BLOCK_N):
        acc0, acc1, top, total = _attend(
            acc0, acc1, top, total, q0, q1, k, v, stride_k, stride_v, start, limits, length_k, scale,
            D, D0, D1, ALIGNED, BLOCK_N, MASKED=True,
        )  # fmt: skip

    # A row without keys has a sum of 0, which leaves 0 and, as its largest logit is -inf, an LSE of -inf.
    total = tl.where(total == 0.0, 1.0, total)
    acc0, acc1 = scale_heads(acc0, acc1, (1.0 / total)[:, None], D1)
    # Counted from the tile: the rows from above would take registers all the way down here.
    rows = tl.arange(0, BLOCK_M)
    inside = rows < length_q - first
    place = (start_q + first).to(tl.int64)
    tl.store(lse + head * total_q + place + rows, (top + tl.log2(total)) * LN_2, mask=inside)
    out += place * stride_out + head * stride_out_head
    store_heads(out, rows, stride_out, inside, acc0, acc1, D, D0, D1, ALIGNED)


def shape_class(head_dim: int, dtype: torch.dtype) -> str:
    """The class of tile sizes of an attention kernel."""
    if dtype == torch.float32:
        return "32-bit"
    return f"d{head_dim} 16-bit" if head_dim in (64, 80, 96, 128) else "other 16-bit"


SHAPE_CLASSES = ("d64 16-bit", "d80 16-bit", "d96 16-bit", "d128 16-bit", "other 16-bit", "32-bit")


def _candidates(shape_class: str) -> tuple[Config, ...]:
    if shape_class == "32-bit":
        return tile_config(64, 16, 8, 2), tile_config(32, 16, 8, 2)
    if shape_class == "other 16-bit":
        return tile_config(128, 32, 8, 2, 90), tile_config(64, 32, 4, 2)
    largest = tile_config(128, 128, 8, 2, 90, 100 if shape_class == "d128 16-bit" else 1000)
    return (
        largest,
        tile_config(128, 64, 8, 3),
        tile_config(128, 64, 8, 2),
        tile_config(64, 64, 4, 3),
        tile_config(64, 64, 4, 2),
    )


def unit_rows(x: Tensor) -> Tensor:
    """``x`` itself if the elements of a head lie side by side, otherwise a copy where they do."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    softmax_scale: float,
    kv_limit: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over packed segments or cache slots: ``out`` and ``softmax_lse``.

    Source: FlashAttention-2 (arXiv 2307.08691), algorithm 1.
    """
    total_q, heads_q, head_dim = q.shape
    num_segments = cu_seqlens_q.shape[0] - 1
    if num_segments <= 0 or total_q == 0:
        return q.new_zeros(q.shape), q.new_full((heads_q, total_q), -math.inf, dtype=torch.float32)
    q, k, v = unit_rows(q), unit_rows(k), unit_rows(v)
    out = q.new_empty(q.shape)
    lse = q.new_empty((heads_q, total_q), dtype=torch.float32)
    total_k, heads_k = k.shape[-3], k.shape[-2]
    group = heads_q // heads_k
    d0, d1 = head_tiles(head_dim)
    config = tuning.configuration(FORWARD, shape_class(head_dim, q.dtype), q.device)
    tiles = max(1, triton.cdiv(min(max_seqlen_q, total_q), config.blocks["BLOCK_M"]))
    row_bytes = 2 * head_dim * q.element_size()
    forward_kernel[(num_segments * heads_q * tiles,)](
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens_q.contiguous(),
        None if seqused_k is not None else cu_seqlens_k.contiguous(),
        None if kv_limit is None else kv_limit.contiguous(),
        None if seqused_k is None else seqused_k.contiguous(),
        *q.stride()[:2],
        *(k.stride()[:3] if seqused_k is not None else (0, *k.stride()[:2])),
        *(v.stride()[:3] if seqused_k is not None else (0, *v.stride()[:2])),
        *out.stride()[:2],
        total_q,
        total_k,
        num_segments,
        heads_q,
        group,
        tiles,
        section_of_pairs(row_bytes, min(max_seqlen_k, total_k), group),
        softmax_scale * LOG2_E.value,
        D=head_dim,
        D0=d0,
        D1=d1,
        ALIGNED=aligned(q, k, v, out),
        CAUSAL=causal and kv_limit is None,
        **config.options,
    )
    return out, lse


def problem(shape_class: str, device: torch.device) -> Callable[[], Any]:
    """The prefill of four LLaVA prompts."""
    q, k, v, cu_seqlens, longest = typical_inputs(shape_class, device)
    scale = q.shape[2] ** -0.5
    return lambda: varlen_attention(q, k, v, cu_seqlens, cu_seqlens, longest, longest, True, scale)


def typical_inputs(shape_class: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Queries, keys and values of four segments around 3000 rows: a prompt with an image in five crops."""
    head_dim = {"other 16-bit": 256, "32-bit": 128}.get(shape_class) or int(shape_class[1:].split()[0])
    dtype = torch.float32 if shape_class == "32-bit" else torch.bfloat16
    ends = [0, 2960, 5280, 8256, 11136]
    heads = 4096 // max(64, head_dim)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = torch.randn(3, ends[-1], heads, head_dim, device=device, generator=generator).to(dtype)
    return q, k, v, torch.tensor(ends, dtype=torch.int32, device=device), 2976


FORWARD = Tunable(
    "varlen_forward",
    SHAPE_CLASSES,
    _candidates,
    Config({"BLOCK_M": 32, "BLOCK_N": 32}),
    problem,
)
TUNABLES: tuple[Tunable, ...] = (FORWARD,)
KERNELS = {"varlen_attention": varlen_attention}
