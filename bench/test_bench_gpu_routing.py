"""The two ops of a mixture-of-depths layer on a GPU, against the chain one would write."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench import peers
from bench.gpu_compare import first_rehearsed, rotated, smaller, versus
from bench.gpu_timing import DEVICE
from bench.timing import check
from pruneops import ops

pytestmark = pytest.mark.gpu

# Rows of a LLaVA-1.5, a LLaVA-NeXT and a batched layer, half of them kept.
SIZES = {"llava15_7b": 640, "llava_next_7b": 2944, "4 x llava_next_7b": 11776}
HIDDEN = 4096
CHAINS = {"clone, index_put, multiply, add": peers.scaled_in_place, "mul + addcmul + index_copy_": peers.scaled_copy}


def layer(total: int, generator: torch.Generator) -> list[Tensor]:
    """x, residual, branch, weights, and the kept rows as int32 and int64."""
    keep, hidden = total // 2, smaller(HIDDEN)
    options = {"generator": generator, "device": DEVICE}
    tensors = [torch.randn(n, hidden, **options).bfloat16() for n in (total, keep, keep)]
    rows = torch.randperm(total, **options)[:keep].sort().values
    return [*tensors, 1.0 + 0.1 * torch.randn(total, **options), rows.int(), rows]


@pytest.mark.parametrize("peer", CHAINS)
@pytest.mark.parametrize("size", SIZES)
def test_scatter_scaled(benchmark: Any, backend: str, size: str, peer: str) -> None:
    total, hidden = smaller(SIZES[size]), smaller(HIDDEN)
    versus(
        benchmark,
        backend,
        rotated(lambda generator: layer(total, generator)),
        lambda x: ops.scatter_scaled(*x[:5]),
        lambda x: CHAINS[peer](*x[:4], x[5]),
        op="scatter_scaled",
        workload=f"{size}, {total} rows of {hidden}, half kept",
        peer_name=peer,
        dtype=torch.bfloat16,
        bytes_moved=(2 * total + total // 2) * hidden * 2,
        same=lambda ours, theirs: check(ours, theirs, rtol=2e-2, atol=2e-2),
    )


@pytest.mark.parametrize("size", first_rehearsed(SIZES))
def test_router_weights(benchmark: Any, backend: str, size: str) -> None:
    total, hidden = smaller(SIZES[size]), smaller(HIDDEN)

    def make(generator: torch.Generator) -> list[Tensor]:
        options = {"generator": generator, "device": DEVICE}
        weight = torch.randn(hidden, **options) / hidden**0.5
        target = torch.arange(total, device=DEVICE) < total - total // 10
        return [
            torch.randn(total, hidden, **options).bfloat16(),
            weight.bfloat16(),
            weight.new_zeros(1).bfloat16(),
            target,
        ]

    versus(
        benchmark,
        backend,
        rotated(make),
        lambda x: ops.router_weights(*x[:3], target=x[3], scale=0.2, shift=1.0),
        lambda x: peers.tanh_router(*x),
        op="router_weights",
        workload=f"{size}, {total} rows of {hidden}",
        peer_name="linear + tanh + where",
        dtype=torch.bfloat16,
        bytes_moved=(total - total // 10) * hidden * 2,
        same=lambda ours, theirs: check(ours, theirs, rtol=2e-2, atol=2e-2),
    )
