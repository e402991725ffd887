"""Segment arithmetic shared by the reference ops: packed rows, ``cu_seqlens`` and what they mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sane_cu_seqlens(cu_seqlens: Tensor, total: int) -> Tensor:
    """``cu_seqlens`` (int32 ``[B+1]``) as every backend reads it: in ``[0, total]``, never decreasing."""
    return cu_seqlens.to(torch.int64).clamp(0, total).cummax(0).values


def segment_bounds(cu_seqlens: Tensor, total: int) -> list[tuple[int, int]]:
    """The ``B`` half-open row ranges of a packed tensor with ``total`` rows, on the host."""
    ends = sane_cu_seqlens(cu_seqlens, total).tolist()
    return list(zip(ends[:-1], ends[1:], strict=True))


def segment_of_rows(cu_seqlens: Tensor, total: int) -> Tensor:
    """int64 ``[total]``: the segment of each row, ``B`` for rows that belong to none (the unused tail)."""
    cu = sane_cu_seqlens(cu_seqlens, total)
    rows = torch.arange(total, device=cu.device)
    segment = torch.searchsorted(cu[1:], rows, right=True)
    return torch.where(rows >= cu[0], segment, cu.numel() - 1)


def counts_tensor(counts: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Per-segment counts as int64 ``[B]`` on ``device``, negative ones raised to 0."""
    if not isinstance(counts, Tensor):
        counts = torch.tensor(list(counts), dtype=torch.int64)
    return counts.to(device=device, dtype=torch.int64).clamp(min=0)
