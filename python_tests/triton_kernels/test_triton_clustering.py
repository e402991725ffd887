"""Of clustering in Triton what the tests of the ops do not show: tiles, panels, blocks of segments and of ids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pruneops import backends, ops, reference
from pruneops.testing import assert_bitwise_equal, cu_seqlens_of
from pruneops.triton import dpc_knn as launcher
from pruneops.triton import tuning
from pruneops.triton.tuning import Config

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# More than a kernel looks at in one step, empty ones among them.
MANY = tuple((i * 7) % 4 for i in range(600))


def lattice(total: int, channels: int = 4) -> Tensor:
    """Small whole coordinates: exact in every dtype, with many duplicates and equal distances."""
    return torch.randint(0, 5, (total, channels)).float()


def near_and_far(total: int, channels: int) -> Tensor:
    """Rows of a few scenes far from the origin: some hardly differ, some are equal, some are far from all others."""
    scenes = 5 * torch.randn(channels) + torch.randn(9, channels)
    x = scenes[torch.randint(0, 9, (total,))] + 0.01 * torch.randn(total, channels)
    x[::7] = x[3]
    x[::10] = 40 * torch.randn(len(x[::10]), channels)
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_bit_depends_on_tiles_or_on_whether_distances_are_kept(dtype, monkeypatch):
    lengths = (70, 0, 1, 100)
    x, noise = near_and_far(175, 70).to(dtype), torch.rand(175)

    def call() -> ops.DPCKNNResult:
        return ops.dpc_knn(x, cu_seqlens_of(lengths), [9, 1, 1, 30], k=5, noise=noise)

    expected = call()
    for tile in (16, 32):
        with tuning.use(launcher.DISTANCES, Config({"TILE": tile, "DEPTH": 64, "WIDTH": 32})):
            assert_bitwise_equal(call(), expected, f"tiles of {tile}")
    monkeypatch.setattr(launcher, "LONGEST_WHOLE", 0)
    monkeypatch.setattr(launcher, "PANEL_FLOATS", 0)  # panels of 64 rows
    for tile in (32, 128):
        with tuning.use(launcher.PANELS, Config({"TILE": tile, "DEPTH": 64, "WIDTH": 32})):
            assert_bitwise_equal(call(), expected, f"panels in tiles of {tile}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_densities_are_accurate_in_half_precision_too_wherever_the_rows_lie(mean, dtype):
    x = near_and_far(150, 200) + mean * torch.randn(200)
    x[50:] = torch.randn(100, 200) + mean * torch.randn(200)
    x = x.to(dtype)
    ours = ops.dpc_knn(x, cu_seqlens_of([150]), 20, k=4)
    exact = reference.dpc_knn(x.double(), cu_seqlens_of([150]), 20, k=4)
    torch.testing.assert_close(ours.density.double(), exact.density, rtol=2e-6, atol=0.0)


@pytest.mark.parametrize(("k", "noisy"), [(1, False), (6, True), (200, False)])
def test_rows_of_distances_are_read_in_blocks_where_they_are_long(k, noisy, monkeypatch):
    x, noise = torch.randn(230, 8), torch.rand(230) if noisy else None

    def call() -> ops.DPCKNNResult:
        return ops.dpc_knn(x, cu_seqlens_of([200, 30]), [50, 3], k=k, noise=noise)

    expected = call()
    monkeypatch.setattr(launcher, "_PEAKS", {4096: Config({"ROWS": 128, "BLOCK": 64})})
    ours = call()
    torch.testing.assert_close(ours.density, expected.density, rtol=2e-7, atol=0.0)
    assert_bitwise_equal(ours[:2], expected[:2])


@pytest.mark.parametrize("boundaries", [(0, 9, 4, 20), (0, 9, 40, 41), (-5, -1, 8, 12), (7, 3, 19, 25)], ids=str)
def test_boundaries_of_any_value_are_read_as_the_compiled_kernels_read_them(boundaries):
    x, cu_seqlens = lattice(20), torch.tensor(boundaries, dtype=torch.int32)
    counts = torch.tensor([3, -1, 100], dtype=torch.int32)
    ids, weights = torch.randint(-1, 5, (20,), dtype=torch.int32), torch.ones(20)
    native, ours = torch.ops.pruneops, torch.ops.pruneops_triton
    for op, args in {
        "dpc_knn": (x, cu_seqlens, counts, 5, 20, 12),
        "merge_mean": (x, ids, cu_seqlens, counts, 120, weights),
        "position_means": (x, cu_seqlens, counts, 120),
    }.items():
        expected = getattr(native, op)(*args)
        for a, b in zip(getattr(ours, op)(*args), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, equal_nan=True, msg=op)


def test_rows_past_the_bound_of_the_length_belong_to_no_segment():
    x = lattice(20)
    ours = torch.ops.pruneops_triton.dpc_knn(x, cu_seqlens_of([4, 16]), torch.tensor([2, 3]).int(), 3, 7, 9)
    expected = ops.dpc_knn(torch.cat([x[:4], x[4:11]]), cu_seqlens_of([4, 7]), [2, 3], k=3, capacity=9)
    assert ours[0].tolist() == expected.cluster_ids.tolist() + [-1] * 9
    assert ours[1].tolist() == expected.center_indices.tolist()
    assert not torch.stack(ours[3:])[:, 11:].any()


def test_more_segments_than_one_step_looks_at():
    x, cu_seqlens = lattice(sum(MANY) + 5), cu_seqlens_of(MANY)
    counts = torch.tensor([(i * 5) % 6 - 2 for i in range(len(MANY))], dtype=torch.int32)
    capacity = 900
    ours = ops.dpc_knn(x, cu_seqlens, counts, k=2, capacity=capacity)
    expected = reference.dpc_knn(x, cu_seqlens, counts, k=2, capacity=capacity)
    for name in ("cluster_ids", "center_indices", "cu_clusters"):
        assert_bitwise_equal(getattr(ours, name), getattr(expected, name), name)
    for op, args in {"merge_mean": (x, ours.cluster_ids), "position_means": (x,)}.items():
        with backends.use("native"):
            expected = getattr(ops, op)(*args, cu_seqlens, counts, capacity=capacity)
        for a, b in zip(getattr(ops, op)(*args, cu_seqlens, counts, capacity=capacity), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, equal_nan=True, msg=op)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_members_are_added_up_in_their_order(dtype):
    """Which shows in the last bit; the weights are such that products are exact."""
    lengths, counts = (5, 700, 90), [2, 3, 40]
    x, weights = torch.randn(800, 33).to(dtype), 2.0 ** torch.randint(-2, 3, (800,))
    ids = torch.cat([torch.randint(-1, n + 1, (length,)) for n, length in zip(counts, lengths, strict=True)])
    args = x, torch.cat([ids, torch.zeros(5)]).int(), cu_seqlens_of(lengths), counts
    for options in ({}, {"weights": weights}):
        with backends.use("native"):
            expected = ops.merge_mean(*args, **options)
        assert_bitwise_equal(ops.merge_mean(*args, **options), expected)
