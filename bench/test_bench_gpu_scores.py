"""Attention as a score on a GPU, against the eager code that materialises probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import gpu_peers, workloads
from bench.gpu_compare import first_rehearsed, rotated, sized, versus
from bench.gpu_timing import DEVICE
from bench.timing import check
from bench.workloads import Workload
from pruneops import ops, reference

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float32]


def close(ours: Any, peer: Any) -> None:
    """The eager chain rounds logits to the dtype of the inputs, which moves a probability by a few percent."""
    check(ours, peer, rtol=5e-2, atol=1e-5)


def keys(work: Workload, rows: int, dtype: torch.dtype) -> list[Any]:
    """Sets of (q, k, and both as the eager chain likes them); ``rows`` query rows of every segment."""

    def make(generator: torch.Generator) -> Any:
        q = torch.randn(rows, work.heads, work.head_dim, generator=generator, device=DEVICE).to(dtype)
        k = torch.randn(work.total, work.kv_heads, work.head_dim, generator=generator, device=DEVICE).to(dtype)
        return q, k, gpu_peers.head_major(q), gpu_peers.head_major(k)

    return rotated(make)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "model", [workloads.llava15_7b, workloads.llava_next_7b, workloads.onevision_7b_32f, workloads.pllava_16f]
)
def test_last_query_scores(benchmark: Any, backend: str, model: Any, dtype: torch.dtype) -> None:
    """PyramidDrop's ranking: one query row against all keys, mean over heads."""
    work = sized(model())
    cu_q = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    cu_k = work.cu_seqlens().to(DEVICE)
    versus(
        benchmark,
        backend,
        keys(work, 1, dtype),
        lambda x: ops.last_query_scores(x[0], x[1], cu_q, cu_k),
        lambda x: gpu_peers.last_query_mean(x[2], x[3]),
        op="last_query_scores",
        workload=f"{work.name}, 1 x {work.total} keys, {work.heads}/{work.kv_heads} heads of {work.head_dim}",
        peer_name="matmul + softmax + mean",
        dtype=dtype,
        bytes_moved=work.total * work.kv_heads * work.head_dim * dtype.itemsize,
        same=close,
        target_ratio=3.0,
    )


@pytest.mark.parametrize("dtype", first_rehearsed(DTYPES), ids=str)
def test_last_query_scores_of_a_ragged_batch(benchmark: Any, backend: str, dtype: torch.dtype) -> None:
    """One query row a segment; the eager chain loops over the segments."""
    work = sized(workloads.ragged8())
    cu_q = torch.arange(work.batch + 1, dtype=torch.int32, device=DEVICE)
    cu_k = work.cu_seqlens().to(DEVICE)
    inputs = [
        (q, k, *([part.contiguous() for part in x.split(n, dim=1)] for x, n in ((q_heads, 1), (k_heads, work.seqlens))))
        for q, k, q_heads, k_heads in keys(work, work.batch, dtype)
    ]
    versus(
        benchmark,
        backend,
        inputs,
        lambda x: ops.last_query_scores(x[0], x[1], cu_q, cu_k),
        lambda x: torch.cat([gpu_peers.last_query_mean(a, b) for a, b in zip(x[2], x[3], strict=True)]),
        op="last_query_scores",
        workload=f"{work.name}, {work.batch} x 1 query row, {work.total} keys",
        peer_name="loop over rows: matmul + softmax + mean",
        dtype=dtype,
        bytes_moved=work.total * work.kv_heads * work.head_dim * dtype.itemsize,
        same=close,
        target_ratio=3.0,
    )


@pytest.mark.parametrize("with_lse", [True, False], ids=["lse_given", "lse_computed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", [workloads.llava15_7b, workloads.llava_next_7b])
def test_column_scores(benchmark: Any, backend: str, model: Any, dtype: torch.dtype, with_lse: bool) -> None:
    """What every key receives, with the log-sum-exp of the forward pass at hand and without it."""
    work = sized(model())
    length = work.total
    cu_seqlens, mask = work.cu_seqlens().to(DEVICE), gpu_peers.causal_mask(length)
    inputs = []
    for q, k, q_heads, k_heads in keys(work, length, dtype):
        lse = None
        if with_lse:
            boundaries = (cu_seqlens, cu_seqlens, length, length)
            lse = reference.varlen_attention(q, k, k, *boundaries, causal=True, return_lse=True)[1]
        inputs.append((q, k, q_heads, k_heads, lse))
    versus(
        benchmark,
        backend,
        inputs,
        lambda x: ops.column_scores(
            x[0], x[1], cu_seqlens, cu_seqlens, length, length,
            softmax_lse=x[4], causal=True, query_reduce="sum", head_reduce="mean",
        ),
        lambda x: gpu_peers.column_sum(x[2], x[3], mask),
        op="column_scores",
        workload=f"{work.name}, {length} tokens, causal, LSE {'given' if with_lse else 'computed'}",
        peer_name="eager softmax, heads x L x L",
        dtype=dtype,
        flops=work.attention_flops() // 2,
        same=close,
        target_ratio=6.0 if model is workloads.llava_next_7b and with_lse and dtype == torch.bfloat16 else None,
    )  # fmt: skip
