"""Routing: a learned logit for every row, and from it the weight of the row.

The router of Mixture-of-Depths (arXiv 2404.02258) with the weights of p-MoD (arXiv 2412.04449).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pruneops.triton import tuning

_WIDTH = 1024  # of a tile, in elements, so 4 rows of a model
_ROWS = (4, 128)  # of a tile, for long rows and at most
_GRAD_WIDTH = 512  # the same backward, where a program has a slice of the columns
_GRAD_ROWS = (8, 32)
# Rows whose gradients of the weight one program adds up, a multiple of _GRAD_ROWS; more where there would be more than
# _MOST_SUMS sums to add.
_SUMMED_ROWS = 32
_MOST_SUMS = 512
_REDUCED_SUMS = 64
_REDUCED_COLUMNS = 32

# By the bytes of an element: as many elements a thread in 32 bits as registers allow.
_OPTIONS = {2: tuning.Config({}, num_warps=4).options, 4: tuning.Config({}, num_warps=8).options}


@triton.jit
def _tanh(x):
    # For small values a polynomial in x * x, fitted for the least relative error (4e-9 up to 0.625), since the quotient
    # would lose the leading bits of 1 - e.
    s = x * x
    p = -0.005704984961429003 * s + 0.020639084707732586
    p = p * s - 0.05373971430142943
    p = p * s + 0.13331442188564466
    p = p * s - 0.33333281941639564
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, x + x * s * p, tl.where(x < 0, -large, large))


@triton.jit
def _activated(logit, ACTIVATION: tl.constexpr):
    if ACTIVATION == "tanh":
        return _tanh(logit)
    elif ACTIVATION == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-logit))
    else:
        return logit


@triton.jit
def _slope(logit, ACTIVATION: tl.constexpr):
    value = _activated(logit, ACTIVATION)
    if ACTIVATION == "tanh":
        return (1.0 - value) * (1.0 + value)
    elif ACTIVATION == "sigmoid":
        return value * (1.0 - value)
    else:
        return tl.full(logit.shape, 1.0, tl.float32)


@triton.jit
def _routed_rows(
    row,  # [ROWS]
    end,
    target,  # [total] uint8, or None for all
):
    """[ROWS] bool: which rows below ``end`` are routed."""
    routed = row < end
    if target is not None:
        routed = routed & (tl.load(target + row, mask=routed, other=0) != 0)
    return routed


@triton.jit(do_not_specialize=["total"])
def _router_kernel(
    x,  # [total, columns]; rows that are not routed are not read
    x_stride,
    weight,  # [columns]
    bias,  # [1], or None
    target,  # [total] uint8, or None
    logits,  # [total] float32
    weights,  # [total] float32
    total,
    columns,
    scale,
    shift,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    routed = _routed_rows(row, total, target)
    rows_of_x = x + (row * x_stride)[:, None]
    product = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, columns, WIDTH):
        column = first + tl.arange(0, WIDTH)
        inside = column < columns
        values = tl.load(rows_of_x + column[None, :], mask=routed[:, None] & inside[None, :], other=0.0)
        direction = tl.load(weight + column, mask=inside, other=0.0)
        product += values.to(tl.float32) * direction.to(tl.float32)[None, :]
    logit = tl.sum(product, axis=1)
    if bias is not None:
        logit += tl.load(bias).to(tl.float32)
    value = scale * _activated(logit, ACTIVATION) + shift
    tl.store(logits + row, tl.where(routed, logit, float("-inf")), mask=row < total)
    tl.store(weights + row, tl.where(routed, value, 1.0), mask=row < total)


@triton.jit(do_not_specialize=["total", "rows_of_sum"])
def _router_backward_kernel(
    dweights,  # [total] float32
    logits,  # [total] float32
    x,  # [total, columns]; rows that are not routed are not read
    x_stride,
    weight,  # [columns]
    target,  # [total] uint8, or None
    dx,  # [total, columns], dense
    sums,  # [blocks of rows_of_sum rows, sums_stride] float32: of each column, then of the bias
    sums_stride,
    total,
    rows_of_sum,
    columns,
    scale,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    slices = tl.maximum((columns + WIDTH - 1) // WIDTH, 1)
    block = (tl.program_id(0) // slices).to(tl.int64)
    slice_of_columns = tl.program_id(0) % slices
    column = slice_of_columns * WIDTH + tl.arange(0, WIDTH)
    direction = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    product = tl.zeros([ROWS, WIDTH], tl.float32)
    of_bias = tl.zeros([ROWS], tl.float32)
    for first in range(0, rows_of_sum, ROWS):
        row = block * rows_of_sum + first + tl.arange(0, ROWS)
        routed = _routed_rows(row, total, target)
        slope = _slope(tl.load(logits + row, mask=routed, other=0.0), ACTIVATION)
        dlogit = tl.where(routed, tl.load(dweights + row, mask=routed, other=0.0) * scale * slope, 0.0)
        inside = (column < columns)[None, :]
        values = tl.load(x + (row * x_stride)[:, None] + column[None, :], mask=routed[:, None] & inside, other=0.0)
        product += dlogit[:, None] * values.to(tl.float32)
        of_bias += dlogit
        value = tl.where(routed[:, None], dlogit[:, None] * direction, 0.0).to(dx.dtype.element_ty)
        tl.store(dx + (row * columns)[:, None] + column[None, :], value, mask=(row < total)[:, None] & inside)
    to_sums = sums + block * sums_stride
    tl.store(to_sums + column, tl.sum(product, axis=0), mask=column < columns)
    if slice_of_columns == 0:
        tl.store(to_sums + columns, tl.sum(of_bias, axis=0))


@triton.jit(do_not_specialize=["blocks"])
def _router_reduce_kernel(
    sums,  # [blocks, sums_stride] float32
    sums_stride,
    dweight,  # [columns]
    dbias,  # [1]
    blocks,
    columns,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([BLOCKS, COLUMNS], tl.float32)
    for first in range(0, blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        inside = (block < blocks)[:, None] & (column <= columns)[None, :]
        total += tl.load(sums + block.to(tl.int64)[:, None] * sums_stride + column[None, :], mask=inside, other=0.0)
    value = tl.sum(total, axis=0).to(dweight.dtype.element_ty)
    tl.store(dweight + column, value, mask=column < columns)
    tl.store(dbias + column - columns, value, mask=column == columns)


def _matrix(x: Tensor) -> Tensor:
    """``x`` ``[rows, columns]``, copied unless its rows are dense; they may be any distance apart."""
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def _mask(target: Tensor | None) -> Tensor | None:
    """A bool mask as bytes."""
    return None if target is None else target.contiguous().view(torch.uint8)


def _tile(columns: int, rows: tuple[int, int], most: int) -> tuple[int, int]:
    """Rows and width of a tile, as many values wherever rows are no shorter than these allow."""
    width = min(most, triton.next_power_of_2(max(columns, 1)))
    return min(rows[1], rows[0] * (most // width)), width


def router_weights(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    activation: str,
    scale: float,
    shift: float,
) -> tuple[Tensor, Tensor]:
    """The logit ``x[t] . weight + bias`` of each row and ``scale * activation(logit) + shift``, its weight.

    One launch. Rows outside ``target`` are not read and get -inf and 1.
    """
    total, columns = x.shape
    logits, weights = (x.new_empty((total,), dtype=torch.float32) for _ in range(2))
    if total == 0:
        return logits, weights
    x = _matrix(x)
    rows, width = _tile(columns, _ROWS, _WIDTH)
    _router_kernel[(triton.cdiv(total, rows),)](
        x,
        x.stride(0),
        weight.contiguous(),
        bias,
        _mask(target),
        logits,
        weights,
        total,
        columns,
        scale,
        shift,
        ACTIVATION=activation,
        ROWS=rows,
        WIDTH=width,
        **_OPTIONS[x.element_size()],
    )
    return logits, weights


def router_weights_backward(
    dweights: Tensor,
    logits: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor | None,
    activation: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``x``, ``weight`` and ``bias``; rows outside ``target`` get 0 and add nothing.

    Two launches: sums over blocks of rows, then over the blocks. Where these begin depends on the number of rows alone.
    """
    total, columns = x.shape
    dx, dweight, dbias = x.new_empty((total, columns)), x.new_empty((columns,)), x.new_empty((1,))
    x, options = _matrix(x), _OPTIONS[x.element_size()]
    rows, width = _tile(columns, _GRAD_ROWS, _GRAD_WIDTH)
    rows_of_sum = max(triton.cdiv(triton.cdiv(total, _MOST_SUMS), _SUMMED_ROWS), 1) * _SUMMED_ROWS
    blocks = triton.cdiv(total, rows_of_sum)
    sums_stride = triton.cdiv(columns + 1, 16) * 16
    sums = x.new_empty((blocks, sums_stride), dtype=torch.float32)
    if blocks > 0:
        # At least one slice of columns, which sums for the bias.
        _router_backward_kernel[(blocks * max(triton.cdiv(columns, width), 1),)](
            dweights.contiguous(),
            logits.contiguous(),
            x,
            x.stride(0),
            weight.contiguous(),
            _mask(target),
            dx,
            sums,
            sums_stride,
            total,
            rows_of_sum,
            columns,
            scale,
            ACTIVATION=activation,
            ROWS=rows,
            WIDTH=width,
            **options,
        )
    _router_reduce_kernel[(triton.cdiv(columns + 1, _REDUCED_COLUMNS),)](
        sums,
        sums_stride,
        dweight,
        dbias,
        blocks,
        columns,
        BLOCKS=_REDUCED_SUMS,
        COLUMNS=_REDUCED_COLUMNS,
        **options,
    )
    return dx, dweight, dbias


KERNELS: dict[str, Callable[..., Any]] = {
    "router_weights": router_weights,
    "router_weights_backward": router_weights_backward,
}

__all__ = ["KERNELS", "router_weights", "router_weights_backward"]
