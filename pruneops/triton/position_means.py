"""Means and likeness of the rows that stand at one position in every frame of a segment.

A program takes the norms of the rows of a position first, then adds them up, frame after frame, while they are still in
the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pruneops.triton.segments import segment_bounds, segment_of_slots
from pruneops.triton.tuning import Config

_MOST_ROWS = 2**31 - 2**14
# The least norm that a row is divided by.
_LEAST_NORM = tl.constexpr(1e-12)
# FRAMES rows of BLOCK channels are on their way at the same time. The interpreter takes as long for many positions as
# for one.
_SLOTS, _FRAMES = (32, 16) if triton.knobs.runtime.interpret else (1, 4)
_CONFIG = Config({"SLOTS": _SLOTS, "FRAMES": _FRAMES, "BLOCK": 512}, num_warps=4)


@triton.jit(do_not_specialize=["num_segments", "total", "capacity"])
def _position_means_kernel(
    x,  # [total, C]
    x_stride,  # elements from row to row
    cu_seqlens,  # [B+1] int32, any values
    num_positions,  # [B] int32, any values
    means,  # out [capacity, C]
    similarity,  # out [capacity] float32
    inverse_norms,  # scratch [total] float32
    num_segments,
    total,
    capacity,
    channels,
    SLOTS: tl.constexpr,  # positions of a program
    FRAMES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    wanted = slot < capacity
    segment, first = segment_of_slots(num_positions, num_segments, slot)
    begin, count = segment_bounds(cu_seqlens, segment, num_segments, total)
    positions = tl.load(num_positions + segment, mask=segment < num_segments, other=1)
    frames = tl.where(wanted, count // positions, 0)
    most_frames = tl.max(frames, axis=0)
    row = begin + slot - first
    pitch = positions.to(tl.int64)  # rows from one frame to the next
    lanes = tl.arange(0, BLOCK)

    # Lengths of the unit vectors as they are rounded, and the squares of these: what rounding does to the square of the
    # sum of the vectors, it does to both. In float64, where the squares of large and of small numbers are in range.
    lengths = tl.zeros([SLOTS, FRAMES], tl.float64)
    squares = tl.zeros([SLOTS, FRAMES], tl.float64)
    for start in range(0, most_frames, FRAMES):
        frame = start + tl.arange(0, FRAMES)
        exists = frame[None, :] < frames[:, None]
        at = row[:, None] + frame[None, :] * pitch[:, None]
        square = tl.zeros([SLOTS, FRAMES, BLOCK], tl.float64)
        for c in range(0, channels, BLOCK):
            inside = exists[:, :, None] & (lanes < channels - c)[None, None, :]
            value = tl.load(x + at[:, :, None] * x_stride + (c + lanes)[None, None, :], mask=inside, other=0)
            value = value.to(tl.float32).to(tl.float64)
            square += value * value
        norm = tl.sqrt(tl.sum(square, axis=2))
        norm = tl.where(norm < _LEAST_NORM, _LEAST_NORM, norm)  # NaN stays
        inverse = (1.0 / norm).to(tl.float32)
        tl.store(inverse_norms + at, inverse, mask=exists)
        length = tl.where(exists, inverse.to(tl.float64) * norm, 0.0)
        lengths += length
        squares += length * length
    tl.debug_barrier()  # other threads have written the norms

    divisor = tl.maximum(frames, 1).to(tl.float32)[:, None]
    square_of_sum = tl.zeros([SLOTS, BLOCK], tl.float64)
    for c in range(0, channels, BLOCK):
        channel = c + lanes
        sums = tl.zeros([SLOTS, BLOCK], tl.float32)
        units = tl.zeros([SLOTS, BLOCK], tl.float32)
        for start in range(0, most_frames, FRAMES):
            for i in tl.static_range(FRAMES):
                exists = frames > start + i
                at = row + (start + i) * pitch
                inside = exists[:, None] & (channel < channels)[None, :]
                value = tl.load(x + at[:, None] * x_stride + channel[None, :], mask=inside, other=0).to(tl.float32)
                sums += value
                units += tl.load(inverse_norms + at, mask=exists, other=0)[:, None] * value
        square_of_sum += units.to(tl.float64) * units.to(tl.float64)
        mean = tl.div_rn(sums, divisor).to(means.dtype.element_ty)
        to = means + slot[:, None] * channels + channel[None, :]
        tl.store(to, mean, mask=wanted[:, None] & (channel < channels)[None, :])
    of_lengths, of_squares = tl.sum(lengths, axis=1), tl.sum(squares, axis=1)
    pairs = of_lengths * of_lengths - of_squares
    found = (tl.sum(square_of_sum, axis=1) - of_squares) / tl.where(frames < 2, 1.0, pairs)
    found = tl.where(frames < 2, float("nan"), found.to(tl.float32))
    tl.store(similarity + slot, tl.where(segment < num_segments, found, 0.0), mask=wanted)


def position_means(x: Tensor, cu_seqlens: Tensor, num_positions: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The mean of each position over its frames and the mean cosine of its pairs of frames, in one launch.

    Rows with a last stride other than 1 are copied first. Source: the static positions of PruneVid (arXiv 2412.16117,
    section 3.2).
    """
    total, channels = x.shape
    if total > _MOST_ROWS or capacity > _MOST_ROWS:
        raise ValueError(f"at most {_MOST_ROWS} rows are supported, got {total} and capacity {capacity}")
    means, similarity = x.new_empty((capacity, channels)), x.new_empty(capacity, dtype=torch.float32)
    if capacity == 0:
        return means, similarity
    if channels > 1 and x.stride(1) != 1:
        x = x.contiguous()
    _position_means_kernel[(triton.cdiv(capacity, _SLOTS),)](
        x,
        x.stride(0),
        cu_seqlens.contiguous(),
        num_positions.contiguous(),
        means,
        similarity,
        similarity.new_empty(total),
        cu_seqlens.shape[0] - 1,
        total,
        capacity,
        channels,
        **_CONFIG.options,
    )
    return means, similarity


KERNELS: dict[str, Callable[..., Any]] = {"position_means": position_means}
