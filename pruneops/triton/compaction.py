"""Compaction: rows of any dtype moved as raw bytes, several tensors in a launch.

Every tensor is seen as rows of units, the widest of 1, 2, 4, 8 and 16 bytes that its address, its row stride and its
row size allow; 16 bytes are two neighbouring 8-byte values, which the compiler moves as one. The rows of a tensor are
cut into tiles, a program moves one tile, and the tiles of up to :data:`TENSORS_OF_A_LAUNCH` tensors share a grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pruneops.triton import tuning

# What ragged batches carry along fits into one launch: hidden rows, positions, masks, labels, sources.
TENSORS_OF_A_LAUNCH = 8
# Up to this many indices a program that writes rows looks through all of them for its own; above, a table is made.
SCANNED = 1024

_TILE = 2048  # elements: 16 for each thread, all loaded before the first is stored
_WIDTH = 256  # of a tile, in elements, so 8 rows of 2 KiB for most tensors
_MOST_ROWS = 512
_MOST_SCANNED_ROWS = 16  # of a tile whose rows are looked for: every row is compared with every index
_INVERTED = 256  # indices of a program

_OPTIONS = tuning.Config({}, num_warps=4).options
_TYPES = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64, 16: tl.int64}


@triton.jit
def last_with_index(
    rows,  # [ROWS] int, rows that indices may name
    indices,  # [num_indices] int32
    num_indices,
    SCAN: tl.constexpr,  # whether `indices` are looked through; else they are a table, one entry a row
    ROWS: tl.constexpr,
):
    """[ROWS] int32: the last ``i`` with ``indices[i] == rows``, or the table's entry; -1 if there is none."""
    if SCAN:
        CHUNK: tl.constexpr = 4096 // ROWS  # 32 comparisons a thread and step
        rows = rows.to(tl.int32)
        last = tl.full([ROWS], -1, tl.int32)
        for first in range(0, num_indices, CHUNK):
            at = first + tl.arange(0, CHUNK)
            named = tl.load(indices + at, mask=at < num_indices, other=-1)
            last = tl.maximum(last, tl.max(tl.where(named[None, :] == rows[:, None], at[None, :], -1), axis=1))
        return last
    else:
        return tl.load(indices + rows, mask=rows < num_indices, other=-1)


