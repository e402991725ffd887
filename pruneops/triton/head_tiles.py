"""Rows of heads in one or two tiles, and the keys that query rows see: what the attention kernels share.

A tile of a Triton kernel has a power of two elements a side. A head dimension that is none is cut into two tiles, the
largest power of two below it and the rest (80 = 64 + 16), so that little is computed on padding; for one that is a
power of two the second tile is empty and costs nothing. In the functions below ``x0, x1`` are the two parts of the same
rows; where ``D1`` is 0, ``x1`` is something unused.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pruneops.triton.segments import CHUNK
from pruneops.triton.tuning import Config

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# What tl.dot takes at least in each dimension.
SMALLEST = 16

# The interpreter of Triton keeps bfloat16 as integers and multiplies those.
_WIDEN = tl.constexpr(bool(triton.knobs.runtime.interpret))


def head_tiles(head_dim: int) -> tuple[int, int]:
    """The widths ``(D0, D1)`` of the two tiles of a head; ``D1`` is 0 where one tile is enough."""
    if head_dim <= SMALLEST:
        return SMALLEST, 0
    first = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - first
    return first, max(SMALLEST, triton.next_power_of_2(rest)) if rest else 0


def tile_config(m: int, n: int, warps: int, stages: int, capability: int = 80, below: int = 1000) -> Config:
    """Tiles of ``m`` query rows and ``n`` keys, for GPUs from one compute capability on and below another."""
    return Config({"BLOCK_M": m, "BLOCK_N": n}, warps, stages, capability, below)


def aligned(*tensors: Tensor) -> bool:
    """Whether every head starts at a multiple of 16 bytes, so that rows can be read 16 bytes at a time.

    Triton sees that for strides that are multiples of 16, which leaves out a head dimension of 72 or 200.
    """
    return all(
        x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
        for x in tensors
    )


@triton.jit
def dot(
    a,  # [R, K]
    b,  # [K, C]
    acc,  # [R, C] float32, or None
):
    """Float32 ``a @ b``, plus ``acc``; float32 inputs are not shortened to the tensor cores' format."""
    if _WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if acc is None:
        return tl.dot(a, b, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def packed_segment(
    cu_seqlens,  # [B+1], any values
    segment,
    total,
):
    """First row and number of rows of a segment: boundaries are clamped to ``[0, total]`` and never decrease."""
    start = 0
    for first in range(0, segment + 1, CHUNK):
        at = first + tl.arange(0, CHUNK)
        start = tl.maximum(start, tl.max(tl.load(cu_seqlens + at, mask=at <= segment, other=0), 0))
    start = tl.minimum(start, total)
    stop = tl.minimum(tl.load(cu_seqlens + segment + 1), total)
    return start, tl.maximum(stop - start, 0)


@triton.jit
def _load_tile(pointers, inside, columns, D: tl.constexpr, LAST: tl.constexpr):
    # Masks are left out where nothing can be outside.
    if D < LAST:
        if inside is None:
            return tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
        else:
            return tl.load(pointers, mask=inside[:, None] & (columns < D)[None, :], other=0.0)
    else:
        if inside is None:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=inside[:, None], other=0.0)


@triton.jit
def load_heads(
    base,  # the head's element 0 in row 0
    rows,  # [R] row numbers
    stride,  # from row to row
    inside,  # [R] bool, or None where all rows are there; the others are not read and give 0
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ALIGNED: tl.constexpr = False,
):
    """Rows of one head: ``[R, D0]`` and ``[R, D1]``, 0 past ``D``. ``ALIGNED`` says that :func:`aligned` holds."""
    first = tl.arange(0, D0)
    pointers = base + rows.to(tl.int64)[:, None] * stride
    if ALIGNED:
        pointers = tl.multiple_of(pointers, [1, 16])
    x0 = _load_tile(pointers + first[None, :], inside, first, D, D0)
    if D1 == 0:
        return x0, x0
    else:
        second = D0 + tl.arange(0, D1)
        return x0, _load_tile(pointers + second[None, :], inside, second, D, D0 + D1)


