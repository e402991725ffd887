"""Compaction: moving the rows that stay, in as few launches as possible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from pruneops import backends, reference
from pruneops.ops import _checks
from pruneops.ops.selection import _check_topk, _resolve_capacity


@overload
def gather_rows(x: Tensor, indices: Tensor) -> Tensor: ...
@overload
def gather_rows(x: Sequence[Tensor], indices: Tensor) -> list[Tensor]: ...
def gather_rows(x: Tensor | Sequence[Tensor], indices: Tensor) -> Tensor | list[Tensor]:
    """``out[i] = x[indices[i]]``; index -1 gives a row of zeros.

    Parameters
    ----------
    x : ``[rows, ...]``, any dtype and strides, or a list of such tensors
        Tensors of a list share ``rows`` and the device; one call moves them all.
    indices : int32 ``[n]``
        Unique apart from -1 where a gradient is wanted, since the backward pass scatters.

    Returns
    -------
    ``[n, ...]``, contiguous, or a list of them.

    Raises
    ------
    TypeError, ValueError
        Wrong type, dtype, shape or device; on the CPU in eager mode also an index outside ``[-1, rows)``
        and, where a gradient is wanted, one that occurs twice. A device kernel writes zeros for an index
        out of range.

    Notes
    -----
    O(n x row size). Differentiable to any order in floating ``x``; the gradient is :func:`scatter_rows`.
    Deterministic.
    """
    single = isinstance(x, Tensor)
    tensors = _checks.tensors("x", [x] if single else x)
    if not tensors:
        _checks.tensor("indices", indices, 1, _checks.INT32)
        return []
    device = tensors[0].device
    unique = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    _checks.row_indices("indices", indices, tensors[0].shape[0], device, unique)
    backend = backends.select("gather_rows", device.type)
    if backend != backends.REFERENCE:
        out = backends.kernel(backend, "gather_rows")(tensors, indices)
    else:
        out = reference.gather_rows(tensors, indices)
    return out[0] if single else out


@overload
def scatter_rows(rows: Tensor, indices: Tensor, total: int) -> Tensor: ...
@overload
def scatter_rows(rows: Sequence[Tensor], indices: Tensor, total: int) -> list[Tensor]: ...
def scatter_rows(rows: Tensor | Sequence[Tensor], indices: Tensor, total: int) -> Tensor | list[Tensor]:
    """``out[indices[i]] = rows[i]`` in ``total`` rows of zeros; index -1 is skipped.

    Parameters
    ----------
    rows : ``[n, ...]``, any dtype and strides, or a list of such tensors
        Tensors of a list share ``n`` and the device; one call moves them all.
    indices : int32 ``[n]``, unique apart from -1
    total : int

    Returns
    -------
    ``[total, ...]``, contiguous, or a list of them.

    Raises
    ------
    TypeError, ValueError
        Wrong type, dtype, shape or device, a negative ``total``; on the CPU in eager mode also an index
        outside ``[-1, total)`` or one that occurs twice. A device kernel skips an index out of range.

    Notes
    -----
    O((n + total) x row size). Differentiable to any order in floating ``rows``; the gradient is
    :func:`gather_rows`. Deterministic for unique indices.
    """
    single = isinstance(rows, Tensor)
    tensors = _checks.tensors("rows", [rows] if single else rows)
    _checks.integer("total", total)
    if not tensors:
        _checks.tensor("indices", indices, 1, _checks.INT32)
        return []
    device = tensors[0].device
    _checks.row_indices("indices", indices, total, device, True)
    if indices.shape[0] != tensors[0].shape[0]:
        raise ValueError(f"indices must have {tensors[0].shape[0]} entries, one a row, got {indices.shape[0]}")
    backend = backends.select("scatter_rows", device.type)
    if backend != backends.REFERENCE:
        out = backends.kernel(backend, "scatter_rows")(tensors, indices, total)
    else:
        out = reference.scatter_rows(tensors, indices, total)
    return out[0] if single else out


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
    """:func:`segment_topk` of ``scores`` and :func:`gather_rows` of every tensor, in one call.

    Parameters
    ----------
    scores, cu_seqlens, keep_counts, capacity, protect, protected_counts :
        As in :func:`segment_topk`.
    tensors : list of ``[total, ...]``, any dtype and strides
        What travels along: hidden states, positions, labels ...

    Returns
    -------
    tensors : list of ``[kept, ...]`` or ``[capacity, ...]``, with rows of zeros after the last kept row
    indices : int32
    cu_seqlens : int32 ``[B+1]``

    Raises
    ------
    TypeError, ValueError
        As in :func:`segment_topk`, and for tensors that do not have ``total`` rows on the same device.

    Notes
    -----
    Differentiable in the floating ``tensors``, not in ``scores``. Deterministic, no device synchronisation.
    """
    cu, counts = _check_topk(scores, cu_seqlens, keep_counts, capacity, protect)
    tensors = _checks.tensors("tensors", tensors)
    if tensors:
        _checks.tensor("tensors[0]", tensors[0], device=scores.device, rows=scores.shape[0])
    capacity = _resolve_capacity(capacity, counts, cu, protect, protected_counts, scores.shape[0])
    counts = _checks.counts_tensor(counts, scores.device)
    backend = backends.select("select_compact", scores.device.type, scores.dtype)
    if backend != backends.REFERENCE:
        out, indices, cu_seqlens_out = backends.kernel(backend, "select_compact")(
            _checks.constant(scores), tensors, cu_seqlens, counts, capacity, protect
        )
        return out, indices, cu_seqlens_out
    return reference.select_compact(scores, tensors, cu_seqlens, counts, capacity=capacity, protect=protect)


def scatter_scaled(x: Tensor, residual: Tensor, branch: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Puts the rows that a block computed back among those it skipped, every row with its weight.

    ``out[t] = residual[i] + weights[t] * branch[i]`` for ``t = indices[i]``, and ``out[t] = weights[t] * x[t]``
    for every row that no index names.

    Parameters
    ----------
    x : ``[total, H]``
        float32, bfloat16 or float16; float64 runs on the reference backend. Rows that an index names are not read.
    residual, branch : ``[kept, H]``, the dtype of ``x``
    weights : float32 ``[total]``
        float64 as well where ``x`` is. 1 for rows that are not to be weighted.
    indices : int32 ``[kept]``
        Rows of ``x``, unique apart from -1, which drops its row of ``residual`` and ``branch``.

    Returns
    -------
    ``[total, H]``, contiguous, the dtype of ``x``

    Raises
    ------
    TypeError, ValueError
        Wrong type, dtype, shape or device; on the CPU in eager mode also an index outside ``[-1, total)`` or one that
        occurs twice. A device kernel skips an index out of range, and of equal ones takes the last.

    Notes
    -----
    O(total x H), one pass over memory. Arithmetic in float32, rounded once. Differentiable once in ``x``, ``residual``,
    ``branch`` and ``weights``, fused; rows that were not read get a gradient of exactly 0, whatever they hold.
    Deterministic, forward and backward. Under autocast ``residual`` and ``branch`` are cast to the dtype of ``x``.

    Source: the output of a layer in p-MoD (arXiv 2412.04449), where the weight of a skipped token scales the token.
    """
    residual, branch = _checks.autocast_to(x, residual, branch)
    _checks.tensor("x", x, 2, _checks.FLOATS)
    _checks.row_indices("indices", indices, x.shape[0], x.device, True)
    for name, value in (("residual", residual), ("branch", branch)):
        _checks.tensor(name, value, 2, _checks.FLOATS, x.device, indices.shape[0])
        if value.dtype != x.dtype:
            raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {value.dtype}")
        if value.shape[1] != x.shape[1]:
            raise ValueError(f"{name} must have the {x.shape[1]} columns of x, got shape {tuple(value.shape)}")
    dtypes = _checks.FLOAT32 if x.dtype != torch.float64 else _checks.FLOAT32 | _checks.FLOAT64
    _checks.tensor("weights", weights, 1, dtypes, x.device, x.shape[0])
    backend = backends.select("scatter_scaled", x.device.type, x.dtype)
    if backend != backends.REFERENCE:
        return backends.kernel(backend, "scatter_scaled")(x, residual, branch, weights, indices)
    return reference.scatter_scaled(x, residual, branch, weights, indices)
