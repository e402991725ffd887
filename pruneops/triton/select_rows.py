"""The kernels of a selection: what each segment keeps, and the rows that this means.

A score becomes an int32 key that sorts like the score does: NaN lowest, -0.0 equal to +0.0; a protected row gets the
highest key of all. What a segment keeps is then one cutoff key and a number of ties: every row above the cutoff, and
the first rows that equal it. A bisection over the keys finds the cutoff; it ends as soon as some key parts as many rows
as are to be kept from the others, which is soon unless there are ties. Nothing is sorted: one ordered pass writes rows.

Source: the ranking step shared by FastV (arXiv 2403.06764), PyramidDrop (arXiv 2410.17247) and their relatives.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pruneops.triton.segments import CHUNK, segment_bounds

_NAN_KEY = tl.constexpr(-(2**31))
_PROTECTED_KEY = tl.constexpr(2**31 - 1)
_INFINITY_BITS = tl.constexpr(0x7F800000)
_MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)
# Numbers of ties and of rows above the cutoff share an int32 that is summed up once: ties from this bit on.
_TIE_BIT = tl.constexpr(16)
_ABOVE_MASK = tl.constexpr(0xFFFF)
# Entries behind the last row that a program writes at once.
_TAIL = tl.constexpr(1024)


@triton.jit
def _ordered_key(score):  # float32
    bits = score.to(tl.int32, bitcast=True)
    magnitude = bits & _MAGNITUDE_BITS
    key = bits ^ ((bits >> 31) & _MAGNITUDE_BITS)
    key = tl.where(magnitude == 0, 0, key)
    return tl.where(magnitude > _INFINITY_BITS, _NAN_KEY, key)


@triton.jit
def _load_keys(
    scores,  # [total]
    protect,  # [total] bool, or None
    begin,  # [GROUP] first row of each segment
    n,  # [GROUP] rows of each segment
    start,  # first of the ROWS rows to load, counted from begin
    ROWS: tl.constexpr,
):
    """[GROUP, ROWS]: keys, the lowest one past the end of a segment, and which rows lie inside."""
    lanes = tl.arange(0, ROWS)
    inside = lanes[None, :] < (n - start)[:, None]
    rows = (begin + start)[:, None] + lanes[None, :]
    key = _ordered_key(tl.load(scores + rows, mask=inside, other=0).to(tl.float32))
    if protect is not None:
        key = tl.where(tl.load(protect + rows, mask=inside, other=0) != 0, _PROTECTED_KEY, key)
    return tl.where(inside, key, _NAN_KEY), inside


@triton.jit
def _summary(keys, inside, threshold_key, PROTECT: tl.constexpr, THRESHOLD: tl.constexpr):
    """[GROUP] each: how many rows are protected, how many above the threshold, lowest and highest unprotected key."""
    lowest = tl.min(tl.where(inside, keys, _PROTECTED_KEY), axis=1)
    protected = lowest * 0
    above = lowest * 0
    unprotected = keys
    if PROTECT:
        is_protected = keys == _PROTECTED_KEY
        protected = tl.sum(is_protected.to(tl.int32), axis=1)
        unprotected = tl.where(is_protected, _NAN_KEY, keys)
    if THRESHOLD:
        above = tl.sum((keys > threshold_key).to(tl.int32), axis=1)
    return protected, above, lowest, tl.max(unprotected, axis=1)


@triton.jit
def _find_cut(
    scores,  # [total]
    protect,  # [total] bool, or None
    begin,  # [GROUP]
    n,  # [GROUP]
    least,  # [GROUP] unprotected rows to keep at least
    threshold_key,
    THRESHOLD: tl.constexpr,  # whether every row above threshold_key stays as well
    HELD: tl.constexpr,  # no segment has more than ROWS rows
    ROWS: tl.constexpr,
):
    """[GROUP] each: what segments keep, as cutoff, ties and rows. Keys past the first ROWS are made anew each time."""
    PROTECT: tl.constexpr = protect is not None
    longest = tl.max(n, axis=0)
    keys, inside = _load_keys(scores, protect, begin, n, 0, ROWS)
    protected, above, lowest, highest = _summary(keys, inside, threshold_key, PROTECT, THRESHOLD)
    if not HELD:
        for start in range(ROWS, longest, ROWS):
            more_keys, more_inside = _load_keys(scores, protect, begin, n, start, ROWS)
            more = _summary(more_keys, more_inside, threshold_key, PROTECT, THRESHOLD)
            protected += more[0]
            above += more[1]
            lowest = tl.minimum(lowest, more[2])
            highest = tl.maximum(highest, more[3])

    free = n - protected
    wanted = tl.minimum(least, free)
    count = protected + wanted
    # The cutoff lies in [low, high]; num_above rows are above high. Three cases need no search.
    low = tl.where(wanted == free, _NAN_KEY, lowest)
    high = tl.where(wanted == free, _NAN_KEY, highest)
    num_above = tl.where(wanted == free, 0, protected)
    low = tl.where(wanted == 0, _PROTECTED_KEY - 1, low)
    high = tl.where(wanted == 0, _PROTECTED_KEY - 1, high)
    num_above = tl.where(wanted == 0, protected, num_above)
    if THRESHOLD:
        enough = above - protected >= wanted
        count = tl.where(enough, above, count)
        num_above = tl.where(enough, above, num_above)
        low = tl.where(enough, threshold_key, low)
        high = tl.where(enough, threshold_key, high)
    while tl.max((low < high).to(tl.int32), axis=0) > 0:
        # The mean, rounded up, without a sum that could overflow.
        middle = (low | high) - ((low ^ high) >> 1)
        reached = (keys >= middle[:, None]).to(tl.int32)
        if not HELD:
            for start in range(ROWS, longest, ROWS):
                more_keys, _ = _load_keys(scores, protect, begin, n, start, ROWS)
                reached += (more_keys >= middle[:, None]).to(tl.int32)
        num_reached = tl.sum(reached, axis=1)
        searching = low < high
        too_many = searching & (num_reached > count)
        # Exactly as many rows as wanted reach it: all of them are above the next lower key.
        found = searching & (num_reached == count)
        not_more = searching & (num_reached <= count)
        low = tl.where(too_many, middle, tl.where(found, middle - 1, low))
        high = tl.where(not_more, middle - 1, high)
        num_above = tl.where(not_more, num_reached, num_above)
    return low, count - num_above, count


@triton.jit
def _emit_rows(
    scores,  # [total]
    protect,  # [total] bool, or None
    indices,  # out [capacity]
    begin,  # [GROUP]
    n,  # [GROUP]
    cutoff,  # [GROUP]
    ties,  # [GROUP]
    offset,  # [GROUP] place of each segment's first kept row
    capacity,
    ROWS: tl.constexpr,
):
    """Writes the rows that segments keep, ascending."""
    above_before = offset
    ties_before = offset * 0
    for start in range(0, tl.max(n, axis=0), ROWS):
        keys, inside = _load_keys(scores, protect, begin, n, start, ROWS)
        is_above = keys > cutoff[:, None]
        is_tie = inside & (keys == cutoff[:, None])
        found = is_above.to(tl.int32) + (is_tie.to(tl.int32) << _TIE_BIT)
        up_to = tl.cumsum(found, axis=1)
        above = above_before[:, None] + (up_to & _ABOVE_MASK)
        tie = ties_before[:, None] + (up_to >> _TIE_BIT)
        place = above + tl.minimum(tie, ties[:, None]) - 1
        kept = (is_above | (is_tie & (tie <= ties[:, None]))) & (place < capacity)
        rows = (begin + start)[:, None] + tl.arange(0, ROWS)[None, :]
        tl.store(indices + place, rows, mask=kept)
        in_rows = tl.sum(found, axis=1)
        above_before += in_rows & _ABOVE_MASK
        ties_before += in_rows >> _TIE_BIT


@triton.jit
def _emit_nothing(
    indices,  # out [capacity]
    end,  # rows that are kept
    capacity,
):
    """Writes this program's share of the -1 behind the last row."""
    first = end.to(tl.int64) + tl.program_id(0).to(tl.int64) * _TAIL
    for start in range(first, capacity, tl.num_programs(0).to(tl.int64) * _TAIL):
        at = start + tl.arange(0, _TAIL)
        tl.store(indices + at, -1, mask=at < capacity)


