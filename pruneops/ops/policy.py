"""Attention under a keep policy: dropping keys, softly and differentiably, without changing any length.

Source: Dynamic-LLaVA (arXiv 2412.00876, section 3.2), after DynamicViT (arXiv 2106.02034): during training tokens
are dropped in the softmax only, so that a gradient reaches the predictor that decides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pruneops import backends, reference
from pruneops.ops import _checks
from pruneops.ops.attention import _autocast


def policy_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    softmax_scale: float | None = None,
    epsilon: float = 1e-6,
) -> Tensor:
    """Causal self-attention within packed segments in which key ``j`` counts ``policy[j]``.

    A row's own key always counts 1; a dropped row still asks. In a segment of ``N`` rows, with ``a[i, j] =
    softmax_scale * q[i] . k[j]`` and ``m[i]`` the largest ``a[i, j]`` over ``j <= i``, whatever the policy::

        e[i, j] = exp(a[i, j] - m[i]) * (policy[j] if j < i else 1 if j == i else 0)
        out[i] = (sum_j e[i, j] v[j] + epsilon / N * sum_j v[j]) / (sum_j e[i, j] + epsilon)

    where the second sum of values runs over the whole segment. So every row takes a share of about ``epsilon`` from
    the mean value of its segment, later rows included; where the keys that are left are far below a dropped one,
    that share is all. With a policy of ones the result is causal :func:`varlen_attention` up to ``epsilon``.

    Parameters
    ----------
    q : ``[total, Hq, D]``
        float32, bfloat16 or float16; float64 runs on the reference backend. ``D`` up to 256.
    k, v : ``[total, Hk, D]``, the dtype of ``q``
        ``Hk`` divides ``Hq``.
    policy : float32 ``[total]`` (float64 for float64 inputs)
        1 keeps a key, 0 drops it; any other number scales it.
    cu_seqlens : int32 ``[B+1]``
    max_seqlen : int
        No smaller than the longest segment.
    softmax_scale : float, default ``D ** -0.5``
    epsilon : float, not negative

    Returns
    -------
    ``[total, Hq, D]`` in the dtype of ``q``; 0 past ``cu_seqlens[-1]``.

    Raises
    ------
    TypeError, ValueError
        Wrong type, dtype, shape or device, a negative or infinite ``epsilon``; on the CPU in eager mode also
        boundaries that do not start at 0, decrease or overrun, and a ``max_seqlen`` below the longest segment.

    Notes
    -----
    O(sum N**2 x Hq x D) time, O(total) memory: scores are never materialised, forward or backward. Inputs are read in
    place whatever their strides, as long as the last one is 1. Arithmetic in float32. Deterministic, forward and
    backward. Differentiable once in q, k, v and policy, with ``m`` as a constant. Under autocast q, k and v are cast
    to its dtype.
    """
    q, k, v = _autocast(q, k, v)
    _checks.heads(q, k, "k", 3)
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k must have {q.shape[0]} rows, those of q, got shape {tuple(k.shape)}")
    _checks.same_as_keys("k", k, "v", v)
    dtypes = _checks.FLOAT64 if q.dtype == torch.float64 else _checks.FLOAT32
    _checks.tensor("policy", policy, 1, dtypes, q.device, q.shape[0])
    cu = _checks.cu_seqlens("cu_seqlens", cu_seqlens, q.shape[0], q.device)
    _checks.max_seqlen("max_seqlen", max_seqlen, "cu_seqlens", cu)
    scale = _checks.scale(softmax_scale, q.shape[2])
    epsilon = _epsilon(epsilon)

    backend = backends.select("policy_attention", q.device.type, q.dtype)
    if backend != backends.REFERENCE:
        return backends.kernel(backend, "policy_attention")(q, k, v, policy, cu_seqlens, max_seqlen, scale, epsilon)[0]
    return reference.policy_attention(q, k, v, policy, cu_seqlens, max_seqlen, softmax_scale=scale, epsilon=epsilon)


def _epsilon(value: Any) -> float:
    value = _checks.real("epsilon", value)
    if isinstance(value, float) and not 0.0 <= value <= torch.finfo(torch.float32).max:
        raise ValueError(f"epsilon must be finite in float32 and not negative, got {value}")
    return value
