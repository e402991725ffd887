"""Squared distances between the rows of each segment: ``|a - b|^2 = |a|^2 + |b|^2 - 2 a b``, by tensor cores.

Where the three terms cancel, float32 has too few digits for that. So the value of a pair comes from the first of these
that does not cancel:

1. for half precision, the rows as they are, whose products are exact;
2. the rows less the middle of their segment, each cut into a sum of three bfloat16 rows, which loses nothing;
3. the differences ``a_c - b_c`` themselves.

Each is a function of the two rows and the middle alone, and the same with the rows exchanged: two large terms are never
added up in an order that depends on which of the rows comes first. So equal rows are equally far from every third row,
whichever tiles the pairs are in, and exactly 0 from each other.

Tiles are cut from the packed tensor, across segments: a tile is computed if any two of its rows share a segment.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pruneops.triton.segments import segment_of_rows

NUM_PLANES = tl.constexpr(3)
# Below this part of |a|^2 + |b|^2 a squared distance has cancelled.
_CANCELLED = tl.constexpr(1.0 / 16.0)
# In the place of one that is still to be computed.
_OPEN = tl.constexpr(-1.0)
# Segments of which the number of clusters is looked at in one step.
_LAYOUT = tl.constexpr(64)
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


# ---------------------------------------------------------------------- rows


@triton.jit
def _write_clusters(
    cu_seqlens,  # [B+1] int32, any values
    num_clusters,  # [B] int32, any values
    cu_clusters,  # out [B+1] int32
    center_indices,  # out [capacity] int32: -1 behind the last centre
    num_segments,
    total,
    max_seqlen,
    capacity,
    BLOCK: tl.constexpr,
):
    """The boundaries of the segments in ``center_indices``; one program."""
    lanes = tl.arange(0, _LAYOUT)
    earlier = lanes[None, :] <= lanes[:, None]
    highest = total * 0
    clusters = capacity.to(tl.int64) * 0
    tl.store(cu_clusters, 0)
    for start in range(0, num_segments, _LAYOUT):
        index = start + lanes
        inside = index < num_segments
        boundary = tl.minimum(tl.load(cu_seqlens + index, mask=inside, other=0), total)
        begin = tl.maximum(tl.max(tl.where(earlier, boundary[None, :], 0), axis=1), highest)
        end = tl.load(cu_seqlens + index + 1, mask=inside, other=0)
        end = tl.maximum(begin, tl.minimum(end, total))
        highest = tl.max(end, axis=0)
        rows = tl.minimum(end - begin, max_seqlen)
        count = tl.minimum(tl.maximum(tl.load(num_clusters + index, mask=inside, other=0), 1), rows)
        ends = clusters + tl.cumsum(tl.where(inside, count, 0).to(tl.int64), axis=0)
        tl.store(cu_clusters + index + 1, tl.minimum(ends, capacity).to(tl.int32), mask=inside)
        clusters = tl.max(ends, axis=0)
    block = tl.arange(0, BLOCK)
    for start in range(tl.minimum(clusters, capacity).to(tl.int32), capacity, BLOCK):
        tl.store(center_indices + start + block, -1, mask=block < capacity - start)


@triton.jit
def _median(a, b, c):
    """Of three rows; 0 where it is not finite, which would spoil rows that are."""
    middle = tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))
    return tl.where(tl.abs(middle) < float("inf"), middle, 0.0)


@triton.jit(do_not_specialize=["num_segments", "total", "max_seqlen", "capacity"])
def prepare_kernel(
    x,  # [total, C] float32, bfloat16 or float16
    x_stride,  # elements from row to row
    cu_seqlens,  # [B+1] int32, any values
    num_clusters,  # [B] int32, any values
    planes,  # out [3, total, padded] bfloat16: shifted rows are the sum of these
    norms,  # out [2, total] float32: squared, of shifted rows and of rows as they are
    segments,  # out [total] int32, -1 for rows of none
    begins,  # out [total] int32: first row of the segment, -1
    counts,  # out [total] int32: rows of the segment, 0
    cluster_ids,  # out [total] int32; these four only for rows of no segment
    density,  # out [total] float32
    delta,  # out [total] float32
    score,  # out [total] float32
    cu_clusters,  # out [B+1] int32
    center_indices,  # out [capacity] int32: -1 behind the last centre
    num_segments,
    total,
    max_seqlen,  # rows of a segment past this many belong to no segment
    capacity,
    channels,
    padded,  # channels, rounded up to a multiple of every DEPTH
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Everything that is made before distances: program 0 has the clusters, each other one ROWS rows."""
    program = tl.program_id(0)
    if program == 0:
        _write_clusters(
            cu_seqlens, num_clusters, cu_clusters, center_indices, num_segments, total, max_seqlen, capacity, BLOCK
        )
    else:
        row = (program - 1) * ROWS + tl.arange(0, ROWS)
        exists = row < total
        segment, begin, end = segment_of_rows(cu_seqlens, num_segments, total, row)
        count = tl.minimum(end - begin, max_seqlen)
        member = exists & (segment >= 0) & (row - begin < count)
        tl.store(segments + row, tl.where(member, segment, -1), mask=exists)
        tl.store(begins + row, tl.where(member, begin, -1), mask=exists)
        tl.store(counts + row, tl.where(member, count, 0), mask=exists)
        stray = exists & ~member
        tl.store(cluster_ids + row, -1, mask=stray)
        tl.store(density + row, 0.0, mask=stray)
        tl.store(delta + row, 0.0, mask=stray)
        tl.store(score + row, 0.0, mask=stray)

        lanes = tl.arange(0, BLOCK)
        plane = total.to(tl.int64) * padded
        edge = count // 4
        # In float64 also the squares of large numbers are in range, and what adding up rounds does not count.
        shifted = tl.zeros([ROWS, BLOCK], tl.float64)
        plain = tl.zeros([ROWS, BLOCK], tl.float64)
        for start in range(0, padded, BLOCK):
            channel = start + lanes
            inside = member[:, None] & (channel < channels)[None, :]
            at = x + channel[None, :]
            value = tl.load(at + row.to(tl.int64)[:, None] * x_stride, mask=inside, other=0).to(tl.float32)
            first = tl.load(at + (begin + edge).to(tl.int64)[:, None] * x_stride, mask=inside, other=0)
            half = tl.load(at + (begin + count // 2).to(tl.int64)[:, None] * x_stride, mask=inside, other=0)
            last = tl.load(at + (begin + count - 1 - edge).to(tl.int64)[:, None] * x_stride, mask=inside, other=0)
            rest = value - _median(first.to(tl.float32), half.to(tl.float32), last.to(tl.float32))
            wide, wide_rest = value.to(tl.float64), rest.to(tl.float64)
            plain += wide * wide
            shifted += wide_rest * wide_rest
            to = planes + row.to(tl.int64)[:, None] * padded + channel[None, :]
            kept = exists[:, None] & (channel < padded)[None, :]
            for i in tl.static_range(NUM_PLANES):
                part = rest.to(tl.bfloat16)
                tl.store(to + i * plane, part, mask=kept)
                rest -= part.to(tl.float32)
        tl.store(norms + row, tl.sum(shifted, axis=1).to(tl.float32), mask=exists)
        tl.store(norms + total + row, tl.sum(plain, axis=1).to(tl.float32), mask=exists)


# ---------------------------------------------------------------------- tiles


@triton.jit
def _factor(x):  # half precision
    """``x`` as :func:`_dot` wants it.

    Libraries for the CPU add up in another order near the edges of a matrix, while here every element is to be made in
    the same way. Of that, float64 and one rounding leave no trace.
    """
    return x.to(tl.float32).to(tl.float64) if _INTERPRETED else x


@triton.jit
def _dot(
    a,  # [TILE, DEPTH]
    b,  # [DEPTH, TILE]
    acc,  # [TILE, TILE] float32, or None
):
    """Float32 ``a @ b + acc``."""
    if _INTERPRETED:
        products = tl.dot(a, b).to(tl.float32)
        if acc is None:
            return products
        else:
            return acc + products
    elif acc is None:
        return tl.dot(a, b)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def _add_up(large, small, products):
    """``large + small`` grows by ``products``; ``small`` takes what rounding ``large`` loses.

    Tensor cores cut sums off towards zero, so none of theirs is long: every step starts anew.
    """
    total = large + products
    return total, small + ((large - total) + products)


@triton.jit
def _squared(
    large,  # [TILE, TILE] and
    small,  # [TILE, TILE]: inner products are the sum of the two
    norms,  # [total] float32, squared
    rows_a,  # [TILE] int32
    rows_b,  # [TILE] int32
    total,
):
    """Squared distances; _OPEN where they have cancelled, and where what is no number may come from an overflow."""
    norms_a = tl.load(norms + rows_a, mask=rows_a < total, other=0)[:, None]
    norms_b = tl.load(norms + rows_b, mask=rows_b < total, other=0)[None, :]
    squared = ((norms_a - large) + (norms_b - large)) - 2.0 * small
    return tl.where(squared >= _CANCELLED * (norms_a + norms_b), squared, _OPEN)


@triton.jit
def _from_rows(
    x,  # [total, C] half precision
    x_stride,
    rows_a,  # [TILE] int32
    rows_b,  # [TILE] int32
    norms,  # [total] float32, squared
    total,
    channels,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Squared distances from the rows as they are, or _OPEN."""
    lanes = tl.arange(0, DEPTH)
    exists_a, exists_b = rows_a < total, rows_b < total
    at_a = x + rows_a.to(tl.int64)[:, None] * x_stride + lanes[None, :]
    at_b = x + rows_b.to(tl.int64)[:, None] * x_stride + lanes[None, :]
    large = tl.zeros([TILE, TILE], tl.float32)
    small = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, channels, DEPTH):
        inside = (lanes < channels - start)[None, :]
        a = _factor(tl.load(at_a + start, mask=exists_a[:, None] & inside, other=0))
        b = _factor(tl.load(at_b + start, mask=exists_b[:, None] & inside, other=0))
        large, small = _add_up(large, small, _dot(a, tl.trans(b), None))
    return _squared(large, small, norms, rows_a, rows_b, total)


@triton.jit
def _from_planes(
    planes,  # [3, total, padded] bfloat16
    rows_a,  # [TILE] int32
    rows_b,  # [TILE] int32
    norms,  # [total] float32, squared
    total,
    padded,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The same from shifted rows. Of the nine products the three smallest are below 2**-24 of ``|a| |b|``: left out."""
    lanes = tl.arange(0, DEPTH)
    exists_a, exists_b = rows_a < total, rows_b < total
    plane = total.to(tl.int64) * padded
    at_a = planes + rows_a.to(tl.int64)[:, None] * padded + lanes[None, :]
    at_b = planes + rows_b.to(tl.int64)[:, None] * padded + lanes[None, :]
    large = tl.zeros([TILE, TILE], tl.float32)
    small = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, padded, DEPTH):
        a0 = _factor(tl.load(at_a + start, mask=exists_a[:, None], other=0))
        a1 = _factor(tl.load(at_a + start + plane, mask=exists_a[:, None], other=0))
        a2 = _factor(tl.load(at_a + start + 2 * plane, mask=exists_a[:, None], other=0))
        b0 = tl.trans(_factor(tl.load(at_b + start, mask=exists_b[:, None], other=0)))
        b1 = tl.trans(_factor(tl.load(at_b + start + plane, mask=exists_b[:, None], other=0)))
        b2 = tl.trans(_factor(tl.load(at_b + start + 2 * plane, mask=exists_b[:, None], other=0)))
        # The smallest first; products of a with the rest of b and of b with the rest of a are added up apart.
        with_rest_of_b = _dot(a0, b1, _dot(a0, b2, None))
        with_rest_of_a = _dot(a1, b0, _dot(a2, b0, None))
        small += with_rest_of_b + with_rest_of_a
        large, small = _add_up(large, small, _dot(a0, b0, _dot(a1, b1, None)))
    return _squared(large, small, norms, rows_a, rows_b, total)


@triton.jit
def _from_differences(
    x,  # [total, C]
    x_stride,
    rows_a,  # [TILE] int32
    rows_b,  # [TILE] int32
    total,
    channels,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    lanes = tl.arange(0, WIDTH)
    at_a = x + rows_a.to(tl.int64)[:, None, None] * x_stride + lanes[None, None, :]
    at_b = x + rows_b.to(tl.int64)[None, :, None] * x_stride + lanes[None, None, :]
    exists_a, exists_b = (rows_a < total)[:, None, None], (rows_b < total)[None, :, None]
    squares = tl.zeros([TILE, TILE, WIDTH], tl.float32)
    for start in range(0, channels, WIDTH):
        inside = (lanes < channels - start)[None, None, :]
        a = tl.load(at_a + start, mask=exists_a & inside, other=0).to(tl.float32)
        b = tl.load(at_b + start, mask=exists_b & inside, other=0).to(tl.float32)
        apart = a - b
        squares += apart * apart
    return tl.sum(squares, axis=2)


@triton.jit
def _any(mask):
    return tl.max(tl.max(mask.to(tl.int32), axis=1), axis=0) > 0


@triton.jit
def _pairs(
    begins,  # [total] int32
    rows_a,  # [TILE] int32, any
    rows_b,  # [TILE] int32, any
    total,
):
    """Whether two rows are of one segment, and the first row of the segments of ``rows_a``."""
    begins_a = tl.load(begins + rows_a, mask=(rows_a >= 0) & (rows_a < total), other=-1)[:, None]
    begins_b = tl.load(begins + rows_b, mask=(rows_b >= 0) & (rows_b < total), other=-1)[None, :]
    return (begins_a == begins_b) & (begins_a >= 0), begins_a


@triton.jit
def _store_tile(
    values,  # [TILE, TILE]
    rows,  # [TILE] int32, of the tensor
    columns,  # [TILE] int32, of the tensor
    begins,  # [total] int32
    distances,  # out [end_row - first_row, pitch]
    total,
    pitch,
    first_row,
    end_row,
):
    pairs, begin = _pairs(begins, rows, columns, total)
    kept = pairs & ((rows >= first_row) & (rows < end_row))[:, None]
    to = distances + (rows - first_row).to(tl.int64)[:, None] * pitch + (columns[None, :] - begin)
    tl.store(to, values, mask=kept)


@triton.jit(do_not_specialize=["total", "first_row", "end_row", "first_tile", "span"])
def distances_kernel(
    x,  # [total, C] float32, bfloat16 or float16
    x_stride,  # elements from row to row
    planes,  # [3, total, padded] bfloat16
    norms,  # [2, total] float32
    begins,  # [total] int32
    distances,  # out [end_row - first_row, pitch] float32: squared, by column within the segment
    total,
    channels,
    padded,
    pitch,
    first_row,  # the rows that distances are wanted of
    end_row,
    first_tile,  # the tile with the first of them
    span,  # tiles that a tile may share segments with: if WHOLE those from itself on, else those around it
    WHOLE: tl.constexpr,  # all rows are wanted, and tiles are stored twice
    HALF: tl.constexpr,  # half precision
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,  # channels of a step of products
    WIDTH: tl.constexpr,  # channels of a step of differences
):
    program = tl.program_id(0)
    tile_a = first_tile + program // span
    tile_b = tile_a + program % span
    if not WHOLE:
        tile_b -= span // 2
    lanes = tl.arange(0, TILE)
    rows_a, rows_b = tile_a * TILE + lanes, tile_b * TILE + lanes
    pairs, _ = _pairs(begins, rows_a, rows_b, total)
    if _any(pairs):
        if HALF:
            squared = _from_rows(x, x_stride, rows_a, rows_b, norms + total, total, channels, TILE, DEPTH)
        else:
            squared = _from_planes(planes, rows_a, rows_b, norms, total, padded, TILE, DEPTH)
        # A row is at 0 from itself; pairs of two segments are left alone.
        pairs, _ = _pairs(begins, rows_a, rows_b, total)
        squared = tl.where(pairs & (rows_a[:, None] != rows_b[None, :]), squared, 0.0)
        if HALF and _any(squared < 0):
            finer = _from_planes(planes, rows_a, rows_b, norms, total, padded, TILE, DEPTH)
            squared = tl.where(squared < 0, finer, squared)
        if _any(squared < 0):
            exact = _from_differences(x, x_stride, rows_a, rows_b, total, channels, TILE, WIDTH)
            squared = tl.where(squared < 0, tl.where(exact == exact, exact, float("inf")), squared)
        _store_tile(squared, rows_a, rows_b, begins, distances, total, pitch, first_row, end_row)
        if WHOLE and tile_a != tile_b:
            _store_tile(tl.trans(squared), rows_b, rows_a, begins, distances, total, pitch, first_row, end_row)
