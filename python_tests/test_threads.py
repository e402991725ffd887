"""The number of threads changes no byte of any result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from pruneops import ops
from pruneops.testing import assert_bitwise_equal, attention_inputs, cu_seqlens_of

LENGTHS = (300, 0, 1, 129, 517)


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def selection() -> Any:
    scores, cu_seqlens = torch.randn(947), cu_seqlens_of(LENGTHS)
    counts = [n // 3 for n in LENGTHS]
    return ops.segment_topk(scores, cu_seqlens, counts), ops.segment_threshold(scores, cu_seqlens, 0.3)


def compaction() -> Any:
    x, labels, scores = torch.randn(947, 300), torch.arange(947), torch.randn(947)
    counts = [n // 2 for n in LENGTHS]
    kept, indices, _ = ops.select_compact(scores, [x, labels], cu_seqlens_of(LENGTHS), counts)
    return ops.gather_rows([x, labels], indices), ops.scatter_rows(kept, indices, 947)


def routing(dtype: torch.dtype) -> Any:
    """A layer whose weights come from a router, with all its gradients."""
    x, residual, branch, weight = (
        torch.randn(*shape).to(dtype) for shape in ((947, 300), (400, 300), (400, 300), (300,))
    )
    leaves = [x.requires_grad_(), residual.requires_grad_(), branch.requires_grad_(), weight.requires_grad_()]
    logits, weights = ops.router_weights(x, weight, scale=0.2, shift=1.0)
    out = ops.scatter_scaled(x, residual, branch, weights, torch.arange(0, 800, 2, dtype=torch.int32))
    return logits, weights, out, torch.autograd.grad(out, leaves, torch.randn_like(out))


def attention(dtype: torch.dtype) -> Any:
    inputs = attention_inputs(LENGTHS, heads=(6, 2), head_dim=64, dtype=dtype)
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out, lse = ops.varlen_attention(*inputs.args, return_lse=True)
    return out, lse, torch.autograd.grad(out, leaves, torch.randn_like(out))


def policy_attention(dtype: torch.dtype) -> Any:
    inputs = attention_inputs(LENGTHS, heads=(6, 2), head_dim=64, dtype=dtype)
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v, torch.rand(947))]
    out = ops.policy_attention(*leaves, inputs.cu_seqlens_q, inputs.max_seqlen_q)
    return out, torch.autograd.grad(out, leaves, torch.randn_like(out))


def decode() -> Any:
    q, (k, v) = torch.randn(3, 6, 64), torch.randn(2, 3, 900, 2, 64)
    used = torch.tensor([900, 0, 513], dtype=torch.int32)
    return ops.decode_attention(q, k, v, used, num_splits=3, return_scores=True)


def scores() -> Any:
    inputs = attention_inputs(LENGTHS, heads=(6, 2), head_dim=64)
    column = ops.column_scores(inputs.q, inputs.k, *inputs.boundaries)
    return column, ops.last_query_scores(inputs.q, inputs.k, *inputs.boundaries[:2], query_reduce="max")


def clustering() -> Any:
    # A shared segment, and many small ones that threads take whole.
    results = []
    for lengths in (LENGTHS, (60,) * 15):
        x, cu_seqlens = torch.randn(sum(lengths), 40), cu_seqlens_of(lengths)
        clusters = ops.dpc_knn(x, cu_seqlens, [n // 2 for n in lengths], k=7)
        results.append((clusters, ops.merge_mean(x, clusters.cluster_ids, cu_seqlens, clusters.cu_clusters.diff())))
        results.append(ops.position_means(x, cu_seqlens, [n // 4 for n in lengths]))
    return results


CALLS: dict[str, Callable[[], Any]] = {
    "selection": selection,
    "compaction": compaction,
    "routing-float32": lambda: routing(torch.float32),
    "routing-bfloat16": lambda: routing(torch.bfloat16),
    "attention-float32": lambda: attention(torch.float32),
    "attention-bfloat16": lambda: attention(torch.bfloat16),
    "policy_attention-float32": lambda: policy_attention(torch.float32),
    "policy_attention-bfloat16": lambda: policy_attention(torch.bfloat16),
    "decode": decode,
    "scores": scores,
    "clustering": clustering,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_any_number_of_threads_gives_the_same_bytes(call, native_calls):
    results = []
    for threads in (1, 2, 3, 8):
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        results.append(call())
    for result in results[1:]:
        assert_bitwise_equal(result, results[0])
