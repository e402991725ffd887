"""What the selection ops mean, in plain torch.

The functions here define the ops: every kernel must return exactly these indices. Given a ``capacity``
they read no value back to the host, so they also serve as the fallback on devices without a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pruneops.reference._segments import counts_tensor, segment_of_rows


def rank_in_segment(scores: Tensor, segment: Tensor, last: Tensor | None = None) -> Tensor:
    """The rank of each row among the rows of its segment, best first.

    Order: higher score first, NaN lowest (below -inf), ``-0.0`` equal to ``+0.0``, ties to the lower row.
    Rows where ``last`` is true rank after all others of their segment.

    Parameters
    ----------
    scores : float ``[total]``
    segment : int64 ``[total]``
    last : bool ``[total]``, optional

    Returns
    -------
    int64 ``[total]``
    """
    unordered = scores.isnan()
    # Adding +0.0 turns -0.0 into +0.0 whatever the sort of this backend thinks about signed zeros.
    values = torch.where(unordered, -torch.inf, scores) + 0.0
    # A chain of stable sorts, least significant key first, is a lexicographic sort.
    order = torch.argsort(values, descending=True, stable=True)
    keys = [unordered, segment] if last is None else [unordered, last, segment]
    for key in keys:
        order = order[torch.argsort(key[order].to(torch.int64), stable=True)]
    sorted_segment = segment[order]
    first = torch.searchsorted(sorted_segment, sorted_segment)
    place = torch.arange(scores.shape[0], device=scores.device) - first
    return torch.empty_like(place).index_copy_(0, order, place)


def compact_rows(keep: Tensor, segment: Tensor, batch: int, capacity: int | None) -> tuple[Tensor, Tensor]:
    """The kept rows in ascending order and their ``cu_seqlens``, both int32; see :func:`segment_topk`."""
    rows = torch.arange(keep.shape[0], device=keep.device, dtype=torch.int32)
    kept = torch.zeros(batch + 1, dtype=torch.int64, device=keep.device)
    kept = kept.index_add(0, segment, keep.to(torch.int64))[:batch]
    cu_seqlens_out = torch.nn.functional.pad(kept.cumsum(0), (1, 0))
    if capacity is None:
        return rows[keep], cu_seqlens_out.to(torch.int32)
    slot = keep.cumsum(0) - 1
    slot = torch.where(keep & (slot < capacity), slot, capacity)  # one bin past the end takes the rest
    indices = torch.full((capacity + 1,), -1, dtype=torch.int32, device=keep.device)
    indices = indices.index_copy(0, slot, rows)[:capacity].contiguous()
    return indices, cu_seqlens_out.clamp(max=capacity).to(torch.int32)


@torch.no_grad()
def segment_topk(
    scores: Tensor,
    cu_seqlens: Tensor,
    keep_counts: Sequence[int] | Tensor,
    *,
    capacity: int | None = None,
    protect: Tensor | None = None,
    protected_counts: Sequence[int] | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Per segment the ``keep_counts[b]`` best unprotected rows and every protected row, order kept.

    Parameters
    ----------
    scores : float ``[total]``
    cu_seqlens : int32 ``[B+1]``
    keep_counts : list or int tensor ``[B]``
        Negative counts act as 0, counts above the number of unprotected rows keep them all.
    capacity : int, optional
        Length of ``indices``. Kept rows past it are cut. Without it the length is the number of kept rows.
    protect : bool ``[total]``, optional
    protected_counts : ignored
        The fast backends need it to know the output length; see :func:`pruneops.ops.segment_topk`.

    Returns
    -------
    indices : int32 ``[capacity]``
        Absolute rows, ascending; -1 after the last kept row.
    cu_seqlens_out : int32 ``[B+1]``
    """
    batch = cu_seqlens.numel() - 1
    segment = segment_of_rows(cu_seqlens, scores.shape[0])
    counts = torch.nn.functional.pad(counts_tensor(keep_counts, scores.device), (0, 1))
    keep = rank_in_segment(scores, segment, protect) < counts[segment]
    if protect is not None:
        keep = torch.where(protect, segment < batch, keep)
    return compact_rows(keep, segment, batch, capacity)


@torch.no_grad()
def segment_threshold(
    scores: Tensor,
    cu_seqlens: Tensor,
    threshold: float,
    *,
    min_keep: Sequence[int] | Tensor | None = None,
    capacity: int | None = None,
    protect: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Per segment the unprotected rows with ``score > threshold``, at least the ``min_keep[b]`` best ones,
    and every protected row, order kept.

    The comparison is strict and never true for NaN. It is made in float32 (float64 for float64 scores), so
    a threshold that float32 cannot hold is rounded first. Parameters and results otherwise as in
    :func:`segment_topk`.
    """
    batch = cu_seqlens.numel() - 1
    segment = segment_of_rows(cu_seqlens, scores.shape[0])
    values = scores if scores.dtype == torch.float64 else scores.float()
    keep = values > torch.tensor(threshold, dtype=values.dtype)
    if min_keep is not None:
        least = torch.nn.functional.pad(counts_tensor(min_keep, scores.device), (0, 1))
        keep |= rank_in_segment(scores, segment, protect) < least[segment]
    if protect is not None:
        keep |= protect
    keep &= segment < batch
    return compact_rows(keep, segment, batch, capacity)
