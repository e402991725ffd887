"""What the clustering ops mean, in plain torch: one segment after the other, whole distance matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pruneops.reference._segments import counts_tensor, sane_cu_seqlens, segment_bounds, segment_of_rows
from pruneops.reference.selection import rank_in_segment


class DPCKNNResult(NamedTuple):
    """What :func:`pruneops.ops.dpc_knn` found.

    Parameters
    ----------
    cluster_ids : int32 ``[total]``
        The cluster of each row within its segment, 0 for the one with the best centre; -1 for rows of no segment.
    center_indices : int32 ``[clusters]`` or ``[capacity]``
        The centres as absolute rows, per segment the best one first; -1 after the last.
    density, delta, score : float32 ``[total]``
        0 for rows of no segment.
    cu_clusters : int32 ``[B+1]``
        The boundaries of the segments in ``center_indices``.
    """

    cluster_ids: Tensor
    center_indices: Tensor
    density: Tensor
    delta: Tensor
    score: Tensor
    cu_clusters: Tensor


def _counts(num_clusters: int | Sequence[int] | Tensor, batch: int, device: torch.device) -> Tensor:
    """int64 ``[B]``, not negative."""
    if isinstance(num_clusters, (int, torch.SymInt)):
        num_clusters = [num_clusters] * batch
    return counts_tensor(num_clusters, device)


def _distances(x: Tensor, exact_cdist: bool) -> Tensor:
    """``|x_i - x_j| / sqrt(C)`` of one segment, ``[n, n]``; what is not a number is infinitely far.

    In float64, or with ``exact_cdist`` in float32 for inputs other than float64.
    """
    scale = max(x.shape[1], 1) ** 0.5
    if exact_cdist:
        wide = x if x.dtype == torch.float64 else x.float()
        distances = torch.cdist(wide[None], wide[None])[0] / scale
    else:
        wide = x.double()
        distances = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist") / scale
        distances.fill_diagonal_(0.0)
    return distances.masked_fill(distances.isnan(), torch.inf)


def _cluster(
    distances: Tensor, dtype: torch.dtype, count: int, kept: int, k: int, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Cluster ids, centres, density, delta and score of one segment with at least one row.

    ``dtype`` is that of the density and all that is made of it. The best ``kept`` of ``count`` centres are used.
    """
    rows = torch.arange(distances.shape[0], device=distances.device)
    nearest = distances.topk(min(k, distances.shape[0]), largest=False).values
    density = (-nearest.square().mean(-1)).exp().to(dtype)
    if noise is not None:
        density = density + noise * 1e-6
    denser = density > density[:, None]  # [i, j]: j is denser than i
    if noise is None:
        denser |= (density == density[:, None]) & (rows < rows[:, None])
    delta = distances.masked_fill(~denser, torch.inf).amin(-1)
    delta = torch.where(denser.any(-1), delta, distances.amax()).to(dtype)
    score = delta * density
    order = torch.argsort(rank_in_segment(score, torch.zeros_like(rows)))
    centers = order[: min(count, kept)]
    if kept == 0:
        return torch.full_like(rows, -1), centers, density, delta, score
    to_centers = distances[centers]
    nearest_center = to_centers == to_centers.amin(0)
    ranks = torch.arange(centers.shape[0], device=rows.device)
    ids = torch.where(nearest_center, ranks[:, None], distances.shape[0]).amin(0)
    return ids.index_copy(0, centers, ranks), centers, density, delta, score


