"""Shapes and dtypes of what each op returns, for tracing without data. Importing registers them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.library import register_fake

from pruneops import backends

# Sizes are int or, under a tracer with dynamic shapes, torch.SymInt; annotations say int for both.


def _fake(op: str) -> Callable[[Callable], Callable]:
    """Registers a function for the compiled op and its twin in Triton."""

    def register(function: Callable) -> Callable:
        for namespace in backends.NAMESPACES.values():
            register_fake(f"{namespace}::{op}", function)
        return function

    return register


def _one_device(*tensors: Tensor | None) -> None:
    """Refuses meta tensors beside real ones, which arrive here and would come back uninitialised."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    torch._check(len(devices) <= 1, lambda: f"all tensors must be on one device, got {devices}")


def _indices(like: Tensor, size: int) -> Tensor:
    return like.new_empty((size,), dtype=torch.int32)


@_fake("segment_topk")
def _segment_topk(
    scores: Tensor, cu_seqlens: Tensor, keep_counts: Tensor, capacity: int, protect: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _one_device(scores, cu_seqlens, keep_counts, protect)
    return _indices(scores, capacity), cu_seqlens.new_empty(cu_seqlens.shape)


@_fake("segment_threshold")
def _segment_threshold(
    scores: Tensor,
    cu_seqlens: Tensor,
    threshold: float,
    capacity: int,
    min_keep: Tensor | None = None,
    protect: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _one_device(scores, cu_seqlens, min_keep, protect)
    size = torch.library.get_ctx().new_dynamic_size() if capacity == -1 else capacity
    return _indices(scores, size), cu_seqlens.new_empty(cu_seqlens.shape)


def _resized(tensors: list[Tensor], rows: int) -> list[Tensor]:
    return [tensor.new_empty((rows, *tensor.shape[1:])) for tensor in tensors]


@_fake("gather_rows")
def _gather_rows(tensors: list[Tensor], indices: Tensor) -> list[Tensor]:
    _one_device(*tensors, indices)
    return _resized(tensors, indices.shape[0])


@_fake("scatter_rows")
def _scatter_rows(tensors: list[Tensor], indices: Tensor, total: int) -> list[Tensor]:
    _one_device(*tensors, indices)
    return _resized(tensors, total)


@_fake("select_compact")
def _select_compact(
    scores: Tensor,
    tensors: list[Tensor],
    cu_seqlens: Tensor,
    keep_counts: Tensor,
    capacity: int,
    protect: Tensor | None = None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    _one_device(scores, *tensors, cu_seqlens, keep_counts, protect)
    indices = _indices(scores, capacity)
    return _resized(tensors, capacity), indices, cu_seqlens.new_empty(cu_seqlens.shape)


@_fake("scatter_scaled")
def _scatter_scaled(x: Tensor, residual: Tensor, branch: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    _one_device(x, residual, branch, weights, indices)
    return x.new_empty(x.shape)


@_fake("scatter_scaled_backward")
def _scatter_scaled_backward(
    dout: Tensor, x: Tensor, branch: Tensor, weights: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _one_device(dout, x, branch, weights, indices)
    kept = branch.shape
    return x.new_empty(x.shape), x.new_empty(kept), x.new_empty(kept), weights.new_empty(weights.shape)


@_fake("router_weights")
def _router_weights(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    activation: str,
    scale: float,
    shift: float,
) -> tuple[Tensor, Tensor]:
    _one_device(x, weight, bias, target)
    logits, weights = (x.new_empty((x.shape[0],), dtype=torch.float32) for _ in range(2))
    return logits, weights


@_fake("router_weights_backward")
def _router_weights_backward(
    dweights: Tensor,
    logits: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor | None,
    activation: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _one_device(dweights, logits, x, weight, target)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty((1,))


@_fake("varlen_attention")
def _varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    softmax_scale: float,
    kv_limit: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _one_device(q, k, v, cu_seqlens_q, cu_seqlens_k, kv_limit, seqused_k)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@_fake("varlen_attention_backward")
def _varlen_attention_backward(
    dout: Tensor,
    dsoftmax_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    softmax_scale: float,
    kv_limit: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _one_device(dout, dsoftmax_lse, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, kv_limit)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@_fake("policy_attention")
def _policy_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _one_device(q, k, v, policy, cu_seqlens)
    of_rows = (q.shape[1], q.shape[0])
    return q.new_empty(q.shape), q.new_empty(of_rows, dtype=torch.float32), q.new_empty(of_rows, dtype=torch.float32)


@_fake("policy_attention_backward")
def _policy_attention_backward(
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
    _one_device(dout, q, k, v, policy, out, softmax_max, softmax_sum, cu_seqlens)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), policy.new_empty(policy.shape)


@_fake("decode_attention")
def _decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqused_k: Tensor,
    softmax_scale: float,
    num_splits: int,
    return_scores: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _one_device(q, k_cache, v_cache, seqused_k)
    scores_shape = k_cache.shape[:2] if return_scores else (0, 0)
    return (
        q.new_empty(q.shape),
        q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32),
        q.new_empty(scores_shape, dtype=torch.float32),
    )


@_fake("last_query_scores")
def _last_query_scores(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    head_reduce: str,
    query_reduce: str,
    kv_limit: Tensor | None = None,
) -> Tensor:
    _one_device(q, k, cu_seqlens_q, cu_seqlens_k, kv_limit)
    return k.new_empty((k.shape[0],), dtype=torch.float32)


@_fake("column_scores")
def _column_scores(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    softmax_scale: float,
    query_reduce: str,
    head_reduce: str,
    softmax_lse: Tensor | None = None,
) -> Tensor:
    _one_device(q, k, cu_seqlens_q, cu_seqlens_k, softmax_lse)
    return k.new_empty((k.shape[0],), dtype=torch.float32)


@_fake("kv_limit_from_positions")
def _kv_limit_from_positions(
    position_ids_q: Tensor, position_ids_k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> Tensor:
    _one_device(position_ids_q, position_ids_k, cu_seqlens_q, cu_seqlens_k)
    return _indices(position_ids_q, position_ids_q.shape[0])


@_fake("dpc_knn")
def _dpc_knn(
    x: Tensor,
    cu_seqlens: Tensor,
    num_clusters: Tensor,
    k: int,
    max_seqlen: int,
    capacity: int,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _one_device(x, cu_seqlens, num_clusters, noise)
    rows = (x.shape[0],)
    density, delta, score = (x.new_empty(rows, dtype=torch.float32) for _ in range(3))
    ids, centers = _indices(x, x.shape[0]), _indices(x, capacity)
    return ids, centers, cu_seqlens.new_empty(cu_seqlens.shape), density, delta, score


@_fake("merge_mean")
def _merge_mean(
    x: Tensor,
    cluster_ids: Tensor,
    cu_seqlens: Tensor,
    num_clusters: Tensor,
    capacity: int,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _one_device(x, cluster_ids, cu_seqlens, num_clusters, weights)
    return x.new_empty((capacity, x.shape[1])), _indices(x, capacity)


@_fake("position_means")
def _position_means(x: Tensor, cu_seqlens: Tensor, num_positions: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    _one_device(x, cu_seqlens, num_positions)
    return x.new_empty((capacity, x.shape[1])), x.new_empty((capacity,), dtype=torch.float32)
