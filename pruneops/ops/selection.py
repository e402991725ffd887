"""Selection: which rows of each segment stay.

Source: the ranking step shared by FastV (arXiv 2403.06764), PyramidDrop (arXiv 2410.17247) and their
relatives, made independent of the sort a backend happens to have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pruneops import backends, reference
from pruneops.ops import _checks


def segment_topk(
    scores: Tensor,
    cu_seqlens: Tensor,
    keep_counts: Sequence[int] | Tensor,
    *,
    capacity: int | None = None,
    protect: Tensor | None = None,
    protected_counts: Sequence[int] | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Per segment the ``keep_counts[b]`` highest-scoring rows, in their old order.

    Higher scores first, NaN lowest (below -inf), ``-0.0`` equal to ``+0.0``, ties to the lower row.
    Protected rows always stay and do not count towards ``keep_counts``.

    *Exact form* (``capacity`` not given): the counts are known to the host, as a list or a CPU tensor, and
    the result is exactly as long as the number of kept rows. *Capacity form*: the counts may live on a
    device, the result has ``capacity`` entries, the valid ones are the first ``cu_seqlens_out[-1]``. Counts
    are then clamped to what the segment holds, and segments are cut where the capacity ends.

    Parameters
    ----------
    scores : float32, bfloat16 or float16 ``[total]``
        float64 runs on the reference backend.
    cu_seqlens : int32 ``[B+1]``
    keep_counts : list of ints or int tensor ``[B]``
        Number of unprotected rows to keep.
    capacity : int, optional
    protect : bool ``[total]``, optional
    protected_counts : list of ints or CPU int tensor ``[B]``, optional
        Number of protected rows a segment. Needed by the exact form where ``protect`` lives on a device.

    Returns
    -------
    indices : int32 ``[kept]`` or ``[capacity]``
        Absolute rows of the packed tensor, ascending; -1 after the last kept row.
    cu_seqlens_out : int32 ``[B+1]``

    Raises
    ------
    TypeError, ValueError
        Wrong type, dtype, shape or device; in the exact form also a count that is negative or, where the
        segment lengths are known to the host, above the number of unprotected rows.

    Notes
    -----
    Expected O(total) time, no device synchronisation, not differentiable. Deterministic: every backend
    returns the same indices. Rows past ``cu_seqlens[-1]`` are never selected.
    """
    cu, counts = _check_topk(scores, cu_seqlens, keep_counts, capacity, protect)
    capacity = _resolve_capacity(capacity, counts, cu, protect, protected_counts, scores.shape[0])
    counts = _checks.counts_tensor(counts, scores.device)
    backend = backends.select("segment_topk", scores.device.type, scores.dtype)
    if backend != backends.REFERENCE:
        return backends.kernel(backend, "segment_topk")(_checks.constant(scores), cu_seqlens, counts, capacity, protect)
    return reference.segment_topk(scores, cu_seqlens, counts, capacity=capacity, protect=protect)


