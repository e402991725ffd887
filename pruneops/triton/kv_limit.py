"""Key limits of queries from the positions that tokens kept: a binary search a query row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pruneops.triton import tuning
from pruneops.triton.segments import clamped_pair, count_not_above

_ROWS = 128
_OPTIONS: dict[str, Any] = tuning.Config({}, num_warps=4).options


@triton.jit(do_not_specialize=["total_q", "num_segments"])
def _kv_limit_kernel(
    positions_q,  # [total_q] int32 or int64
    positions_k,  # [total_k], ascending within each segment
    bounds,  # [2, B+1] int32, of queries and of keys, clamped
    kv_limit,  # out [total_q] int32
    total_q,
    num_segments,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < total_q
    # Segments that end at or before the row; the first bound of all only says where the rows begin that have a segment.
    segment = count_not_above(bounds, 1, num_segments, num_segments, row, inside)
    owned = inside & (segment < num_segments)
    owned &= row >= tl.load(bounds)
    bounds_k = bounds + num_segments + 1 + segment
    first = tl.load(bounds_k, mask=owned, other=0)
    length = tl.load(bounds_k + 1, mask=owned, other=0) - first
    position = tl.load(positions_q + row, mask=owned, other=0)
    limit = count_not_above(positions_k, first, length, tl.max(length, axis=0), position, owned)
    tl.store(kv_limit + row, limit, mask=inside)


def kv_limit_from_positions(
    position_ids_q: Tensor, position_ids_k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> Tensor:
    """Per query row the number of keys of its segment whose position is not above its own; two launches."""
    total_q = position_ids_q.shape[0]
    kv_limit = position_ids_q.new_empty(total_q, dtype=torch.int32)
    if total_q == 0:
        return kv_limit
    bounds = clamped_pair(cu_seqlens_q, total_q, cu_seqlens_k, position_ids_k.shape[0])
    _kv_limit_kernel[(triton.cdiv(total_q, _ROWS),)](
        position_ids_q.contiguous(),
        position_ids_k.contiguous(),
        bounds,
        kv_limit,
        total_q,
        cu_seqlens_q.shape[0] - 1,
        BLOCK=_ROWS,
        **_OPTIONS,
    )
    return kv_limit


KERNELS: dict[str, Callable[..., Any]] = {"kv_limit_from_positions": kv_limit_from_positions}