@triton.jit
def _move_tile(
    tile,
    src,  # [num_src_rows] rows, src_stride units apart
    src_stride,
    dst,  # [num_rows, row_units], dense
    row_units,
    indices,  # [num_indices]
    num_indices,
    num_rows,
    num_src_rows,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,  # elements
    ELEMENTS: tl.constexpr,  # of a unit
    SCAN: tl.constexpr,
):
    # A unit of 16 bytes is written as a product, from which the compiler sees that every row begins on 16 bytes.
    width = row_units * ELEMENTS
    tiles_of_group = (width - 1) // WIDTH + 1
    row = (tile // tiles_of_group).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tile % tiles_of_group).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    source = last_with_index(row, indices, num_indices, SCAN, ROWS)
    exists = (source >= 0) & (source < num_src_rows)
    inside = (column < width)[None, :]
    values = tl.load(
        src + source.to(tl.int64)[:, None] * (src_stride * ELEMENTS) + column[None, :],
        mask=exists[:, None] & inside,
        other=0,
    )
    tl.store(dst + row[:, None] * width + column[None, :], values, mask=(row < num_rows)[:, None] & inside)


@triton.jit(do_not_specialize=["num_indices", "num_rows", "num_src_rows"])
def _move_rows_kernel(
    sources,  # tuple of pointers to units
    src_strides,  # tuple: units from one row to the next
    destinations,  # tuple of pointers to units
    row_units,  # tuple: units of a row
    indices,  # [num_indices] int32: the source of each row, or with SCAN the row of each source
    num_indices,
    num_rows,  # of every destination
    num_src_rows,  # of every source
    SHAPES: tl.constexpr,  # tuple: (rows, elements) of a tile
    ELEMENTS: tl.constexpr,  # tuple: elements of a unit
    SCAN: tl.constexpr,
):
    tile = tl.program_id(0)
    for i in tl.static_range(len(sources)):
        # No sum of the most rows there can be and anything: it would not fit.
        groups = (num_rows - 1) // SHAPES[i][0] + 1
        tiles = groups * ((row_units[i] * ELEMENTS[i] - 1) // SHAPES[i][1] + 1)
        if (tile >= 0) & (tile < tiles):
            _move_tile(
                tile,
                sources[i],
                src_strides[i],
                destinations[i],
                row_units[i],
                indices,
                num_indices,
                num_rows,
                num_src_rows,
                SHAPES[i][0],
                SHAPES[i][1],
                ELEMENTS[i],
                SCAN,
            )
        tile -= tiles  # the next tensor counts its own


@triton.jit(do_not_specialize=["num_indices", "num_rows"])
def _invert_kernel(
    indices,  # [num_indices] int32
    inverse,  # [num_rows] int32, comes filled with -1
    num_indices,
    num_rows,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(indices + at, mask=at < num_indices, other=-1)
    # A maximum does not depend on the order in which programs arrive.
    tl.atomic_max(inverse + row, at.to(tl.int32), mask=(row >= 0) & (row < num_rows), sem="relaxed")


def sources_of(indices: Tensor, num_rows: int) -> tuple[Tensor, bool]:
    """What :func:`last_with_index` needs for rows below ``num_rows``: few indices as they are, else their inverse.

    Returns
    -------
    indices : int32 ``[n]`` or ``[num_rows]``
    scan : whether they are to be looked through
    """
    indices = indices.contiguous()
    count = indices.shape[0]
    if count <= SCANNED:
        return indices, True
    inverse = indices.new_full((num_rows,), -1)
    if num_rows > 0:
        _invert_kernel[(triton.cdiv(count, _INVERTED),)](indices, inverse, count, num_rows, BLOCK=_INVERTED, **_OPTIONS)
    return inverse, False


def _with_dense_rows(x: Tensor) -> Tensor:
    """``x``, copied unless each of its rows is one block of memory; rows may be any distance apart."""
    expected = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return x.contiguous()
        expected *= size
    return x


def _unit(x: Tensor, out: Tensor, stride: int, row: int) -> int:
    """The bytes that move at once, for a row stride and a row size in bytes."""
    bits = x.data_ptr() | out.data_ptr() | stride | row | 16
    return bits & -bits


def _move(tensors: Sequence[Tensor], outputs: Sequence[Tensor], indices: Tensor, scan: bool) -> None:
    """Fills ``outputs``, all of at least one row and one column, from ``tensors`` in one launch."""
    num_rows, sources, destinations, strides, units, shapes, elements = outputs[0].shape[0], [], [], [], [], [], []
    most_rows = _MOST_SCANNED_ROWS if scan else _MOST_ROWS
    tiles = 0
    for tensor, out in zip(tensors, outputs, strict=True):
        x = _with_dense_rows(tensor)
        stride, row = x.stride(0) * x.element_size(), out.numel() // num_rows * out.element_size()
        unit = _unit(x, out, stride, row)
        sources.append(triton.reinterpret(x, _TYPES[unit]))
        destinations.append(triton.reinterpret(out, _TYPES[unit]))
        strides.append(stride // unit)
        units.append(row // unit)
        elements.append(2 if unit == 16 else 1)
        width = units[-1] * elements[-1]
        tile_width = min(_WIDTH, triton.next_power_of_2(width))
        shapes.append((min(most_rows, _TILE // tile_width), tile_width))
        tiles += triton.cdiv(num_rows, shapes[-1][0]) * triton.cdiv(width, tile_width)
    _move_rows_kernel[(tiles,)](
        tuple(sources),
        tuple(strides),
        tuple(destinations),
        tuple(units),
        indices,
        indices.shape[0],
        num_rows,
        tensors[0].shape[0],
        SHAPES=tuple(shapes),
        ELEMENTS=tuple(elements),
        SCAN=scan,
        **_OPTIONS,
    )


def _moved(tensors: Sequence[Tensor], num_rows: int, indices: Tensor, scan: bool) -> list[Tensor]:
    outputs = [x.new_empty((num_rows, *x.shape[1:])) for x in tensors]
    # A tensor without elements has nothing to move.
    pairs = [pair for pair in zip(tensors, outputs, strict=True) if pair[1].numel() > 0]
    for first in range(0, len(pairs), TENSORS_OF_A_LAUNCH):
        group = pairs[first : first + TENSORS_OF_A_LAUNCH]
        _move([x for x, _ in group], [out for _, out in group], indices, scan)
    return outputs


def gather_rows(tensors: list[Tensor], indices: Tensor) -> list[Tensor]:
    """``out[i] = x[indices[i]]`` for every tensor, a row of zeros where there is no such row.

    One launch for up to :data:`TENSORS_OF_A_LAUNCH` tensors. Tensors whose rows are not dense are copied first.
    """
    return _moved(tensors, indices.shape[0], indices.contiguous(), scan=False)


def scatter_rows(tensors: list[Tensor], indices: Tensor, total: int) -> list[Tensor]:
    """``out[indices[i]] = x[i]`` in ``total`` rows of zeros for every tensor; the last of equal indices wins.

    Every row of the result looks for its source, so it is written once, by the same launches as in
    :func:`gather_rows`; more than :data:`SCANNED` indices are inverted before, which are two more.
    """
    if not tensors:
        return []
    return _moved(tensors, total, *sources_of(indices, total))


KERNELS: dict[str, Callable[..., Any]] = {"gather_rows": gather_rows, "scatter_rows": scatter_rows}

__all__ = ["KERNELS", "SCANNED", "TENSORS_OF_A_LAUNCH", "gather_rows", "last_with_index", "scatter_rows", "sources_of"]
