"""DPC-kNN and cluster means reproduce what the official implementation computed."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from golden_support import GOLDENS, Golden

from pruneops import ops, reference
from pruneops.testing import backend_under_test, cu_seqlens_of

CLUSTERINGS = sorted(path.stem for path in GOLDENS.glob("prunevid_dpc_*.npz"))


def packed_clustering(golden: Golden) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
    """The batch as one packed tensor: x, boundaries, noise, clusters and neighbours."""
    batch, length = golden["noise"].shape
    x, noise = golden.tensor("x").flatten(0, 1), golden.tensor("noise").flatten()
    return x, cu_seqlens_of([length] * batch), noise, golden.config["cluster_num"], golden.config["k"]


@pytest.mark.parametrize("name", CLUSTERINGS)
def test_centres_ids_and_merged_tokens_equal_the_official_ones(
    name: str, native_calls: Counter[tuple[str, str]]
) -> None:
    golden = Golden(name)
    x, cu_seqlens, noise, count, k = packed_clustering(golden)
    result = ops.dpc_knn(x, cu_seqlens, count, k=k, noise=noise)
    centers = golden.tensor("center_idx") + cu_seqlens[:-1, None]
    assert result.center_indices.tolist() == centers.flatten().tolist()
    assert result.cluster_ids.tolist() == golden.tensor("cluster_idx").flatten().tolist()
    torch.testing.assert_close(result.density, golden.tensor("density").flatten(), rtol=0.0, atol=1e-6)
    # The official distances of more than 25 rows carry the rounding of a matrix product.
    torch.testing.assert_close(result.score, golden.tensor("score").flatten(), rtol=0.0, atol=5e-6)
    merged, members = ops.merge_mean(x, result.cluster_ids, cu_seqlens, count)
    torch.testing.assert_close(merged, golden.tensor("merged").flatten(0, 1), rtol=0.0, atol=1e-6)
    assert int(members.sum()) == len(x)
    assert native_calls == {("dpc_knn", backend_under_test()): 1, ("merge_mean", backend_under_test()): 1}


@pytest.mark.parametrize("name", CLUSTERINGS)
def test_reference_with_the_distances_of_cdist_equals_the_official_values_more_closely(name: str) -> None:
    golden = Golden(name)
    x, cu_seqlens, noise, count, k = packed_clustering(golden)
    result = reference.dpc_knn(x, cu_seqlens, count, k=k, noise=noise, exact_cdist=True)
    nearest = golden.tensor("knn_dist").square().mean(-1).flatten()
    torch.testing.assert_close(result.density, (-nearest).exp() + noise * 1e-6, rtol=0.0, atol=2e-7)
    torch.testing.assert_close(result.density, golden.tensor("density").flatten(), rtol=0.0, atol=2e-7)
    torch.testing.assert_close(result.score, golden.tensor("score").flatten(), rtol=0.0, atol=2e-7)
    assert result.cluster_ids.tolist() == golden.tensor("cluster_idx").flatten().tolist()
