"""Ragged attention and decoding against scaled_dot_product_attention, policy attention against its eager chain."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import peers, timing, workloads
from bench.conftest import Versus
from bench.workloads import Workload
from pruneops import ops

DTYPES = [torch.float32, torch.bfloat16]


def _ours(work: Workload, dtype: torch.dtype) -> tuple[Any, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    q, k, v = work.qkv(dtype)
    cu_seqlens, longest = work.cu_seqlens(), work.max_seqlen
    return lambda: ops.varlen_attention(q, k, v, cu_seqlens, cu_seqlens, longest, longest), (q, k, v)


def _policy(length: int) -> torch.Tensor:
    """Keeps about half of the keys."""
    return torch.rand(length, generator=torch.Generator().manual_seed(2)).round()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [576, 1152, 2304])
def test_varlen_attention_one_segment(versus: Versus, length: int, dtype: torch.dtype) -> None:
    work = workloads.uniform(length)
    ours, qkv = _ours(work, dtype)
    dense = [peers.head_major(x) for x in qkv]
    versus(
        ours,
        lambda: peers.sdpa(*dense)[0].transpose(0, 1),
        op="varlen_attention",
        workload=f"{length} tokens, 32 heads of 128, causal",
        peer_name="SDPA",
        dtype=dtype,
        flops=work.attention_flops(),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("peer", ["SDPA, loop over rows", "SDPA, padded", "SDPA, padded + mask"])
def test_varlen_attention_ragged(versus: Versus, peer: str, dtype: torch.dtype) -> None:
    work = workloads.ragged4()
    ours, qkv = _ours(work, dtype)
    if peer == "SDPA, loop over rows":
        segments = [
            tuple(peers.head_major(part) for part in parts)
            for parts in zip(*(x.split(work.seqlens) for x in qkv), strict=True)
        ]

        def call() -> Any:
            return peers.sdpa_loop(segments)

        def packed(result: Any) -> torch.Tensor:
            return torch.cat([part[0].transpose(0, 1) for part in result])

    else:
        padded = [peers.pad_rows(x, work.seqlens) for x in qkv]
        mask = peers.causal_padding_mask(work.seqlens) if peer.endswith("mask") else None

        def call() -> Any:
            return peers.sdpa(*padded) if mask is None else peers.sdpa_masked(*padded, mask)

        def packed(result: Any) -> torch.Tensor:
            return peers.unpad_rows(result, work.seqlens)

    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    versus(
        ours,
        call,
        op="varlen_attention",
        workload=f"{work.name} {list(work.seqlens)}, 32 heads of 128, causal",
        peer_name=peer,
        dtype=dtype,
        flops=work.attention_flops(),
        same=lambda a, b: timing.check(a, packed(b), rtol=tolerance, atol=tolerance),
    )


def test_varlen_attention_many_tiny_segments(versus: Versus) -> None:
    work = workloads.tiny512()
    ours, qkv = _ours(work, torch.float32)
    shape = (work.batch, work.max_seqlen, work.heads, work.head_dim)
    dense = [x.view(shape).transpose(1, 2).contiguous() for x in qkv]
    versus(
        ours,
        lambda: peers.sdpa(*dense).transpose(1, 2).flatten(0, 1),
        op="varlen_attention",
        workload="512 segments of 34 tokens, 8 heads of 128, causal",
        peer_name="SDPA, one dense batch",
        flops=work.attention_flops(),
    )


def test_varlen_attention_gqa(versus: Versus) -> None:
    work = workloads.uniform(1152, heads=28, kv_heads=4)
    ours, qkv = _ours(work, torch.float32)
    dense = [peers.head_major(x) for x in qkv]
    versus(
        ours,
        lambda: peers.sdpa(*dense)[0].transpose(0, 1),
        op="varlen_attention",
        workload="1152 tokens, 28 query and 4 key heads of 128, causal",
        peer_name="SDPA, enable_gqa",
        flops=work.attention_flops(),
    )


@pytest.mark.parametrize("length", [576, 1152])
def test_varlen_attention_forward_and_backward(versus: Versus, length: int) -> None:
    work = workloads.uniform(length)
    q, k, v = (x.requires_grad_() for x in work.qkv())
    dense = [peers.head_major(x.detach()).requires_grad_() for x in (q, k, v)]
    cu_seqlens = work.cu_seqlens()
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    dense_upstream = peers.head_major(upstream)

    def ours() -> Any:
        out = ops.varlen_attention(q, k, v, cu_seqlens, cu_seqlens, length, length)
        return torch.autograd.grad(out, (q, k, v), upstream)

    def peer() -> Any:
        return torch.autograd.grad(peers.sdpa(*dense), dense, dense_upstream)

    versus(
        ours,
        peer,
        op="varlen_attention + backward",
        workload=f"{length} tokens, 32 heads of 128, causal",
        peer_name="SDPA + backward",
        flops=work.attention_flops() * 7 // 2,
        same=lambda a, b: timing.check(list(a), [x[0].transpose(0, 1) for x in b], rtol=1e-3, atol=1e-3),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 32), (28, 4)])
def test_decode_attention(versus: Versus, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    """One new token against 2880 cached ones."""
    length, dim = 2880, 128
    q = torch.randn(1, heads, dim).to(dtype)
    k, v = (torch.randn(1, length, kv_heads, dim).to(dtype) for _ in range(2))
    used = torch.tensor([length], dtype=torch.int32)
    dense_q = q.unsqueeze(2)
    dense_k, dense_v = (x.transpose(1, 2).contiguous() for x in (k, v))
    versus(
        lambda: ops.decode_attention(q, k, v, used),
        lambda: peers.sdpa_decode(dense_q, dense_k, dense_v)[:, :, 0],
        op="decode_attention",
        workload=f"1 x {length} cached, {heads} query and {kv_heads} key heads of 128",
        peer_name="SDPA",
        dtype=dtype,
        bytes_moved=k.numel() * k.element_size() * 2,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [576, 1152])
def test_policy_attention(versus: Versus, length: int, dtype: torch.dtype) -> None:
    work = workloads.uniform(length)
    q, k, v = work.qkv(dtype)
    policy, cu_seqlens = _policy(length), work.cu_seqlens()
    dense = [peers.head_major(x) for x in (q, k, v)]
    mask = peers.causal_padding_mask([length])
    versus(
        lambda: ops.policy_attention(q, k, v, policy, cu_seqlens, length),
        lambda: peers.policy_softmax(*dense, policy, mask)[0].transpose(0, 1),
        op="policy_attention",
        workload=f"{length} tokens, 32 heads of 128",
        peer_name="masked softmax, L x L",
        dtype=dtype,
        flops=work.attention_flops(),
    )


@pytest.mark.parametrize("length", [576, 1152])
def test_policy_attention_forward_and_backward(versus: Versus, length: int) -> None:
    work = workloads.uniform(length)
    q, k, v = (x.requires_grad_() for x in work.qkv())
    policy, cu_seqlens = _policy(length).requires_grad_(), work.cu_seqlens()
    dense = [peers.head_major(x.detach()).requires_grad_() for x in (q, k, v)]
    mask = peers.causal_padding_mask([length])
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    dense_upstream = peers.head_major(upstream)

    def ours() -> Any:
        out = ops.policy_attention(q, k, v, policy, cu_seqlens, length)
        return torch.autograd.grad(out, (q, k, v, policy), upstream)

    def peer() -> Any:
        return torch.autograd.grad(peers.policy_softmax(*dense, policy, mask), (*dense, policy), dense_upstream)

    def same(a: Any, b: Any) -> None:
        timing.check(list(a[:3]), [x[0].transpose(0, 1) for x in b[:3]], rtol=1e-3, atol=1e-3)
        timing.check(a[3], b[3], rtol=1e-3, atol=1e-4 * float(b[3].abs().max()))

    versus(
        ours,
        peer,
        op="policy_attention + backward",
        workload=f"{length} tokens, 32 heads of 128",
        peer_name="masked softmax, L x L, + backward",
        flops=work.attention_flops() * 7 // 2,
        same=same,
    )
