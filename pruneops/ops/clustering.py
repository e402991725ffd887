"""Clustering: DPC-kNN within the segments of a packed tensor, means of its clusters, and means over frames.

Source: density peaks clustering by k nearest neighbours (Du, Ding and Jia, "Study on density peaks clustering
based on k-nearest neighbors and principal component analysis", Knowledge-Based Systems 99, 2016) in the form
that clusters tokens (TCFormer, Zeng et al., CVPR 2022, arXiv 2204.08680), as PruneVid (arXiv 2412.16117) merges
video tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pruneops import backends, reference
from pruneops.ops import _checks
from pruneops.reference.clustering import DPCKNNResult


def dpc_knn(
    x: Tensor,
    cu_seqlens: Tensor,
    num_clusters: int | Sequence[int] | Tensor,
    *,
    k: int,
    noise: Tensor | None = None,
    max_seqlen: int | None = None,
    capacity: int | None = None,
) -> DPCKNNResult:
    """Density peaks clustering (DPC-kNN) of the rows of each segment, many segments in one call.

    Within a segment of ``n`` rows, with ``D_ij = |x_i - x_j| / sqrt(C)``:

    - the density of row i is ``exp(-mean(D_ij ** 2))`` over its ``min(k, n)`` nearest rows, itself included, plus
      ``noise[i] * 1e-6`` where noise is given;
    - its delta is the smallest ``D_ij`` over all denser rows j, or the largest distance of the segment where no row
      is denser;
    - the centres are the rows with the highest ``score = delta * density``;
    - each row belongs to the nearest centre, a centre to itself.

    Equal densities: with ``noise=None`` the lower row counts as denser, with noise neither does. Equal scores go to
    the lower row, NaN ranks lowest, and of equally near centres the better one gets the row. A distance that is not a
    number, as from a row with NaN, counts as infinite.

    *Exact form* (``capacity`` not given): the counts are known to the host, and ``center_indices`` is exactly as
    long as there are clusters; where the segment lengths are not known to the host, as on a device or under a
    tracer, it is as long as if every segment could hold its clusters and had at least one. *Capacity form*:
    ``center_indices`` has ``capacity`` entries, the valid ones are the first ``cu_clusters[-1]``. Centres past the
    capacity are cut, and rows are assigned to those that are left; a segment without any has the id -1.

    Parameters
    ----------
    x : float32, bfloat16 or float16 ``[total, C]``
        float64 runs on the reference backend.
    cu_seqlens : int32 ``[B+1]``
    num_clusters : int, list of ints or int tensor ``[B]``
        Clusters a segment, clamped to between 1 and its length; an empty segment has none. An int holds for every
        segment.
    k : int, at least 1
    noise : float32 ``[total]``, optional
        Breaks ties of the density; published code draws it uniformly from [0, 1).
    max_seqlen : int, optional
        An upper bound of the segment lengths, which decides how much is kept in memory. Where ``cu_seqlens`` is on the
        CPU it is read from there, otherwise it is ``total``.
    capacity : int, optional

    Returns
    -------
    DPCKNNResult
        ``cluster_ids`` int32 ``[total]``: the rank of the row's centre in its segment, 0 for the best, -1 for rows
        past ``cu_seqlens[-1]``; ``center_indices`` int32 ``[clusters]``: absolute rows, per segment in descending
        score; ``density``, ``delta``, ``score`` float32 ``[total]``, 0 past the end; ``cu_clusters`` int32 ``[B+1]``.

    Raises
    ------
    TypeError, ValueError
        Wrong type, dtype, shape or device, a ``k`` below 1, counts on a device without a capacity, or a
        ``max_seqlen`` below the longest segment.

    Notes
    -----
    O(C x sum of n^2) time. Up to ``max_seqlen`` 4096 the distances of a segment are kept, above that they are computed
    anew in each pass, and memory is linear in ``total``. Distances are accurate in float32 even between near
    duplicates far from the origin. No device synchronisation, not differentiable. Deterministic: the result does not
    depend on the number of threads, and ids and centres equal those of float64 arithmetic wherever the decisions
    differ by more than 1e-6 of the largest distance.
    """
    _checks.tensor("x", x, 2, _checks.FLOATS)
    total = x.shape[0]
    cu = _checks.cu_seqlens("cu_seqlens", cu_seqlens, total, x.device)
    counts = _segment_counts("num_clusters", num_clusters, cu_seqlens.shape[0] - 1, x.device)
    _checks.integer("k", k, 1)
    if noise is not None:
        dtypes = _checks.FLOAT64 if x.dtype == torch.float64 else _checks.FLOAT32
        _checks.tensor("noise", noise, 1, dtypes, x.device, total)
    if max_seqlen is not None:
        _checks.max_seqlen("max_seqlen", max_seqlen, "cu_seqlens", cu)
    elif cu is not None:
        max_seqlen = max([0, *(stop - start for start, stop in zip(cu[:-1], cu[1:], strict=True))])
    else:
        max_seqlen = total
    capacity = _resolve_capacity(capacity, "num_clusters", counts, 1, cu)
    counts = _checks.counts_tensor(counts, x.device)
    backend = backends.select("dpc_knn", x.device.type, x.dtype)
    if backend != backends.REFERENCE:
        ids, centers, cu_clusters, density, delta, score = backends.kernel(backend, "dpc_knn")(
            _checks.constant(x),
            cu_seqlens,
            counts,
            k,
            max_seqlen,
            capacity,
            None if noise is None else _checks.constant(noise),
        )
        return DPCKNNResult(ids, centers, density, delta, score, cu_clusters)
    return reference.dpc_knn(x, cu_seqlens, counts, k=k, noise=noise, max_seqlen=max_seqlen, capacity=capacity)


def merge_mean(
    x: Tensor,
    cluster_ids: Tensor,
    cu_seqlens: Tensor,
    num_clusters: int | Sequence[int] | Tensor,
    *,
    weights: Tensor | None = None,
    capacity: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The mean of the rows of each cluster, segment after segment.

    Segment b owns ``max(num_clusters[b], 0)`` rows of the result, behind those of the segments before it; its row
    ``c`` is ``sum(w_i x_i) / sum(w_i)`` over the rows i of the segment with ``cluster_ids[i] == c``. Rows with any
    other id are left out. After :func:`dpc_knn`, ``num_clusters`` is ``result.cu_clusters.diff()``.

    Parameters
    ----------
    x : float32, bfloat16 or float16 ``[total, C]``
        float64 runs on the reference backend.
    cluster_ids : int32 ``[total]``
    cu_seqlens : int32 ``[B+1]``
    num_clusters : int, list of ints or int tensor ``[B]``
        An int holds for every segment.
    weights : float32 ``[total]``, not negative, optional
        1 for every row if not given.
    capacity : int, optional
        Rows of the result, needed where the counts are on a device: clusters past it are cut, rows after the last
        cluster are zero. Without it the result has the sum of the counts.

    Returns
    -------
    merged : ``[clusters, C]`` in the dtype of ``x``
        Summed in float32 in the order of the rows and rounded once; zeros where a cluster has no member or no weight.
    counts : int32 ``[clusters]``
        Members of each cluster.

    Raises
    ------
    TypeError, ValueError
        Wrong type, dtype, shape or device, counts on a device without a capacity; on the CPU in eager mode also a
        weight that is negative or NaN.

    Notes
    -----
    O(total x C) time, no device synchronisation. Differentiable in ``x`` and ``weights``. Deterministic.
    """
    _checks.tensor("x", x, 2, _checks.FLOATS)
    _checks.tensor("cluster_ids", cluster_ids, 1, _checks.INT32, x.device, x.shape[0])
    _checks.cu_seqlens("cu_seqlens", cu_seqlens, x.shape[0], x.device)
    counts = _segment_counts("num_clusters", num_clusters, cu_seqlens.shape[0] - 1, x.device)
    if weights is not None:
        dtypes = _checks.FLOAT64 if x.dtype == torch.float64 else _checks.FLOAT32
        _checks.tensor("weights", weights, 1, dtypes, x.device, x.shape[0])
        if _checks.readable(weights) and weights.shape[0] and not float(weights.detach().min()) >= 0:
            raise ValueError(f"weights must not be negative or NaN, got {float(weights.detach().min())}")
    capacity = _resolve_capacity(capacity, "num_clusters", counts, 0, None)
    counts = _checks.counts_tensor(counts, x.device)
    backend = backends.select("merge_mean", x.device.type, x.dtype)
    if backend != backends.REFERENCE:
        merged, members = backends.kernel(backend, "merge_mean")(x, cluster_ids, cu_seqlens, counts, capacity, weights)
        return merged, members
    return reference.merge_mean(x, cluster_ids, cu_seqlens, counts, weights=weights, capacity=capacity)


