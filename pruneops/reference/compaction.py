"""What the compaction ops mean, in plain torch, differentiable by ordinary autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from pruneops.reference.selection import segment_topk


def _inside(indices: Tensor, rows: int) -> Tensor:
    """``indices`` as int64 with everything outside ``[0, rows)`` mapped to ``rows``, a row past the end."""
    indices = indices.to(torch.int64)
    return torch.where((indices < 0) | (indices >= rows), rows, indices)


def _is_float8(x: Tensor) -> bool:
    """Whether torch stores but does not move this dtype; its bytes move as well."""
    return x.is_floating_point() and x.element_size() == 1


def _gather(x: Tensor, indices: Tensor) -> Tensor:
    if _is_float8(x):
        return _gather(x.view(torch.uint8), indices).view(x.dtype)
    padded = torch.cat([x, x.new_zeros((1, *x.shape[1:]))])
    return padded.index_select(0, _inside(indices, x.shape[0]))


def _scatter(rows: Tensor, indices: Tensor, total: int) -> Tensor:
    if _is_float8(rows):
        return _scatter(rows.view(torch.uint8), indices, total).view(rows.dtype)
    padded = rows.new_zeros((total + 1, *rows.shape[1:]))
    return padded.index_copy(0, _inside(indices, total), rows)[:total].contiguous()


@overload
def gather_rows(x: Tensor, indices: Tensor) -> Tensor: ...
@overload
def gather_rows(x: Sequence[Tensor], indices: Tensor) -> list[Tensor]: ...
def gather_rows(x: Tensor | Sequence[Tensor], indices: Tensor) -> Tensor | list[Tensor]:
    """``out[i] = x[indices[i]]``, a zero row where the index is -1 (or out of range).

    Parameters
    ----------
    x : ``[rows, ...]``, any dtype, or a list of such tensors with the same number of rows
    indices : int32 ``[n]``

    Returns
    -------
    ``[n, ...]``, or a list of them.
    """
    if isinstance(x, Tensor):
        return _gather(x, indices)
    return [_gather(tensor, indices) for tensor in x]


@overload
def scatter_rows(rows: Tensor, indices: Tensor, total: int) -> Tensor: ...
@overload
def scatter_rows(rows: Sequence[Tensor], indices: Tensor, total: int) -> list[Tensor]: ...
def scatter_rows(rows: Tensor | Sequence[Tensor], indices: Tensor, total: int) -> Tensor | list[Tensor]:
    """``out[indices[i]] = rows[i]`` in a tensor of ``total`` zero rows; -1 (or out of range) is skipped.

    Parameters
    ----------
    rows : ``[n, ...]``, any dtype, or a list of such tensors with the same number of rows
    indices : int32 ``[n]``, unique apart from -1
    total : int

    Returns
    -------
    ``[total, ...]``, or a list of them.
    """
    if isinstance(rows, Tensor):
        return _scatter(rows, indices, total)
    return [_scatter(tensor, indices, total) for tensor in rows]


def select_compact(
    scores: Tensor,
    tensors: Sequence[Tensor],
    cu_seqlens: Tensor,
    keep_counts: Sequence[int] | Tensor,
    *,
    capacity: int | None = None,
    protect: Tensor | None = None,
    protected_counts: Sequence[int] | Tensor | None = None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """:func:`segment_topk` of ``scores``, then :func:`gather_rows` of every tensor by its indices."""
    indices, cu_seqlens_out = segment_topk(
        scores,
        cu_seqlens,
        keep_counts,
        capacity=capacity,
        protect=protect,
        protected_counts=protected_counts,
    )
    return gather_rows(tensors, indices), indices, cu_seqlens_out


def scatter_scaled(x: Tensor, residual: Tensor, branch: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """``residual[i] + weights[t] * branch[i]`` in row ``t = indices[i]``, ``weights[t] * x[t]`` in every other row.

    Parameters
    ----------
    x : float ``[total, H]``
    residual, branch : ``[kept, H]``
    weights : float ``[total]``
    indices : int32 ``[kept]``, unique apart from -1; a row with -1 (or out of range) is dropped

    Returns
    -------
    ``[total, H]``, rounded once from float32 (float64 where ``x`` is)
    """
    total, out_dtype = x.shape[0], x.dtype
    dtype = torch.promote_types(out_dtype, torch.float32)
    rows = _inside(indices, total)
    named = torch.zeros(total + 1, dtype=torch.bool, device=x.device).index_fill(0, rows, True)[:total]
    # Zeros in place of the rows that are not read keep what they hold out of every gradient.
    x, weights = x.to(dtype).masked_fill(named[:, None], 0.0), weights.to(dtype)
    branch = branch.to(dtype).masked_fill((rows == total)[:, None], 0.0)
    skipped = torch.cat([weights[:, None] * x, x.new_zeros(1, x.shape[1])])
    kept = residual.to(dtype) + torch.cat([weights, weights.new_zeros(1)])[rows, None] * branch
    return skipped.index_copy(0, rows, kept)[:total].to(out_dtype).contiguous()
