"""On a GPU every decision of dpc_knn is that of float64 up to rounding, and merge_mean equals the CPU kernel."""

from __future__ import annotations

import pytest
import torch
from gpu_support import (
    DEVICE,
    DTYPES,
    REHEARSAL,
    assert_density_peaks,
    assert_equals_cpu_kernel,
    cpu_kernel,
    every_second,
    on_both,
    on_cpu,
    on_device,
    raw,
    repeatable,
    with_gaps,
)
from torch import Tensor

from pruneops import ops, reference
from pruneops.ops import DPCKNNResult
from pruneops.testing import LENGTHS, assert_bitwise_equal, cu_seqlens_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("backend")]

MORE_LENGTHS = {**LENGTHS, "tiny512": (34,) * 512, "frames": (144,) * 16, "image": (576,)}


def clusters(x: Tensor, lengths: tuple[int, ...], counts: list[int], *, k: int = 5, **options: object) -> DPCKNNResult:
    """The result on the device, the same twice, checked against float64."""
    args, options = on_device((x, cu_seqlens_of(lengths), counts)), on_device(options)
    ours = DPCKNNResult(*repeatable(lambda: list(ops.dpc_knn(*args, k=k, **options))))
    assert all(part.device.type == DEVICE.type for part in ours)
    ours = on_cpu(ours)
    noise = on_cpu(options.get("noise"))
    assert_density_peaks(ours, x, cu_seqlens_of(lengths), counts, k, noise)
    return ours


def lattice(total: int, channels: int = 16) -> Tensor:
    """Small whole coordinates: exact in every dtype, with many duplicates and equal distances."""
    return torch.randint(0, 3, (total, channels)).float()


