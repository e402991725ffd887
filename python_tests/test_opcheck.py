"""Every registered op passes torch.library.opcheck: schema, autograd, fake kernel and tracing agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from pruneops import _library, backends, ops  # noqa: F401  (ops registers fakes and gradients)
from pruneops.testing import attention_inputs, cu_seqlens_of, ops_under_test

OPS = ops_under_test()


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def selection_args(protected: bool) -> tuple[Any, ...]:
    protect = torch.arange(9) % 4 == 0 if protected else None
    return torch.randn(9), cu_seqlens_of([4, 0, 5]), protect


def topk(protected: bool) -> tuple[Any, ...]:
    scores, cu_seqlens, protect = selection_args(protected)
    return scores, cu_seqlens, int32(2, 0, 1), 7, protect


def threshold(capacity: int) -> tuple[Any, ...]:
    scores, cu_seqlens, protect = selection_args(True)
    return scores, cu_seqlens, 0.2, capacity, int32(1, 0, 2), protect


def rows(needs_grad: bool) -> list[Tensor]:
    return [
        torch.randn(9, 3, requires_grad=needs_grad),
        torch.arange(9),
        torch.randn(9, 2, 2, requires_grad=needs_grad),
        torch.randn(9),
    ]


def compact(protected: bool, needs_grad: bool) -> tuple[Any, ...]:
    scores, cu_seqlens, protect = selection_args(protected)
    return scores, rows(needs_grad), cu_seqlens, int32(2, 0, 1), 7, protect


def attention(needs_grad: bool, dtype: torch.dtype, limited: bool = False, slots: bool = False) -> tuple:
    inputs = attention_inputs((5, 0, 7), (6, 2, 7), head_dim=8, dtype=dtype)
    q, k, v = (x.requires_grad_(needs_grad) for x in (inputs.q, inputs.k, inputs.v))
    limit = torch.randint(0, 7, (12,), dtype=torch.int32) if limited else None
    if slots:
        k, v = torch.randn(3, 8, 2, 8), torch.randn(3, 8, 2, 8)
        return q, k, v, inputs.cu_seqlens_q, None, 7, 8, True, 0.3, limit, int32(8, 0, 3)
    return q, k, v, *inputs.boundaries, True, 0.3, limit, None


def attention_backward(with_lse: bool) -> tuple[Any, ...]:
    q, k, v, *rest = attention(False, torch.float32)
    out, lse = OPS.varlen_attention(q, k, v, *rest)
    dlse = torch.randn_like(lse) if with_lse else None
    return torch.randn_like(out), dlse, q, k, v, out, lse, *rest[:-1]


def policy(needs_grad: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    inputs = attention_inputs((5, 0, 7), head_dim=8, dtype=dtype)
    q, k, v, policy = (x.requires_grad_(needs_grad) for x in (inputs.q, inputs.k, inputs.v, torch.rand(12)))
    return q, k, v, policy, inputs.cu_seqlens_q, 7, 0.3, 1e-6


def policy_backward() -> tuple[Any, ...]:
    q, k, v, keep, *rest = policy(False, torch.float32)
    return torch.randn_like(q), q, k, v, keep, *OPS.policy_attention(q, k, v, keep, *rest), *rest


def decode(scores: bool) -> tuple[Any, ...]:
    k, v = torch.randn(2, 3, 9, 2, 8)
    return torch.randn(3, 4, 8), k, v, int32(9, 0, 4), 0.3, 2, scores


def last_query() -> tuple[Any, ...]:
    q, k, _, cu_q, cu_k, *_ = attention(False, torch.bfloat16)
    return q, k, cu_q, cu_k, 0.3, "mean", "max", torch.randint(0, 7, (12,), dtype=torch.int32)


def column(with_lse: bool) -> tuple[Any, ...]:
    q, k, v, *rest = attention(False, torch.float32)
    lse = OPS.varlen_attention(q, k, v, *rest)[1] if with_lse else None
    return q, k, *rest[:6], "sum", "mean", lse


def clustering(noisy: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    noise = torch.rand(12) if noisy else None
    return torch.randn(12, 3).to(dtype), cu_seqlens_of([4, 0, 6]), int32(2, 1, 3), 3, 6, 7, noise


def merging(weighted: bool, needs_grad: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.randn(12, 3).to(dtype).requires_grad_(needs_grad)
    weights = torch.rand(12).requires_grad_(needs_grad) if weighted else None
    ids = int32(0, 1, -1, 0, 2, 2, 0, 3, 1, 0, 0, 0)
    return x, ids, cu_seqlens_of([4, 0, 6]), int32(2, 1, 3), 7, weights


def averaging(needs_grad: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    x = torch.randn(12, 3).to(dtype).requires_grad_(needs_grad)
    # At least two frames each: opcheck takes NaN for a difference.
    return x, cu_seqlens_of([4, 0, 7]), int32(2, -1, 3), 7


def positions() -> tuple[Any, ...]:
    return torch.arange(9), torch.arange(9), cu_seqlens_of([4, 0, 5]), cu_seqlens_of([4, 0, 5])


def scaled(needs_grad: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    x, residual, branch = (torch.randn(n, 5).to(dtype).requires_grad_(needs_grad) for n in (9, 4, 4))
    return x, residual, branch, torch.rand(9).requires_grad_(needs_grad), int32(7, -1, 0, 3)


def scaled_backward() -> tuple[Tensor, ...]:
    x, _, branch, weights, indices = scaled(False)
    return torch.randn(9, 5), x, branch, weights, indices


def router(needs_grad: bool, full: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    x, weight, bias = (torch.randn(*shape).to(dtype).requires_grad_(needs_grad) for shape in ((9, 5), (5,), (1,)))
    bias, target = (bias, torch.arange(9) % 3 > 0) if full else (None, None)
    return x, weight, bias, target, "tanh", 0.2, 1.0


def router_backward(full: bool) -> tuple[Any, ...]:
    x, weight, _, target, *_ = router(False, full)
    return torch.randn(9), torch.randn(9), x, weight, target, "sigmoid", 0.2


CASES: dict[str, tuple[str, Callable[[], tuple[Any, ...]]]] = {
    "segment_topk": ("segment_topk", lambda: topk(False)),
    "segment_topk-protect": ("segment_topk", lambda: topk(True)),
    "segment_threshold": ("segment_threshold", lambda: threshold(7)),
    "segment_threshold-exact": ("segment_threshold", lambda: threshold(-1)),
    "gather_rows": ("gather_rows", lambda: (rows(False), int32(3, -1, 0))),
    "gather_rows-grad": ("gather_rows", lambda: (rows(True), int32(3, -1, 0))),
    "scatter_rows": ("scatter_rows", lambda: (rows(False), int32(3, -1, 0, 5, 6, 7, 8, 9, 11), 12)),
    "scatter_rows-grad": ("scatter_rows", lambda: (rows(True), int32(3, -1, 0, 5, 6, 7, 8, 9, 11), 12)),
    "select_compact": ("select_compact", lambda: compact(True, False)),
    "select_compact-grad": ("select_compact", lambda: compact(False, True)),
    "select_compact-protect-grad": ("select_compact", lambda: compact(True, True)),
    "scatter_scaled": ("scatter_scaled", lambda: scaled(False, torch.bfloat16)),
    "scatter_scaled-grad": ("scatter_scaled", lambda: scaled(True)),
    "scatter_scaled_backward": ("scatter_scaled_backward", scaled_backward),
    "router_weights": ("router_weights", lambda: router(False, False, torch.bfloat16)),
    "router_weights-grad": ("router_weights", lambda: router(True, False)),
    "router_weights-target-grad": ("router_weights", lambda: router(True)),
    "router_weights_backward": ("router_weights_backward", lambda: router_backward(False)),
    "router_weights_backward-target": ("router_weights_backward", lambda: router_backward(True)),
    "varlen_attention": ("varlen_attention", lambda: attention(False, torch.bfloat16)),
    "varlen_attention-grad": ("varlen_attention", lambda: attention(True, torch.float32)),
    "varlen_attention-limit-grad": ("varlen_attention", lambda: attention(True, torch.float32, True)),
    "varlen_attention-slots": ("varlen_attention", lambda: attention(False, torch.float32, True, True)),
    "varlen_attention_backward": ("varlen_attention_backward", lambda: attention_backward(False)),
    "varlen_attention_backward-lse": ("varlen_attention_backward", lambda: attention_backward(True)),
    "policy_attention": ("policy_attention", lambda: policy(False, torch.bfloat16)),
    "policy_attention-grad": ("policy_attention", lambda: policy(True, torch.float32)),
    "policy_attention_backward": ("policy_attention_backward", policy_backward),
    "decode_attention": ("decode_attention", lambda: decode(False)),
    "decode_attention-scores": ("decode_attention", lambda: decode(True)),
    "last_query_scores": ("last_query_scores", last_query),
    "column_scores": ("column_scores", lambda: column(False)),
    "column_scores-lse": ("column_scores", lambda: column(True)),
    "kv_limit_from_positions": ("kv_limit_from_positions", positions),
    "dpc_knn": ("dpc_knn", lambda: clustering(False, torch.bfloat16)),
    "dpc_knn-noise": ("dpc_knn", lambda: clustering(True, torch.float32)),
    "merge_mean": ("merge_mean", lambda: merging(False, False, torch.bfloat16)),
    "merge_mean-grad": ("merge_mean", lambda: merging(False, True, torch.float32)),
    "merge_mean-weights-grad": ("merge_mean", lambda: merging(True, True, torch.float32)),
    "position_means": ("position_means", lambda: averaging(False, torch.bfloat16)),
    "position_means-grad": ("position_means", lambda: averaging(True, torch.float32)),
}


@pytest.mark.parametrize(("op", "args"), CASES.values(), ids=CASES)
def test_opcheck(op, args):
    results = opcheck(getattr(OPS, op).default, args())
    assert set(results.values()) == {"SUCCESS"}


def test_every_op_of_the_library_is_checked():
    registered = set(_library.op_names())
    assert registered == {op for op, _ in CASES.values()}
    differentiable_once = {"varlen_attention", "policy_attention", "scatter_scaled", "router_weights"}
    assert registered == {*backends.OPS, *(f"{op}_backward" for op in differentiable_once)}


# The size of an exact threshold depends on data, which meta tensors do not have.
META_CASES = {name: case for name, case in CASES.items() if name != "segment_threshold-exact"}


@pytest.mark.parametrize(("op", "args"), META_CASES.values(), ids=META_CASES)
def test_meta_tensors_give_shapes_without_data(op, args):
    """Fake and real kernels agree on shape, dtype and strides."""
    arguments = args()
    real = torch.utils._pytree.tree_leaves(getattr(OPS, op)(*arguments))
    meta_args = torch.utils._pytree.tree_map_only(Tensor, lambda x: x.detach().to("meta"), arguments)
    meta = torch.utils._pytree.tree_leaves(getattr(OPS, op)(*meta_args))
    for a, b in zip(real, meta, strict=True):
        assert b.is_meta and (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
