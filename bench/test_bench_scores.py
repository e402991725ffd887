"""Attention as a score, against the eager code that materialises probabilities."""

from __future__ import annotations

import pytest
import torch

from bench import peers, workloads
from bench.conftest import Versus
from pruneops import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_last_query_scores(versus: Versus, dtype: torch.dtype) -> None:
    """PyramidDrop's ranking: one query row against 2880 keys, mean over 32 heads."""
    length, heads, dim = 2880, 32, 128
    q, k = torch.randn(1, heads, dim).to(dtype), torch.randn(length, heads, dim).to(dtype)
    cu_q = torch.tensor([0, 1], dtype=torch.int32)
    cu_k = torch.tensor([0, length], dtype=torch.int32)
    eager_q, eager_k = (x.transpose(0, 1).contiguous() for x in (q, k))
    versus(
        lambda: ops.last_query_scores(q, k, cu_q, cu_k),
        lambda: peers.last_query_mean(eager_q, eager_k),
        op="last_query_scores",
        workload=f"1 query row, {length} keys, 32 heads of 128",
        peer_name="matmul + softmax + mean",
        dtype=dtype,
        bytes_moved=k.numel() * k.element_size(),
    )


@pytest.mark.parametrize("length", [640, 1152])
def test_column_scores(versus: Versus, length: int) -> None:
    """What every key receives, with the log-sum-exp of the forward at hand (the usual case) left out."""
    work = workloads.uniform(length)
    q, k, _ = work.qkv()
    cu_seqlens = work.cu_seqlens()
    eager_q, eager_k = (x.transpose(0, 1).contiguous() for x in (q, k))
    versus(
        lambda: ops.column_scores(
            q, k, cu_seqlens, cu_seqlens, length, length, causal=True, query_reduce="sum", head_reduce="mean"
        ),
        lambda: peers.column_sum(eager_q, eager_k),
        op="column_scores",
        workload=f"{length} tokens, 32 heads of 128, causal, sum over queries",
        peer_name="eager softmax, heads x L x L",
        flops=work.attention_flops() // 2,
    )
