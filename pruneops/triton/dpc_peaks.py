"""Density peaks from the rows of a matrix of squared distances: density, delta, rank of the score, nearest centre.

A program has ROWS packed rows, of any segments; what a step needs of other rows an earlier launch has written. No value
depends on the order in which programs run.
"""

from __future__ import annotations

import triton
import triton.language as tl

_INFINITY = tl.constexpr(0x7F800000)
# Above the bits of every distance.
_NONE = tl.constexpr(0x7FFFFFFF)
_NO_KEY = tl.constexpr(2**63 - 1)


@triton.jit
def _rows(
    begins,  # [total] int32
    counts,  # [total] int32
    first_row,
    end_row,
    ROWS: tl.constexpr,
):
    """The rows of this program, first row and number of rows of their segments; 0 rows where there is none."""
    row = first_row + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < end_row
    count = tl.load(counts + row, mask=exists, other=0)
    begin = tl.load(begins + row, mask=exists, other=0)
    return row, begin, count


@triton.jit
def _load_bits(
    distances,  # [end_row - first_row, pitch] float32
    row,  # [ROWS], from first_row on
    count,  # [ROWS]
    start,
    pitch,
    BLOCK: tl.constexpr,
):
    """``[ROWS, BLOCK]`` int32 that are ordered as the distances are; _NONE past the end of the segment."""
    column = start + tl.arange(0, BLOCK)
    # All of the buffer's row may be read, which leaves the compiler free to read four at a time.
    at = distances + row.to(tl.int64)[:, None] * pitch + column[None, :]
    bits = tl.load(at, mask=(count > 0)[:, None] & (column < pitch)[None, :], other=0).to(tl.int32, bitcast=True)
    return tl.where(column[None, :] < count[:, None], bits, _NONE)


@triton.jit
def _load_others(
    distances,
    row,
    count,
    own,  # [ROWS]: the row within its segment
    start,
    pitch,
    BLOCK: tl.constexpr,
):
    """The same, without the distance of a row to itself."""
    bits = _load_bits(distances, row, count, start, pitch, BLOCK)
    return tl.where((start + tl.arange(0, BLOCK))[None, :] == own[:, None], _NONE, bits)


@triton.jit
def _extremes(bits):
    """Per row the smallest, and the largest that is a distance."""
    return tl.min(bits, axis=1), tl.max(tl.where(bits == _NONE, 0, bits), axis=1)


@triton.jit
def _sum_below(bits, bound):
    """Per row the sum of all distances below the bound, in float64, and their number."""
    below = bits < bound[:, None]
    values = tl.where(below, bits, 0).to(tl.float32, bitcast=True)
    return tl.sum(values.to(tl.float64), axis=1), tl.sum(below.to(tl.int32), axis=1)