@triton.jit
def _cut_segments(
    scores,  # [total]
    protect,  # [total] bool, or None
    keep_counts,  # [B] int32, any values, or None for 0
    cuts,  # out [5, B] int32: begin, n, cutoff, ties, rows; or None
    indices,  # out [capacity] int32 if there are no cuts
    cu_seqlens_out,  # out [2] int32 if there are no cuts
    segment,  # [GROUP]
    begin,  # [GROUP]
    n,  # [GROUP]
    threshold,
    capacity,
    num_segments,
    THRESHOLD: tl.constexpr,
    HELD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Finds what segments keep, and says so in ``cuts``, or writes the rows of the only segment."""
    known = segment < num_segments
    least = n * 0
    if keep_counts is not None:
        least = tl.maximum(tl.load(keep_counts + segment, mask=known, other=0), 0)
    threshold_key = _ordered_key(tl.full((), threshold, tl.float32))
    # No score is above a NaN.
    threshold_key = tl.where(threshold_key == _NAN_KEY, _PROTECTED_KEY - 1, threshold_key)
    cutoff, ties, count = _find_cut(scores, protect, begin, n, least, threshold_key, THRESHOLD, HELD, ROWS)
    if cuts is not None:
        tl.store(cuts + segment, begin, mask=known)
        tl.store(cuts + num_segments + segment, n, mask=known)
        tl.store(cuts + 2 * num_segments + segment, cutoff, mask=known)
        tl.store(cuts + 3 * num_segments + segment, ties, mask=known)
        tl.store(cuts + 4 * num_segments + segment, count, mask=known)
    else:
        _emit_rows(scores, protect, indices, begin, n, cutoff, ties, n * 0, capacity, ROWS)
        kept = tl.minimum(tl.max(count, axis=0), capacity)
        tl.store(cu_seqlens_out, 0)
        tl.store(cu_seqlens_out + 1, kept)
        _emit_nothing(indices, kept, capacity)


@triton.jit(do_not_specialize=["total", "capacity", "num_segments"])
def cut_kernel(
    scores,  # [total]
    protect,  # [total] bool, or None
    cu_seqlens,  # [B+1] int32, any values
    keep_counts,  # [B] int32, any values, or None for 0
    threshold,  # float32
    cuts,  # out [5, B] int32, or None if there is one segment, whose rows are then written
    indices,  # out [capacity] int32
    cu_seqlens_out,  # out [2] int32
    total,
    capacity,
    num_segments,
    THRESHOLD: tl.constexpr,
    GROUP: tl.constexpr,  # segments of a program
    SHORT: tl.constexpr,  # rows of each; if one has more, they are taken one after the other,
    STEP: tl.constexpr,  # and so many rows at a time
):
    first = tl.program_id(0) * GROUP
    segment = first + tl.arange(0, GROUP)
    begin, n = segment_bounds(cu_seqlens, segment, num_segments, total)
    if tl.max(n, axis=0) <= SHORT:
        _cut_segments(
            scores, protect, keep_counts, cuts, indices, cu_seqlens_out, segment, begin, n,
            threshold, capacity, num_segments, THRESHOLD, True, SHORT,
        )  # fmt: skip
    else:
        for one in range(first, tl.minimum(first + GROUP, num_segments)):
            alone = one + tl.arange(0, 1)
            alone_begin, alone_n = segment_bounds(cu_seqlens, alone, num_segments, total)
            _cut_segments(
                scores, protect, keep_counts, cuts, indices, cu_seqlens_out, alone, alone_begin, alone_n,
                threshold, capacity, num_segments, THRESHOLD, False, STEP,
            )  # fmt: skip


@triton.jit
def _emit_cuts(
    scores,  # [total]
    protect,  # [total] bool, or None
    cuts,  # [5, B] int32
    indices,  # out [capacity] int32
    segment,  # [GROUP]
    offset,  # [GROUP]
    capacity,
    num_segments,
    ROWS: tl.constexpr,
):
    known = segment < num_segments
    begin = tl.load(cuts + segment, mask=known, other=0)
    n = tl.load(cuts + num_segments + segment, mask=known, other=0)
    cutoff = tl.load(cuts + 2 * num_segments + segment, mask=known, other=0)
    ties = tl.load(cuts + 3 * num_segments + segment, mask=known, other=0)
    _emit_rows(scores, protect, indices, begin, n, cutoff, ties, offset, capacity, ROWS)


@triton.jit(do_not_specialize=["capacity", "num_segments"])
def emit_kernel(
    scores,  # [total]
    protect,  # [total] bool, or None
    cuts,  # [5, B] int32, from cut_kernel
    indices,  # out [capacity] int32
    cu_seqlens_out,  # out [B+1] int32
    capacity,
    num_segments,
    GROUP: tl.constexpr,  # as in cut_kernel
    SHORT: tl.constexpr,
    STEP: tl.constexpr,
):
    first = tl.program_id(0) * GROUP
    segment = first + tl.arange(0, GROUP)
    known = segment < num_segments
    counts = cuts + 4 * num_segments
    offset = segment * 0
    all_rows = first * 0
    for start in range(0, num_segments, CHUNK):
        others = start + tl.arange(0, CHUNK)
        count = tl.load(counts + others, mask=others < num_segments, other=0)
        offset += tl.sum(tl.where(others[None, :] < segment[:, None], count[None, :], 0), axis=1)
        all_rows += tl.sum(count, axis=0)
    if first == 0:
        tl.store(cu_seqlens_out, 0)
    end = offset + tl.load(counts + segment, mask=known, other=0)
    tl.store(cu_seqlens_out + 1 + segment, tl.minimum(end, capacity), mask=known)

    if GROUP == 1:
        _emit_cuts(scores, protect, cuts, indices, segment, offset, capacity, num_segments, SHORT)
    else:
        lengths = tl.load(cuts + num_segments + segment, mask=known, other=0)
        if tl.max(lengths, axis=0) <= SHORT:
            _emit_cuts(scores, protect, cuts, indices, segment, offset, capacity, num_segments, SHORT)
        else:
            place = tl.min(offset, axis=0)
            for one in range(first, tl.minimum(first + GROUP, num_segments)):
                alone = one + tl.arange(0, 1)
                _emit_cuts(scores, protect, cuts, indices, alone, alone * 0 + place, capacity, num_segments, STEP)
                place += tl.load(counts + one)
    _emit_nothing(indices, tl.minimum(all_rows, capacity), capacity)
