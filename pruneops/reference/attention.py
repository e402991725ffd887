"""What the attention ops mean, in plain torch: one segment after the other, whole score matrices.

Half-precision inputs are computed in float32 and rounded once at the end; float64 stays float64, which makes
these functions the oracle of the tests and lets ``torch.autograd.gradcheck`` judge their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from pruneops.reference._segments import segment_bounds

F = TypeVar("F", bound=Callable[..., Any])


def _without_autocast(function: F) -> F:
    """Keeps autocast out of a reference: the inputs decide the precision."""

    @wraps(function)
    def call(q: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(q.device.type, enabled=False):
            return function(q, *args, **kwargs)

    return call  # type: ignore[return-value]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _scale(q: Tensor, softmax_scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale


def _attend(q: Tensor, k: Tensor, limit: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Probabilities ``[Hq, Lq, Lk]`` and LSE ``[Hq, Lq]`` of one segment.

    ``q`` is ``[Lq, Hq, D]``, ``k`` ``[Lk, Hk, D]``; query row ``i`` sees the keys below ``limit[i]``. A row
    that sees no key has zero probabilities and an LSE of -inf, with zero (not NaN) gradients.
    """
    k = _wide(k).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = torch.einsum("qhd,khd->hqk", _wide(q), k) * softmax_scale
    columns = torch.arange(k.shape[0], device=k.device)
    allowed = columns < limit.clamp(0, k.shape[0])[:, None]
    alive = allowed.any(-1)
    logits = logits.masked_fill(~allowed & alive[:, None], -torch.inf)
    probs = torch.where(alive[:, None], logits.softmax(-1), 0.0)
    lse = torch.where(alive, logits.logsumexp(-1), -torch.inf)
    return probs, lse


def _limits(rows: slice, length_k: int, causal: bool, kv_limit: Tensor | None, device: torch.device) -> Tensor:
    """int64 ``[Lq]``: how many keys of its segment each query row sees."""
    if kv_limit is not None:
        return kv_limit[rows].to(torch.int64)
    length_q = rows.stop - rows.start
    if not causal:
        return torch.full((length_q,), length_k, device=device)
    return torch.arange(length_q, device=device) + (length_k - length_q + 1)


@_without_autocast
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    kv_limit: Tensor | None = None,
    seqused_k: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention within the segments of a packed batch.

    Query row ``i`` of a segment with ``Lq`` queries and ``Lk`` keys sees all keys, or with ``causal`` the
    keys below ``Lk - Lq + i + 1`` (bottom-right aligned), or with ``kv_limit`` the keys below
    ``kv_limit[row]`` clamped to ``[0, Lk]``. Query heads share key heads in groups of ``Hq / Hk``. A row
    without keys, and rows past ``cu_seqlens_q[-1]``, give 0 and an LSE of -inf.

    Parameters
    ----------
    q : ``[total_q, Hq, D]``
    k, v : ``[total_k, Hk, D]``; with ``seqused_k`` cache slots ``[B, capacity, Hk, D]``
    cu_seqlens_q, cu_seqlens_k : int32 ``[B+1]``; ``cu_seqlens_k`` is None with ``seqused_k``
    max_seqlen_q, max_seqlen_k : int, ignored here
    softmax_scale : float, default ``D ** -0.5``
    kv_limit : int32 ``[total_q]``, optional
    seqused_k : int32 ``[B]``, optional
        The number of filled slots per segment.

    Returns
    -------
    out : ``[total_q, Hq, D]`` in the dtype of ``q`` softmax_lse : float32 (float64 for float64 inputs)
    ``[Hq, total_q]``, natural logarithm, with ``return_lse``
    """
    total_q, heads, _ = q.shape
    scale = _scale(q, softmax_scale)
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    end = 0
    for rows, keys, values in _segments(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k):
        outs.append(_wide(q).new_zeros(rows.start - end, heads, q.shape[2]))
        lses.append(_wide(q).new_full((heads, rows.start - end), -torch.inf))
        limit = _limits(rows, keys.shape[0], causal, kv_limit, q.device)
        probs, lse = _attend(q[rows], keys, limit, scale)
        values = _wide(values).repeat_interleave(heads // values.shape[1], dim=1)
        outs.append(torch.einsum("hqk,khd->qhd", probs, values))
        lses.append(lse)
        end = rows.stop
    outs.append(_wide(q).new_zeros(total_q - end, heads, q.shape[2]))
    lses.append(_wide(q).new_full((heads, total_q - end), -torch.inf))
    out = torch.cat(outs).to(q.dtype)
    return (out, torch.cat(lses, dim=1)) if return_lse else out


def _segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The query rows, keys and values of each segment, packed or from cache slots."""
    queries = segment_bounds(cu_seqlens_q, q.shape[0])
    if seqused_k is not None:
        used = seqused_k.clamp(0, k.shape[1]).tolist()
        for b, (start, stop) in enumerate(queries):
            yield slice(start, stop), k[b, : used[b]], v[b, : used[b]]
        return
    assert cu_seqlens_k is not None
    for (start, stop), (k0, k1) in zip(queries, segment_bounds(cu_seqlens_k, k.shape[0]), strict=True):
        yield slice(start, stop), k[k0:k1], v[k0:k1]