def segment_threshold(
    scores: Tensor,
    cu_seqlens: Tensor,
    threshold: float,
    *,
    min_keep: Sequence[int] | Tensor | None = None,
    capacity: int | None = None,
    protect: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Per segment the rows with ``score > threshold``, at least the ``min_keep[b]`` best ones, order kept.

    The comparison is strict, made in float32, and never true for NaN. Protected rows always stay and do not
    count towards ``min_keep``.

    Parameters
    ----------
    scores, cu_seqlens, protect :
        As in :func:`segment_topk`.
    threshold : float, not NaN
    min_keep : list of ints or int tensor ``[B]``, optional
        Clamped to what the segment holds.
    capacity : int, optional
        Length of ``indices``. Without it the result is exact on the CPU; on a device, where its length
        cannot be known without waiting, the capacity is then ``total``.

    Returns
    -------
    indices, cu_seqlens_out :
        As in :func:`segment_topk`.

    Raises
    ------
    TypeError, ValueError
        Wrong type, dtype, shape or device, a NaN threshold.

    Notes
    -----
    Expected O(total) time, no device synchronisation, not differentiable, deterministic.
    """
    _checks.tensor("scores", scores, 1, _checks.FLOATS)
    _checks.cu_seqlens("cu_seqlens", cu_seqlens, scores.shape[0], scores.device)
    threshold = _checks.real("threshold", threshold)
    least = None
    if min_keep is not None:
        counts = _checks.host_counts("min_keep", min_keep, cu_seqlens.shape[0] - 1, scores.device)
        least = _checks.counts_tensor(counts, scores.device)
    if capacity is not None:
        _checks.integer("capacity", capacity)
    if protect is not None:
        _checks.tensor("protect", protect, 1, _checks.BOOL, scores.device, scores.shape[0])
    if capacity is None and scores.device.type != "cpu":
        capacity = scores.shape[0]
    backend = backends.select("segment_threshold", scores.device.type, scores.dtype)
    if backend != backends.REFERENCE:
        return backends.kernel(backend, "segment_threshold")(
            _checks.constant(scores),
            cu_seqlens,
            threshold,
            -1 if capacity is None else capacity,
            least,
            protect,
        )
    return reference.segment_threshold(
        scores, cu_seqlens, threshold, min_keep=least, capacity=capacity, protect=protect
    )


def _check_topk(
    scores: Any, cu_seqlens: Any, keep_counts: Any, capacity: Any, protect: Any
) -> tuple[list[int] | None, list[int] | Tensor]:
    """The checks that ``segment_topk`` and ``select_compact`` share; boundaries and counts on the host."""
    _checks.tensor("scores", scores, 1, _checks.FLOATS)
    cu = _checks.cu_seqlens("cu_seqlens", cu_seqlens, scores.shape[0], scores.device)
    counts = _checks.host_counts("keep_counts", keep_counts, cu_seqlens.shape[0] - 1, scores.device)
    if capacity is not None:
        _checks.integer("capacity", capacity)
    if protect is not None:
        _checks.tensor("protect", protect, 1, _checks.BOOL, scores.device, scores.shape[0])
    return cu, counts


def _resolve_capacity(
    capacity: int | None,
    counts: list[int] | Tensor,
    cu: list[int] | None,
    protect: Tensor | None,
    protected_counts: Any,
    total: int,
) -> int:
    """The length of ``indices``: the capacity given, or the rows that the host knows will be kept."""
    batch = counts.shape[0] if isinstance(counts, Tensor) else len(counts)
    if protected_counts is not None:
        if protect is None:
            raise ValueError("protected_counts must come with protect, got protect=None")
        host = torch.device("cpu")
        protected_counts = _checks.host_counts("protected_counts", protected_counts, batch, host)
    if capacity is not None:
        return capacity
    if isinstance(counts, Tensor) and counts.device.type != "cpu":
        raise ValueError(f"capacity must be given when keep_counts is on a device, got None with {counts.device}")
    protected = _protected(cu, protect, protected_counts)
    if isinstance(counts, list):
        _check_counts(counts, cu, protected)
    kept = _sum(counts) + (0 if protected is None else _sum(protected))
    if isinstance(kept, int) and kept > total:
        raise ValueError(f"keep_counts must not keep more than the {total} rows there are, got {kept}")
    return kept


def _protected(
    cu: list[int] | None, protect: Tensor | None, protected_counts: list[int] | Tensor | None
) -> list[int] | Tensor | None:
    """Protected rows a segment, counted where ``protect`` can be read, else as the caller says."""
    if protect is None:
        return None
    if cu is not None and _checks.readable(protect):
        before = [0, *protect.cumsum(0).tolist()]
        counted = [before[b] - before[a] for a, b in zip(cu[:-1], cu[1:], strict=True)]
        if protected_counts is not None and protected_counts != counted:
            raise ValueError(
                f"protected_counts must be the protected rows of each segment, {counted}, got {protected_counts}"
            )
        return counted
    if protected_counts is None and protect.device.type != "cpu":
        raise ValueError(
            "protected_counts must be given when protect is on a device and capacity is not given, got None"
        )
    if isinstance(protected_counts, list) and any(c < 0 for c in protected_counts):
        raise ValueError(f"protected_counts must not be negative, got {min(protected_counts)}")
    return protect if protected_counts is None else protected_counts


def _check_counts(counts: list[int], cu: list[int] | None, protected: list[int] | Tensor | None) -> None:
    for b, count in enumerate(counts):
        if count < 0:
            raise ValueError(f"keep_counts[{b}] must not be negative, got {count}")
        if cu is not None and not isinstance(protected, Tensor):
            rows = cu[b + 1] - cu[b] - (0 if protected is None else protected[b])
            if count > rows:
                raise ValueError(f"keep_counts[{b}] must not be above {rows}, its unprotected rows, got {count}")


def _sum(counts: list[int] | Tensor) -> int:
    """The sum of host counts; a CPU tensor arrives here only under a tracer, which makes it symbolic."""
    return counts.sum().item() if isinstance(counts, Tensor) else sum(counts)
