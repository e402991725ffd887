"""What policy_attention means, in plain torch: one segment after the other, whole score matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from pruneops.reference._segments import segment_bounds
from pruneops.reference.attention import _scale, _wide, _without_autocast


@_without_autocast
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
    """Causal self-attention in which key ``j`` counts ``policy[j]``, and 1 for its own query.

    In a segment of ``N`` rows, with ``a[i, j] = softmax_scale * q[i] . k[j]`` and ``m[i]`` the largest ``a[i, j]``
    over ``j <= i``, whatever the policy::

        e[i, j] = exp(a[i, j] - m[i]) * (policy[j] if j < i else 1 if j == i else 0)
        out[i] = (sum_j e[i, j] v[j] + epsilon / N * sum_j v[j]) / (sum_j e[i, j] + epsilon)

    where the second sum of values runs over the whole segment. Gradients treat ``m`` as a constant. Rows past
    ``cu_seqlens[-1]`` give 0.

    Parameters
    ----------
    q : ``[total, Hq, D]``
    k, v : ``[total, Hk, D]``
    policy : float32 ``[total]``, float64 for float64 inputs
    cu_seqlens : int32 ``[B+1]``
    max_seqlen : int, ignored here
    softmax_scale : float, default ``D ** -0.5``
    epsilon : float

    Returns
    -------
    ``[total, Hq, D]`` in the dtype of ``q``
    """
    group = q.shape[1] // k.shape[1]
    outs: list[Tensor] = []
    end = 0
    for start, stop in segment_bounds(cu_seqlens, q.shape[0]):
        outs.append(_wide(q).new_zeros(start - end, *q.shape[1:]))
        end = stop
        if start == stop:
            continue
        rows = slice(start, stop)
        keys, values = (_wide(x[rows]).repeat_interleave(group, dim=1) for x in (k, v))
        logits = torch.einsum("qhd,khd->hqk", _wide(q[rows]), keys) * _scale(q, softmax_scale)
        own = torch.eye(stop - start, dtype=torch.bool, device=q.device)
        hidden = torch.ones_like(own).triu(1)
        logits = logits.masked_fill(hidden, -torch.inf)
        counts = torch.where(own, 1.0, policy[rows].to(logits.dtype))
        e = (logits - logits.detach().amax(-1, keepdim=True)).exp() * torch.where(hidden, 0.0, counts)
        total = torch.einsum("hqk,khd->qhd", e, values) + epsilon * values.mean(0)
        outs.append(total / (e.sum(-1).transpose(0, 1) + epsilon).unsqueeze(-1))
    outs.append(_wide(q).new_zeros(q.shape[0] - end, *q.shape[1:]))
    return torch.cat(outs).to(q.dtype)
