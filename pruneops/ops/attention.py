"""Attention over packed segments, and the scores that pruning methods read off it.

Source: FlashAttention-2 (arXiv 2307.08691) for the tiled softmax and its backward pass, Flash-Decoding for
the split over keys of a single query.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pruneops import backends, reference
from pruneops.ops import _checks


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

    Which keys query row ``i`` of a segment with ``Lq`` queries and ``Lk`` keys sees:

    - ``causal=False``: all,
    - ``causal=True``: those below ``Lk - Lq + i + 1``, the last query row sees all keys (bottom-right
      aligned),
    - ``kv_limit``: those below ``kv_limit[row]``, clamped to ``[0, Lk]``; ``causal`` is then ignored.

    A row that sees no key, and a row past ``cu_seqlens_q[-1]``, gives 0 and an LSE of -inf.

    Parameters
    ----------
    q : ``[total_q, Hq, D]``
        float32, bfloat16 or float16; float64 runs on the reference backend. ``D`` up to 256.
    k, v : ``[total_k, Hk, D]``, the dtype of ``q``
        ``Hk`` divides ``Hq``. With ``seqused_k`` cache slots ``[B, capacity, Hk, D]``.
    cu_seqlens_q, cu_seqlens_k : int32 ``[B+1]``
        ``cu_seqlens_k`` is None with ``seqused_k``.
    max_seqlen_q, max_seqlen_k : int
        No smaller than the longest segment.
    softmax_scale : float, default ``D ** -0.5``
    kv_limit : int32 ``[total_q]``, optional
        See :func:`kv_limit_from_positions`.
    seqused_k : int32 ``[B]``, optional
        Filled slots per segment.

    Returns
    -------
    out : ``[total_q, Hq, D]`` in the dtype of ``q``
    softmax_lse : float32 ``[Hq, total_q]``, natural logarithm; only with ``return_lse``

    Raises
    ------
    TypeError, ValueError
        Wrong type, dtype, shape or device; on the CPU in eager mode also boundaries that do not start at 0,
        decrease or overrun, a ``max_seqlen`` below the longest segment, ``seqused_k`` above the capacity.

    Notes
    -----
    O(sum Lq x Lk x Hq x D) time, O(total) memory: scores are never materialised, forward or backward.
    Inputs are read in place whatever their strides, as long as the last one is 1. Arithmetic in float32.
    Deterministic, forward and backward. Differentiable once in q, k and v, through ``out`` and
    ``softmax_lse``; with ``seqused_k`` only the reference backend has a gradient, and runs where one is
    wanted. Under autocast the inputs are cast to its dtype (with cache slots ``q`` to theirs). The compiled
    kernels for a GPU take bfloat16 and float16 and a ``D`` of 64, 80, 96 or 128, and copy inputs whose rows
    do not begin on 16 bytes; other calls go to the next backend, see :func:`pruneops.backends.explain`.
    """
    q, k, v = _autocast(q, k, v, cache=seqused_k is not None)
    _checks.heads(q, k, "k", 3 if seqused_k is None else 4)
    _checks.same_as_keys("k", k, "v", v)
    cu_q = _checks.cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.shape[0], q.device)
    _checks.max_seqlen("max_seqlen_q", max_seqlen_q, "cu_seqlens_q", cu_q)
    batch = cu_seqlens_q.shape[0] - 1
    if seqused_k is None:
        cu_k = _checks.cu_seqlens("cu_seqlens_k", cu_seqlens_k, k.shape[0], q.device, batch)
        _checks.max_seqlen("max_seqlen_k", max_seqlen_k, "cu_seqlens_k", cu_k)
    else:
        _check_slots(cu_seqlens_k, k, batch)
        used = _checks.seqused(seqused_k, batch, k.shape[1], q.device)
        _checks.integer("max_seqlen_k", max_seqlen_k)
        if used and isinstance(max_seqlen_k, int) and max_seqlen_k < max(used):
            raise ValueError(
                f"max_seqlen_k must be at least {max(used)}, the most slots a row fills, got {max_seqlen_k}"
            )
    _checks.flag("causal", causal)
    _checks.flag("return_lse", return_lse)
    if kv_limit is not None:
        _checks.tensor("kv_limit", kv_limit, 1, _checks.INT32, q.device, q.shape[0])
    scale = _checks.scale(softmax_scale, q.shape[2])

    unsupported = "gradients with seqused_k" if seqused_k is not None and _wants_grad(q, k, v) else None
    backend = backends.select("varlen_attention", q.device.type, q.dtype, q.shape[2], unsupported)
    if backend != backends.REFERENCE:
        out, lse = backends.kernel(backend, "varlen_attention")(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            causal,
            scale,
            kv_limit,
            seqused_k,
        )
        return (out, lse) if return_lse else out
    return reference.varlen_attention(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        causal=causal,
        softmax_scale=scale,
        kv_limit=kv_limit,
        seqused_k=seqused_k,
        return_lse=return_lse,
    )


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
        float32, bfloat16 or float16; float64 runs on the reference backend. ``D`` up to 256.
    k_cache, v_cache : ``[B, capacity, Hk, D]``, the dtype of ``q``
    seqused_k : int32 ``[B]``
        Filled slots per row. Slots past them are never read, whatever they hold.
    softmax_scale : float, default ``D ** -0.5``
    num_splits : int
        Pieces into which the keys of a row are split; 0 chooses.
    return_scores : bool

    Returns
    -------
    out : ``[B, Hq, D]`` in the dtype of ``q``; 0 for a row without keys
    scores : float32 ``[B, capacity]``, only with ``return_scores``
        The mean over query heads of the softmax; 0 past ``seqused_k``.

    Raises
    ------
    TypeError, ValueError
        Wrong type, dtype, shape or device; on the CPU in eager mode also ``seqused_k`` outside ``[0,
        capacity]``.

    Notes
    -----
    O(sum seqused_k x Hq x D). Deterministic for a given ``num_splits``. No backward pass: where a gradient
    is wanted the reference backend runs. Under autocast ``q`` is cast to the dtype of the cache.
    """
    q, k_cache, v_cache = _autocast(q, k_cache, v_cache, cache=True)
    _checks.heads(q, k_cache, "k_cache", 4)
    _checks.same_as_keys("k_cache", k_cache, "v_cache", v_cache)
    batch, capacity = k_cache.shape[:2]
    if q.shape[0] != batch:
        raise ValueError(f"q must have {batch} rows, one a row of k_cache, got shape {tuple(q.shape)}")
    _checks.seqused(seqused_k, batch, capacity, q.device)
    _checks.integer("num_splits", num_splits)
    _checks.flag("return_scores", return_scores)
    scale = _checks.scale(softmax_scale, q.shape[2])

    unsupported = "gradients" if _wants_grad(q, k_cache, v_cache) else None
    backend = backends.select("decode_attention", q.device.type, q.dtype, q.shape[2], unsupported)
    if backend != backends.REFERENCE:
        out, _, scores = backends.kernel(backend, "decode_attention")(
            q, k_cache, v_cache, seqused_k, scale, num_splits, return_scores
        )
        return (out, scores) if return_scores else out
    return reference.decode_attention(
        q,
        k_cache,
        v_cache,
        seqused_k,
        softmax_scale=scale,
        num_splits=num_splits,
        return_scores=return_scores,
    )


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
    q : ``[total_q, Hq, D]``
        The chosen rows only: none, one or several a segment.
    k : ``[total_k, Hk, D]``, the dtype of ``q``
    cu_seqlens_q, cu_seqlens_k : int32 ``[B+1]``
    kv_limit : int32 ``[total_q]``, optional
    softmax_scale : float, default ``D ** -0.5``
    head_reduce, query_reduce : "mean", "sum" or "max"

    Returns
    -------
    float32 ``[total_k]``; 0 past ``cu_seqlens_k[-1]``.

    Raises
    ------
    TypeError, ValueError
        As in :func:`varlen_attention`, and for an unknown reduction.

    Notes
    -----
    O(sum Lq x Lk x Hq x D) time, O(total) memory. Deterministic, not differentiable. Under autocast the
    inputs are cast to its dtype. Source: the ranking of PyramidDrop (arXiv 2410.17247, section 3) and FastV
    (arXiv 2403.06764).
    """
    q, k = _autocast(q, k)
    _check_scores(q, k, cu_seqlens_q, cu_seqlens_k, head_reduce, query_reduce)
    if kv_limit is not None:
        _checks.tensor("kv_limit", kv_limit, 1, _checks.INT32, q.device, q.shape[0])
    scale = _checks.scale(softmax_scale, q.shape[2])
    backend = backends.select("last_query_scores", q.device.type, q.dtype)
    if backend != backends.REFERENCE:
        return backends.kernel(backend, "last_query_scores")(
            _checks.constant(q),
            _checks.constant(k),
            cu_seqlens_q,
            cu_seqlens_k,
            scale,
            head_reduce,
            query_reduce,
            kv_limit,
        )
    return reference.last_query_scores(
        q,
        k,
        cu_seqlens_q,
        cu_seqlens_k,
        kv_limit=kv_limit,
        softmax_scale=scale,
        head_reduce=head_reduce,
        query_reduce=query_reduce,
    )


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
    """How much all query rows of each segment attend to each of its keys: softmax columns, reduced.

    Heads are reduced first, then the query rows. An entry that ``causal`` masks counts as 0, and a "mean"
    over query rows divides by ``Lq``.

    Parameters
    ----------
    q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale :
        As in :func:`varlen_attention`.
    softmax_lse : float32 ``[Hq, total_q]``, optional
        From :func:`varlen_attention` on the same arguments; saves the pass that computes it.
    query_reduce, head_reduce : "mean", "sum" or "max"

    Returns
    -------
    float32 ``[total_k]``; 0 past ``cu_seqlens_k[-1]``.

    Raises
    ------
    TypeError, ValueError
        As in :func:`varlen_attention`, and for an unknown reduction.

    Notes
    -----
    O(sum Lq x Lk x Hq x D) time, O(total) memory: computed in tiles. Deterministic, not differentiable.
    Under autocast the inputs are cast to its dtype.
    """
    q, k = _autocast(q, k)
    cu_q, cu_k = _check_scores(q, k, cu_seqlens_q, cu_seqlens_k, head_reduce, query_reduce)
    _checks.max_seqlen("max_seqlen_q", max_seqlen_q, "cu_seqlens_q", cu_q)
    _checks.max_seqlen("max_seqlen_k", max_seqlen_k, "cu_seqlens_k", cu_k)
    if softmax_lse is not None:
        dtypes = _checks.FLOAT64 if q.dtype == torch.float64 else _checks.FLOAT32
        _checks.tensor("softmax_lse", softmax_lse, 2, dtypes, q.device, q.shape[1])
        if softmax_lse.shape[1] != q.shape[0]:
            raise ValueError(f"softmax_lse must have shape {(q.shape[1], q.shape[0])}, got {tuple(softmax_lse.shape)}")
    _checks.flag("causal", causal)
    scale = _checks.scale(softmax_scale, q.shape[2])
    backend = backends.select("column_scores", q.device.type, q.dtype)
    if backend != backends.REFERENCE:
        return backends.kernel(backend, "column_scores")(
            _checks.constant(q),
            _checks.constant(k),
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            causal,
            scale,
            query_reduce,
            head_reduce,
            None if softmax_lse is None else _checks.constant(softmax_lse),
        )
    return reference.column_scores(
        q,
        k,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_lse=softmax_lse,
        causal=causal,
        softmax_scale=scale,
        query_reduce=query_reduce,
        head_reduce=head_reduce,
    )


