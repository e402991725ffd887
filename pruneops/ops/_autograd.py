"""Gradients of the differentiable ops. Importing registers them.

The formulas call ops of the same backend again, so whatever is registered here for those is the second derivative:
gathering and scattering are each other's backward pass to any order, ops with a backward op of their own are
differentiable once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd

from pruneops import backends
from pruneops.reference.clustering import cluster_rows, position_rows

Grads = list[Tensor | None]


def _mark_outputs(ctx: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    """Tells autograd that only outputs of inputs with a gradient have one, and to leave missing ones out."""
    ctx.set_materialize_grads(False)
    constant = [out for x, out in zip(inputs, outputs, strict=True) if not x.requires_grad]
    ctx.mark_non_differentiable(*constant)


def _wanted(grads: Grads, needed: list[bool]) -> tuple[list[int], list[Tensor]]:
    """The places and values of the gradients that arrived and are needed."""
    pairs = [(i, grad) for i, grad in enumerate(grads) if grad is not None and needed[i]]
    return [i for i, _ in pairs], [grad for _, grad in pairs]


def _placed(count: int, places: list[int], values: list[Tensor]) -> Grads:
    out: Grads = [None] * count
    for i, value in zip(places, values, strict=True):
        out[i] = value
    return out


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, indices = inputs
    _mark_outputs(ctx, tensors, output)
    ctx.save_for_backward(indices)
    ctx.total = tensors[0].shape[0]


def _gather_backward(run: Any, ctx: Any, grads: Grads) -> tuple[Grads, None]:
    (indices,) = ctx.saved_tensors
    places, values = _wanted(grads, ctx.needs_input_grad[0])
    values = run.scatter_rows.default(values, indices, ctx.total) if values else []
    return _placed(len(grads), places, values), None


def _scatter_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, indices, _ = inputs
    _mark_outputs(ctx, tensors, output)
    ctx.save_for_backward(indices)


def _scatter_backward(run: Any, ctx: Any, grads: Grads) -> tuple[Grads, None, None]:
    (indices,) = ctx.saved_tensors
    places, values = _wanted(grads, ctx.needs_input_grad[0])
    values = run.gather_rows.default(values, indices) if values else []
    return _placed(len(grads), places, values), None, None


def _compact_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], Tensor, Tensor]) -> None:
    scores, tensors, _, _, _, protect = inputs
    moved, indices, cu_seqlens_out = output
    _mark_outputs(ctx, tensors, moved)
    ctx.mark_non_differentiable(
        *(out for x, out in zip(tensors, moved, strict=True) if not x.requires_grad),
        indices,
        cu_seqlens_out,
    )
    ctx.save_for_backward(indices)
    ctx.total = scores.shape[0]
    # The dispatcher drops arguments that equal their default, and the number of gradients must match.
    ctx.trailing = 3 if protect is None else 4


def _compact_backward(run: Any, ctx: Any, grads: Grads, _indices: None, _cu_seqlens: None) -> tuple[Grads | None, ...]:
    (indices,) = ctx.saved_tensors
    places, values = _wanted(grads, ctx.needs_input_grad[1])
    values = run.scatter_rows.default(values, indices, ctx.total) if values else []
    return (None, _placed(len(grads), places, values), *[None] * ctx.trailing)


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale, limit, used = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k, limit)
    ctx.max_seqlens = max_seqlen_q, max_seqlen_k
    ctx.causal, ctx.softmax_scale = causal, scale
    ctx.has_slots = used is not None


def _attention_backward(run: Any, ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if ctx.has_slots:
        raise RuntimeError("pruneops::varlen_attention has no gradient with seqused_k; pass packed keys")
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, limit = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    grads = run.varlen_attention_backward.default(
        dout,
        dlse,
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        *ctx.max_seqlens,
        ctx.causal,
        ctx.softmax_scale,
        limit,
    )
    return (*grads, *[None] * 8)


def _scaled_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x, _, branch, weights, indices = inputs
    ctx.save_for_backward(x, branch, weights, indices)


def _scaled_backward(run: Any, ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return (*run.scatter_scaled_backward.default(dout, *ctx.saved_tensors), None)


def _router_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, target, ctx.activation, ctx.scale, _ = inputs
    logits, _ = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(logits)
    ctx.save_for_backward(logits, x, weight, target)
    ctx.has_bias = bias is not None


def _router_backward(run: Any, ctx: Any, _logits: None, dweights: Tensor | None) -> tuple[Tensor | None, ...]:
    if dweights is None:
        return (None,) * 7
    dx, dweight, dbias = run.router_weights_backward.default(dweights, *ctx.saved_tensors, ctx.activation, ctx.scale)
    return (dx, dweight, dbias if ctx.has_bias else None, *[None] * 4)


def _policy_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, policy, cu_seqlens, max_seqlen, scale, epsilon = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(q, k, v, policy, *output, cu_seqlens)
    ctx.numbers = max_seqlen, scale, epsilon


def _policy_backward(run: Any, ctx: Any, dout: Tensor, _max: None, _sum: None) -> tuple[Tensor | None, ...]:
    grads = run.policy_attention_backward.default(dout, *ctx.saved_tensors, *ctx.numbers)
    return (*grads, *[None] * 4)


def _no_second_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Nothing to keep: the backward pass below only refuses."""


