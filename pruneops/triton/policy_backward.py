"""Gradients of policy_attention; scores are computed again, once for dq and once for dk, dv and dpolicy.

With ``x = exp(logit - max) / den``, ``den = sum of the weights + epsilon``, counts ``c`` (the policy, 1 for a row's own
key) and ``delta = rowsum(dout * out)``::

    change = x * (dout v^T - delta)    dq = scale * (change * c) k    dk = scale * (change * c)^T q
    dv = (x * c)^T dout + epsilon / length * sum of dout / den       dpolicy = column sums of change, without own keys

No program adds to what another wrote, so the order of additions is fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pruneops.triton import tuning
from pruneops.triton.attention_forward import SHAPE_CLASSES, section_of_pairs, shape_class, typical_inputs, unit_rows
from pruneops.triton.head_tiles import LOG2_E, aligned, head_tiles, load_heads
from pruneops.triton.policy_backward_keys import candidates_of_keys, key_gradient_kernel
from pruneops.triton.policy_backward_queries import candidates_of_queries, query_gradient_kernel
from pruneops.triton.policy_forward import num_slots, segment_sums, typical_policy
from pruneops.triton.segments import clamped_pair
from pruneops.triton.tuning import Config, Tunable

_ROW_TERMS = Config({"ROWS": 64}, num_warps=4)
_HEAD_SUM = Config({"ROWS": 256}, num_warps=4)


@triton.jit(do_not_specialize=["total"])
def row_terms_kernel(
    dout,  # [total, Hq, D]
    out,  # [total, Hq, D]
    softmax_sum,  # [Hq, total] float32
    inverse,  # [Hq, total] float32
    delta,  # [Hq, total] float32
    stride_dout,
    stride_dout_head,
    stride_out,
    stride_out_head,
    total,
    heads_q,
    epsilon,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """1 / den and delta of every row; those of no segment get what nobody reads."""
    head = (tl.program_id(0) % heads_q).to(tl.int64)
    rows = tl.program_id(0) // heads_q * ROWS + tl.arange(0, ROWS)
    inside = rows < total
    dout0, dout1 = load_heads(dout + head * stride_dout_head, rows, stride_dout, inside, D, D0, D1, ALIGNED)
    out0, out1 = load_heads(out + head * stride_out_head, rows, stride_out, inside, D, D0, D1, ALIGNED)
    sums = tl.sum(dout0.to(tl.float32) * out0.to(tl.float32), 1)
    if D1 > 0:
        sums += tl.sum(dout1.to(tl.float32) * out1.to(tl.float32), 1)
    at = head * total + rows
    tl.store(inverse + at, 1.0 / (tl.load(softmax_sum + at, mask=inside, other=1.0) + epsilon), mask=inside)
    tl.store(delta + at, sums, mask=inside)


@triton.jit(do_not_specialize=["total"])
def head_sum_kernel(
    of_heads,  # [heads, total] float32
    result,  # [total] float32
    total,
    heads,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros([ROWS], tl.float32)
    for head in range(heads):
        sums += tl.load(of_heads + head * total.to(tl.int64) + rows, mask=rows < total, other=0.0)
    tl.store(result + rows, sums, mask=rows < total)


def policy_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    out: Tensor,
    softmax_max: Tensor,
    softmax_sum: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to q, k, v and the policy, with the largest logit of a row as a constant; deterministic."""
    total, heads_q, head_dim = q.shape
    heads_k = k.shape[1]
    dq, dk, dv, dpolicy = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), policy.new_empty(total)
    if total == 0:
        return dq, dk, dv, dpolicy
    dout, q, k, v, out = (unit_rows(x) for x in (dout, q, k, v, out))
    policy, softmax_max, softmax_sum = (x.contiguous() for x in (policy, softmax_max, softmax_sum))
    bounds = clamped_pair(cu_seqlens, total, cu_seqlens, total)[0]
    num_segments = bounds.shape[0] - 1
    d0, d1 = head_tiles(head_dim)
    vectors = aligned(dout, q, k, v, out, dq, dk, dv)
    inverse, delta = softmax_max.new_empty((2, heads_q, total))
    row_terms_kernel[(triton.cdiv(total, _ROW_TERMS.blocks["ROWS"]) * heads_q,)](
        dout,
        out,
        softmax_sum,
        inverse,
        delta,
        *dout.stride()[:2],
        *out.stride()[:2],
        total,
        heads_q,
        epsilon,
        D=head_dim,
        D0=d0,
        D1=d1,
        ALIGNED=vectors,
        **_ROW_TERMS.options,
    )
    dout_sums = segment_sums(dout, bounds, inverse)

    inputs = (dout, q, k, v, policy, softmax_max, inverse, delta)
    strides = [stride for x in (dout, q, k, v) for stride in x.stride()[:2]]
    group = heads_q // heads_k
    scales = softmax_scale, softmax_scale * LOG2_E.value
    row_bytes, longest = 2 * head_dim * q.element_size(), min(max_seqlen, total)
    class_ = shape_class(head_dim, q.dtype)

    config = tuning.configuration(QUERY_GRADIENT, class_, q.device)
    slots = num_slots(total, num_segments, config.blocks["BLOCK_M"])
    query_gradient_kernel[(slots * heads_q,)](
        *inputs,
        bounds,
        dq,
        *strides,
        total,
        num_segments,
        slots,
        section_of_pairs(row_bytes, longest, group),
        heads_q,
        group,
        *scales,
        D=head_dim,
        D0=d0,
        D1=d1,
        ALIGNED=vectors,
        **config.options,
    )

    config = tuning.configuration(KEY_GRADIENT, class_, q.device)
    slots = num_slots(total, num_segments, config.blocks["BLOCK_N"])
    of_heads = softmax_max.new_empty((heads_k, total))
    key_gradient_kernel[(slots * heads_k,)](
        *inputs,
        dout_sums,
        bounds,
        dk,
        dv,
        of_heads,
        *strides,
        total,
        num_segments,
        slots,
        section_of_pairs(row_bytes * group, longest, 1),
        heads_k,
        *scales,
        epsilon,
        D=head_dim,
        D0=d0,
        D1=d1,
        ALIGNED=vectors,
        GROUP=group,
        **config.options,
    )
    head_sum_kernel[(triton.cdiv(total, _HEAD_SUM.blocks["ROWS"]),)](
        of_heads, dpolicy, total, heads_k, **_HEAD_SUM.options
    )
    return dq, dk, dv, dpolicy


def problem(shape_class: str, device: torch.device) -> Callable[[], Any]:
    """The gradients of a training step's four LLaVA prompts."""
    q, k, v, cu_seqlens, longest = typical_inputs(shape_class, device)
    policy, scale = typical_policy(q.shape[0], device), q.shape[2] ** -0.5
    # In place of a forward pass: of the size that a row has whose largest logit is 5.5.
    softmax_max = q.new_full((q.shape[1], q.shape[0]), 8.0, dtype=torch.float32)
    softmax_sum = torch.full_like(softmax_max, 10.0)
    return lambda: policy_attention_backward(
        v, q, k, v, policy, q, softmax_max, softmax_sum, cu_seqlens, longest, scale, 1e-6
    )


QUERY_GRADIENT = Tunable(
    "policy_attention_backward dq",
    SHAPE_CLASSES,
    candidates_of_queries,
    Config({"BLOCK_M": 64, "BLOCK_N": 32}),
    problem,
)
KEY_GRADIENT = Tunable(
    "policy_attention_backward dk dv",
    SHAPE_CLASSES,
    candidates_of_keys,
    Config({"BLOCK_M": 32, "BLOCK_N": 64}),
    problem,
)
