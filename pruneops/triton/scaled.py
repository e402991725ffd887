"""Weighted rows: computed rows put back among those that were skipped, in one pass over memory.

As in p-MoD (arXiv 2412.04449), where the weight of a skipped token scales the token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pruneops.triton import tuning
from pruneops.triton.compaction import last_with_index, sources_of

_WIDTH = 1024  # of a tile, in elements, so 8 or 16 KiB of 4 rows that a program loads before it stores any
_GRAD_WIDTH = 512  # the same backward, where a program has whole rows and more values of each to hold
_ROWS = 4  # of a tile, more where rows are short
_MOST_ROWS = 16  # of a tile: every row may be compared with every index

_OPTIONS = tuning.Config({}, num_warps=4).options
_GRAD_OPTIONS = {2: _OPTIONS, 4: tuning.Config({}, num_warps=8).options}  # by the bytes of an element


@triton.jit
def _rows_either(
    named,  # [ROWS, 1] bool: whether a row comes from the first matrix
    inside,  # [ROWS, WIDTH] bool
    first,  # [ROWS, 1] pointers to rows of the first matrix
    second,  # [ROWS, 1] pointers to rows of the second matrix
    column,  # [1, WIDTH]
):
    """[ROWS, WIDTH] float32: each row from one of two matrices; of the other one, nothing is read."""
    # Two loads, not one from chosen addresses: those would lose what the compiler knows of their alignment.
    a = tl.load(first + column, mask=inside & named, other=0.0)
    b = tl.load(second + column, mask=inside & ~named, other=0.0)
    return tl.where(named, a, b).to(tl.float32)


@triton.jit(do_not_specialize=["num_indices", "total", "kept"])
def _scatter_scaled_kernel(
    x,  # [total, columns]
    x_stride,
    residual,  # [kept, columns]
    residual_stride,
    branch,  # [kept, columns]
    branch_stride,
    weights,  # [total] float32
    indices,  # [num_indices] int32, as last_with_index takes them
    num_indices,
    out,  # [total, columns], dense
    total,
    kept,
    columns,
    SCAN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    tiles_of_group = (columns - 1) // WIDTH + 1
    row = (tl.program_id(0) // tiles_of_group).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % tiles_of_group) * WIDTH + tl.arange(0, WIDTH)[None, :]
    exists = row < total
    source = last_with_index(row, indices, num_indices, SCAN, ROWS).to(tl.int64)[:, None]
    weight = tl.load(weights + row, mask=exists, other=0.0)[:, None]
    row = row[:, None]
    named = (source >= 0) & (source < kept)
    inside = exists[:, None] & (column < columns)

    value = weight * _rows_either(named, inside, branch + source * branch_stride, x + row * x_stride, column)
    base = tl.load(residual + source * residual_stride + column, mask=inside & named, other=0.0).to(tl.float32)
    value = tl.where(named, base + value, value)
    tl.store(out + row * columns + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _clear_dropped_rows(
    tile,
    indices,  # [num_indices] int32
    num_indices,
    inverse,  # [total] int32, or indices with SCAN
    dresidual,  # [kept, columns], dense
    dbranch,  # [kept, columns], dense
    total,
    kept,
    columns,
    SCAN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Zeros to the gradients of the kept rows that no row of the result was made of."""
    row = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < kept
    index = tl.load(indices + row, mask=exists, other=-1)
    in_range = (index >= 0) & (index < total)
    if SCAN:
        last = last_with_index(index, indices, num_indices, SCAN, ROWS)
    else:
        last = tl.load(inverse + index, mask=in_range, other=-1)
    dropped = (exists & ((last != row) | ~in_range))[:, None]
    if tl.max(dropped.to(tl.int32)) != 0:
        zeros = tl.zeros([ROWS, WIDTH], dbranch.dtype.element_ty)
        for first in range(0, columns, WIDTH):
            column = first + tl.arange(0, WIDTH)[None, :]
            at = row[:, None] * columns + column
            tl.store(dresidual + at, zeros, mask=dropped & (column < columns))
            tl.store(dbranch + at, zeros, mask=dropped & (column < columns))