@triton.jit
def store_heads(
    base,  # the head's element 0 in row 0
    rows,  # [R] row numbers
    stride,  # from row to row
    inside,  # [R] bool; the other rows are not written
    x0,
    x1,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ALIGNED: tl.constexpr = False,
):
    """Writes rows of one head in the dtype of ``base``."""
    first = tl.arange(0, D0)
    pointers = base + rows.to(tl.int64)[:, None] * stride
    if ALIGNED:
        pointers = tl.multiple_of(pointers, [1, 16])
    mask = inside[:, None]
    if D < D0:
        tl.store(pointers + first[None, :], x0.to(base.dtype.element_ty), mask=mask & (first < D)[None, :])
    else:
        tl.store(pointers + first[None, :], x0.to(base.dtype.element_ty), mask=mask)
    if D1 > 0:
        second = D0 + tl.arange(0, D1)
        if D < D0 + D1:
            mask = mask & (second < D)[None, :]
        tl.store(pointers + second[None, :], x1.to(base.dtype.element_ty), mask=mask)


@triton.jit
def zero_heads(R: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """A float32 accumulator ``[R, D0]``, ``[R, D1]``."""
    x0 = tl.zeros([R, D0], tl.float32)
    if D1 == 0:
        return x0, 0.0
    else:
        return x0, tl.zeros([R, D1], tl.float32)


@triton.jit
def scale_heads(x0, x1, factor, D1: tl.constexpr):
    """Rows times ``factor``, which is a number or, per row, ``[R, 1]``."""
    if D1 == 0:
        return x0 * factor, x1
    else:
        return x0 * factor, x1 * factor


@triton.jit
def add_products(
    acc,  # [R, C] float32, or None
    a0,  # [R, D0]
    a1,
    b0,  # [C, D0]
    b1,
    D1: tl.constexpr,
):
    """``acc + a @ b.T``: the product of every row of ``a`` with every row of ``b``."""
    acc = dot(a0, tl.trans(b0), acc)
    if D1 > 0:
        acc = dot(a1, tl.trans(b1), acc)
    return acc


@triton.jit
def products(a0, a1, b0, b1, D1: tl.constexpr):
    """Float32 ``[R, C]``: the product of every row of ``a`` with every row of ``b``."""
    return add_products(None, a0, a1, b0, b1, D1)


@triton.jit
def add_weighted(
    acc0,  # [R, D0] float32
    acc1,  # [R, D1] float32
    weights,  # [R, C] float32, rounded to the dtype of the rows
    x0,  # [C, D0]
    x1,  # [C, D1]
    D1: tl.constexpr,
):
    """``acc + weights @ x`` for both tiles."""
    weights = weights.to(x0.dtype)
    acc0 = dot(weights, x0, acc0)
    if D1 > 0:
        acc1 = dot(weights, x1, acc1)
    return acc0, acc1


@triton.jit
def key_limits(
    kv_limit,  # [Lq] of the segment's query rows, or None
    rows,  # [R] query rows, counted from the segment's first
    length_q,
    length_k,
    CAUSAL: tl.constexpr,
):
    """``[R]``: how many leading keys each query row sees, in ``[0, length_k]``; 0 for rows past the segment."""
    inside = rows < length_q
    if kv_limit is not None:
        limits = tl.load(kv_limit + rows, mask=inside, other=0)
    elif CAUSAL:
        limits = rows + (length_k - length_q + 1)
    else:
        limits = tl.zeros_like(rows) + length_k
    return tl.where(inside, tl.minimum(tl.maximum(limits, 0), length_k), 0)


@triton.jit
def key_range(
    kv_limit,  # [Lq] of the segment's query rows, or None
    limits,  # [R] from key_limits
    rows,  # [R] consecutive, the first of them inside the segment
    first,  # the first of the rows
    length_q,
    length_k,
    CAUSAL: tl.constexpr,
):
    """The fewest and the most keys that a row of a block sees: below the first nothing is masked, from the last all."""
    if kv_limit is not None:
        fewest = tl.min(tl.where(rows < length_q, limits, length_k), 0)
        most = tl.max(limits, 0)
    elif CAUSAL:
        before = length_k - length_q + 1
        last = tl.minimum(first + limits.shape[0], length_q) - 1
        fewest = tl.minimum(tl.maximum(first + before, 0), length_k)
        most = tl.minimum(tl.maximum(last + before, 0), length_k)
    else:
        fewest = length_k
        most = length_k
    return fewest, most
