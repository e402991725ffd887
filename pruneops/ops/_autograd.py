"""Gradients of the differentiable ops. Importing registers them.

The formulas call ops again, so whatever is registered here for those is the second derivative: gathering and
scattering are each other's backward pass to any order, attention is differentiable once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd

from pruneops import _library  # noqa: F401  (defines the schemas)

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


def _gather_backward(ctx: Any, grads: Grads) -> tuple[Grads, None]:
    (indices,) = ctx.saved_tensors
    places, values = _wanted(grads, ctx.needs_input_grad[0])
    values = torch.ops.pruneops.scatter_rows.default(values, indices, ctx.total) if values else []
    return _placed(len(grads), places, values), None


def _scatter_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, indices, _ = inputs
    _mark_outputs(ctx, tensors, output)
    ctx.save_for_backward(indices)


def _scatter_backward(ctx: Any, grads: Grads) -> tuple[Grads, None, None]:
    (indices,) = ctx.saved_tensors
    places, values = _wanted(grads, ctx.needs_input_grad[0])
    values = torch.ops.pruneops.gather_rows.default(values, indices) if values else []
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


def _compact_backward(ctx: Any, grads: Grads, _indices: None, _cu_seqlens: None) -> tuple[Grads | None, ...]:
    (indices,) = ctx.saved_tensors
    places, values = _wanted(grads, ctx.needs_input_grad[1])
    values = torch.ops.pruneops.scatter_rows.default(values, indices, ctx.total) if values else []
    return (None, _placed(len(grads), places, values), *[None] * ctx.trailing)


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale, limit, used = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k, limit)
    ctx.max_seqlens = max_seqlen_q, max_seqlen_k
    ctx.causal, ctx.softmax_scale = causal, scale
    ctx.has_slots = used is not None


def _attention_backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if ctx.has_slots:
        raise RuntimeError("pruneops::varlen_attention has no gradient with seqused_k; pass packed keys")
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, limit = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    grads = torch.ops.pruneops.varlen_attention_backward.default(
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


def _no_second_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Nothing to keep: the backward pass below only refuses."""


def _no_second_backward(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "pruneops::varlen_attention is differentiable once; "
        "use pruneops.backends.use('reference') for second derivatives"
    )


register_autograd("pruneops::gather_rows", _gather_backward, setup_context=_gather_setup)
register_autograd("pruneops::scatter_rows", _scatter_backward, setup_context=_scatter_setup)
register_autograd("pruneops::select_compact", _compact_backward, setup_context=_compact_setup)
register_autograd("pruneops::varlen_attention", _attention_backward, setup_context=_attention_setup)
register_autograd("pruneops::varlen_attention_backward", _no_second_backward, setup_context=_no_second_setup)
