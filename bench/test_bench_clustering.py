"""DPC-kNN against the chain of torch operations it replaces, and cluster means against index_add_."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench import peers
from bench.conftest import Versus
from pruneops import ops

NEIGHBOURS = 7


def _agree_on_most_rows(ours: Any, peer: Any) -> None:
    """The distances of the chain carry the rounding of a matrix product, which may turn near ties."""
    ids = peer[0].flatten().int()
    assert float((ours.cluster_ids == ids).float().mean()) > 0.9


def _dpc(versus: Versus, batch: int, length: int, channels: int, dtype: torch.dtype = torch.float32) -> None:
    """Half as many clusters as rows, as PruneVid merges a frame."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, length, channels, generator=generator).to(dtype)
    noise = torch.rand(batch, length, generator=generator)
    packed, draws = x.flatten(0, 1), noise.flatten()
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32) * length
    clusters = length // 2
    versus(
        lambda: ops.dpc_knn(packed, cu_seqlens, clusters, k=NEIGHBOURS, noise=draws),
        lambda: peers.dpc_chain(x.float(), clusters, NEIGHBOURS, noise),
        op="dpc_knn",
        workload=f"{batch} x {length} rows of {channels}, {clusters} clusters",
        peer_name="cdist + topk + mask + topk + argmin",
        dtype=dtype,
        flops=batch * length * length * channels,
        same=_agree_on_most_rows,
    )


def test_dpc_576x1024(versus: Versus) -> None:
    _dpc(versus, 1, 576, 1024)


def test_dpc_576x1024_bfloat16(versus: Versus) -> None:
    _dpc(versus, 1, 576, 1024, torch.bfloat16)


def test_dpc_576x4096(versus: Versus) -> None:
    _dpc(versus, 1, 576, 4096)


def test_dpc_16x144x1024(versus: Versus) -> None:
    """The frames of a video, which the chain takes as one batch of equal length."""
    _dpc(versus, 16, 144, 1024)


def test_dpc_2304x1024(versus: Versus) -> None:
    _dpc(versus, 1, 2304, 1024)


def test_dpc_576x1024_near_duplicates(versus: Versus) -> None:
    """Eight tight groups, where one distance in eight is computed from differences."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(8, 1024, generator=generator)[torch.arange(576) % 8]
    x = groups + 0.1 * torch.randn(576, 1024, generator=generator)
    noise, cu_seqlens = torch.rand(576, generator=generator), torch.tensor([0, 576], dtype=torch.int32)
    versus(
        lambda: ops.dpc_knn(x, cu_seqlens, 288, k=NEIGHBOURS, noise=noise),
        lambda: peers.dpc_chain(x[None], 288, NEIGHBOURS, noise[None]),
        op="dpc_knn",
        workload="1 x 576 rows of 1024 in eight tight groups, 288 clusters",
        peer_name="cdist + topk + mask + topk + argmin",
        flops=576 * 576 * 1024,
        same=_agree_on_most_rows,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("peer", ["index_add_", "sort + segment_reduce"])
def test_merge_mean_2304x4096(versus: Versus, dtype: torch.dtype, peer: str) -> None:
    rows, clusters, channels = 2304, 1152, 4096
    x = torch.randn(rows, channels).to(dtype)
    ids = torch.randint(0, clusters, (rows,), generator=torch.Generator().manual_seed(0))
    narrow, cu_seqlens = ids.int(), torch.tensor([0, rows], dtype=torch.int32)

    def merged() -> Tensor:
        return ops.merge_mean(x, narrow, cu_seqlens, clusters)[0]

    call = {"index_add_": peers.mean_index_add, "sort + segment_reduce": peers.mean_sorted}[peer]
    versus(
        merged,
        lambda: call(x, ids, clusters),
        op="merge_mean",
        workload=f"{rows} rows of {channels} to {clusters} means",
        peer_name=peer,
        dtype=dtype,
        bytes_moved=(rows + clusters) * channels * x.element_size(),
    )