def smooth(n: int, channels: int) -> Tensor:
    """Small changes on top of one large vector, as features of neighbouring frames have."""
    scenes = torch.randn(max(n // 9, 1), channels)
    return 60 * torch.randn(channels) + scenes[torch.arange(n) % len(scenes)] + 0.02 * torch.randn(n, channels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", MORE_LENGTHS.values(), ids=MORE_LENGTHS)
def test_ragged_batches(lengths, dtype):
    total = sum(lengths) + 3
    counts = [(-2, 0, 1, n // 2, n, n + 3)[i % 6] for i, n in enumerate(lengths)]
    clusters(torch.randn(total, 40).to(dtype), lengths, counts)
    clusters(lattice(total).to(dtype), lengths, counts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 31, 33, 64, 1000, 1024, 4096])
def test_channels(channels, dtype):
    clusters(torch.randn(200, channels).to(dtype), (130, 70), [40, 7])


@pytest.mark.parametrize("length", [1, 2, 31, 63, 64, 65, 127, 128, 129, 257])
def test_lengths_around_tile_sizes(length):
    clusters(torch.randn(length, 24), (length,), [length // 2])
    clusters(smooth(length, 24).bfloat16(), (length,), [3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("data", ["smooth", "two far groups", "one far row", "duplicates"])
def test_distances_are_those_of_float64_also_where_they_cancel(data, dtype):
    n, channels = 300, 700
    x = {
        "smooth": lambda: smooth(n, channels),
        "two far groups": lambda: torch.randn(n, channels) + 30 * (torch.arange(n)[:, None] % 2),
        "one far row": lambda: torch.randn(n, channels) * torch.where(torch.arange(n) == 7, 1000.0, 1.0)[:, None],
        "duplicates": lambda: torch.randn(n, channels)[torch.randint(0, n, (n,))],
    }[data]().to(dtype)
    clusters(x, (n,), [n // 3], k=7)
    clusters(x, (n,), [n // 3], k=7, noise=torch.rand(n))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", [0.0, 5.0, 100.0])
def test_equal_rows_have_equal_densities_in_whichever_tiles_they_lie(mean, dtype):
    x = (torch.randn(60, 300).repeat(3, 1)[torch.randperm(180)] + mean).to(dtype)
    result = clusters(x, (180,), [60], k=7)
    first = (x[:, None] == x).all(-1).int().argmax(1)
    later = first != torch.arange(180)
    assert torch.equal(result.density, result.density[first])
    assert (result.delta[later] == 0).all()
    assert torch.equal(result.cluster_ids, result.cluster_ids[first])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_arithmetic_is_exact_the_clusters_are_those_of_the_reference(dtype):
    """Ties of distances, densities and scores included."""
    lengths = (70, 0, 1, 200)
    x, cu_seqlens = lattice(271, 16).to(dtype), cu_seqlens_of(lengths)
    ours = on_cpu(ops.dpc_knn(*on_device((x, cu_seqlens)), [6, 1, 1, 50], k=5))
    expected = reference.dpc_knn(x, cu_seqlens, [6, 1, 1, 50], k=5)
    for name in ("cluster_ids", "center_indices", "cu_clusters"):
        assert_bitwise_equal(getattr(ours, name), getattr(expected, name)[: len(getattr(ours, name))], name)


@pytest.mark.parametrize("k", [1, 2, 7, 8, 9, 100, 3000])
def test_any_number_of_neighbours_makes_the_density(k):
    clusters(torch.randn(480, 32), (400, 80), [20, 4], k=k)


@pytest.mark.rehearsed
def test_equal_rows_become_centres_in_order():
    result = clusters(torch.full((90, 5), 0.3), (90,), [4])
    assert result.center_indices.tolist() == [0, 1, 2, 3]
    assert result.cluster_ids.tolist() == [0, 1, 2, 3, *[0] * 86]


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_is_infinitely_far_from_all_others(broken):
    x = torch.randn(100, 20)
    x[[0, 40, 50], [3, 19, 0]] = broken
    for dtype in DTYPES:
        clusters(x.to(dtype), (99, 1), [9, 1])


@pytest.mark.parametrize("capacity", [0, 1, 19, 20, 25, 60, 61, 100])
def test_centres_past_the_capacity_are_cut_and_rows_go_to_those_that_are_left(capacity):
    result = clusters(torch.randn(130, 16), (50, 0, 60, 20), [20, 3, 40, 1], capacity=capacity)
    assert result.center_indices.shape == (capacity,)
    assert result.cu_clusters[-1] == min(capacity, 61)


@pytest.mark.parametrize("view", [with_gaps, every_second], ids=lambda view: view.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_give_the_same_result(dtype, view):
    x, cu_seqlens = torch.randn(200, 37).to(dtype), cu_seqlens_of([130, 70])
    dense, spaced = x.to(DEVICE), view(x.to(DEVICE))
    args = (on_device(cu_seqlens), [9, 9])
    assert_bitwise_equal(list(ops.dpc_knn(spaced, *args, k=5)), list(ops.dpc_knn(dense, *args, k=5)))
    ids, counts = torch.randint(0, 9, (200,), dtype=torch.int32, device=DEVICE), [9, 9]
    args = (ids, on_device(cu_seqlens), counts)
    assert_bitwise_equal(list(ops.merge_mean(spaced, *args)), list(ops.merge_mean(dense, *args)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_upper_bound_of_the_length_changes_no_bit(dtype):
    """Above 4096 rows the distances are computed anew in each pass."""
    lengths = (700, 30, 170)
    x = smooth(900, 40).to(dtype)
    args = on_device((x, cu_seqlens_of(lengths)))
    total = torch.cat([args[0], torch.zeros_like(args[0])] * 3)
    stored = list(ops.dpc_knn(total, args[1], [70, 3, 17], k=7, max_seqlen=700, capacity=90))
    recomputed = list(ops.dpc_knn(total, args[1], [70, 3, 17], k=7, max_seqlen=5000, capacity=90))
    assert_bitwise_equal(recomputed, stored)
    assert_density_peaks(DPCKNNResult(*on_cpu(recomputed)), on_cpu(total), on_cpu(args[1]), [70, 3, 17], 7)


def test_a_long_segment_needs_no_square_of_memory():
    n, channels = (6000, 8) if REHEARSAL else (65_536, 64)
    x, cu_seqlens = torch.randn(n, channels, device=DEVICE), on_device(cu_seqlens_of([n]))
    before = 0 if REHEARSAL else torch.cuda.memory_allocated()
    if not REHEARSAL:
        torch.cuda.reset_peak_memory_stats()
    result = ops.dpc_knn(x, cu_seqlens, n // 64, k=5)
    if not REHEARSAL:
        assert torch.cuda.max_memory_allocated() - before < 128 * 2**20 < n * n
    rows = torch.arange(0, n, n // 64, device=DEVICE)
    exact = torch.cdist(x[rows].double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist") / channels**0.5
    nearest = exact.topk(5, largest=False).values.square().mean(-1)
    torch.testing.assert_close(result.density[rows].double(), (-nearest).exp(), rtol=1e-5, atol=0.0)
    centers = result.center_indices.long()
    order = result.score.argsort(descending=True, stable=True)[: len(centers)]
    assert torch.equal(centers, order)
    assert torch.equal(result.cluster_ids[centers], torch.arange(len(centers), dtype=torch.int32, device=DEVICE))
    chosen = exact.gather(1, centers[result.cluster_ids[rows].long()][:, None])[:, 0]
    others = ~torch.isin(rows, centers)
    assert (chosen <= exact[:, centers].amin(-1) + 1e-6 * exact.max())[others].all()


@pytest.mark.parametrize("boundaries", [(0, 9, 4, 20), (0, 9, 40, 41), (-5, -1, 8, 12)], ids=str)
def test_boundaries_on_a_device_are_clamped_as_on_the_cpu(boundaries):
    x, cu_seqlens = lattice(20), torch.tensor(boundaries, dtype=torch.int32)
    counts = torch.tensor([3, -1, 100], dtype=torch.int32)
    args = (x, cu_seqlens, counts, 5, 20, 12)
    for ours, expected in zip(on_cpu(raw("dpc_knn", *on_device(args))), cpu_kernel("dpc_knn", *args), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    ids = torch.randint(-1, 5, (20,), dtype=torch.int32)
    assert_equals_cpu_kernel("merge_mean", x, ids, cu_seqlens, counts, 12)


# ---------------------------------------------------------------------- merge_mean


def exact_products(total: int, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows and weights whose products are exact, so that multiply-add and multiply, then add, give the same bits."""
    return torch.randn(total, channels).to(dtype), 2.0 ** torch.randint(-2, 3, (total,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", MORE_LENGTHS.values(), ids=MORE_LENGTHS)
def test_means_equal_the_cpu_kernel(lengths, dtype):
    total = sum(lengths) + 2
    x, weights = exact_products(total, 40, dtype)
    ids = torch.randint(-2, 9, (total,), dtype=torch.int32)
    counts = torch.tensor([(7, 0, -3, 1, 20)[i % 5] for i in range(len(lengths))], dtype=torch.int32)
    rows = int(counts.clamp(min=0).sum())
    for capacity in (rows, rows + 3, rows // 2):
        assert_equals_cpu_kernel("merge_mean", x, ids, cu_seqlens_of(lengths), counts, capacity)
        assert_equals_cpu_kernel("merge_mean", x, ids, cu_seqlens_of(lengths), counts, capacity, weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 255, 256, 257, 1024, 4099])
def test_channels_of_means(channels, dtype):
    x, weights = exact_products(150, channels, dtype)
    ids, counts = torch.randint(0, 8, (150,), dtype=torch.int32), torch.tensor([8], dtype=torch.int32)
    assert_equals_cpu_kernel("merge_mean", x, ids, cu_seqlens_of([150]), counts, 8, weights)


def test_one_cluster_of_many_rows_and_many_clusters_of_one_row():
    x, cu_seqlens = torch.randn(5000, 24), cu_seqlens_of([5000])
    ids = torch.arange(5000, dtype=torch.int32)
    assert_equals_cpu_kernel("merge_mean", x, ids * 0, cu_seqlens, torch.tensor([1], dtype=torch.int32), 1)
    assert_equals_cpu_kernel("merge_mean", x, ids.flip(0), cu_seqlens, torch.tensor([5000], dtype=torch.int32), 5000)


@pytest.mark.rehearsed
def test_a_cluster_without_weight_is_zero_and_its_members_are_counted():
    x, weights = torch.randn(6, 5), torch.tensor([0.0, 0.0, 1.0, 0.5, 0.0, 3.0])
    ids = torch.tensor([0, 0, 1, 1, 1, 3], dtype=torch.int32)
    args = on_device((x, ids, cu_seqlens_of([6])))
    merged, counts = ops.merge_mean(*args, 4, weights=on_device(weights))
    assert counts.tolist() == [2, 3, 0, 1]
    assert (merged[[0, 2]] == 0).all()
    torch.testing.assert_close(merged[1].cpu(), (x[2] + 0.5 * x[3]) / 1.5)


def test_gradients_of_means_equal_those_on_the_cpu():
    ids, counts = torch.randint(-1, 6, (50,), dtype=torch.int32), [6, 6]
    x, weights, upstream = torch.randn(50, 7), torch.rand(50), torch.randn(12, 7)

    def gradients(x: Tensor, weights: Tensor, ids: Tensor, cu_seqlens: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
        merged, _ = ops.merge_mean(leaves[0], ids, cu_seqlens, counts, weights=leaves[1])
        return torch.autograd.grad(merged, leaves, upstream)

    ours, expected = on_both(gradients, x, weights, ids, cu_seqlens_of([30, 20]), upstream)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_clusters_merge_to_one_row_each_without_a_count_on_the_host():
    x, cu_seqlens = on_device((torch.randn(400, 32), cu_seqlens_of([250, 150])))
    found = ops.dpc_knn(x, cu_seqlens, [30, 9], k=5)
    merged, counts = ops.merge_mean(x, found.cluster_ids, cu_seqlens, found.cu_clusters.diff(), capacity=39)
    assert counts.sum() == 400 and (counts > 0).all()
    assert merged.shape == (39, 32)