@torch.no_grad()
def dpc_knn(
    x: Tensor,
    cu_seqlens: Tensor,
    num_clusters: int | Sequence[int] | Tensor,
    *,
    k: int,
    noise: Tensor | None = None,
    max_seqlen: int | None = None,
    capacity: int | None = None,
    exact_cdist: bool = False,
) -> DPCKNNResult:
    """Density peaks clustering of each segment; see :func:`pruneops.ops.dpc_knn`.

    Parameters
    ----------
    x : ``[total, C]``
        Distances are computed in float64; densities and deltas are rounded to float32, unless the inputs are float64.
    cu_seqlens : int32 ``[B+1]``
    num_clusters : int, list of ints or int tensor ``[B]``
        Clamped to between 1 and the length of the segment; 0 for an empty one.
    k : int
        Neighbours that make up the density, the row itself included; cut to the length of the segment.
    noise : float ``[total]``, optional
    max_seqlen : int, ignored here
    capacity : int, optional
        Length of ``center_indices``. Centres past it are cut, and no row is assigned to them.
    exact_cdist : bool
        Take the distances of ``torch.cdist``, as published code does: above 25 rows it computes them by a
        matrix product in float32, with a diagonal that is not exactly 0.

    Returns
    -------
    DPCKNNResult
        ``density``, ``delta`` and ``score`` are float64 for float64 inputs.
    """
    bounds = segment_bounds(cu_seqlens, x.shape[0])
    counts = _counts(num_clusters, len(bounds), x.device).tolist()
    wanted = [min(max(count, 1), stop - start) for count, (start, stop) in zip(counts, bounds, strict=True)]
    capacity = sum(wanted) if capacity is None else capacity
    ids = torch.full((x.shape[0],), -1, dtype=torch.int32, device=x.device)
    center_indices = torch.full((capacity,), -1, dtype=torch.int32, device=x.device)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    density, delta, score = (torch.zeros(x.shape[0], dtype=wide, device=x.device) for _ in range(3))
    ends = [0]
    for (start, stop), count in zip(bounds, wanted, strict=True):
        first, rows = ends[-1], slice(start, stop)
        ends.append(min(first + count, capacity))
        if start == stop:
            continue
        result = _cluster(
            _distances(x[rows], exact_cdist),
            wide,
            count,
            ends[-1] - first,
            k,
            None if noise is None else noise[rows],
        )
        ids[rows], centers, density[rows], delta[rows], score[rows] = result
        center_indices[first : ends[-1]] = start + centers
    cu_clusters = torch.tensor(ends, dtype=torch.int32, device=x.device)
    return DPCKNNResult(ids, center_indices, density, delta, score, cu_clusters)


def cluster_rows(
    cluster_ids: Tensor, cu_seqlens: Tensor, num_clusters: int | Sequence[int] | Tensor, capacity: int
) -> Tensor:
    """int64 ``[total]``: the row of ``merged`` that each row of ``x`` goes into, ``capacity`` if none."""
    batch, total = cu_seqlens.numel() - 1, cluster_ids.shape[0]
    counts = torch.nn.functional.pad(_counts(num_clusters, batch, cluster_ids.device), (0, 1))
    segment = segment_of_rows(cu_seqlens, total)
    inside = (cluster_ids >= 0) & (cluster_ids < counts[segment])
    first = counts.cumsum(0) - counts
    slot = torch.where(inside, first[segment] + cluster_ids, capacity)
    return slot.clamp(max=capacity)


