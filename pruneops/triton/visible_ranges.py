"""Which keys every packed query row sees, and which query rows see every packed key, in rows of the packed tensors.

Segments follow each other in queries and in keys alike, so the rows that matter to a tile of keys are consecutive even
where several segments share the tile, and so are the keys that matter to a tile of rows. Kernels that work from these
ranges need to know nothing of segments.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pruneops.triton.segments import segment_bounds, segment_of_rows
from pruneops.triton.tuning import Config

BLOCK = 32
_OPTIONS = Config({}, num_warps=4, num_stages=1).options


@triton.jit
def _other_side(own_bounds, other_bounds, num_segments, own_total, other_total, rows):
    """Per row: whether it has a segment, its place and its segment's length, and the same segment's rows elsewhere."""
    segment, begin, end = segment_of_rows(own_bounds, num_segments, own_total, rows)
    found = segment >= 0
    # A row of no segment lies before the first one or behind the last.
    outside = tl.where(rows < tl.load(own_bounds), 0, num_segments)
    other_begin, other_length = segment_bounds(
        other_bounds, tl.where(found, segment, outside), num_segments, other_total
    )
    return found, rows - begin, end - begin, other_begin, tl.where(found, other_length, 0)


@triton.jit(do_not_specialize=["num_segments", "total_q", "total_k"])
def ranges_kernel(
    cu_seqlens_q,  # [B+1] int32, any values
    cu_seqlens_k,  # [B+1] int32, any values
    kv_limit,  # [total_q] int32, or None
    keys_of_rows,  # out [2, total_q] int32: the first key that the row sees, and the one after the last
    rows_of_keys,  # out [3, total_k] int32: the first row that may see the key, the one after the last, the segment's
    num_segments,
    total_q,
    total_k,
    CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    query_blocks = (total_q + BLOCK - 1) // BLOCK
    if program < query_blocks:
        rows = program * BLOCK + tl.arange(0, BLOCK)
        inside = rows < total_q
        found, place, length_q, begin, length_k = _other_side(
            cu_seqlens_q, cu_seqlens_k, num_segments, total_q, total_k, rows
        )
        if kv_limit is not None:
            limit = tl.load(kv_limit + rows, mask=inside & found, other=0)
        elif CAUSAL:
            limit = length_k - length_q + place + 1
        else:
            limit = length_k
        tl.store(keys_of_rows + rows, begin, mask=inside)
        tl.store(keys_of_rows + total_q + rows, begin + tl.minimum(tl.maximum(limit, 0), length_k), mask=inside)
    else:
        keys = (program - query_blocks) * BLOCK + tl.arange(0, BLOCK)
        inside = keys < total_k
        found, place, length_k, begin, length_q = _other_side(
            cu_seqlens_k, cu_seqlens_q, num_segments, total_k, total_q, keys
        )
        first = begin
        if CAUSAL:
            first += tl.where(found, tl.maximum(place - (length_k - length_q), 0), 0)
        tl.store(rows_of_keys + keys, first, mask=inside)
        tl.store(rows_of_keys + total_k + keys, begin + length_q, mask=inside)
        tl.store(rows_of_keys + 2 * total_k + keys, length_q, mask=inside)


def visible_ranges(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, total_q: int, total_k: int, causal: bool, kv_limit: Tensor | None
) -> tuple[Tensor, Tensor]:
    """int32 ``keys_of_rows [2, total_q]`` and ``rows_of_keys [3, total_k]``, see :func:`ranges_kernel`; one launch."""
    keys_of_rows = cu_seqlens_q.new_empty((2, total_q), dtype=torch.int32)
    rows_of_keys = cu_seqlens_q.new_empty((3, total_k), dtype=torch.int32)
    blocks = triton.cdiv(total_q, BLOCK) + triton.cdiv(total_k, BLOCK)
    if blocks:
        ranges_kernel[(blocks,)](
            cu_seqlens_q.contiguous(),
            cu_seqlens_k.contiguous(),
            None if kv_limit is None else kv_limit.contiguous(),
            keys_of_rows,
            rows_of_keys,
            cu_seqlens_q.shape[0] - 1,
            total_q,
            total_k,
            CAUSAL=causal and kv_limit is None,
            BLOCK=BLOCK,
            **_OPTIONS,
        )
    return keys_of_rows, rows_of_keys
