"""Means of clusters: a program adds up the members of a cluster in their order, a stretch of channels of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pruneops.triton.segments import segment_bounds, segment_of_slots
from pruneops.triton.tuning import Config

_MOST_ROWS = 2**31 - 2**14
# Members whose rows are on their way at the same time.
_IN_FLIGHT = tl.constexpr(8)
# The interpreter takes as long for many clusters as for one.
_SLOTS, _IDS = (32, 256) if triton.knobs.runtime.interpret else (1, 1024)
_NARROW, _WIDE = (Config({"SLOTS": _SLOTS, "IDS": _IDS, "BLOCK": block}, num_warps=4) for block in (256, 1024))


@triton.jit(do_not_specialize=["num_segments", "total", "capacity"])
def _merge_mean_kernel(
    x,  # [total, C]
    x_stride,  # elements from row to row
    cluster_ids,  # [total] int32, any values
    cu_seqlens,  # [B+1] int32, any values
    num_clusters,  # [B] int32, any values
    weights,  # [total] float32, or None
    merged,  # out [capacity, C]
    counts,  # out [capacity] int32
    num_segments,
    total,
    capacity,
    channels,
    SLOTS: tl.constexpr,  # clusters of a program
    IDS: tl.constexpr,  # ids that are looked through at once
    BLOCK: tl.constexpr,  # channels of a program
):
    groups = tl.cdiv(capacity, SLOTS)
    slot = (tl.program_id(0) % groups).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    stretch = tl.program_id(0) // groups
    segment, first = segment_of_slots(num_clusters, num_segments, slot)
    begin, count = segment_bounds(cu_seqlens, segment, num_segments, total)
    cluster = slot - first

    channel = stretch * BLOCK + tl.arange(0, BLOCK)
    lanes = tl.arange(0, IDS)
    places = tl.arange(0, _IN_FLIGHT)
    sums = tl.zeros([SLOTS, BLOCK], tl.float32)
    weight = tl.zeros([SLOTS], tl.float32)
    members = tl.zeros([SLOTS], tl.int32)
    for start in range(0, tl.max(count, axis=0), IDS):
        offset = start + lanes
        inside = offset[None, :] < count[:, None]
        ids = tl.load(cluster_ids + begin[:, None] + offset[None, :], mask=inside, other=-1)
        member = (ids == cluster[:, None]).to(tl.int32)
        place = tl.where(member > 0, tl.cumsum(member, axis=1) - 1, -1)
        found = tl.sum(member, axis=1)
        members += found
        for before in range(0, tl.max(found, axis=0), _IN_FLIGHT):
            # The next members, in their order.
            wanted = place[:, None, :] == (before + places)[None, :, None]
            offsets = tl.sum(tl.where(wanted, offset[None, None, :], 0), axis=2)
            for i in tl.static_range(_IN_FLIGHT):
                exists = found > before + i
                row = begin + tl.sum(tl.where((places == i)[None, :], offsets, 0), axis=1)
                # Rows of other clusters may hold anything: they are not read.
                at = x + row.to(tl.int64)[:, None] * x_stride + channel[None, :]
                value = tl.load(at, mask=exists[:, None] & (channel < channels)[None, :], other=0).to(tl.float32)
                if weights is None:
                    sums += value
                else:
                    share = tl.load(weights + row, mask=exists, other=0)
                    sums += share[:, None] * value
                    weight += share
    if weights is None:
        weight = members.to(tl.float32)
    nothing = (weight == 0)[:, None]
    mean = tl.where(nothing, 0.0, tl.div_rn(sums, tl.where(nothing, 1.0, weight[:, None])))
    to = merged + slot[:, None] * channels + channel[None, :]
    inside = (slot < capacity)[:, None] & (channel < channels)[None, :]
    tl.store(to, mean.to(merged.dtype.element_ty), mask=inside)
    if stretch == 0:
        tl.store(counts + slot, members, mask=slot < capacity)


def merge_mean(
    x: Tensor,
    cluster_ids: Tensor,
    cu_seqlens: Tensor,
    num_clusters: Tensor,
    capacity: int,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The mean of the rows of each cluster and the number of its members, in one launch.

    Rows with a last stride other than 1 are copied first.
    """
    total, channels = x.shape
    if total > _MOST_ROWS or capacity > _MOST_ROWS:
        raise ValueError(f"at most {_MOST_ROWS} rows are supported, got {total} and capacity {capacity}")
    merged, counts = x.new_empty((capacity, channels)), cu_seqlens.new_empty(capacity)
    if capacity == 0:
        return merged, counts
    if channels > 1 and x.stride(1) != 1:
        x = x.contiguous()
    config = _NARROW if channels <= _NARROW.blocks["BLOCK"] else _WIDE
    # Counts are written even where there are no channels.
    stretches = max(1, triton.cdiv(channels, config.blocks["BLOCK"]))
    _merge_mean_kernel[(triton.cdiv(capacity, _SLOTS) * stretches,)](
        x,
        x.stride(0),
        cluster_ids.contiguous(),
        cu_seqlens.contiguous(),
        num_clusters.contiguous(),
        None if weights is None else weights.contiguous(),
        merged,
        counts,
        cu_seqlens.shape[0] - 1,
        total,
        capacity,
        channels,
        **config.options,
    )
    return merged, counts


KERNELS: dict[str, Callable[..., Any]] = {"merge_mean": merge_mean}