def merge_mean(
    x: Tensor,
    cluster_ids: Tensor,
    cu_seqlens: Tensor,
    num_clusters: int | Sequence[int] | Tensor,
    *,
    weights: Tensor | None = None,
    capacity: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The mean of the rows of each cluster; see :func:`pruneops.ops.merge_mean`.

    Parameters
    ----------
    x : ``[total, C]``
        Half precision is summed in float32 and rounded once.
    cluster_ids : int32 ``[total]``
        Rows with an id outside ``[0, num_clusters[b])`` are left out.
    cu_seqlens : int32 ``[B+1]``
    num_clusters : int, list of ints or int tensor ``[B]``
        Negative counts act as 0.
    weights : float ``[total]``, optional
    capacity : int, optional
        Rows of the result; without it the sum of ``num_clusters``.

    Returns
    -------
    merged : ``[capacity, C]`` in the dtype of ``x``; 0 for a cluster without members or weight
    counts : int32 ``[capacity]``, the number of members
    """
    if capacity is None:
        capacity = int(_counts(num_clusters, cu_seqlens.numel() - 1, x.device).sum())
    slot = cluster_rows(cluster_ids, cu_seqlens, num_clusters, capacity)
    wide = x if x.dtype == torch.float64 else x.float()
    ones = torch.ones_like(slot, dtype=wide.dtype)
    weights = ones if weights is None else weights.to(wide.dtype)
    # The last bin takes the rows that belong to no cluster; a NaN there, or in a weight of 0, must not spread.
    sums = wide.new_zeros(capacity + 1, x.shape[1]).index_add(0, slot, wide * weights[:, None])[:capacity]
    total = wide.new_zeros(capacity + 1).index_add(0, slot, weights)[:capacity]
    counts = torch.zeros(capacity + 1, dtype=torch.int32, device=x.device)
    counts = counts.index_add(0, slot, torch.ones_like(slot, dtype=torch.int32))[:capacity].contiguous()
    empty = total == 0
    merged = torch.where(empty[:, None], 0.0, sums / torch.where(empty, 1.0, total)[:, None])
    return merged.to(x.dtype), counts


def position_rows(
    cu_seqlens: Tensor, num_positions: int | Sequence[int] | Tensor, total: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows of ``x`` make up a position.

    Returns
    -------
    (Tensor, Tensor, Tensor)
        int64 ``[total]``: the row of ``means`` that each row of ``x`` goes into, ``capacity`` if none; int64
        ``[capacity]``: the frames of each row of ``means``; bool ``[capacity]``: whether it is one.
    """
    positions = _counts(num_positions, cu_seqlens.numel() - 1, cu_seqlens.device)
    borders = sane_cu_seqlens(cu_seqlens, total)
    frames = borders.diff() // positions.clamp(min=1)
    ends = positions.cumsum(0)
    # One more segment, without positions, for rows and results that belong to none.
    starts, of_frame, frames, first = (
        torch.nn.functional.pad(t, (0, 1)) for t in (borders[:-1], positions, frames, ends - positions)
    )
    segment = segment_of_rows(cu_seqlens, total)
    place = torch.arange(total, device=cu_seqlens.device) - starts[segment]
    inside = place < (frames * of_frame)[segment]
    slot = torch.where(inside, first[segment] + place % of_frame[segment].clamp(min=1), capacity).clamp(max=capacity)
    segment_of_slot = torch.searchsorted(ends, torch.arange(capacity, device=ends.device), right=True)
    return slot, frames[segment_of_slot], segment_of_slot < ends.shape[0]


def position_means(
    x: Tensor,
    cu_seqlens: Tensor,
    num_positions: int | Sequence[int] | Tensor,
    *,
    capacity: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The mean over its frames of each position, and how alike they are; see :func:`pruneops.ops.position_means`.

    Parameters
    ----------
    x : ``[total, C]``
        Half precision is summed in float32 and rounded once; the similarity is computed in float64.
    cu_seqlens : int32 ``[B+1]``
    num_positions : int, list of ints or int tensor ``[B]``
        Negative numbers act as 0.
    capacity : int, optional
        Rows of the result; without it the sum of ``num_positions``.

    Returns
    -------
    means : ``[capacity, C]`` in the dtype of ``x``; 0 for a position without frames
    similarity : float32, for float64 inputs float64, ``[capacity]``; NaN for fewer than two frames
    """
    if capacity is None:
        capacity = int(_counts(num_positions, cu_seqlens.numel() - 1, x.device).sum())
    slot, frames, exists = position_rows(cu_seqlens, num_positions, x.shape[0], capacity)
    wide = x if x.dtype == torch.float64 else x.float()
    # The last bin takes the rows that belong to no position.
    sums = wide.new_zeros(capacity + 1, x.shape[1]).index_add(0, slot, wide)[:capacity]
    means = (sums / frames.clamp(min=1).to(wide.dtype)[:, None]).to(x.dtype)
    with torch.no_grad():
        unit = torch.nn.functional.normalize(x.double(), dim=-1, eps=1e-12)
        square = unit.new_zeros(capacity + 1, x.shape[1]).index_add(0, slot, unit)[:capacity].square().sum(-1)
        similarity = torch.where(frames < 2, torch.nan, (square - frames) / (frames * (frames - 1)))
        similarity = torch.where(exists, similarity, 0.0)
    return means, similarity.to(wide.dtype)