def kv_limit_from_positions(
    position_ids_q: Tensor, position_ids_k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> Tensor:
    """The ``kv_limit`` of :func:`varlen_attention` that makes attention causal in positions.

    Per query row the number of keys of its segment whose position is not above its own. This is the mask of
    a pruned sequence whose queries and keys were pruned differently.

    Parameters
    ----------
    position_ids_q : int32 or int64 ``[total_q]``
    position_ids_k : the same dtype ``[total_k]``, ascending within each segment
    cu_seqlens_q, cu_seqlens_k : int32 ``[B+1]``

    Returns
    -------
    int32 ``[total_q]``; 0 past ``cu_seqlens_q[-1]``.

    Raises
    ------
    TypeError, ValueError
        Wrong type, dtype, shape or device; on the CPU in eager mode also boundaries that do not start at 0,
        decrease or overrun, and key positions that are not ascending.

    Notes
    -----
    O(total_q x log Lk), deterministic, not differentiable.
    """
    _checks.tensor("position_ids_q", position_ids_q, 1, _checks.POSITIONS)
    device = position_ids_q.device
    _checks.tensor("position_ids_k", position_ids_k, 1, _checks.POSITIONS, device)
    if position_ids_k.dtype != position_ids_q.dtype:
        raise TypeError(
            f"position_ids_k must have the dtype of position_ids_q, {position_ids_q.dtype}, got {position_ids_k.dtype}"
        )
    _checks.cu_seqlens("cu_seqlens_q", cu_seqlens_q, position_ids_q.shape[0], device)
    batch = cu_seqlens_q.shape[0] - 1
    cu_k = _checks.cu_seqlens("cu_seqlens_k", cu_seqlens_k, position_ids_k.shape[0], device, batch)
    if cu_k is not None and _checks.readable(position_ids_k):
        _check_ascending(position_ids_k, cu_k)
    backend = backends.select("kv_limit_from_positions", device.type)
    if backend != backends.REFERENCE:
        return backends.kernel(backend, "kv_limit_from_positions")(
            position_ids_q, position_ids_k, cu_seqlens_q, cu_seqlens_k
        )
    return reference.kv_limit_from_positions(position_ids_q, position_ids_k, cu_seqlens_q, cu_seqlens_k)


def _wants_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _autocast(*tensors: Any, cache: bool = False) -> tuple[Any, ...]:
    """The inputs in the dtype that autocast asks for; unchanged outside autocast.

    With ``cache`` the tensors after the first are cache slots, which are not copied: the first follows them.
    """
    first = tensors[0]
    if not isinstance(first, Tensor) or first.is_meta or not torch.is_autocast_enabled(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    if cache and isinstance(tensors[1], Tensor):
        dtype = tensors[1].dtype
    return tuple(
        tensor.to(dtype) if isinstance(tensor, Tensor) and tensor.dtype in _checks.KERNEL_FLOATS else tensor
        for tensor in tensors
    )


def _check_slots(cu_seqlens_k: Any, k: Tensor, batch: int) -> None:
    if cu_seqlens_k is not None:
        raise ValueError("cu_seqlens_k must be None with seqused_k, got both")
    if k.shape[0] != batch:
        raise ValueError(f"k must have {batch} rows of cache slots, one a segment, got shape {tuple(k.shape)}")


def _check_scores(
    q: Any, k: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, head_reduce: Any, query_reduce: Any
) -> tuple[list[int] | None, list[int] | None]:
    _checks.heads(q, k, "k", 3)
    cu_q = _checks.cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.shape[0], q.device)
    batch = cu_seqlens_q.shape[0] - 1
    cu_k = _checks.cu_seqlens("cu_seqlens_k", cu_seqlens_k, k.shape[0], q.device, batch)
    _checks.choice("head_reduce", head_reduce, _checks.REDUCTIONS)
    _checks.choice("query_reduce", query_reduce, _checks.REDUCTIONS)
    return cu_q, cu_k


def _check_ascending(positions: Tensor, cu: list[int]) -> None:
    drops = (torch.nonzero(positions[1:] < positions[:-1]).flatten() + 1).tolist()
    starts = set(cu)
    for row in drops:
        if row not in starts and row < cu[-1]:
            raise ValueError(
                "position_ids_k must be ascending within each segment, got "
                f"{int(positions[row - 1])} then {int(positions[row])} at row {row}"
            )
