"""DPC-kNN on a GPU against the published chain of torch ops, and means of clusters against index_add_ and divide."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import gpu_peers
from bench.gpu_compare import first_rehearsed, rotated, smaller, versus
from bench.gpu_timing import DEVICE, REHEARSAL
from bench.timing import check
from pruneops import ops

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16]
NEIGHBOURS = 7

# Batch, length and channels of the visual tokens of one image or video.
SIZES = {
    "llava15_7b": (1, 576, 1024),
    "llava15_7b, projected": (1, 576, 4096),
    "pllava_16f, frame by frame": (16, 144, 1024),
    "pllava_16f, whole": (1, 2304, 1024),
    "onevision_7b_32f, frame by frame": (32, 196, 3584),
    "tiny512": (512, 34, 1024),
}
SMALL = ("llava15_7b", "pllava_16f, frame by frame")


def sized(size: str) -> tuple[int, int, int]:
    batch, length, channels = SIZES[size]
    return (min(batch, 4), max(12, length // 16), smaller(channels)) if REHEARSAL else SIZES[size]


def boundaries(batch: int, length: int) -> torch.Tensor:
    return torch.arange(batch + 1, device=DEVICE, dtype=torch.int32) * length


def same_clusters(ours: ops.DPCKNNResult, peer: Any) -> None:
    """Equal densities, and centres but for near ties: the distances of the chain are rounded coarsely."""
    _, centers, density = peer
    check(ours.density, density, rtol=1e-2, atol=1e-4)
    shared = torch.isin(ours.center_indices, centers).float().mean()
    assert shared > 0.9, f"{float(shared):.3f} of the centres in common"


def ratio_wanted(size: str, dtype: torch.dtype) -> float | None:
    if size in SMALL:
        return 5.0
    if size == "pllava_16f, whole":
        return 4.0 if dtype == torch.float32 else 8.0
    return None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_dpc_knn(benchmark: Any, backend: str, size: str, dtype: torch.dtype) -> None:
    """Half as many clusters as rows, as PruneVid merges the tokens of a frame."""
    batch, length, channels = sized(size)
    clusters = length // 2
    cu_seqlens, chain = boundaries(batch, length), gpu_peers.DensityPeaks(batch, length, clusters, NEIGHBOURS)

    def make(generator: torch.Generator) -> Any:
        x = torch.randn(batch * length, channels, generator=generator, device=DEVICE)
        return x.to(dtype), torch.rand(batch * length, generator=generator, device=DEVICE)

    counts = torch.full((batch,), clusters, dtype=torch.int32, device=DEVICE)
    versus(
        benchmark,
        backend,
        rotated(make),
        lambda x: ops.dpc_knn(
            x[0], cu_seqlens, counts, k=NEIGHBOURS, noise=x[1], max_seqlen=length, capacity=batch * clusters
        ),
        lambda x: chain(*x),
        op="dpc_knn",
        workload=f"{size}, {batch} x {length} rows of {channels}, {clusters} clusters",
        peer_name="cdist chain in float32",
        dtype=dtype,
        flops=2 * batch * length * length * channels,
        same=same_clusters,
        target_ratio=ratio_wanted(size, dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", first_rehearsed(SIZES))
def test_merge_mean(benchmark: Any, backend: str, size: str, dtype: torch.dtype) -> None:
    """Rows of each segment spread over half as many clusters."""
    batch, length, channels = sized(size)
    clusters = length // 2
    cu_seqlens = boundaries(batch, length)
    counts = torch.full((batch,), clusters, dtype=torch.int32, device=DEVICE)
    first = torch.arange(batch, device=DEVICE).repeat_interleave(length) * clusters

    def make(generator: torch.Generator) -> Any:
        x = torch.randn(batch * length, channels, generator=generator, device=DEVICE).to(dtype)
        ids = torch.randint(0, clusters, (batch * length,), generator=generator, device=DEVICE)
        return x, ids.int(), ids + first

    versus(
        benchmark,
        backend,
        rotated(make),
        lambda x: ops.merge_mean(x[0], x[1], cu_seqlens, counts, capacity=batch * clusters),
        lambda x: gpu_peers.index_add_mean(x[0], x[2], batch * clusters),
        op="merge_mean",
        workload=f"{size}, {batch} x {length} rows of {channels} into {clusters}",
        peer_name="index_add_ + divide",
        dtype=dtype,
        bytes_moved=batch * (length + clusters) * channels * dtype.itemsize,
        # The order of additions differs, and a mean that cancels shows it.
        same=lambda ours, peer: check(ours, peer, rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-5),
        target_ratio=3.0,
    )