@_without_autocast
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqused_k: Tensor,
    *,
    softmax_scale: float | None = None,
    num_splits: int = 0,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of one new token per row to the filled slots of its cache row.

    Parameters
    ----------
    q : ``[B, Hq, D]``
    k_cache, v_cache : ``[B, capacity, Hk, D]``
    seqused_k : int32 ``[B]``
    num_splits : int, ignored here

    Returns
    -------
    out : ``[B, Hq, D]``; 0 for a row without keys
    scores : float32 ``[B, capacity]``, with ``return_scores``
        The mean over the query heads of the softmax; 0 past ``seqused_k``.
    """
    batch, capacity = k_cache.shape[:2]
    cu_seqlens_q = torch.arange(batch + 1, dtype=torch.int32)
    scale = _scale(q, softmax_scale)
    outs, scores = [], []
    for rows, keys, values in _segments(q, k_cache, v_cache, cu_seqlens_q, None, seqused_k):
        limit = _limits(rows, keys.shape[0], False, None, q.device)
        probs, _ = _attend(q[rows], keys, limit, scale)
        values = _wide(values).repeat_interleave(q.shape[1] // values.shape[1], dim=1)
        outs.append(torch.einsum("hqk,khd->qhd", probs, values).to(q.dtype))
        mean = probs.mean(0)
        scores.append(torch.nn.functional.pad(mean, (0, capacity - mean.shape[1])))
    out = torch.cat(outs) if outs else torch.zeros_like(q)
    if not return_scores:
        return out
    return out, torch.cat(scores) if scores else _wide(q).new_zeros(batch, capacity)


def _reduce(probs: Tensor, how: str) -> Tensor:
    """Reduces dimension 0 by name; over no entries every reduction is 0."""
    if probs.shape[0] == 0:
        return probs.new_zeros(probs.shape[1:])
    if how == "mean":
        return probs.mean(0)
    return probs.sum(0) if how == "sum" else probs.amax(0)


def _scores(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    kv_limit: Tensor | None,
    softmax_scale: float | None,
    head_reduce: str,
    query_reduce: str,
) -> Tensor:
    scale = _scale(q, softmax_scale)
    scores = _wide(q).new_zeros(k.shape[0])
    queries = segment_bounds(cu_seqlens_q, q.shape[0])
    for (q0, q1), (k0, k1) in zip(queries, segment_bounds(cu_seqlens_k, k.shape[0]), strict=True):
        rows = slice(q0, q1)
        limit = _limits(rows, k1 - k0, causal, kv_limit, q.device)
        probs, _ = _attend(q[rows], k[k0:k1], limit, scale)
        scores[k0:k1] = _reduce(_reduce(probs, head_reduce), query_reduce)
    return scores


@torch.no_grad()
@_without_autocast
def last_query_scores(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    kv_limit: Tensor | None = None,
    softmax_scale: float | None = None,
    head_reduce: str = "mean",
    query_reduce: str = "mean",
) -> Tensor:
    """How much a few chosen query rows of each segment attend to each of its keys.

    The softmax runs over all keys of the segment, or over those below ``kv_limit[row]``. Heads are reduced
    first, then the query rows ("mean" divides by their number). A segment without query rows scores 0.

    Parameters
    ----------
    q : ``[total_q, Hq, D]``, only the chosen rows
    k : ``[total_k, Hk, D]``
    cu_seqlens_q, cu_seqlens_k : int32 ``[B+1]``
    kv_limit : int32 ``[total_q]``, optional
    head_reduce, query_reduce : "mean", "sum" or "max"

    Returns
    -------
    float32 (float64 for float64 inputs) ``[total_k]``; 0 past ``cu_seqlens_k[-1]``.
    """
    return _scores(q, k, cu_seqlens_q, cu_seqlens_k, False, kv_limit, softmax_scale, head_reduce, query_reduce)


@torch.no_grad()
@_without_autocast
def column_scores(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_lse: Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    query_reduce: str = "sum",
    head_reduce: str = "mean",
) -> Tensor:
    """How much all query rows of each segment attend to each of its keys: columns of the softmax, reduced.

    Heads are reduced first, then the query rows; an entry that ``causal`` masks counts as 0, and "mean"
    divides by ``Lq``. ``softmax_lse`` only saves the fast backends a pass and is ignored here. Parameters
    and result as in :func:`last_query_scores`, with every query row in ``q``.
    """
    return _scores(q, k, cu_seqlens_q, cu_seqlens_k, causal, None, softmax_scale, head_reduce, query_reduce)


@torch.no_grad()
def kv_limit_from_positions(
    position_ids_q: Tensor, position_ids_k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> Tensor:
    """Per query row the number of keys of its segment whose position is not above its own.

    Parameters
    ----------
    position_ids_q : int32 or int64 ``[total_q]``
    position_ids_k : the same dtype ``[total_k]``, ascending within each segment
    cu_seqlens_q, cu_seqlens_k : int32 ``[B+1]``

    Returns
    -------
    int32 ``[total_q]``; 0 past ``cu_seqlens_q[-1]``.
    """
    limit = torch.zeros(position_ids_q.shape[0], dtype=torch.int32, device=position_ids_q.device)
    queries = segment_bounds(cu_seqlens_q, position_ids_q.shape[0])
    keys = segment_bounds(cu_seqlens_k, position_ids_k.shape[0])
    for (q0, q1), (k0, k1) in zip(queries, keys, strict=True):
        seen = position_ids_k[k0:k1] <= position_ids_q[q0:q1, None]
        limit[q0:q1] = seen.sum(-1, dtype=torch.int32)
    return limit
