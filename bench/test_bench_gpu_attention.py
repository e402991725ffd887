"""Ragged attention and decoding on a GPU against torch's own: ragged, dense, padded, and for decoding dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from bench import gpu_peers, peers, workloads
from bench.gpu_compare import first_rehearsed, rotated, sized, smaller, versus
from bench.gpu_timing import DEVICE, REHEARSAL
from bench.timing import check
from bench.workloads import Workload
from pruneops import backends, ops

pytestmark = pytest.mark.gpu

BFLOAT16 = torch.bfloat16
DENSE = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


def with_head_dim(work: Workload, head_dim: int) -> Workload:
    """The workload at another head dimension, sized for where it runs."""
    work = sized(work)
    return work if REHEARSAL else replace(work, head_dim=head_dim)


def described(work: Workload) -> str:
    shape = f"{work.heads}/{work.kv_heads} heads of {work.head_dim}, causal"
    return f"{work.name}, {work.batch} x {min(work.seqlens)} to {work.max_seqlen} tokens, {shape}"


def qkv(work: Workload, prepare: Callable[[Tensor], Tensor] = lambda x: x) -> list[Any]:
    """Sets of packed q, k and v, and the same as a peer likes them."""

    def make(generator: torch.Generator) -> Any:
        heads = work.heads, work.kv_heads, work.kv_heads
        packed = [
            torch.randn(work.total, h, work.head_dim, generator=generator, device=DEVICE).to(BFLOAT16) for h in heads
        ]
        return packed, [prepare(x) for x in packed]

    return rotated(make)


def attend(work: Workload) -> Callable[[Any], Tensor]:
    cu_seqlens, longest = work.cu_seqlens().to(DEVICE), work.max_seqlen
    return lambda x: ops.varlen_attention(*x[0], cu_seqlens, cu_seqlens, longest, longest)


def torch_varlen(work: Workload) -> Callable[[Any], Tensor]:
    cu_seqlens = work.cu_seqlens().to(DEVICE)
    return lambda x: gpu_peers.varlen(*x[1], cu_seqlens, work.seqlens)


def close(ours: Any, peer: Any) -> None:
    check(ours, peer, rtol=2e-2, atol=2e-2)


def close_to_dense(ours: Tensor, peer: Tensor) -> None:
    close(ours, peer.transpose(1, 2).flatten(0, 1))


# ---------------------------------------------------------------------- forward

RAGGED_TARGETS = {128: 1.3}


@pytest.mark.parametrize("head_dim", [128, 64, 80, 96])
def test_forward_of_a_ragged_batch(benchmark: Any, backend: str, head_dim: int) -> None:
    work = with_head_dim(workloads.ragged8(), head_dim)
    versus(
        benchmark,
        backend,
        qkv(work),
        attend(work),
        torch_varlen(work),
        op="varlen_attention",
        workload=described(work),
        peer_name="torch varlen_attn",
        dtype=BFLOAT16,
        flops=work.attention_flops(),
        same=close,
        target_ratio=RAGGED_TARGETS.get(head_dim),
    )


# Against cuDNN; 1 would be the speed of a kernel written for this GPU by its maker.
UNIFORM_TARGETS = {128: 0.9, 64: 0.95, 96: 0.95, 80: 1.05}


@pytest.mark.parametrize("peer", DENSE)
@pytest.mark.parametrize("head_dim", [128, 64, 80, 96])
def test_forward_of_equal_segments(benchmark: Any, backend: str, head_dim: int, peer: str) -> None:
    work = with_head_dim(workloads.llava_next_7b(4), head_dim)
    inputs = qkv(work, lambda x: gpu_peers.dense(x, work.batch))
    with gpu_peers.sdpa_by(DENSE[peer], lambda: peers.sdpa(*inputs[0][1])):
        versus(
            benchmark,
            backend,
            inputs,
            attend(work),
            lambda x: peers.sdpa(*x[1]),
            op="varlen_attention",
            workload=described(work),
            peer_name=f"SDPA {peer}, dense",
            dtype=BFLOAT16,
            flops=work.attention_flops(),
            same=close_to_dense,
            target_ratio=UNIFORM_TARGETS[head_dim] if peer == "cuDNN" else None,
        )


@pytest.mark.parametrize("make", first_rehearsed([workloads.ragged8, workloads.ragged8_fuller]))
def test_forward_against_a_padded_batch(benchmark: Any, backend: str, make: Any) -> None:
    """What a model without ragged attention computes: 58 % or 45 % of the padded slots are waste."""
    work = with_head_dim(make(), 128)
    mask = peers.causal_padding_mask(work.seqlens).to(DEVICE)
    inputs = qkv(work, lambda x: peers.pad_rows(x, work.seqlens))
    with gpu_peers.sdpa_by(SDPBackend.EFFICIENT_ATTENTION, lambda: peers.sdpa_masked(*inputs[0][1], mask)):
        versus(
            benchmark,
            backend,
            inputs,
            attend(work),
            lambda x: peers.sdpa_masked(*x[1], mask),
            op="varlen_attention",
            workload=described(work),
            peer_name="SDPA efficient, padded + mask",
            dtype=BFLOAT16,
            flops=work.attention_flops(),
            same=lambda ours, peer: close(ours, peers.unpad_rows(peer, work.seqlens)),
            target_ratio=2.5,
        )


@pytest.mark.parametrize("make", first_rehearsed([workloads.llava15_7b, workloads.onevision_7b_32f]))
def test_forward_of_one_prompt(benchmark: Any, backend: str, make: Any) -> None:
    """So short that it is latency, and so long that it is not; the long one with seven query heads a key head."""
    work = sized(make())
    versus(
        benchmark,
        backend,
        qkv(work),
        attend(work),
        torch_varlen(work),
        op="varlen_attention",
        workload=described(work),
        peer_name="torch varlen_attn",
        dtype=BFLOAT16,
        flops=work.attention_flops(),
        same=close,
    )


@pytest.mark.parametrize("peer", ["torch varlen_attn", "SDPA flash, dense"])
def test_forward_of_many_tiny_segments(benchmark: Any, backend: str, peer: str) -> None:
    """Costs that grow with the square of the number of segments show here."""
    work = sized(workloads.tiny512())
    ragged = peer == "torch varlen_attn"
    inputs = qkv(work, (lambda x: x) if ragged else (lambda x: gpu_peers.dense(x, work.batch)))
    theirs = torch_varlen(work) if ragged else (lambda x: peers.sdpa(*x[1]))
    with gpu_peers.sdpa_by(SDPBackend.FLASH_ATTENTION, lambda: theirs(inputs[0])):
        versus(
            benchmark,
            backend,
            inputs,
            attend(work),
            theirs,
            op="varlen_attention",
            workload=described(work),
            peer_name=peer,
            dtype=BFLOAT16,
            flops=work.attention_flops(),
            same=close if ragged else close_to_dense,
            target_ratio=None if ragged else 0.5,
        )


# ---------------------------------------------------------------------- forward and backward


def gradients(attention: Callable[..., Tensor], leaves: list[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(attention(*leaves), leaves, upstream)


def trained(work: Workload, prepare: Callable[[Tensor], Tensor] = lambda x: x) -> list[Any]:
    """Sets of leaves and of what comes from above, packed and as a peer likes them."""

    def make(generator: torch.Generator) -> Any:
        heads = work.heads, work.kv_heads, work.kv_heads, work.heads
        tensors = [
            torch.randn(work.total, h, work.head_dim, generator=generator, device=DEVICE).to(BFLOAT16) for h in heads
        ]
        return [([x.requires_grad_() for x in side[:3]], side[3]) for side in (tensors, [prepare(x) for x in tensors])]

    return rotated(make)


def close_gradients(ours: Any, peer: Any) -> None:
    """Both sides round products and sums of many terms to bfloat16 on their way."""
    for a, b in zip(ours, peer, strict=True):
        check(a, b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))


@pytest.mark.parametrize("head_dim", [128, 64, 80, 96])
def test_forward_and_backward_of_a_ragged_batch(benchmark: Any, backend: str, head_dim: int) -> None:
    work = with_head_dim(workloads.ragged8(), head_dim)
    cu_seqlens, longest = work.cu_seqlens().to(DEVICE), work.max_seqlen
    versus(
        benchmark,
        backend,
        trained(work),
        lambda x: gradients(
            lambda q, k, v: ops.varlen_attention(q, k, v, cu_seqlens, cu_seqlens, longest, longest), *x[0]
        ),
        lambda x: gradients(lambda q, k, v: gpu_peers.varlen(q, k, v, cu_seqlens, work.seqlens), *x[1]),
        op="varlen_attention + backward",
        workload=described(work),
        peer_name="torch varlen_attn + backward",
        dtype=BFLOAT16,
        flops=work.attention_flops() * 7 // 2,
        same=close_gradients,
        gradients=True,
        target_ratio=1.25 if head_dim == 128 else None,
    )


def test_forward_and_backward_of_equal_segments(benchmark: Any, backend: str) -> None:
    work = sized(workloads.llava_next_7b(4))
    cu_seqlens, longest = work.cu_seqlens().to(DEVICE), work.max_seqlen
    inputs = trained(work, lambda x: gpu_peers.dense(x.detach(), work.batch))
    with gpu_peers.sdpa_by(SDPBackend.CUDNN_ATTENTION, lambda: gradients(peers.sdpa, *inputs[0][1])):
        versus(
            benchmark,
            backend,
            inputs,
            lambda x: gradients(
                lambda q, k, v: ops.varlen_attention(q, k, v, cu_seqlens, cu_seqlens, longest, longest), *x[0]
            ),
            lambda x: gradients(peers.sdpa, *x[1]),
            op="varlen_attention + backward",
            workload=described(work),
            peer_name="SDPA cuDNN, dense, + backward",
            dtype=BFLOAT16,
            flops=work.attention_flops() * 7 // 2,
            same=lambda ours, peer: close_gradients(ours, [x.transpose(1, 2).flatten(0, 1) for x in peer]),
            gradients=True,
            target_ratio=0.85,
        )


# ---------------------------------------------------------------------- decoding

# Rows, filled slots, query and key heads: one conversation, many of them, a video, and grouped heads in a large batch.
CACHES = {
    "llava_next_7b": (1, 2944, 32, 32),
    "16 x llava_next_7b": (16, 2944, 32, 32),
    "16 x onevision_7b_32f": (16, 6336, 28, 4),
    "64 x 4096": (64, 4096, 32, 8),
}


@pytest.mark.parametrize("size", first_rehearsed(CACHES))
def test_decode_attention(benchmark: Any, backend: str, size: str) -> None:
    """One new token a row against slots that are all filled."""
    rows, filled, heads, kv_heads = CACHES[size]
    if REHEARSAL:
        rows, filled, heads, kv_heads = min(rows, 2), smaller(filled), heads // kv_heads, 1
    used = torch.full((rows,), filled, dtype=torch.int32, device=DEVICE)

    def make(generator: torch.Generator) -> Any:
        shapes = (rows, heads, 128), (rows, filled, kv_heads, 128), (rows, filled, kv_heads, 128)
        q, k, v = (torch.randn(shape, generator=generator, device=DEVICE).to(BFLOAT16) for shape in shapes)
        # As torch likes them; its heads come first.
        return (q, k, v), (q.unsqueeze(2), *(x.transpose(1, 2).contiguous() for x in (k, v)))

    inputs = rotated(make)
    kv_bytes = 2 * rows * filled * kv_heads * 128 * 2
    large = kv_bytes >= 100e6
    with gpu_peers.sdpa_by(SDPBackend.FLASH_ATTENTION, lambda: peers.sdpa_decode(*inputs[0][1])):
        versus(
            benchmark,
            backend,
            inputs,
            lambda x: ops.decode_attention(*x[0], used),
            lambda x: peers.sdpa_decode(*x[1])[:, :, 0],
            op="decode_attention",
            workload=f"{size}, {rows} x {filled} slots, {heads}/{kv_heads} heads of 128",
            peer_name="SDPA flash",
            dtype=BFLOAT16,
            bytes_moved=kv_bytes,
            same=close,
            target_ratio=1.2 if large else None,
            target_of_copy=0.8 if large else None,
        )


# ---------------------------------------------------------------------- column scores


def test_column_scores_beside_the_attention_they_follow(benchmark: Any, backend: str) -> None:
    """Half of the products of the forward pass, whose log-sum-exp is at hand; the ratio is forward over scores."""
    work = sized(workloads.llava_next_7b())
    cu_seqlens, length = work.cu_seqlens().to(DEVICE), work.total
    boundaries = cu_seqlens, cu_seqlens, length, length

    def scores(x: Any) -> Tensor:
        options = {"softmax_lse": x[1], "causal": True, "query_reduce": "sum", "head_reduce": "mean"}
        return ops.column_scores(*x[0][:2], *boundaries, **options)

    def forward(x: Any) -> Tensor:
        return ops.varlen_attention(*x[0], *boundaries)

    inputs = []
    with backends.use(backend), torch.inference_mode():
        for packed, _ in qkv(work):
            inputs.append((packed, ops.varlen_attention(*packed, *boundaries, return_lse=True)[1]))
    versus(
        benchmark,
        backend,
        inputs,
        scores,
        forward,
        op="column_scores",
        workload=f"{described(work)}, LSE given",
        peer_name="own varlen_attention",
        dtype=BFLOAT16,
        flops=work.attention_flops() // 2,
        # Of other things; every query row shares out 1 in all.
        same=lambda ours, _: check(ours.sum(), ours.new_tensor(float(length)), rtol=1e-2),
        target_ratio=1.54,
    )