def position_means(
    x: Tensor,
    cu_seqlens: Tensor,
    num_positions: int | Sequence[int] | Tensor,
    *,
    capacity: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The mean over frames of each position, and how alike its frames are, segment after segment.

    Segment b holds frames behind each other, each of ``P = num_positions[b]`` rows; rows after the last whole frame
    are left out. It owns ``max(P, 0)`` rows of the results, behind those of the segments before it. With ``W`` frames
    and ``x_w`` the row of a position in frame w, they are

    - the mean of the ``x_w``;
    - the mean cosine similarity over the ordered pairs of different frames,
      ``(|sum of u_w|^2 - W) / (W (W - 1))`` with ``u_w = x_w / max(|x_w|, 1e-12)``.

    Parameters
    ----------
    x : float32, bfloat16 or float16 ``[total, C]``
        float64 runs on the reference backend.
    cu_seqlens : int32 ``[B+1]``
    num_positions : int, list of ints or int tensor ``[B]``
        An int holds for every segment.
    capacity : int, optional
        Rows of the results, needed where the numbers are on a device: positions past it are cut, rows after the last
        position are zero. Without it there are as many as the sum of the numbers.

    Returns
    -------
    means : ``[positions, C]`` in the dtype of ``x``
        Summed in float32 in the order of the frames and rounded once; zeros where there is no frame.
    similarity : float32, for float64 inputs float64, ``[positions]``
        NaN where there are fewer than two frames.

    Raises
    ------
    TypeError, ValueError
        Wrong type, dtype, shape or device, numbers on a device without a capacity.

    Notes
    -----
    O(total x C) time in one pass over ``x``, no device synchronisation. Differentiable in ``x`` through ``means``.
    Deterministic. Source: the static positions of PruneVid (arXiv 2412.16117, section 3.2).
    """
    _checks.tensor("x", x, 2, _checks.FLOATS)
    _checks.cu_seqlens("cu_seqlens", cu_seqlens, x.shape[0], x.device)
    counts = _segment_counts("num_positions", num_positions, cu_seqlens.shape[0] - 1, x.device)
    capacity = _resolve_capacity(capacity, "num_positions", counts, 0, None)
    counts = _checks.counts_tensor(counts, x.device)
    backend = backends.select("position_means", x.device.type, x.dtype)
    if backend != backends.REFERENCE:
        means, similarity = backends.kernel(backend, "position_means")(x, cu_seqlens, counts, capacity)
        return means, similarity
    return reference.position_means(x, cu_seqlens, counts, capacity=capacity)


def _segment_counts(name: str, counts: Any, batch: int, device: torch.device) -> list[int] | Tensor:
    """A count for each segment, from one int for all of them or from a list or tensor."""
    if isinstance(counts, (int, torch.SymInt)) and not isinstance(counts, bool):
        counts = [counts] * batch
    return _checks.host_counts(name, counts, batch, device)


def _resolve_capacity(capacity: Any, name: str, counts: list[int] | Tensor, least: int, cu: list[int] | None) -> int:
    """The rows of the whole batch: the capacity given, or what the host knows.

    Counts are at least ``least`` and, where the boundaries are known, at most the length of the segment.
    """
    if capacity is not None:
        _checks.integer("capacity", capacity)
        return capacity
    if isinstance(counts, Tensor):
        if counts.device.type != "cpu":
            raise ValueError(f"capacity must be given when {name} is on a device, got None with {counts.device}")
        return counts.clamp(min=least).sum().item()
    wanted = [max(count, least) for count in counts]
    if cu is not None:
        wanted = [min(count, stop - start) for count, start, stop in zip(wanted, cu[:-1], cu[1:], strict=True)]
    total = sum(wanted)
    if isinstance(total, int):
        _checks.integer(f"the sum of {name}", total)
    return total