@triton.jit(do_not_specialize=["first_row", "end_row", "k"])
def density_kernel(
    distances,  # [end_row - first_row, pitch] float32, squared
    begins,  # [total] int32
    counts,  # [total] int32
    noise,  # [total] float32, or None
    density,  # out [total] float32
    farthest,  # out [total] float32: the largest of the row's distances, squared
    first_row,
    end_row,
    pitch,
    k,
    channels,
    HOLDS_ALL: tl.constexpr,  # no segment has more than BLOCK rows
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Density: the k smallest distances of a row are found by a bisection that ends once some bound parts them."""
    row, begin, count = _rows(begins, counts, first_row, end_row, ROWS)
    own, local = row - begin, row - first_row
    longest = tl.max(count, axis=0)
    bits = _load_others(distances, local, count, own, 0, pitch, BLOCK)
    low, high = _extremes(bits)
    if not HOLDS_ALL:
        for start in range(BLOCK, longest, BLOCK):
            lowest, highest = _extremes(_load_others(distances, local, count, own, start, pitch, BLOCK))
            low, high = tl.minimum(low, lowest), tl.maximum(high, highest)
    tl.store(farthest + row, high.to(tl.float32, bitcast=True), mask=count > 0)

    # The row itself is the nearest, at 0. The k-1st other one lies in [low, high].
    wanted = tl.minimum(count, k) - 1
    low = tl.where(wanted > 0, low, high)
    while tl.max((low < high).to(tl.int32), axis=0) > 0:
        middle = low + ((high - low) >> 1)
        reached = (bits <= middle[:, None]).to(tl.int32)
        if not HOLDS_ALL:
            for start in range(BLOCK, longest, BLOCK):
                more = _load_others(distances, local, count, own, start, pitch, BLOCK)
                reached += (more <= middle[:, None]).to(tl.int32)
        num_reached = tl.sum(reached, axis=1)
        undecided = low < high
        high = tl.where(undecided & (num_reached >= wanted), middle, high)
        low = tl.where(undecided & (num_reached < wanted), middle + 1, low)
        low = tl.where(undecided & (num_reached == wanted), high, low)
    total, below = _sum_below(bits, high)
    if not HOLDS_ALL:
        for start in range(BLOCK, longest, BLOCK):
            more, more_below = _sum_below(_load_others(distances, local, count, own, start, pitch, BLOCK), high)
            total += more
            below += more_below
    # The others of the k-1 are as far as the bound; infinity times none of them would be no number.
    ties = wanted - below
    total += tl.where(ties > 0, ties.to(tl.float64) * high.to(tl.float32, bitcast=True).to(tl.float64), 0.0)
    total = tl.where(wanted > 0, total, 0.0)
    mean = total / (tl.maximum(wanted + 1, 1).to(tl.float64) * tl.maximum(channels, 1))
    result = tl.exp(-mean).to(tl.float32)
    if noise is not None:
        # 1e-6 in float32. The product is rounded before it is added.
        share = tl.load(noise + row, mask=count > 0, other=0).to(tl.float64) * 9.999999974752427e-07
        result += share.to(tl.float32)
    tl.store(density + row, result, mask=count > 0)


@triton.jit(do_not_specialize=["first_row", "end_row"])
def delta_kernel(
    distances,  # [end_row - first_row, pitch] float32, squared
    begins,  # [total] int32
    counts,  # [total] int32
    density,  # [total] float32
    farthest,  # [total] float32
    delta,  # out [total] float32
    score,  # out [total] float32
    first_row,
    end_row,
    pitch,
    channels,
    BY_ROW: tl.constexpr,  # of equally dense rows the first one counts as denser
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Delta, the distance to the nearest denser row, and the score."""
    row, begin, count = _rows(begins, counts, first_row, end_row, ROWS)
    own_density = tl.load(density + row, mask=count > 0, other=0)
    longest = tl.max(count, axis=0)
    nearest = tl.full([ROWS], _NONE, tl.int32)
    for start in range(0, longest, BLOCK):
        column = start + tl.arange(0, BLOCK)
        bits = _load_bits(distances, row - first_row, count, start, pitch, BLOCK)
        inside = column[None, :] < count[:, None]
        other = tl.load(density + begin[:, None] + column[None, :], mask=inside, other=0)
        denser = other > own_density[:, None]
        if BY_ROW:
            denser |= (other == own_density[:, None]) & (column[None, :] < (row - begin)[:, None])
        nearest = tl.minimum(nearest, tl.min(tl.where(inside & denser, bits, _NONE), axis=1))
    # Mostly one row of a segment has no denser one; it gets the largest distance.
    lost = (nearest == _NONE) & (count > 0)
    if tl.max(lost.to(tl.int32), axis=0) > 0:
        largest = tl.zeros([ROWS], tl.float32)
        for start in range(0, longest, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = lost[:, None] & (column[None, :] < count[:, None])
            far = tl.load(farthest + begin[:, None] + column[None, :], mask=inside, other=0)
            largest = tl.maximum(largest, tl.max(far, axis=1))
        nearest = tl.where(lost, largest.to(tl.int32, bitcast=True), nearest)
    squared = nearest.to(tl.float32, bitcast=True).to(tl.float64)
    result = tl.sqrt(squared / tl.maximum(channels, 1)).to(tl.float32)
    tl.store(delta + row, result, mask=count > 0)
    tl.store(score + row, result * own_density, mask=count > 0)


@triton.jit(do_not_specialize=["end_row"])
def rank_kernel(
    segments,  # [total] int32
    begins,  # [total] int32
    counts,  # [total] int32
    score,  # [total] float32
    cu_clusters,  # [B+1] int32
    ranks,  # out [total] int32
    center_indices,  # out [capacity] int32
    end_row,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The rank of every row, by counting those before it: higher scores, equal ones of lower rows, NaN last."""
    row, begin, count = _rows(begins, counts, 0, end_row, ROWS)
    own = tl.load(score + row, mask=count > 0, other=0)
    before = tl.zeros([ROWS, BLOCK], tl.int32)
    for start in range(0, tl.max(count, axis=0), BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column[None, :] < count[:, None]
        other = tl.load(score + begin[:, None] + column[None, :], mask=inside, other=0)
        no_number, own_no_number = other != other, (own != own)[:, None]
        tied = (other == own[:, None]) | (no_number & own_no_number)
        higher = (other > own[:, None]) | (own_no_number & ~no_number)
        ahead = higher | (tied & (column[None, :] < (row - begin)[:, None]))
        before += (inside & ahead).to(tl.int32)
    rank = tl.sum(before, axis=1).to(tl.int32)
    tl.store(ranks + row, rank, mask=count > 0)
    segment = tl.load(segments + row, mask=count > 0, other=0)
    first = tl.load(cu_clusters + segment, mask=count > 0, other=0)
    end = tl.load(cu_clusters + segment + 1, mask=count > 0, other=0)
    tl.store(center_indices + first + rank, row, mask=(count > 0) & (rank < end - first))


@triton.jit(do_not_specialize=["first_row", "end_row"])
def assign_kernel(
    distances,  # [end_row - first_row, pitch] float32, squared
    segments,  # [total] int32
    begins,  # [total] int32
    counts,  # [total] int32
    ranks,  # [total] int32
    cu_clusters,  # [B+1] int32
    cluster_ids,  # out [total] int32
    first_row,
    end_row,
    pitch,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The nearest centre of every row, of equally near ones the better one; a centre belongs to itself."""
    row, begin, count = _rows(begins, counts, first_row, end_row, ROWS)
    segment = tl.load(segments + row, mask=count > 0, other=0)
    first = tl.load(cu_clusters + segment, mask=count > 0, other=0)
    num_centers = tl.load(cu_clusters + segment + 1, mask=count > 0, other=0) - first
    own = tl.load(ranks + row, mask=count > 0, other=0)
    best = tl.full([ROWS], _NO_KEY, tl.int64)
    for start in range(0, tl.max(count, axis=0), BLOCK):
        column = start + tl.arange(0, BLOCK)
        bits = _load_bits(distances, row - first_row, count, start, pitch, BLOCK)
        inside = column[None, :] < count[:, None]
        rank = tl.load(ranks + begin[:, None] + column[None, :], mask=inside, other=0)
        # Ordered by distance, then by rank.
        key = (bits.to(tl.int64) << 32) | rank.to(tl.int64)
        center = inside & (rank < num_centers[:, None])
        best = tl.minimum(best, tl.min(tl.where(center, key, _NO_KEY), axis=1))
    nearest = (best & 0xFFFFFFFF).to(tl.int32)
    cluster = tl.where(own < num_centers, own, tl.where(num_centers > 0, nearest, -1))
    tl.store(cluster_ids + row, cluster, mask=count > 0)
