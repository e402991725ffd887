"""The two ops of a mixture-of-depths layer, forward and with their gradients, against the chain one would write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import peers, timing, workloads
from bench.conftest import Versus
from pruneops import ops

KEEP_RATIO = 0.5
DTYPES = [torch.float32, torch.bfloat16]
CHAINS = {"clone, index_put, multiply, add": peers.scaled_in_place, "mul + addcmul + index_copy_": peers.scaled_copy}


def _same_to_scale(ours: Any, peer: Any) -> None:
    """Sums of thousands of rounded products agree in proportion to the largest, not element by element."""
    for a, b in zip(ours, peer, strict=True):
        scale = b.float().abs().max()
        timing.check(a.float() / scale, b.float() / scale, rtol=2e-2, atol=2e-2)


def _gradients(function: Callable[..., Tensor], leaves: Sequence[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
    out = function(*leaves)
    return torch.autograd.grad(out, leaves, dout.to(out.dtype))


def _layer(dtype: torch.dtype) -> tuple[list[Tensor], Tensor, str]:
    """x, residual, branch and weights of one LLaVA-NeXT layer, the kept rows, and what to call it."""
    work = workloads.llava_next_7b()
    generator = torch.Generator().manual_seed(0)
    keep = int(work.total * KEEP_RATIO)
    tensors = [torch.randn(n, work.hidden, generator=generator).to(dtype) for n in (work.total, keep, keep)]
    rows = torch.randperm(work.total, generator=generator)[:keep].sort().values
    weights = 1.0 + 0.1 * torch.randn(work.total, generator=generator)
    return [*tensors, weights], rows, f"{work.total} rows of {work.hidden}, half kept"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("peer", CHAINS)
def test_scatter_scaled(versus: Versus, peer: str, dtype: torch.dtype) -> None:
    tensors, rows, name = _layer(dtype)
    narrow, x = rows.int(), tensors[0]
    moved = 2 * x.shape[0] + tensors[1].shape[0]
    versus(
        lambda: ops.scatter_scaled(*tensors, narrow),
        lambda: CHAINS[peer](*tensors, rows),
        op="scatter_scaled",
        workload=name,
        peer_name=peer,
        dtype=dtype,
        bytes_moved=moved * x.shape[1] * x.element_size(),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("peer", CHAINS)
def test_scatter_scaled_with_backward(versus: Versus, peer: str, dtype: torch.dtype) -> None:
    tensors, rows, name = _layer(dtype)
    narrow, dout = rows.int(), torch.randn_like(tensors[0])
    leaves = [x.requires_grad_() for x in tensors]
    versus(
        lambda: _gradients(lambda *x: ops.scatter_scaled(*x, narrow), leaves, dout),
        lambda: _gradients(lambda *x: CHAINS[peer](*x, rows), leaves, dout),
        op="scatter_scaled + backward",
        workload=name,
        peer_name=f"{peer}, + backward",
        dtype=dtype,
        same=_same_to_scale,
    )


def _router(dtype: torch.dtype) -> tuple[list[Tensor], Tensor, str]:
    """x, weight and bias of the router of one LLaVA-NeXT layer, and its visual rows."""
    work = workloads.llava_next_7b()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(work.total, work.hidden, generator=generator)
    weight = torch.randn(work.hidden, generator=generator) / work.hidden**0.5
    target = torch.arange(work.total) < work.visual
    tensors = [t.to(dtype) for t in (x, weight, torch.zeros(1))]
    return tensors, target, f"{work.visual} of {work.total} rows of {work.hidden}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_router_weights(versus: Versus, dtype: torch.dtype) -> None:
    tensors, target, name = _router(dtype)
    visual = int(target.sum())
    versus(
        lambda: ops.router_weights(*tensors, target=target, scale=0.2, shift=1.0),
        lambda: peers.tanh_router(*tensors, target),
        op="router_weights",
        workload=name,
        peer_name="linear + tanh + where",
        dtype=dtype,
        bytes_moved=visual * tensors[0].shape[1] * tensors[0].element_size(),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_router_weights_with_backward(versus: Versus, dtype: torch.dtype) -> None:
    tensors, target, name = _router(dtype)
    leaves = [x.requires_grad_() for x in tensors]
    dout = torch.randn(target.shape[0])
    versus(
        lambda: _gradients(lambda *x: ops.router_weights(*x, target=target, scale=0.2, shift=1.0)[1], leaves, dout),
        lambda: _gradients(lambda *x: peers.tanh_router(*x, target)[1], leaves, dout),
        op="router_weights + backward",
        workload=name,
        peer_name="the chain + backward",
        dtype=dtype,
        same=_same_to_scale,
    )