def _no_second_backward_of(op: str) -> Callable[..., None]:
    def refuse(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(
            f"pruneops::{op} is differentiable once; use pruneops.backends.use('reference') for second derivatives"
        )

    return refuse


def _mean_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, cluster_ids, cu_seqlens, num_clusters, capacity, weights = inputs
    merged, counts = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(counts)
    weighted = weights is not None and weights.requires_grad
    ctx.save_for_backward(
        cluster_ids, cu_seqlens, num_clusters, counts, weights, x if weighted else None, merged if weighted else None
    )
    ctx.capacity, ctx.dtype = capacity, x.dtype
    ctx.trailing = 4 if weights is None else 5  # as in select_compact


def _mean_backward(run: Any, ctx: Any, dmerged: Tensor | None, _counts: None) -> tuple[Tensor | None, ...]:
    """``dx_i = w_i / W dmerged`` and ``dw_i = (x_i - merged) . dmerged / W``, with W the weight of the cluster."""
    cluster_ids, cu_seqlens, num_clusters, counts, weights, x, merged = ctx.saved_tensors
    if dmerged is None or ctx.capacity == 0:
        return (None,) * (ctx.trailing + 1)
    rows = cluster_rows(cluster_ids, cu_seqlens, num_clusters, ctx.capacity)
    inside, rows = rows < ctx.capacity, rows.clamp(max=ctx.capacity - 1)
    total = counts.float()
    if weights is not None:
        # Its mean over the members, times their number, is the weight of a cluster in a fixed order of summation.
        mean, _ = run.merge_mean.default(weights[:, None], cluster_ids, cu_seqlens, num_clusters, ctx.capacity)
        total = total * mean[:, 0]
    alive = total != 0
    inverse = torch.where(alive, 1.0 / torch.where(alive, total, 1.0), 0.0).index_select(0, rows)
    inside = inside & alive.index_select(0, rows)
    upstream = dmerged.index_select(0, rows).float()
    dx = dweights = None
    if ctx.needs_input_grad[0]:
        share = inverse if weights is None else inverse * weights
        dx = torch.where(inside[:, None], upstream * share[:, None], 0.0).to(ctx.dtype)
    if weights is not None and ctx.needs_input_grad[5]:
        apart = x.float() - merged.index_select(0, rows).float()
        dweights = torch.where(inside, (apart * upstream).sum(-1) * inverse, 0.0)
    return (dx, *[None] * 4, dweights)[: ctx.trailing + 1]


def _positions_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, cu_seqlens, num_positions, ctx.capacity = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(cu_seqlens, num_positions)
    ctx.total, ctx.dtype = x.shape[0], x.dtype


def _positions_backward(ctx: Any, dmeans: Tensor | None, _similarity: None) -> tuple[Tensor | None, ...]:
    """``dx_w = dmeans / W`` for each of the W frames of a position."""
    if dmeans is None or ctx.capacity == 0:
        return (None,) * 4
    cu_seqlens, num_positions = ctx.saved_tensors
    slot, frames, _ = position_rows(cu_seqlens, num_positions, ctx.total, ctx.capacity)
    shares = (dmeans.float() / frames.clamp(min=1)[:, None]).to(ctx.dtype)
    # One more row, of zeros, for the rows that belong to no position.
    return torch.nn.functional.pad(shares, (0, 0, 0, 1)).index_select(0, slot), None, None, None


# The formula of each op. Those that call ops get the namespace of their backend first.
_FORMULAS = {
    "gather_rows": (_gather_backward, _gather_setup),
    "scatter_rows": (_scatter_backward, _scatter_setup),
    "select_compact": (_compact_backward, _compact_setup),
    "varlen_attention": (_attention_backward, _attention_setup),
    "merge_mean": (_mean_backward, _mean_setup),
    "scatter_scaled": (_scaled_backward, _scaled_setup),
    "router_weights": (_router_backward, _router_setup),
    "policy_attention": (_policy_backward, _policy_setup),
}

for _namespace in backends.NAMESPACES.values():
    for _op, (_backward, _setup) in _FORMULAS.items():
        _with_ops = partial(_backward, getattr(torch.ops, _namespace))
        register_autograd(f"{_namespace}::{_op}", _with_ops, setup_context=_setup)
    register_autograd(f"{_namespace}::position_means", _positions_backward, setup_context=_positions_setup)
    for _op in ("varlen_attention", "policy_attention", "scatter_scaled", "router_weights"):
        _name = f"{_namespace}::{_op}_backward"
        register_autograd(_name, _no_second_backward_of(_op), setup_context=_no_second_setup)
