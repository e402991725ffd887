"""What segments the boundaries name, for kernels: boundaries on a device may hold any values.

All kernels read ``cu_seqlens`` clamped to the rows there are and never decreasing, as the reference does.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pruneops.triton import tuning

# Boundaries, or counts of segments, that are read at once where all before a segment matter.
CHUNK = tl.constexpr(256)
# Boundaries that a program clamps.
_CLAMPED = 32
_OPTIONS: dict[str, Any] = tuning.Config({}, num_warps=4).options


@triton.jit
def clamped_boundaries(
    cu_seqlens,  # [B+1] int32, any values
    index,  # [N] int32, in [0, B]
    total,  # rows of the packed tensor
):
    """[N] int32: boundaries in ``[0, total]``, none lower than one before it. O(index / 256) steps."""
    last = tl.max(index, axis=0)
    boundary = index * 0
    for start in range(0, last + 1, CHUNK):
        at = start + tl.arange(0, CHUNK)
        values = tl.load(cu_seqlens + at, mask=at <= last, other=0)
        boundary = tl.maximum(boundary, tl.max(tl.where(at[None, :] <= index[:, None], values[None, :], 0), axis=1))
    return tl.minimum(boundary, total)


@triton.jit
def segment_bounds(
    cu_seqlens,  # [B+1] int32, any values
    segment,  # [N] int32, not negative; from B on segments are empty
    num_segments,  # B
    total,  # rows of the packed tensor
):
    """[N] int32 each: the first row of every segment and the number of its rows."""
    begin = clamped_boundaries(cu_seqlens, tl.minimum(segment, num_segments), total)
    end = tl.load(cu_seqlens + segment + 1, mask=segment < num_segments, other=0)
    return begin, tl.maximum(tl.minimum(end, total) - begin, 0)


@triton.jit
def segment_of_rows(
    cu_seqlens,  # [B+1] int32, any values
    num_segments,  # B
    total,  # rows of the packed tensor
    rows,  # [N] int32, not negative
):
    """[N] int32 each: the segment of every row, -1 for rows of none, its first row and the row after its last.

    O(B / 256) steps.
    """
    past = tl.zeros_like(rows) + (num_segments + 1)  # the first boundary above the row
    begin = tl.zeros_like(rows)
    for start in range(0, num_segments + 1, CHUNK):
        at = start + tl.arange(0, CHUNK)
        boundary = tl.minimum(tl.load(cu_seqlens + at, mask=at <= num_segments, other=0), total)[None, :]
        past = tl.minimum(past, tl.min(tl.where(boundary > rows[:, None], at[None, :], num_segments + 1), axis=1))
        begin = tl.maximum(begin, tl.max(tl.where(at[None, :] < past[:, None], boundary, 0), axis=1))
    found = (past > 0) & (past <= num_segments)
    end = tl.minimum(tl.load(cu_seqlens + past, mask=found, other=0), total)
    return tl.where(found, past - 1, -1), begin, end


@triton.jit
def segment_of_slots(
    counts,  # [B] int32, any values; negative ones act as 0
    num_segments,  # B
    slots,  # [N] int64, not negative
):
    """[N] each: the segment that owns a slot, B if none does, and the first slot of that segment.

    Segment b owns ``counts[b]`` slots, behind those of the segments before it. O(B / 256) steps.
    """
    segment = slots.to(tl.int32) * 0
    first = slots * 0
    base = tl.sum(first, axis=0)
    for start in range(0, num_segments, CHUNK):
        at = start + tl.arange(0, CHUNK)
        count = tl.maximum(tl.load(counts + at, mask=at < num_segments, other=0), 0).to(tl.int64)
        ends = base + tl.cumsum(count, axis=0)
        before = (at < num_segments)[None, :] & (ends[None, :] <= slots[:, None])
        segment += tl.sum(before.to(tl.int32), axis=1)
        first = tl.maximum(first, tl.max(tl.where(before, ends[None, :], 0), axis=1))
        base = tl.max(ends, axis=0)
    return segment, first


@triton.jit
def count_not_above(
    values,  # pointer; ascending from `first` on for `count` entries
    first,  # one a lane, or one for all
    count,  # one a lane, or one for all
    longest,  # scalar, no lower than any count
    x,  # one a lane
    active,  # one a lane; lanes without it read nothing
):
    """Per lane how many of ``values[first : first + count]`` are not above ``x``; a binary search."""
    low = tl.zeros_like(active.to(tl.int32))
    high = low + count
    # No lane has more than `left` entries left to decide on.
    left = longest
    while left > 0:
        middle = low + ((high - low) >> 1)
        searching = active & (low < high)
        above = tl.load(values + first + middle, mask=searching, other=0) > x
        high = tl.where(searching & above, middle, high)
        low = tl.where(searching & (above == 0), middle + 1, low)
        left = left >> 1
    return low


@triton.jit(do_not_specialize=["total_q", "total_k", "count"])
def _clamp_pair_kernel(
    cu_seqlens_q,  # [B+1] int32, any values
    cu_seqlens_k,  # [B+1] int32, any values
    bounds,  # out [2, B+1] int32
    total_q,
    total_k,
    count,  # B + 1
    BLOCK: tl.constexpr,
):
    # Even programs take the queries' boundaries, odd ones the keys'.
    index = tl.program_id(0) // 2 * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    index = tl.minimum(index, count - 1)
    if tl.program_id(0) % 2 == 0:
        tl.store(bounds + index, clamped_boundaries(cu_seqlens_q, index, total_q), mask=inside)
    else:
        tl.store(bounds + count + index, clamped_boundaries(cu_seqlens_k, index, total_k), mask=inside)


def clamped_pair(cu_seqlens_q: Tensor, total_q: int, cu_seqlens_k: Tensor, total_k: int) -> Tensor:
    """int32 ``[2, B+1]``: the boundaries of queries and of keys as a kernel may rely on them; one launch."""
    count = cu_seqlens_q.shape[0]
    bounds = cu_seqlens_q.new_empty((2, count), dtype=torch.int32)
    _clamp_pair_kernel[(2 * triton.cdiv(count, _CLAMPED),)](
        cu_seqlens_q.contiguous(),
        cu_seqlens_k.contiguous(),
        bounds,
        total_q,
        total_k,
        count,
        BLOCK=_CLAMPED,
        **_OPTIONS,
    )
    return bounds