@triton.jit(do_not_specialize=["num_indices", "row_tiles", "total", "kept"])
def _scatter_scaled_backward_kernel(
    dout,  # [total, columns]
    dout_stride,
    x,  # [total, columns]
    x_stride,
    branch,  # [kept, columns]
    branch_stride,
    weights,  # [total] float32
    indices,  # [kept] int32
    sources,  # [num_indices] int32, as last_with_index takes them
    num_indices,
    dx,  # [total, columns], dense
    dresidual,  # [kept, columns], dense
    dbranch,  # [kept, columns], dense
    dweights,  # [total] float32
    row_tiles,  # programs with rows of dout; those behind them clear rows of dresidual and dbranch
    total,
    kept,
    columns,
    SCAN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    tile = tl.program_id(0)
    if tile >= row_tiles:
        _clear_dropped_rows(
            tile - row_tiles, indices, kept, sources, dresidual, dbranch, total, kept, columns, SCAN, ROWS, WIDTH
        )
    else:
        row = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        exists = row < total
        source = last_with_index(row, sources, num_indices, SCAN, ROWS).to(tl.int64)[:, None]
        weight = tl.load(weights + row, mask=exists, other=0.0)[:, None]
        to_dweights = dweights + row
        row = row[:, None]
        named = exists[:, None] & (source >= 0) & (source < kept)
        rows_of_dout, rows_of_dx = dout + row * dout_stride, dx + row * columns
        rows_of_branch, rows_of_x = branch + source * branch_stride, x + row * x_stride
        rows_of_dbranch, rows_of_dresidual = dbranch + source * columns, dresidual + source * columns
        product = tl.zeros([ROWS, WIDTH], tl.float32)
        for first in range(0, columns, WIDTH):
            column = first + tl.arange(0, WIDTH)[None, :]
            inside = exists[:, None] & (column < columns)
            upstream = tl.load(rows_of_dout + column, mask=inside, other=0.0)
            value = upstream.to(tl.float32)
            product += value * _rows_either(named, inside, rows_of_branch, rows_of_x, column)
            scaled = (weight * value).to(dx.dtype.element_ty)
            tl.store(rows_of_dx + column, tl.where(named, 0.0, scaled), mask=inside)
            tl.store(rows_of_dbranch + column, scaled, mask=inside & named)
            tl.store(rows_of_dresidual + column, upstream, mask=inside & named)
        tl.store(to_dweights, tl.sum(product, axis=1), mask=exists)


def _matrix(x: Tensor) -> Tensor:
    """``x`` ``[rows, columns]``, copied unless its rows are dense; they may be any distance apart."""
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def _tile(columns: int, most: int) -> tuple[int, int]:
    """Rows and width of a tile."""
    width = min(most, triton.next_power_of_2(max(columns, 1)))
    return min(_MOST_ROWS, _ROWS * (most // width)), width


def scatter_scaled(x: Tensor, residual: Tensor, branch: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """``residual[i] + weights[t] * branch[i]`` in row ``t = indices[i]``, ``weights[t] * x[t]`` in every other row.

    One launch, and two before it for more indices than a program looks through. Of equal indices the last wins.
    """
    (total, columns), kept = x.shape, indices.shape[0]
    out = x.new_empty((total, columns))
    if out.numel() == 0:
        return out
    x, residual, branch = _matrix(x), _matrix(residual), _matrix(branch)
    sources, scan = sources_of(indices, total)
    rows, width = _tile(columns, _WIDTH)
    _scatter_scaled_kernel[(triton.cdiv(total, rows) * triton.cdiv(columns, width),)](
        x,
        x.stride(0),
        residual,
        residual.stride(0),
        branch,
        branch.stride(0),
        weights.contiguous(),
        sources,
        sources.shape[0],
        out,
        total,
        kept,
        columns,
        SCAN=scan,
        ROWS=rows,
        WIDTH=width,
        **_OPTIONS,
    )
    return out


def scatter_scaled_backward(
    dout: Tensor, x: Tensor, branch: Tensor, weights: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of ``x``, ``residual``, ``branch`` and ``weights``; 0 in rows that the forward pass did not read.

    As many launches as forward. A program has whole rows, so that their products with ``dout`` are summed in one order.
    """
    (total, columns), kept = x.shape, indices.shape[0]
    dx, dweights = x.new_empty((total, columns)), weights.new_empty((total,))
    dresidual, dbranch = x.new_empty((kept, columns)), x.new_empty((kept, columns))
    rows, width = _tile(columns, _GRAD_WIDTH)
    row_tiles, kept_tiles = triton.cdiv(total, rows), triton.cdiv(kept, rows)
    if row_tiles + kept_tiles == 0:
        return dx, dresidual, dbranch, dweights
    dout, x, branch, indices = _matrix(dout), _matrix(x), _matrix(branch), indices.contiguous()
    sources, scan = sources_of(indices, total)
    _scatter_scaled_backward_kernel[(row_tiles + kept_tiles,)](
        dout,
        dout.stride(0),
        x,
        x.stride(0),
        branch,
        branch.stride(0),
        weights.contiguous(),
        indices,
        sources,
        sources.shape[0],
        dx,
        dresidual,
        dbranch,
        dweights,
        row_tiles,
        total,
        kept,
        columns,
        SCAN=scan,
        ROWS=rows,
        WIDTH=width,
        **_GRAD_OPTIONS[x.element_size()],
    )
    return dx, dresidual, dbranch, dweights


KERNELS: dict[str, Callable[..., Any]] = {
    "scatter_scaled": scatter_scaled,
    "scatter_scaled_backward": scatter_scaled_backward,
}

__all__ = ["KERNELS", "scatter_scaled", "scatter_scaled_backward"]
